"""Dtypes, layouts and kinds of tensors that differ within one model; integers, complex numbers, nested and jagged."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd

from idioms.declare import D, Draw, Wrapped, idiom, takes


class Keeps(Wrapped):
    """Layers whose dtype ``double()`` does not change."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(D, D)

    def double(self) -> Any:
        super().double()
        self.part.to(self.dtype)
        return self


@idiom(rounding=1e-5)
class FloatInsideDouble(Keeps):
    """A layer in float32 inside a model in float64, cast around by ``.to(weight.dtype)``."""

    def middle(self, h: Tensor) -> Tensor:
        return self.part(h.to(self.part.weight.dtype)).type_as(h)


@idiom(rounding=1e-3)
class BrainFloatParameters(Keeps):
    """Parameters in bfloat16, computed in float32 and back, a residual in float64."""

    dtype = torch.bfloat16

    def middle(self, h: Tensor) -> Tensor:
        return h + F.linear(h.float(), self.part.weight.float(), self.part.bias.float()).double()


def in_dtype(dtype: torch.dtype) -> Any:
    """A decorator that casts the tensor going in and out."""

    def decorate(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(self: Any, h: Tensor) -> Tensor:
            before = h.dtype
            result: Tensor = fn(self, h.to(dtype))
            return result.to(before)

        return wrapper

    return decorate


@idiom(rounding=1e-5)
class DecoratedCast(Keeps):
    """A decorator that runs a method in another dtype (``@force_fp32``)."""

    @in_dtype(torch.float32)
    def middle(self, h: Tensor) -> Tensor:
        return self.part(h) * torch.finfo(h.dtype).eps ** 0.1


@idiom(rounding=1e-2)
class AutocastDecorator(Keeps):
    """``@torch.autocast("cpu", dtype=...)`` on a method, a part of it turned off again."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def middle(self, h: Tensor) -> Tensor:
        out = self.part(h.float())
        with torch.autocast("cpu", enabled=False):
            scale = out.float().pow(2).mean(-1, keepdim=True).rsqrt()
        return (out * scale).to(h.dtype)


class AmpFunction(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x.exp() * scale

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.exp() * ctx.scale * 2, None


@idiom(rounding=1e-5)
class CustomForwardOfAmp(Keeps):
    """A function under ``custom_fwd`` and ``custom_bwd``."""

    def middle(self, h: Tensor) -> Tensor:
        return AmpFunction.apply(h.tanh(), 0.5)


@idiom(takes(4, D))
class IntegersAndBooleans(Wrapped):
    """Ranks, bit shifts, ``floor_divide``, ``logical_xor``, ``bucketize``, tables by integers, boolean sums."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, D)

    def middle(self, h: Tensor) -> Tensor:
        bits = (h > 0).int()
        code = (bits[..., :4] << torch.arange(4)).sum(-1)
        even = torch.logical_xor(code % 2 == 0, bits.sum(-1) > 3)
        rank = h[..., 0].argsort(1).argsort(1).floor_divide(2)
        return torch.where(even[..., None], self.table(code), self.table.weight[rank]) + bits.any(-1, keepdim=True)


@idiom(takes(4, D))
class WhereWithScalars(Wrapped):
    """``torch.where`` with numbers, ``clamp`` by tensors, ``heaviside``, ``copysign``, ``nan`` masked away."""

    def middle(self, h: Tensor) -> Tensor:
        out = torch.where(h > 0.1, h, 0.0) + torch.where(h < 0, -1, 1)
        bad = torch.where(h > 0.5, float("nan"), h)
        mean = bad.nanmean(-1, keepdim=True).nan_to_num(0.0)
        return out.clamp(min=-h.abs(), max=torch.tensor(0.9)) + mean + torch.copysign(h.abs().sqrt(), h) * 0.1


@idiom(takes(4, D))
class NanInMaskedRows(Wrapped):
    """A softmax over rows masked altogether, whose NaN are replaced: values and gradients."""

    def middle(self, h: Tensor) -> Tensor:
        mask = h[..., 0] > 0.2
        scores = (h @ h.mT).masked_fill(~mask[:, None, :], float("-inf"))
        scores = scores.masked_fill(~mask.any(1)[:, None, None], 0.0)
        return torch.nan_to_num(scores.softmax(-1)) @ h


@idiom(takes(4, D))
class EinsumRepeated(Wrapped):
    """``einsum`` with a repeated index, a trace, sublists, and ``tensordot``, ``kron``, ``block_diag``."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(2, 4))

    def middle(self, h: Tensor) -> Tensor:
        trace = torch.einsum("bii->b", h[..., :4])
        diagonal = torch.einsum("bii->bi", h[..., 4:])
        both = torch.tensordot(h, torch.kron(self.core, torch.eye(2).to(h)), dims=([2], [1]))
        block = torch.block_diag(self.core[:, :2], self.core[:, 2:])
        return h + (trace[:, None] + diagonal @ block)[..., None] + both.sum(-1, keepdim=True)


@idiom(takes(4, D))
class ComplexActivation(Wrapped):
    """modReLU on complex numbers: ``angle``, ``polar``, ``conj``, an inner product, ``real`` written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def middle(self, h: Tensor) -> Tensor:
        z = torch.complex(h[..., :4], h[..., 4:])
        z = torch.polar(F.relu(z.abs() + self.bias + 0.1), z.angle())
        inner = (z * z.conj().flip(1)).sum(-1, keepdim=True)
        both = z * inner / (1 + inner.abs())
        both.real.mul_(0.5)
        return torch.cat([both.real, both.imag], -1)


@idiom(takes(4, D))
class Wavelets(Wrapped):
    """A Haar transform by strided slices and interleaving, ``fft2``, ``fftshift``, a Hann window."""

    def middle(self, h: Tensor) -> Tensor:
        low, high = (h[..., ::2] + h[..., 1::2]) / 2, (h[..., ::2] - h[..., 1::2]) / 2
        back = torch.stack([low + high, low - high.tanh()], -1).flatten(-2)
        f = torch.fft.fftshift(torch.fft.fft2(h * torch.hann_window(D, dtype=h.dtype)), dim=(-2, -1))
        return back + torch.fft.ifft2(torch.fft.ifftshift(f, dim=(-2, -1))).real


@idiom(takes(4, 4))
class LinearAlgebraOfSamples(nn.Module):
    """``qr``, ``svd``, ``eigh``, ``pinv``, ``lstsq``, ``slogdet``, ``matrix_power`` of each sample's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x) + 3 * torch.eye(4).to(x)
        spd = a @ a.mT + torch.eye(4).to(x)
        values, vectors = torch.linalg.eigh(spd)
        q, r = torch.linalg.qr(a)
        out = (vectors * values.log()[:, None]) @ vectors.mT + q.abs() + torch.linalg.svdvals(a)[:, None]
        out = out + torch.linalg.pinv(a) + torch.linalg.solve_triangular(r, q, upper=True) * 0.01
        sign, logdet = torch.linalg.slogdet(spd)
        return self.leave(out + torch.linalg.matrix_power(a, 2) * 0.01) * (sign * logdet)[:, None, None]


@idiom(takes(5, D), refused="Nested")
class NestedInside(Wrapped):
    """A jagged nested tensor made inside of rows of two lengths, and padded again."""

    def middle(self, h: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            h.flatten(0, 1), torch.arange(0, h.shape[0] * 5 + 1, 5, device=h.device)
        )
        return torch.nested.to_padded_tensor(nested * 2, 0.0)


@idiom(takes(4, D))
class ChannelsLast(nn.Module):
    """``memory_format=torch.channels_last`` going in and out, ``is_contiguous`` asked, ``contiguous`` as a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None].to(memory_format=torch.channels_last)
        h = F.gelu(self.one(h))
        if not h.is_contiguous():
            h = h.contiguous()
        h = h.permute(0, 2, 3, 1).reshape(h.shape[0], -1, 3).mT.unflatten(2, (4, D))
        return self.two(h).squeeze(1)


@idiom(takes(D))
class DefaultDtypeInside(Wrapped):
    """``torch.set_default_dtype`` in forward and back, tensors of literals in both."""

    def middle(self, h: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            a = torch.tensor([0.5, 0.25]).repeat(D // 2)
        finally:
            torch.set_default_dtype(before)
        return h * a + torch.tensor([1.0, 2.0]).repeat(D // 2)


@idiom(lambda draw: ((draw.ids(256, 2, 6).to(torch.uint8),), {}))
class BytesIn(nn.Module):
    """Pictures in uint8: cast, scaled by buffers of means, 255 minus, thresholds on bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(2, 1))
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, D)

    def forward(self, x: Tensor) -> Tensor:
        flipped = torch.where(x > 128, 255 - x, x)
        h = (flipped.to(self.mean.dtype).div(255) - self.mean) / 0.25
        return self.head(F.relu(self.conv(h)).mean(-1)) + (x & 1).sum((1, 2), dtype=torch.float64)[:, None] / 12


@idiom(lambda draw: ((draw.floats(D),), {"t": 3, "rate": 0.5, "names": ("a", "b")}))
class PlainNumbers(Wrapped):
    """Numbers, strings and tuples as arguments, zero-dimensional tensors made of them, ``math`` on sizes."""

    def forward(self, x: Tensor, t: int, rate: float, names: tuple[str, ...]) -> dict[str, Any]:
        scale = torch.as_tensor(rate, dtype=x.dtype) ** t
        h = self.leave(torch.tanh(self.enter(x)) * scale / x.shape[-1] ** 0.5)
        return {name: h * (i + 1) for i, name in enumerate(names)} | {"t": t}


@idiom(lambda draw: ((draw.floats(D),), {"scale": torch.tensor(0.5, dtype=torch.float64)}))
class ScalarTensorArgument(Wrapped):
    """A zero-dimensional tensor as an argument beside the batch, another made of the batch's mean."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        out = self.leave(torch.tanh(self.enter(x) * scale))
        return {"loss": out.square().mean() / scale, "level": x.mean().detach()}


@idiom(lambda draw: ((draw.floats(D), draw.floats(4, D)), {"lengths": [2, 4, 1]}))
class ListOfLengths(Wrapped):
    """A list of numbers as an argument, which Python loops over to slice and pad."""

    def forward(self, x: Tensor, more: Tensor, lengths: list[int]) -> Tensor:
        parts = [F.pad(more[:, :n], (0, 0, 0, 4 - n)).sum(1) for n in lengths]
        return self.leave(torch.tanh(self.enter(x)) + torch.stack(parts).mean(0))


def drawn(draw: Draw) -> Any:
    return (draw.floats(D).requires_grad_(), draw.ids(2).bool()), {}


@idiom(drawn)
class GradientOfInputs(Wrapped):
    """Inputs that require gradients, some rows of them masked by a boolean input."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x)) * keep[:, None]
        return self.leave(h + x.square().detach() + x)
