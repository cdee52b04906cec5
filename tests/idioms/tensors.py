"""What is done with tensors: writes, indices, casts, sizes, randomless functions of all kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


@idiom(takes(5, D))
class WritesIntoViews(Wrapped):
    """In-place writes to slices, transposes and diagonals of an activation."""

    def middle(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 0] *= 2
        h[..., ::2] += h[..., 1::2]
        h.transpose(1, 2)[:, 1].neg_()
        h.diagonal(dim1=1, dim2=2).fill_(0.5)
        return h


@idiom(takes(5, D))
class WritesBehindMasks(Wrapped):
    """``h[mask] = value`` with a bool mask, ``masked_scatter``, ``index_fill``."""

    def middle(self, h: Tensor) -> Tensor:
        out = h.clone()
        out[h > 0.3] = 0.1
        out[:, [0, 2]] = h[:, [2, 0]]
        return out.index_fill(2, torch.tensor([1]), 0.0).masked_fill_(h < -0.5, -0.5)


@idiom(takes(5, D))
class FillsAnEmptyTensor(Wrapped):
    """``torch.zeros_like`` and ``new_empty`` filled step by step in a loop over time."""

    def middle(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        state = h.new_zeros(h.size(0), D)
        for t in range(h.size(1)):
            state = 0.5 * state + h[:, t]
            out[:, t] = state.tanh()
        return out


@idiom(takes(5, D), refused_parts="samples")
class OutArguments(Wrapped):
    """``torch.add(a, b, out=c)`` under no_grad for a statistic."""

    def middle(self, h: Tensor) -> Tensor:
        scale = torch.empty(h.shape[0], 1, 1, dtype=h.dtype)
        with torch.no_grad():
            torch.amax(h.abs(), dim=(1, 2), keepdim=True, out=scale)
            torch.add(scale, 1e-3, out=scale)
        return h / scale


@idiom(takes(5, D))
class PicksLastToken(Wrapped):
    """The last valid token by advanced indices: ``h[torch.arange(len(h)), lengths - 1]``."""

    def middle(self, h: Tensor) -> Tensor:
        lengths = (h.detach().sum(-1) > 0).long().sum(1).clamp(min=1)
        return h[torch.arange(h.shape[0]), lengths - 1]


@idiom(lambda draw: ((draw.floats(5, D), draw.lengths(5)), {}))
class MasksByLengths(Wrapped):
    """Padding masks from lengths, masked means and additive masks."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.size(1), device=x.device)[None] < lengths[:, None]
        h = self.enter(x)
        scores = h @ h.mT + (1.0 - mask[:, None].to(h.dtype)) * torch.finfo(h.dtype).min
        h = scores.softmax(-1) @ h
        pooled = (h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.leave(pooled)


@idiom(takes(5, D))
class GathersAndScatters(Wrapped):
    """``gather``, ``scatter_add``, ``index_add``, ``index_select`` and ``take_along_dim``."""

    def middle(self, h: Tensor) -> Tensor:
        order = h.argsort(dim=1)
        sorted_ = h.gather(1, order)
        summed = torch.zeros_like(h).scatter_add(1, order, sorted_ * 2)
        added = torch.zeros_like(h).index_add(1, torch.tensor([0, 2, 2, 1, 4]), h)
        return summed + added + h.index_select(1, torch.arange(4, -1, -1)) + torch.take_along_dim(h, order, 1)


@idiom(takes(5, D))
class TopK(Wrapped):
    """Keeps the k largest of each row and zeroes the others."""

    def middle(self, h: Tensor) -> Tensor:
        values, index = h.topk(3, dim=-1)
        kept = torch.zeros_like(h).scatter(-1, index, values.softmax(-1))
        threshold = h.kthvalue(2, dim=-1, keepdim=True).values
        return torch.where(h >= threshold, h, kept)


@idiom(takes(5, D))
class SortsAndCumulates(Wrapped):
    """Sparsemax: sort, cumsum, a support found by comparison."""

    def middle(self, h: Tensor) -> Tensor:
        z, _ = h.sort(dim=-1, descending=True)
        total = z.cumsum(-1) - 1
        ks = torch.arange(1, D + 1, dtype=h.dtype)
        support = (ks * z > total).sum(-1, keepdim=True)
        tau = total.gather(-1, support - 1) / support
        return (h - tau).clamp(min=0)


@idiom(takes(5, D))
class Nucleus(Wrapped):
    """Nucleus filtering: sort, cumulative probabilities, shift by one, scatter back."""

    def middle(self, h: Tensor) -> Tensor:
        values, index = torch.sort(h, descending=True)
        far = values.softmax(-1).cumsum(-1) > 0.8
        far[..., 1:] = far[..., :-1].clone()
        far[..., 0] = 0
        removed = far.scatter(-1, index, far)
        return h.masked_fill(removed, 0.0)


@idiom(takes(5, D))
class CastsAround(Wrapped):
    """``.float()``, ``.to(dtype)``, ``.type_as``, ``.half()`` and back, as norms in mixed precision do."""

    def middle(self, h: Tensor) -> Tensor:
        dtype = h.dtype
        f = h.float()
        f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)
        return f.to(dtype) + f.type_as(h) + h.to(torch.float32).double() + h.to(self.enter.weight)


@idiom(takes(5, D))
class AutocastInForward(Wrapped):
    """A part in bfloat16 under autocast, as ``@autocast`` of a method."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def low(self, h: Tensor) -> Tensor:
        return h.float() @ h.float().transpose(1, 2)

    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast(device_type="cpu", enabled=False):
            return self.low(h).to(h.dtype) @ h


@idiom(takes(5, D))
class DefaultDtype(Wrapped):
    """Constants made in the default dtype, cast late; ``torch.get_default_dtype``."""

    def middle(self, h: Tensor) -> Tensor:
        scale = torch.ones(D) / 3
        return h * scale + torch.tensor(0.1) + torch.linspace(0, 1, D, dtype=torch.get_default_dtype())


@idiom(takes(5, D), refused_parts="samples")
class NewTensors(Wrapped):
    """``new_zeros``, ``new_full``, ``new_tensor``, ``x.new(...)``, ``torch.full_like``, ``torch.eye``."""

    def middle(self, h: Tensor) -> Tensor:
        start = h.new_zeros(h.shape[0], 1, D)
        end = h.new_full((h.shape[0], 1, D), 0.3)
        h = torch.cat([start, h, end], dim=1) + h.new_tensor([0.5] * D)
        return h @ torch.eye(D, dtype=h.dtype, device=h.device) + torch.full_like(h, 0.1)


@idiom(takes(5, D))
class ClassToken(Wrapped):
    """A class token and positions: ``expand``, ``repeat``, ``cat``, slices of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.position = nn.Parameter(torch.randn(1, 9, D))
        self.query = nn.Parameter(torch.randn(2, D))

    def middle(self, h: Tensor) -> Tensor:
        b, n, _ = h.shape
        h = torch.cat((self.token.expand(b, -1, -1), h), dim=1) + self.position[:, : n + 1]
        query = self.query.unsqueeze(0).repeat(b, 1, 1)
        return (query @ h.mT).softmax(-1) @ h


@idiom(takes(6, D))
class Windows(Wrapped):
    """Windows by view and permute, rolled, and put back."""

    def middle(self, h: Tensor) -> Tensor:
        b, n, c = h.shape
        h = torch.roll(h, -1, dims=1).view(b, n // 2, 2, c).reshape(b * n // 2, 2, c)
        h = (h @ h.transpose(1, 2)).softmax(-1) @ h
        return torch.roll(h.view(b, n, c), 1, dims=1)


@idiom(takes(2, 8, 8))
class Pictures(nn.Module):
    """Convolutions, pooling, interpolation, padding, pixel shuffle, adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.enter(x).relu(), 2)
        h = self.up(h) + F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        h = F.pad(h, (1, 1, 1, 1), mode="reflect")
        h = F.pixel_unshuffle(h, 2).mean(1, keepdim=True) + F.avg_pool2d(h, 2)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


@idiom(takes(2, 8, 8))
class UnfoldsAndFolds(nn.Module):
    """Patches by ``F.unfold``, ``Tensor.unfold`` and ``F.fold``."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        out = F.fold(self.mix(patches).transpose(1, 2), (8, 8), 2, stride=2)
        other = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        return self.head(out) + F.interpolate(other, size=x.shape[-2:])


@idiom(takes(2, 8, 8), refused_parts="samples")
class SpatialTransformer(nn.Module):
    """``affine_grid`` and ``grid_sample`` with a predicted matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Linear(2 * 64, 6)
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.locate(x.flatten(1)).tanh().view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))


@idiom(takes(2, 8, 8), parts=True)
class BatchNorms(nn.Module):
    """Batch, instance and group normalisation behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn, self.inn, self.gn = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.c(self.inn(self.b(self.bn(self.a(x)).relu())).relu())).flatten(1)


@idiom(takes(2, 8, 8), stream=False)
class FrozenBatchNormInACheckpoint(nn.Module):
    """DenseNet with batch norm set to eval inside a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Conv2d(4, 2, 1)

    def train(self, mode: bool = True) -> FrozenBatchNormInACheckpoint:
        super().train(mode)
        self.block[0].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.block[0].eval()
        h = torch.utils.checkpoint.checkpoint(self.block, self.enter(x), use_reentrant=False)
        return self.head(h)


@idiom(takes(5, D))
class Fourier(Wrapped):
    """FNet and FNO: ``fft``, complex weights through ``view_as_complex``, ``irfft``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, D, 2) / 3)

    def middle(self, h: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(h, dim=1)
        out = torch.fft.irfft(spectrum * torch.view_as_complex(self.weight), n=h.shape[1], dim=1)
        return out + torch.fft.fft2(h).real


@idiom(takes(4, D))
class ComplexNumbers(Wrapped):
    """Llama's rotary embedding with complex numbers: ``polar``, ``view_as_complex``, ``view_as_real``."""

    def middle(self, h: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(h.shape[1]).double(), 10 ** -torch.arange(0, D, 2).double().div(D))
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * turn).flatten(2)
        return turned + (pairs.abs() * pairs.angle().cos() + pairs.conj().imag).repeat_interleave(2, -1)


@idiom(takes(D))
class ComplexParameters(nn.Module):
    """S4D: complex parameters made of real ones, a state space kernel by powers."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.rand(4))
        self.frequency = nn.Parameter(torch.arange(4.0))
        self.c = nn.Parameter(torch.randn(4, 2))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        c = torch.view_as_complex(self.c)
        kernel = (c[:, None] * torch.exp(a[:, None] * torch.arange(D))).sum(0).real
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * D) * torch.fft.rfft(kernel, n=2 * D), n=2 * D)[..., :D]
        return self.head(F.gelu(y))


@idiom(takes(5, D), refused_parts="samples")
class SparseAdjacency(Wrapped):
    """A sparse COO matrix in a buffer, multiplied with ``torch.sparse.mm``."""

    def __init__(self) -> None:
        super().__init__()
        index = torch.tensor([[0, 1, 2, 3, 7], [1, 0, 3, 2, 5]])
        self.register_buffer(
            "matrix", torch.sparse_coo_tensor(index, torch.rand(5), (D, D), check_invariants=True).coalesce()
        )

    def middle(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, D).t()
        return torch.sparse.mm(self.matrix, flat).t().view_as(h) + h


@idiom(takes(5, D))
class SparseOfActivations(Wrapped):
    """A sparse tensor made of activations, made dense again."""

    def middle(self, h: Tensor) -> Tensor:
        index = torch.arange(D).repeat(2, 1)
        weight = torch.sparse_coo_tensor(index, self.enter.weight.diagonal(), (D, D), check_invariants=True)
        return h @ weight.to_dense()


@idiom(takes(5, D))
class BucketsAndHistograms(Wrapped):
    """``bucketize``, ``searchsorted``, ``one_hot``, ``embedding`` of quantised activations."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(-0.8, 0.8, 6))
        self.levels = nn.Embedding(7, D)

    def middle(self, h: Tensor) -> Tensor:
        bucket = torch.bucketize(h.detach().mean(-1), self.edges)
        other = torch.searchsorted(self.edges, h.detach().amax(-1))
        return h + self.levels(bucket) + F.one_hot(other, 7).to(h.dtype) @ self.levels.weight


@idiom(lambda draw: ((draw.ids(9, 5),), {}), refused_parts="samples")
class UniqueIds(nn.Module):
    """``unique`` of the ids of a batch, embedded once and put back with its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, D)
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))

    def forward(self, ids: Tensor) -> Tensor:
        values, inverse = ids.unique(return_inverse=True)
        return self.head(self.embedding(values)[inverse])


@idiom(lambda draw: ((draw.floats(5, D), draw.mask(5)), {}))
class PacksByMask(Wrapped):
    """``h[mask]`` through the layers, and scattered back (unpadding)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = self.leave(self.enter(x[mask]).tanh())
        out = x.new_zeros(*mask.shape, D)
        out[mask] = packed
        return out


@idiom(lambda draw: ((draw.floats(5, D), draw.mask(5)), {}), refused_parts="samples")
class NonzeroIndices(Wrapped):
    """``nonzero(as_tuple=True)``, ``torch.where(mask)`` and ``masked_select``."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.enter(x)
        rows, columns = torch.where(mask)
        chosen = h[rows, columns]
        other = torch.masked_select(h, mask.unsqueeze(-1)).view(-1, D)
        return self.leave((chosen + other).tanh()).square().sum() / mask.numel()


@idiom(takes(5, D))
class NumpyConstants(Wrapped):
    """Tables made with numpy in forward: ``torch.from_numpy``, ``torch.as_tensor``, ``np.sqrt``."""

    def middle(self, h: Tensor) -> Tensor:
        angles = np.arange(D) / np.power(10, 2 * (np.arange(D) // 2) / D)
        table = torch.from_numpy(np.sin(angles)).to(h.dtype)
        return h * table / np.sqrt(D) + torch.as_tensor(np.cos(angles), dtype=h.dtype) * np.float64(0.5)


@idiom(takes(5, D), refused="depends on the parameter")
class NumpyRoundTrip(Wrapped):
    """An activation through numpy and back (a metric that is not differentiated)."""

    def middle(self, h: Tensor) -> Tensor:
        weights = np.tanh(h.detach().cpu().numpy())
        return h * torch.from_numpy(weights)


@idiom(takes(5, D), refused="depends on the parameter")
class ReadsActivations(Wrapped):
    """``h.abs().max().item()`` used as a number."""

    def middle(self, h: Tensor) -> Tensor:
        scale = h.detach().abs().max().item()
        return h / (1 + scale)


@idiom(takes(5, D), refused_parts="samples|parts|microbatch", refused="depends on the parameter")
class ReadsRowMean(Wrapped):
    """``float(h.mean())`` of activations, kept on the module for a log."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def middle(self, h: Tensor) -> Tensor:
        self.mean = float(h.detach().mean())
        return h.sin()


@idiom(lambda draw: ((draw.floats(5, D), draw.lengths(5)), {}), refused_parts="from one microbatch")
class ReadsLengthsAsList(Wrapped):
    """``lengths.tolist()`` and ``max().item()`` of inputs, in a loop over the rows."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.enter(x[:, : int(lengths.max())])
        rows = [row[:length].mean(0) for row, length in zip(h, lengths.tolist(), strict=True)]
        return self.leave(torch.stack(rows).tanh())


@idiom(takes(5, D), warns="as one microbatch")
class LoopsOverRows(Wrapped):
    """A Python loop over the rows of the batch."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.stack([row.softmax(0) @ row.T @ row for row in h])


@idiom(takes(5, D))
class BatchInSecondDimension(Wrapped):
    """Sequence first inside: ``transpose(0, 1)`` around a block, as older transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)

    def middle(self, h: Tensor) -> Tensor:
        h = h.transpose(0, 1)
        out, weights = self.attention(h, h, h)
        return out.transpose(0, 1) + weights.mean(-1, keepdim=True)


@idiom(takes(5, D))
class FlattensBatch(Wrapped):
    """``view(-1, D)`` and back, ``squeeze``, ``chunk``, ``unbind``, ``movedim``."""

    def middle(self, h: Tensor) -> Tensor:
        flat = h.view(-1, D)
        a, b = flat.chunk(2, dim=-1)
        h = torch.cat([b, a], -1).view(h.size(0), h.size(1), -1)
        first, *others = h.unbind(1)
        return torch.stack([first, *others[::-1]], dim=1).movedim(1, 2).squeeze(1).mT


@idiom(takes(5, D))
class MaxOutputs(Wrapped):
    """Functions with two results: ``max(dim)``, ``median``, ``var_mean``, ``aminmax``."""

    def middle(self, h: Tensor) -> Tensor:
        values, index = h.max(dim=1)
        low, high = torch.aminmax(h, dim=1)
        var, mean = torch.var_mean(h, dim=1)
        return values * index + low + high + var + mean + h.median(dim=1).values


@idiom(takes(5, D))
class Distances(Wrapped):
    """``cdist``, ``logsumexp``, ``baddbmm``, ``addmm``, ``bilinear``, ``outer`` products."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, D))
        self.pair = nn.Bilinear(D, D, D)

    def middle(self, h: Tensor) -> Tensor:
        far = torch.cdist(h, self.centres)
        soft = torch.logsumexp(-far, dim=-1, keepdim=True)
        h = torch.baddbmm(h, h, h.mT @ h) * soft
        return self.pair(h, h.flip(1))


@idiom(takes(5, D))
class LinearAlgebra(Wrapped):
    """``linalg.solve``, ``cholesky``, ``matrix_exp``, ``inv`` of small matrices of each sample."""

    def middle(self, h: Tensor) -> Tensor:
        gram = h.mT @ h + torch.eye(D, dtype=h.dtype)
        root = torch.linalg.cholesky(gram)
        solved = torch.linalg.solve(gram, h.mT)
        return (torch.matrix_exp(-gram / 20) @ solved + root @ torch.linalg.inv(root) @ h.mT).mT


@idiom(takes(4, D))
class EinsumOfMany(Wrapped):
    """``einsum`` with an ellipsis, three operands and a diagonal."""

    def middle(self, h: Tensor) -> Tensor:
        w = self.enter.weight
        a = torch.einsum("...i,ij,...j->...", h, w, h)
        return h * a[..., None] + torch.einsum("bnn,bnd->bnd", h @ h.mT, h)


@idiom(lambda draw: ((draw.floats(5, D),), {}))
class InPlaceOnInput(Wrapped):
    """A forward that writes into its argument: ``x.mul_(2)``."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x)

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom(takes(5, D))
class ExpandedAndWritten(Wrapped):
    """``expand(...).clone()`` written, and a flip of it added in place."""

    def middle(self, h: Tensor) -> Tensor:
        base = h[:, :1].expand(-1, 5, -1).clone()
        base[:, 2:] = h[:, 2:]
        base += base.flip(1)
        return base.add_(1).sigmoid_()


def graph(draw: Draw) -> Inputs:
    return (draw.floats(5, 5), draw.floats(5, D)), {}


@idiom(graph)
class NanHandling(Wrapped):
    """``nan_to_num``, ``isnan``, ``-inf`` rows in a softmax, ``where`` on both sides."""

    def forward(self, scores: Tensor, x: Tensor) -> Tensor:
        h = self.enter(x)
        masked = scores.masked_fill(scores < 0.5, float("-inf"))
        weights = torch.nan_to_num(masked.softmax(-1))
        safe = torch.where(h > 0, h, torch.ones_like(h)).log()
        out = weights @ torch.where(h > 0, safe, h)
        return self.leave(torch.where(torch.isnan(out), torch.zeros_like(out), out))


@idiom(takes(5, D))
class MetaArithmetic(Wrapped):
    """Shapes worked out on the meta device, and ``torch.broadcast_shapes``."""

    def middle(self, h: Tensor) -> Any:
        shape = torch.empty(1, h.shape[1], 1, device="meta").expand(1, h.shape[1], D).shape
        return h + torch.ones(torch.broadcast_shapes(shape, (D,)), dtype=h.dtype)


@idiom(takes(5, D))
class Strides(Wrapped):
    """``as_strided`` on one's own storage, ``is_contiguous``, ``stride()`` and ``contiguous``."""

    def middle(self, h: Tensor) -> Tensor:
        if not h.transpose(1, 2).is_contiguous():
            h = h.contiguous()
        shifted = F.pad(h, (0, 0, 1, 0))
        shift = shifted[:, 1:] + shifted[:, :-1]
        return shift * (h.stride(-1) + 1)
