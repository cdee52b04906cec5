"""What forwards do to gradients: functions of one's own, hooks, gradients taken inside, implicit layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from idioms.declare import D, Wrapped, idiom, takes


class Affine(Function):
    """Saves inputs and outputs, has non-tensor arguments, and looks at ``needs_input_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: str, slope: float = 0.1) -> Tensor:
        out = x @ weight.t()
        if bias is not None:
            out = out + bias
        ctx.act, ctx.slope, ctx.biased = act, slope, bias is not None
        out = torch.tanh(out) if act == "tanh" else out
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        x, weight, out = ctx.saved_tensors
        if ctx.act == "tanh":
            g = g * (1 - out * out)
        gx = g @ weight if ctx.needs_input_grad[0] else None
        gw = g.t() @ x if ctx.needs_input_grad[1] else None
        gb = ctx.slope * g.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return gx, gw, gb, None, None


@idiom()
class AffineFunctions(Wrapped):
    """One function used twice, with a bias and without, with a frozen weight and without."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D).requires_grad_(False)

    def middle(self, h: Tensor) -> Tensor:
        h = Affine.apply(h, self.one.weight, self.one.bias, "tanh")
        h = Affine.apply(h, self.two.weight, None, "none", 3.0)
        return Affine.apply(h, self.one.weight, self.one.bias, "tanh", 0.5)


class SplitThree(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        a, b, c = x.sin(), x.cos(), x.argmax(-1)
        ctx.mark_non_differentiable(c)
        ctx.save_for_backward(a, b)
        return a, b, c

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ga, gb, _ = gradients
        a, b = ctx.saved_tensors
        out = None
        if ga is not None:
            out = ga * b
        if gb is not None:
            out = -gb * a * 2 if out is None else out - gb * a * 2
        return out


@idiom()
class GradientsNotMaterialized(Wrapped):
    """Three outputs, ``set_materialize_grads(False)``: one used, one integer, one dropped on a branch."""

    def middle(self, h: Tensor) -> Tensor:
        a, _, places = SplitThree.apply(h)
        c, d, _ = SplitThree.apply(a)
        return d + c * F.one_hot(places, D)


class TensorList(Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count = count
        return tuple(t * (i + 1) for i, t in enumerate(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None, *(g * (i + 1) * ctx.count for i, g in enumerate(gradients)))


@idiom(refused_parts="samples")
class VariadicFunction(Wrapped):
    """A function of any number of tensors, parameters among them, that gives as many back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))

    def middle(self, h: Tensor) -> Tensor:
        a, b, c, s = TensorList.apply(3, *h.chunk(2, -1), h, self.scale)
        return torch.cat([a, b], -1) + c * s


class SumRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].expand(ctx.rows, D) * 0.5


@idiom(refused_stream="no batch dimension|loss|samples")
class LossAsAFunction(Wrapped):
    """A loss with a gradient of its own: a sum over the batch in a custom function."""

    def forward(self, x: Tensor) -> Tensor:
        return SumRows.apply(torch.tanh(self.leave(torch.tanh(self.enter(x)))))


class CrossEntropyByHand(Function):
    """The gradient made in forward and kept, as fused kernels (Liger) do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore: int) -> Tensor:
        valid = target != ignore
        safe = target.masked_fill(~valid, 0)
        logp = logits.log_softmax(-1)
        loss = -(logp.gather(-1, safe[:, None])[:, 0] * valid).sum() / valid.sum()
        g = (logp.exp() - F.one_hot(safe, logits.shape[-1])) * valid[:, None] / valid.sum()
        ctx.save_for_backward(g)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = ctx.saved_tensors
        return g * gradients[0], None, None


@idiom(lambda draw: ((draw.floats(D), draw.ids(D) - 1), {}))
class FusedCrossEntropy(Wrapped):
    """Liger's fused loss: a mean over valid targets inside a custom function."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return CrossEntropyByHand.apply(self.leave(torch.tanh(self.enter(x))), target, -1)


class FixedPoint(Function):
    """A deep equilibrium layer: solved without a graph, its backward by another solve."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = torch.tanh(z @ weight + x)
        ctx.save_for_backward(z, weight)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, weight = ctx.saved_tensors
        slope = 1 - z * z
        u = gradients[0]
        for _ in range(20):
            u = gradients[0] + (u * slope) @ weight.t()
        return u * slope, z.t() @ (u * slope)


@idiom()
class EquilibriumByFunction(Wrapped):
    """A DEQ whose gradient is the implicit one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 12)

    def middle(self, h: Tensor) -> Tensor:
        return FixedPoint.apply(h, self.weight)


def contraction() -> nn.Linear:
    cell = nn.Linear(D, D)
    with torch.no_grad():
        cell.weight.mul_(0.2)
    return cell


def fixed_point(cell: nn.Linear, h: Tensor) -> Tensor:
    """Solved under no_grad, and one step with."""
    with torch.no_grad():
        z = torch.zeros_like(h)
        for _ in range(15):
            z = torch.tanh(cell(z) + h)
    return torch.tanh(cell(z) + h)


@idiom()
class EquilibriumByHook(Wrapped):
    """A DEQ as its tutorial has it: solved under no_grad, one step with, a hook that solves for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = contraction()

    def middle(self, h: Tensor) -> Tensor:
        z = fixed_point(self.cell, h)
        if z.requires_grad:
            z.register_hook(lambda g: g * 1.25)
        return z


class Equilibrium(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = contraction()

    def forward(self, h: Tensor) -> Tensor:
        z = fixed_point(self.cell, h)
        if z.requires_grad:
            z0 = z.detach().requires_grad_()
            f0 = torch.tanh(self.cell(z0) + h.detach())

            def solve(grad: Tensor) -> Tensor:
                g = grad
                for _ in range(15):
                    g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
                return g

            z.register_hook(solve)
        return z


@idiom()
class EquilibriumByInnerGraph(Wrapped):
    """A DEQ whose hook differentiates a step of its own with ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.solver = Equilibrium()

    def middle(self, h: Tensor) -> Tensor:
        return self.solver(h)


@idiom(refused="hook")
class EquilibriumInTheModel(Equilibrium):
    """The same where only the model itself is around the hook."""


@idiom()
class RetainedGradient(Wrapped):
    """``h.retain_grad()`` in forward, for whoever reads ``h.grad`` later."""

    def middle(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.retain_grad()
        return h * 2


@idiom()
class InputGradientInside(Wrapped):
    """``x.requires_grad_()`` on a detached copy of the input, its saliency as a feature."""

    def middle(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            x = h.detach().clone().requires_grad_(True)
            energy = (torch.tanh(self.enter(x)) ** 2).sum()
            (g,) = torch.autograd.grad(energy, x)
        return h - 0.1 * g


@idiom()
class AdversarialStep(Wrapped):
    """FGSM inside forward: the sign of the loss's gradient at the input, then the loss at the moved input."""

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(h)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            probe = x.detach().requires_grad_()
            loss = super().forward(probe).pow(2).mean()
            (g,) = torch.autograd.grad(loss, probe)
        out = super().forward(x + 0.01 * g.sign())
        return {"loss": out.pow(2).mean(), "out": out}


@idiom()
class HooksOnModulesAndTensors(Wrapped):
    """A forward hook that registers a tensor hook, and one that replaces the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.layer.register_forward_hook(self.clip)

    @staticmethod
    def clip(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output * 1.5
        if output.requires_grad:
            output.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return output

    def middle(self, h: Tensor) -> Tensor:
        return self.layer(h)


@idiom(refused_parts="microbatch|differ|samples")
class HookThatMixes(Wrapped):
    """A tensor hook that normalises the gradient over the batch."""

    def middle(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: g / (g.norm() + 1e-3))
        return h


@idiom()
class RemovedHook(Wrapped):
    """A tensor hook that is removed again before the backward."""

    def middle(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            handle = h.register_hook(lambda g: g * 100)
            handle.remove()
        return h


@idiom(takes(4, D))
class CheckpointsNested(Wrapped):
    """Checkpoints in checkpoints, with keyword arguments, None, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)

    def inner(self, h: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.one(h)) * scale
        return (h if mask is None else h * mask), h.mean(1)

    def outer(self, h: Tensor) -> Tensor:
        a, b = checkpoint(self.inner, h, scale=0.5, use_reentrant=False)
        c, d = checkpoint(self.inner, a, mask=(h > 0).to(h), use_reentrant=False, preserve_rng_state=False)
        return self.two(a + c + (b + d)[:, None])

    def middle(self, h: Tensor) -> Tensor:
        return checkpoint(self.outer, h, use_reentrant=False, determinism_check="none") if self.training else h


@idiom()
class CheckpointSequential(Wrapped):
    """``checkpoint_sequential`` over segments."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(5)))

    def middle(self, h: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, h, use_reentrant=False)


@idiom()
class CheckpointOfAFunction(Wrapped):
    """A custom function inside a checkpoint, and a checkpoint whose result feeds a detached copy."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        out = checkpoint(lambda h: Affine.apply(h, self.one.weight, self.one.bias, "tanh"), h, use_reentrant=False)
        return out + out.detach() * 0.5


@idiom()
class StopGradients(Wrapped):
    """``detach`` of a part of a tensor, of one of two uses, and ``detach_`` of a new one."""

    def middle(self, h: Tensor) -> Tensor:
        kept, stopped = h.chunk(2, -1)
        fresh = (h * 3).clone().detach_()
        return torch.cat([kept, stopped.detach()], -1) * fresh + h.detach().exp()


@idiom()
class SetGradEnabled(Wrapped):
    """``set_grad_enabled(self.training and ...)`` around a backbone, ``inference_mode`` around a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(D, D)
        self.trained = False

    def middle(self, h: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.trained):
            features = torch.tanh(self.backbone(h))
        return h + features


@idiom()
class InferenceModeInside(Wrapped):
    """A metric under ``torch.inference_mode()`` inside a forward that trains."""

    def middle(self, h: Tensor) -> Tensor:
        with torch.inference_mode():
            norm = (h.detach() * 2).norm(dim=-1, keepdim=True)
        return h / (1 + norm.clone())


@idiom()
class JacobianFeatures(Wrapped):
    """``torch.func.jacrev`` and ``vmap`` of a small network as features of each sample."""

    def middle(self, h: Tensor) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v: torch.tanh(v @ self.leave.weight)))(h)
        return jacobian.sum(-1) + h


@idiom()
class HessianTrace(nn.Module):
    """A physics-informed network: second derivatives by two ``autograd.grad`` with a graph, as the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.net(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        residual = ddu[:, 0] + u[:, 0] - x[:, 1].sin()
        loss = residual.pow(2).mean()
        return {"loss": loss if self.training else loss.detach(), "u": u.detach()}


@idiom()
class PathLengthPenalty(nn.Module):
    """StyleGAN2's path length: a gradient with respect to latents, and its mean length in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.synthesis = nn.Linear(D, D), nn.Linear(D, D)
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            w = torch.tanh(self.mapping(z))
            if not w.requires_grad:
                w = w.requires_grad_()
            image = torch.tanh(self.synthesis(w))
            (g,) = torch.autograd.grad((image * 0.1).sum(), w, create_graph=True)
        length = g.pow(2).sum(-1).sqrt()
        mean = self.mean.lerp(length.mean(), 0.01)
        if self.training:
            self.mean.copy_(mean.detach())
        loss = image.pow(2).mean() + (length - mean).pow(2).mean()
        return {"loss": loss if self.training else loss.detach(), "image": image.detach()}
