"""Torch's own table of operators, each with the arguments that torch tests it with, as small models.

A model is a linear layer, the operator, and a head on whatever floats the operator gives. The tensors that have as many
rows as the first one are the model's inputs, all others its constants. So an operator may keep samples apart, mix them,
or hold for one size of batch alone: all that is asked is the unsplit model's loss and gradients, or a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from oracle import Run, step
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from zoo.check import EXACT, difference, first_line

import pipecompile
from pipecompile.errors import ExecutionError, PipecompileError

LEAST_ROWS = 4  # so that three microbatches are uneven
SAMPLES = 2  # of each operator, beside its method and its in-place form
TOLERANCE = 1e-9  # of a tensor's largest entry, in float64
MICROBATCHES = (1, 3)

OPERATORS: dict[str, Any] = {
    f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.dtypes
}


@dataclass(frozen=True)
class Slot:
    """Stands for an input of the model among an operator's arguments."""

    position: int


@dataclass(frozen=True)
class Case:
    """One call of an operator: ``leaves`` are its arguments, flattened, with a slot for each input."""

    label: str
    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    inputs: tuple[Tensor, ...]


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function, self.spec = case.function, case.spec
        constants = [i for i, leaf in enumerate(case.leaves) if isinstance(leaf, Tensor)]
        self.leaves = [None if i in constants else leaf for i, leaf in enumerate(case.leaves)]
        for i in constants:
            self.register_buffer(f"constant_{i}", case.leaves[i])
        self.constants = constants
        self.first = next(i for i, x in enumerate(case.inputs) if x.is_floating_point())
        width = case.inputs[self.first].shape[-1] if case.inputs[self.first].ndim > 1 else 1
        self.before = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        for layer in self.before:
            nn.init.eye_(layer.weight)  # arguments stay in the operator's domain
            nn.init.zeros_(layer.bias)
        self.double()
        with torch.no_grad():
            found = list(self.floats(self.run(*case.inputs)))
        rows = len(case.inputs[0])
        self.by_row = [out.ndim > 0 and len(out) == rows for out in found]
        self.weights = nn.ParameterList(
            torch.randn(out[0].numel() if by_row else 1, dtype=torch.float64)
            for out, by_row in zip(found, self.by_row, strict=True)
        )

    def run(self, *inputs: Tensor) -> Any:
        x = inputs[self.first]
        hidden = self.before(x) if x.ndim > 1 else self.before(x.unsqueeze(-1)).squeeze(-1)
        leaves = list(self.leaves)
        for i in self.constants:
            leaves[i] = getattr(self, f"constant_{i}")
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Slot):
                leaves[i] = hidden if leaf.position == self.first else inputs[leaf.position]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    @staticmethod
    def floats(out: Any) -> Iterator[Tensor]:
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_complex():
                yield torch.view_as_real(leaf.resolve_conj())
            elif isinstance(leaf, Tensor) and leaf.is_floating_point():
                yield leaf.double()

    def forward(self, *inputs: Tensor) -> Tensor:
        terms = []
        for out, weight, by_row in zip(self.floats(self.run(*inputs)), self.weights, self.by_row, strict=True):
            scores = out.flatten(1) @ weight if by_row and out.ndim > 1 else out * weight
            terms.append(torch.tanh(scores).mean())
        return torch.stack(terms).sum()


def cases(name: str) -> Iterator[Case]:
    """The first samples of an operator that have rows, as a function, and the first as a method and in place."""
    op = OPERATORS[name]
    torch.manual_seed(0)
    found = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        case = _case(str(found), op.op, sample)
        if case is None:
            continue
        yield case
        if found == 0:
            for label, form in (("method", op.method_variant), ("in place", op.inplace_variant)):
                if form is not None:
                    yield Case(label, form, case.leaves, case.spec, case.inputs)
        found += 1
        if found == SAMPLES:
            return


def _case(label: str, function: Callable[..., Any], sample: Any) -> Case | None:
    flat, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    rows = next((len(t) for t in flat if isinstance(t, Tensor) and t.ndim and t.is_floating_point()), 0)
    if rows < LEAST_ROWS:
        return None
    inputs: list[Tensor] = []
    leaves: list[Any] = []
    for leaf in flat:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows and leaf.layout == torch.strided:
            leaves.append(Slot(len(inputs)))
            inputs.append(leaf.detach().clone())
        else:
            leaves.append(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)
    if not any(x.is_floating_point() for x in inputs):
        return None
    return Case(label, function, tuple(leaves), spec, tuple(inputs))


def examine(name: str) -> Iterator[dict[str, str]]:
    """A verdict for each sample of an operator and each number of microbatches, as it is found."""
    for case in cases(name):
        reference = expected(case)
        first = case.label == "0"
        for microbatches in (MICROBATCHES if first else MICROBATCHES[-1:]) if reference else ():
            key = f"{case.label}, {microbatches}"
            yield {key: "hang"}
            yield {key: verdict(*reference, case, microbatches)}


def expected(case: Case) -> tuple[Model, Run] | None:
    """A model and its own numbers; None where there are none to compare: it raises, it is random, nothing is finite."""
    try:
        torch.manual_seed(0)
        model = Model(case)
        runs = []
        for seed in range(2):
            torch.manual_seed(seed)
            runs.append(step(model, model, lambda out: out, (case.inputs, {})))
    except Exception:
        return None
    gradients = [g for g in runs[0].gradients.values() if g is not None]
    finite = all(bool(t.isfinite().all()) for t in (runs[0].loss, *gradients))
    if not finite or difference(runs[1], runs[0], TOLERANCE):
        return None
    return model, runs[0]


def verdict(model: Model, reference: Run, case: Case, microbatches: int) -> str:
    """``exact``, or how it is refused, fails or is wrong."""
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
    try:
        actual = step(pipe, model, lambda out: out, (tuple(x.clone() for x in case.inputs), {}))
    except ExecutionError as error:
        return f"{'refused' if _is_ours(error) else 'foreign'}: {first_line(error)}"
    except PipecompileError as error:
        return f"refused: {first_line(error)}"
    except Exception as error:
        return f"foreign: {first_line(error)}"
    return difference(actual, reference, TOLERANCE) or EXACT


def _is_ours(error: BaseException) -> bool:
    """Whether a failed stage has refused what it was given."""
    cause: BaseException | None = error
    while isinstance(cause, ExecutionError):
        cause = cause.__cause__
    return isinstance(cause, PipecompileError)
