"""Functions called as torch's are: what is known of torch's functions is never taken to hold for them."""

from __future__ import annotations

from collections.abc import Callable
from keyword import iskeyword
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, step
from torch import Tensor, nn

import pipecompile
from pipecompile.batching.rules import RULES
from pipecompile.errors import CaptureError
from pipecompile.ops.operators import function_of, is_opaque, named
from pipecompile.ops.randomness import draws, is_dropout

WIDTH = 6
NAMES = sorted({name for name, _ in RULES.values() if not iskeyword(name)})
FAMILIES = sorted(set({rule: name for name, rule in reversed(RULES.values())}.values()))


def by_the_whole_batch(x: Tensor) -> Tensor:
    return x / x.norm()


def operator(name: str) -> Callable[[Tensor], Tensor]:
    """A custom operator ``pipecompile_names::name`` that divides by the norm of the whole batch."""
    key = f"pipecompile_names::{name}"
    if hasattr(torch.ops.pipecompile_names, name):
        return getattr(torch.ops.pipecompile_names, name)  # type: ignore[no-any-return]

    def normalised(x: Tensor) -> Tensor:
        return by_the_whole_batch(x)

    op = torch.library.custom_op(key, normalised, mutates_args=())
    op.register_fake(torch.empty_like)

    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        size = x.norm()
        return gradient / size - x * (gradient * x).sum() / size**3  # type: ignore[no-any-return]

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return getattr(torch.ops.pipecompile_names, name)  # type: ignore[no-any-return]


def kept_whole(name: str) -> Callable[[Tensor], Tensor]:
    """A function called ``name`` that does the same, and branches on what it is given, so that it is kept whole."""
    scope: dict[str, Any] = {"by_the_whole_batch": by_the_whole_batch, "__name__": __name__}
    source = f"def {name}(x):\n    return by_the_whole_batch(x) if x.sum() > -1e9 else x\n"
    exec(compile(source, __file__, "exec"), scope)
    return scope[name]  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], late: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function, self.late = function, late

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.late:
            return self.function(self.last(hidden)).square().sum(-1).sqrt().mean()
        return self.last(self.function(hidden)).square().mean()


def exact_or_refused(function: Callable[[Tensor], Tensor], late: bool, microbatches: int) -> str:
    """How a model with a function in it is trained: as the unsplit model is, or not at all."""
    torch.manual_seed(0)
    model = Model(function, late).double()
    inputs = (torch.randn(7, WIDTH, dtype=torch.float64),), {}
    expected = step(model, model, lambda out: out, inputs)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
    try:
        actual = step(pipe, model, lambda out: out, inputs)
    except CaptureError as error:
        assert "samples of the batch mix" in str(error)  # noqa: PT017
        return "refused"
    assert_same(actual, expected)
    return "exact"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_custom_operator_takes_no_rule_of_torchs_of_that_name(name: str) -> None:
    assert exact_or_refused(operator(name), late=False, microbatches=2) == "refused"


@pytest.mark.parametrize("name", ["normalize", "cross_entropy", "dropout", "identity", "copy", "norm", "linear"])
def test_a_function_kept_whole_takes_no_rule_of_torchs_of_that_name(name: str) -> None:
    assert exact_or_refused(kept_whole(name), late=False, microbatches=2) == "refused"


@pytest.mark.parametrize("make", [operator, kept_whole])
@pytest.mark.parametrize("name", ["normalize", "cross_entropy", "dropout"])
def test_where_no_weights_follow_it_runs_on_the_whole_batch(make: Callable[..., Any], name: str) -> None:
    assert exact_or_refused(make(name), late=True, microbatches=4) == "exact"


@pytest.mark.parametrize("name", ["normalize", "dropout"])
def test_with_one_microbatch_it_is_exact(name: str) -> None:
    assert exact_or_refused(operator(name), late=False, microbatches=1) == "exact"


def test_every_name_with_a_rule_is_only_a_name() -> None:
    assert len(NAMES) > 400
    for name in NAMES:
        function, op = kept_whole(name), operator(name)
        for target in (function, op, op.default):  # type: ignore[attr-defined]
            assert function_of(target) not in RULES
            assert is_opaque(target)
            assert not is_dropout(target)
            assert not draws(target, (), {})


def test_an_operator_says_itself_that_it_draws_random_numbers() -> None:
    torch.library.custom_op(
        "pipecompile_names::noisy",
        lambda x: x + torch.rand_like(x),
        mutates_args=(),
        schema="(Tensor x) -> Tensor",
        tags=[torch.Tag.nondeterministic_seeded],
    )
    assert draws(torch.ops.pipecompile_names.noisy.default, (), {})


def test_forms_of_a_function_are_one_function() -> None:
    add = named("add")
    forms = (
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__iadd__,
        torch.ops.aten.add,
        torch.ops.aten.add_,
    )
    assert {add[form] for form in forms} == {"add"}
    assert function_of(torch.ops.aten.add.Tensor) in add
    assert Tensor.__radd__ not in add
    assert Tensor.__rand__ not in named("rand")


def test_a_loss_by_number_has_not_the_rule_of_its_namesake() -> None:
    assert F.kl_div in RULES
    assert torch.kl_div not in RULES
    assert torch.ops.aten.mse_loss not in RULES


def test_a_name_that_torch_has_not_is_an_error() -> None:
    with pytest.raises(NameError, match="no function called 'normalise'"):
        named("normalise")
