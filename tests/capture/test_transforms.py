"""Functions of functions (``torch.vmap``, ``torch.func``), parametrizations and hooks, each in a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from long import some
from oracle import assert_same, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import CaptureError

Body = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Blocks around one module; ``body`` says what is done with it. The output is the loss."""

    def __init__(self, make: Callable[[], nn.Module], body: Body = lambda self, h: self.inner(h)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = blocks(2), make(), blocks(2)
        self.body = body
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self, self.before(x))).pow(2).mean()


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pipe_of(model: nn.Module, stages: int, microbatches: int) -> Any:
    return pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, costs="count")


def same(make: Callable[[], nn.Module], body: Body, stages: int = 2, microbatches: int = 2, steps: int = 2) -> Any:
    """Steps of a pipeline beside those of a model of its own, which each keep what they write."""
    model, unsplit = Model(make, body), Model(make, body)
    pipe = pipe_of(model, stages, microbatches)
    for seed in range(steps):
        losses = []
        for module in (pipe, unsplit):
            module.zero_grad()
            losses.append(module(rows(seed)))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for (name, parameter), expected in zip(model.named_parameters(), unsplit.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
        torch.testing.assert_close(dict(model.named_buffers()), dict(unsplit.named_buffers()))
    assert any(parameter.grad is not None for parameter in unsplit.parameters())
    return pipe


# Functions of functions


def _vmap(self: Any, h: Tensor) -> Tensor:
    return torch.vmap(lambda row: self.inner(row).sin() * row.sum())(h)


def _vmap_of_vmap(self: Any, h: Tensor) -> Tensor:
    mask = torch.vmap(torch.vmap(lambda i, j: (j <= i) | (j == 0), in_dims=(None, 0)), in_dims=(0, None))
    positions = torch.arange(h.shape[1])
    return self.inner(mask(positions, positions).double() @ h)


def _vmap_over_two(self: Any, h: Tensor) -> Tensor:
    return self.inner(torch.vmap(torch.mul, in_dims=(0, None), out_dims=1)(h, self.inner.weight[:3]).transpose(0, 1))


def _vmap_of_a_tuple(self: Any, h: Tensor) -> Tensor:
    doubled, sums = torch.vmap(lambda t: (t * 2, t.sum()))(h)
    return self.inner(doubled) * sums.view(-1, 1, 1)


def _vmap_in_chunks(self: Any, h: Tensor) -> Tensor:
    return torch.vmap(self.inner, in_dims=1, out_dims=1, chunk_size=2)(h)


def _vmap_writing(self: Any, h: Tensor) -> Tensor:
    def write(row: Tensor) -> Tensor:
        row = row.clone()
        row[0] = row[1] * 2
        return row.mul_(2)

    return self.inner(torch.vmap(write)(h))


def _ensemble(self: Any, h: Tensor) -> Tensor:
    weights = torch.stack([self.inner.weight, self.inner.weight * 2])
    return torch.vmap(lambda weight: F.linear(h, weight))(weights).sum(0)


def _gradient(self: Any, h: Tensor) -> Tensor:
    return self.inner(torch.func.grad(lambda t: (t**3).sum())(h))


def _gradients_of_rows(self: Any, h: Tensor) -> Tensor:
    return self.inner(torch.vmap(torch.func.grad(lambda t: self.inner(t).sin().sum()))(h))


def _jvp(self: Any, h: Tensor) -> Tensor:
    return self.inner(torch.func.jvp(torch.sin, (h,), (h.cos(),))[1])


def _jacobian(self: Any, h: Tensor) -> Tensor:
    return self.inner(h) + torch.vmap(torch.vmap(torch.func.jacrev(torch.sin)))(h).sum(-1)


def _functional_call(self: Any, h: Tensor) -> Tensor:
    return torch.func.functional_call(self.inner, {"weight": self.inner.weight * 2}, (h,))


TRANSFORMS = [
    _vmap, _vmap_of_vmap, _vmap_over_two, _vmap_of_a_tuple, _vmap_in_chunks, _vmap_writing, _ensemble, _gradient,
    _gradients_of_rows, _jvp, _jacobian, _functional_call,
]  # fmt: skip


@pytest.mark.parametrize(("stages", "microbatches"), some([(2, 1), (2, 2), (3, 2), (3, 1)]))
@pytest.mark.parametrize("body", TRANSFORMS, ids=lambda body: body.__name__[1:])
def test_a_function_of_a_function_gives_the_same_numbers(body: Body, stages: int, microbatches: int) -> None:
    pipe = same(linear, body, stages, microbatches, steps=1)
    assert not any("whole" in note for note in pipe.pipeline.report.notes)


class Tangent(nn.Module):
    """Returns the derivative alone, some operations of which torch runs below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return torch.func.jvp(self.inner, (h,), (h.cos(),))[1]


def test_a_derivative_trains_what_it_is_made_of_for_a_loss_outside() -> None:
    model = nn.Sequential(nn.Linear(D, D), Tangent(), nn.Linear(D, 1)).double()
    inputs = (torch.rand(6, D, dtype=torch.float64),), {}
    expected = step(model, model, mean_square, inputs)
    assert expected.gradients["1.inner.weight"] is not None
    assert_same(step(pipe_of(model, 2, 2), model, mean_square, inputs), expected)


def test_random_numbers_inside_vmap_are_the_microbatchs_own() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        return self.inner(torch.vmap(lambda t: t * (torch.rand(D, dtype=t.dtype) > 0.5), randomness="different")(h))

    losses = []
    for stages in (2, 2, 3):
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="not compared with the unsplit model: .*inside torch.vmap"):
            losses.append(pipe_of(Model(linear, body), stages, 2)(rows()))
    assert losses[0] == losses[1] == losses[2]


class Fivefold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


def _custom(self: Any, h: Tensor) -> Tensor:
    return self.inner(torch.vmap(Fivefold.apply)(h))


def test_a_custom_backward_inside_vmap_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Fivefold\.apply is called inside torch\.vmap"):
        pipe_of(Model(linear, _custom), 2, 2)(rows())


def _of_a_gradient(self: Any, h: Tensor) -> Tensor:
    x = h.detach().requires_grad_()
    return h + torch.autograd.grad(self.inner(x).tanh().pow(2).sum(), x, create_graph=True)[0]


def _of_a_detached_gradient(self: Any, h: Tensor) -> Tensor:
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.inner(x).tanh().sum(), x)
    return h * slope + self.inner(h).tanh().detach()


@pytest.mark.parametrize("body", [_of_a_gradient, _of_a_detached_gradient])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_gradient_taken_in_the_forward_is_trained_through(body: Body, microbatches: int) -> None:
    same(linear, body, 2, microbatches)


def _hooked_gradient(self: Any, h: Tensor) -> Tensor:
    out = _of_a_gradient(self, h)
    out.register_hook(lambda gradient: 2 * gradient)
    return out


def test_a_hook_beside_a_gradient_in_the_forward_is_refused() -> None:
    with pytest.raises(CaptureError, match="a hook on a gradient"):
        pipe_of(Model(linear, _hooked_gradient), 2, 2)(rows())


def test_masks_of_transformers_with_functions_of_the_user() -> None:
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    config = LlamaConfig(hidden_size=8, num_attention_heads=2, attn_implementation="sdpa")

    def body(self: Any, h: Tensor) -> Tensor:
        padding = torch.ones(h.shape[:2], dtype=torch.long)
        mask = create_causal_mask(
            config, h, padding, None,
            or_mask_function=lambda batch, head, q, k: (q == 0) & (k == 2),
            and_mask_function=lambda batch, head, q, k: q - k < 2,
        )  # fmt: skip
        query = self.inner(h).unsqueeze(1)
        return F.scaled_dot_product_attention(query, query, query, attn_mask=mask).squeeze(1)

    same(linear, body, 3, 2, steps=1)


# Parametrizations


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def symmetric() -> nn.Module:
    module = linear()
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


def _cached(self: Any, h: Tensor) -> Tensor:
    with parametrize.cached():
        return self.inner(self.inner(h))


def plain(self: Any, h: Tensor) -> Tensor:
    return self.inner(h)


PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], Body]] = {
    "weight norm, old": (lambda: weight_norm(linear()), plain),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), plain),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), plain),
    "symmetric": (symmetric, plain),
    "cached": (symmetric, _cached),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.3), plain),
}
SPECTRAL = {
    "old": lambda: spectral_norm(linear()),
    "new": lambda: parametrizations.spectral_norm(linear()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("make", "body"), PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parametrization_gives_the_same_numbers(make: Callable[[], nn.Module], body: Body, microbatches: int) -> None:
    same(make, body, 3, microbatches)


@pytest.mark.parametrize("make", SPECTRAL.values(), ids=SPECTRAL)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_spectral_norm_iterates_once_a_batch_and_says_so(make: Callable[[], nn.Module], microbatches: int) -> None:
    same(make, plain, 2, microbatches)
    pipe = pipe_of(Model(make), 2, 2)
    pipe.pipeline.prepare(rows())
    assert any("written once per batch" in note and "inner." in note for note in pipe.pipeline.report.microbatches)
    model = pipe.pipeline.model.eval()
    torch.testing.assert_close(pipe(rows()), model(rows()))


# Hooks


def hooked(register: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = linear()
        register(module)
        return module

    return make


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "before": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "before, keywords": lambda m: m.register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True),
    "after": lambda m: m.register_forward_hook(lambda m, args, out: out * 3),
    "after, keywords": lambda m: m.register_forward_hook(lambda m, a, k, out: out * 3, with_kwargs=True),
    "always": lambda m: m.register_forward_hook(lambda m, args, out: out * 3, always_call=True),
    "only looks": lambda m: m.register_forward_hook(lambda m, args, out: None),
    "backward": lambda m: m.register_full_backward_hook(lambda m, into, out: (into[0] * 2,)),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda m, out: (out[0] * 2,)),
    "on a parameter": lambda m: m.weight.register_hook(lambda gradient: gradient * 2),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_of_a_module_runs(register: Callable[[nn.Module], Any]) -> None:
    same(hooked(register), plain)


def test_a_hook_on_a_tensor_runs() -> None:
    def body(self: Any, h: Tensor) -> Tensor:
        h = self.inner(h)
        h.register_hook(lambda gradient: gradient * 3)
        return h

    same(linear, body)
