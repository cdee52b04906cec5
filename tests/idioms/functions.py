"""Custom autograd functions, gradient hooks, and what is detached."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from idioms.declare import D, Wrapped, idiom, takes


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x  # not the true one, so that a lost backward shows


square = Square.apply


@idiom()
class AliasOfApply(Wrapped):
    """``square = Square.apply`` at module level, as PyTorch's tutorial has it."""

    def middle(self, h: Tensor) -> Tensor:
        return square(h)


class Scan(Function):
    """A cumulative sum that is made in place on a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        for i in range(1, out.shape[-1]):
            out[..., i] += out[..., i - 1]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient.flip(-1).cumsum(-1).flip(-1)


scan = Scan.apply


@idiom()
class AliasOfApplyInPlace(Wrapped):
    """An alias of ``apply`` whose forward writes in place, as mambapy's scan does."""

    def middle(self, h: Tensor) -> Tensor:
        return scan(h)


@idiom()
class ApplyInAnAttribute(Wrapped):
    """``self.activation = Square.apply``, kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = Square.apply

    def middle(self, h: Tensor) -> Tensor:
        return self.activation(h)


@idiom()
class ApplyAsDefault(Wrapped):
    """``apply`` as the default of an argument."""

    def middle(self, h: Tensor, act: Any = Square.apply) -> Tensor:
        return act(h)


class Sign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 0.5)


@idiom()
class StraightThroughFunction(Wrapped):
    """Binary activations: the sign, with the gradient of a clipped identity."""

    def middle(self, h: Tensor) -> Tensor:
        return Sign.apply(h)


@idiom()
class StraightThroughDetach(Wrapped):
    """``x + (round(x) - x).detach()``."""

    def middle(self, h: Tensor) -> Tensor:
        return h + ((4 * h).round() / 4 - h).detach()


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * gradient, None


@idiom()
class GradientReversal(Wrapped):
    """A domain head behind a gradient reversal with a strength that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(D, 2)
        self.alpha = 0.3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.enter(x))
        domain = self.domain(Reverse.apply(h, self.alpha))
        return {"task": self.leave(h), "domain": domain}


class ClampWithGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.low, ctx.high = low, high
        ctx.save_for_backward(x)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return gradient * (gradient * (x - x.clamp(ctx.low, ctx.high)) >= 0), None, None


@idiom()
class Clamped(Wrapped):
    """A clamp that lets gradients through which lead back inside."""

    def middle(self, h: Tensor) -> Tensor:
        return ClampWithGradient.apply(h, -0.3, 0.3)


class DoubleInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


@idiom()
class MarkedDirty(Wrapped):
    """A function that changes its argument in place and says so with ``mark_dirty``."""

    def middle(self, h: Tensor) -> Tensor:
        h = h + 0.1
        out = DoubleInPlace.apply(h)
        return out + h


class Halves(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=-1)
        return a.exp(), b.clone()

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, 2 * b], dim=-1)


@idiom()
class SeveralOutputs(Wrapped):
    """A custom function with two outputs."""

    def middle(self, h: Tensor) -> Tensor:
        a, b = Halves.apply(h)
        return torch.cat([b, a], dim=-1)


@idiom()
class OneOutputUnused(Wrapped):
    """A custom function of whose two outputs one is dropped."""

    def middle(self, h: Tensor) -> Tensor:
        a, _ = Halves.apply(h)
        return torch.cat([a, a], dim=-1)


class WithConfig(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, config: dict[str, Any], name: str, size: tuple[int, ...]) -> Tensor:
        ctx.scale = config["scale"] if name == "scaled" else 1.0
        return x.reshape(*x.shape[:-1], *size).sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.scale * gradient[..., None].expand(*gradient.shape, 2).flatten(-2), None, None, None


@idiom()
class PlainArguments(Wrapped):
    """A custom function that takes a dict, a string and a tuple beside its tensor."""

    def middle(self, h: Tensor) -> Tensor:
        out = WithConfig.apply(h, {"scale": 0.7}, "scaled", (D // 2, 2))
        return torch.cat([out, h[..., : D // 2]], dim=-1)


class OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return x @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if gradient is None:
            return None, None
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (gradient @ weight if needed[0] else None), (gradient.T @ x if needed[1] else None)


@idiom()
class LinearByHand(Wrapped):
    """A linear layer of one's own: ``once_differentiable``, ``needs_input_grad``, gradients for a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 3)

    def middle(self, h: Tensor) -> Tensor:
        return OnceDifferentiable.apply(h, self.weight)


class NonDifferentiable(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = x.sort(dim=-1)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, values: Tensor, indices: Tensor) -> Tensor:
        (order,) = ctx.saved_tensors
        return torch.zeros_like(values).scatter(-1, order, values)


@idiom()
class NonDifferentiableOutput(Wrapped):
    """A sort of one's own whose indices are marked as not differentiable."""

    def middle(self, h: Tensor) -> Tensor:
        values, indices = NonDifferentiable.apply(h)
        return values * (indices + 1)


class TwoSteps(Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x * y.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient * y.sigmoid(), gradient * x


@idiom()
class SetupContext(Wrapped):
    """The newer form, with ``setup_context``."""

    def middle(self, h: Tensor) -> Tensor:
        return TwoSteps.apply(h, h.flip(-1))


class MeanOverBatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient - gradient.sum(0) / ctx.rows


@idiom(refused_parts="samples")
class MixingFunction(Wrapped):
    """A custom function that centres over the batch."""

    def middle(self, h: Tensor) -> Tensor:
        return MeanOverBatch.apply(h)


class InsideForward(Wrapped):
    """A function class made inside the forward, closing over a number."""

    def middle(self, h: Tensor) -> Tensor:
        factor = 1.7

        class Local(Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * factor

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * factor * 2

        return Local.apply(h)


idiom()(InsideForward)


class RunsGraph(Function):
    """Runs a layer under ``enable_grad`` in forward, and its backward by hand (reversible layers do)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            held = x.detach().requires_grad_(), weight.detach().requires_grad_()
            out = torch.tanh(held[0] @ held[1])
        ctx.held, ctx.out = held, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ctx.out, ctx.held, gradient)


@idiom()
class GraphInFunction(Wrapped):
    """A function that keeps a graph of its own and differentiates it in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 3)

    def middle(self, h: Tensor) -> Tensor:
        return RunsGraph.apply(h, self.weight)


# Hooks and detached values


@idiom()
class HookScalesGradient(Wrapped):
    """``h.register_hook(lambda g: g * 0.1)`` in forward."""

    def middle(self, h: Tensor) -> Tensor:
        h = h * 1.5
        if self.training:
            h.register_hook(lambda gradient: gradient * 0.1)
        return h


@idiom()
class HookOnlyIfGradient(Wrapped):
    """A hook where ``h.requires_grad``, which clamps the gradient."""

    def middle(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return h * 2


@idiom()
class GradientScaleByDetach(Wrapped):
    """``x * s + x.detach() * (1 - s)``, wav2vec 2.0's scaled gradient of features."""

    def middle(self, h: Tensor) -> Tensor:
        return h * 0.1 + h.detach() * 0.9


@idiom()
class StopGradientBetweenParts(nn.Module):
    """SimSiam: two views, a predictor, and a target without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.predictor = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.encoder(x), self.encoder(x.flip(-1))
        p, q = self.predictor(a), self.predictor(b)
        one = F.cosine_similarity(p, b.detach(), dim=-1).mean()
        return -(one + F.cosine_similarity(q, a.detach(), dim=-1).mean()) / 2


@idiom()
class FrozenTeacher(nn.Module):
    """Distillation: a teacher in eval mode under no_grad, without gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4))
        self.teacher = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(x)
        logits = self.student(x)
        loss = F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean") * 4
        return {"loss": loss, "logits": logits}


@idiom()
class FrozenBackbone(nn.Module):
    """A backbone whose parameters do not require gradients, below layers that do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@idiom()
class RequiresGradQueries(Wrapped):
    """Branches on ``requires_grad``, ``is_grad_enabled`` and ``is_leaf``."""

    def middle(self, h: Tensor) -> Tensor:
        if torch.is_grad_enabled() and h.requires_grad and not h.is_leaf:
            return h * 2
        return h / (2 if self.enter.weight.requires_grad else 3)


@idiom()
class NoGradDecorator(Wrapped):
    """A method under ``@torch.no_grad()``, and one under ``set_grad_enabled``."""

    @torch.no_grad()
    def weights(self, h: Tensor) -> Tensor:
        return h.abs().softmax(-1)

    def middle(self, h: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            scale = h.mean(-1, keepdim=True)
        return h * self.weights(h) + scale


@idiom(takes(5, D))
class GradientPenaltyOfParts(Wrapped):
    """``torch.autograd.grad`` in forward without a graph: a saliency weight of each token."""

    def middle(self, h: Tensor) -> Tensor:
        probe = h.detach().requires_grad_()
        with torch.enable_grad():
            energy = probe.pow(3).sum()
            (saliency,) = torch.autograd.grad(energy, probe)
        return h * saliency


@idiom(sample=lambda draw: ((draw.floats(D).requires_grad_(),), {}))
class InputWantsGradient(Wrapped):
    """A batch that requires a gradient itself (adversarial training)."""

    def middle(self, h: Tensor) -> Tensor:
        return h.sin()
