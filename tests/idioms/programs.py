"""Programs inside a forward: transforms, gradients, scripted and compiled functions, weights made by networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes


@idiom(takes(4, D))
class VmapOverSamples(Wrapped):
    """``torch.vmap`` of a function of one sample."""

    def middle(self, h: Tensor) -> Tensor:
        return vmap(lambda one: one * one.mean(0) + one.norm())(h)


@idiom()
class GradOfAnEnergy(nn.Module):
    """An energy model: forces by ``torch.func.grad`` under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).sum()

    def forward(self, x: Tensor) -> Tensor:
        return vmap(grad(self.energy))(x) + self.energy(x)


@idiom()
class JacobianVectorProduct(Wrapped):
    """``torch.func.jvp`` along the input."""

    def middle(self, h: Tensor) -> Tensor:
        out, tangent = jvp(lambda x: self.enter(x).tanh(), (h,), (h.sin(),))
        return out + tangent


@idiom()
class ForcesByAutograd(nn.Module):
    """An interatomic potential: forces by ``autograd.grad`` with ``create_graph=True``, trained on them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.net(x).sum()
        x = x.detach().requires_grad_()
        energy = self.net(x).sum()
        (forces,) = torch.autograd.grad(energy, x, create_graph=True)
        return (forces - 0.1).square().mean()


@idiom()
class GradientPenalty(nn.Module):
    """WGAN-GP: the norm of a critic's gradient at a mixture, squared."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.critic(x).mean()
        mixed = (0.3 * x + 0.7 * x.flip(1)).requires_grad_(True)
        out = self.critic(mixed)
        slope = torch.autograd.grad(out, mixed, torch.ones_like(out), create_graph=True, retain_graph=True)[0]
        return ((slope.norm(2, dim=1) - 1) ** 2).mean() + out.mean()


def tasks(draw: Draw) -> Inputs:
    return (draw.floats(4, D), draw.floats(4, 1), draw.floats(4, D), draw.floats(4, 1)), {}


@idiom(tasks, refused_parts="samples")
class MamlByFunctionalCall(nn.Module):
    """MAML: an inner step by ``autograd.grad`` and ``functional_call`` with the weights that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor, y: Tensor, other: Tensor, target: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())
        if self.training:
            inner = F.mse_loss(functional_call(self.net, weights, (x,)), y)
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        return F.mse_loss(functional_call(self.net, weights, (other,)), target)


@idiom(tasks)
class MamlPerTask(nn.Module):
    """MAML with ``torch.func``: ``vmap`` of ``grad`` over tasks, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.net, weights, (x,)), y)

    def forward(self, x: Tensor, y: Tensor, other: Tensor, target: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())

        def of_task(x: Tensor, y: Tensor, other: Tensor, target: Tensor) -> Tensor:
            slopes = grad(self.loss)(weights, x, y)
            moved = {name: weights[name] - 0.1 * slopes[name] for name in weights}
            return self.loss(moved, other, target)

        return vmap(of_task)(x, y, other, target).mean()


@idiom(lambda draw: ((draw.floats(D), draw.floats(3)), {}))
class HyperNetwork(nn.Module):
    """A network that makes another's weights for each sample, applied by ``bmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(3, D * D + D)
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made = self.maker(task)
        w, b = made[:, : D * D].view(-1, D, D), made[:, D * D :]
        return self.head((torch.bmm(w, x.unsqueeze(2)).squeeze(2) + b).tanh())


@idiom()
class HyperNetworkByFunctionalCall(nn.Module):
    """Weights made from an embedding, put into a template module with ``functional_call``."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(4))
        self.maker = nn.Linear(4, D * D + D)
        self.template = nn.Linear(D, D).requires_grad_(False)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.maker(self.task)
        weights = {"weight": made[: D * D].view(D, D), "bias": made[D * D :]}
        return self.head(functional_call(self.template, weights, (x,)).tanh())


@idiom()
class EnsembleByStack(nn.Module):
    """An ensemble by ``stack_module_state`` of parameters kept as one, and ``vmap`` of ``functional_call``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, D, D) / 3)
        self.b = nn.Parameter(torch.zeros(3, D))
        self.head = nn.Linear(D, 2)
        self.__dict__["base"] = nn.Linear(D, D, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        outs = vmap(lambda w, b: functional_call(self.base, {"weight": w, "bias": b}, (x,)))(self.w, self.b)
        return self.head(outs.tanh().mean(0))


@torch.jit.script
def fused_gelu(x: Tensor, bias: Tensor) -> Tensor:
    h = x + bias
    if h.dim() > 5:
        h = h * 2
    return h * 0.5 * (1.0 + torch.erf(h / 1.41421))


@idiom(takes(4, D))
class ScriptedFunction(Wrapped):
    """A function under ``torch.jit.script``, as fused kernels were written."""

    def middle(self, h: Tensor) -> Tensor:
        return fused_gelu(h, self.enter.bias)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sigmoid() * x


class ScriptedModule(Wrapped):
    """A submodule that is scripted, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.jit.script(Gate())

    def middle(self, h: Tensor) -> Tensor:
        return self.gate(h)


idiom(takes(4, D))(ScriptedModule)


@torch.compile(backend="eager")
def compiled_act(x: Tensor) -> Tensor:
    return x.sin() + x.cos()


@idiom(takes(4, D))
class CompiledFunction(Wrapped):
    """A function under ``torch.compile`` inside a forward."""

    def middle(self, h: Tensor) -> Tensor:
        return compiled_act(h)


@idiom(takes(4, D))
class CompiledModule(Wrapped):
    """A submodule wrapped by ``torch.compile``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.compile(Gate(), backend="eager")

    def middle(self, h: Tensor) -> Tensor:
        return self.gate(h)


@idiom(takes(4, D))
class DisabledCompilation(Wrapped):
    """``torch.compiler.disable`` and ``torch.compiler.is_compiling`` in a forward."""

    @torch.compiler.disable
    def special(self, h: Tensor) -> Tensor:
        return h * 2 if torch.compiler.is_compiling() or torch.jit.is_tracing() else h * 3

    def middle(self, h: Tensor) -> Tensor:
        return self.special(h)


@idiom(refused="no shape yet")
class LazyLayers(nn.Module):
    """``LazyLinear``: parameters that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.LazyLinear(D)
        self.leave = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x).tanh())


@idiom(refused="no optimizer has|swap")
class LayerMadeInForward(nn.Module):
    """A layer that forward makes at the first call: ``if self.proj is None: self.proj = nn.Linear(...)``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.proj: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is None:
            self.proj = nn.Linear(x.shape[-1], D).to(x)
            nn.init.constant_(self.proj.weight, 0.1)
            nn.init.zeros_(self.proj.bias)
        return self.proj(self.enter(x).tanh())


@idiom()
class CopyOfAModule(nn.Module):
    """A teacher made by ``copy.deepcopy`` in the constructor, and one in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), self.teacher(x.flip(1)))


@idiom()
class InnerOptimisation(nn.Module):
    """A latent that is optimised in forward by plain gradient steps, then detached."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], 3, dtype=x.dtype, requires_grad=True)
        with torch.enable_grad():
            for _ in range(2):
                error = (self.decoder(z) - x).square().sum()
                (slope,) = torch.autograd.grad(error, z)
                z = (z - 0.05 * slope).detach().requires_grad_()
        return (self.decoder(z.detach()) - x).square().mean()


@torch.library.custom_op("idioms::softmax", mutates_args=())
def softmax_of_batch(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=0)


@softmax_of_batch.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (out,) = ctx.saved_tensors
    return out * (gradient - (gradient * out).sum(0))


softmax_of_batch.register_autograd(_backward, setup_context=_setup)


@idiom(refused_parts="samples")
class OperatorNamedLikeTorchs(Wrapped):
    """A custom operator called softmax that mixes the batch, whose namesake in torch does not."""

    def middle(self, h: Tensor) -> Tensor:
        return softmax_of_batch(h)


@torch.library.custom_op("idioms::mul", mutates_args=())
def mul(x: Tensor, by: float) -> Tensor:
    return x * by


@mul.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


def _setup_mul(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.by = inputs[1]


mul.register_autograd(lambda ctx, gradient: (gradient * ctx.by * 2, None), setup_context=_setup_mul)


@idiom()
class CustomOperator(Wrapped):
    """A custom operator with a fake kernel and a backward of its own."""

    def middle(self, h: Tensor) -> Tensor:
        return mul(h, 0.7)


@idiom()
class TensorHookOnParameter(Wrapped):
    """A gradient mask by ``weight.register_hook`` in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.enter.weight.register_hook(lambda gradient: gradient * torch.ones(D, 1, dtype=gradient.dtype).tril())

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom()
class PrunedWeights(Wrapped):
    """``torch.nn.utils.prune``: a mask buffer, weights made in a forward pre-hook as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.prune.l1_unstructured(self.enter, "weight", amount=0.4)

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom()
class OldWeightNorm(Wrapped):
    """``torch.nn.utils.weight_norm``: the weight is a plain attribute that a hook sets."""

    def __init__(self) -> None:
        super().__init__()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(self.enter)

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom()
class OldSpectralNorm(Wrapped):
    """``torch.nn.utils.spectral_norm`` by a forward pre-hook with power iteration."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.spectral_norm(self.enter)

    def middle(self, h: Tensor) -> Tensor:
        return h
