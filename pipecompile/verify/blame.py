"""Finds the first module where a split model differs from the unsplit model.

Outputs of modules are compared in the order of their calls: the unsplit model's with those of the nodes in the trace,
first on the whole batch (to check the capture), then on the microbatches (to check the division). The outputs of the
step itself come last. If all outputs agree, gradients are compared in the order of the backward.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batching import Partial, Rows, scatter
from pipecompile.capture import Captured
from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.state.model_state import without_caches
from pipecompile.capture.state.restore import left_as_before
from pipecompile.ops.randomness import drawn_alike
from pipecompile.ops.tensor_args import tensors_in
from pipecompile.verify.comparison import coarsest_type, difference
from pipecompile.verify.microbatch_statistics import statistics_of
from pipecompile.verify.one_device import on_one_device
from pipecompile.verify.results import Difference
from pipecompile.verify.side_by_side import Trial, leaves_of

STEP = "<step>"  # in the place of a path: the model's own forward, which runs without its hooks, and the loss
Parts = Sequence[Tensor]  # a value of the whole batch, or of each microbatch
Outputs = Mapping[str, Sequence[Sequence[Parts]]]  # by path of the module, then by call


@dataclass(frozen=True)
class Traced:
    """A trace, and the nodes of the outputs of the step."""

    captured: Captured
    outputs: tuple[str | None, ...]

    @property
    def returns(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """The calls of modules as they end, with the nodes of their outputs; the step itself comes last."""
        return (*self.captured.returns, (STEP, self.outputs))


def first_that_differs(trial: Trial, found: Sequence[Difference]) -> str:
    """Describes the first module whose output or gradients differ.

    Args:
        found: the differences of the whole step.
    """
    division = trial.batch.division
    whole = Traced(division.whole, tuple(output.node for output in division.whole.outputs))
    captured = _of_trace(trial, whole, [trial.fresh().batch.call.tensors])
    if where := _first(whole, _of_model(trial.fresh(), Rows((1,))), captured):
        return f"the first module whose output differs is {where}, as it was captured"
    if len(trial.rows) > 1:
        body = Traced(division.body, tuple(division.places.get(str(it.node)) for it in trial.captured.outputs))
        expected, divided = _of_model(trial.fresh(), trial.rows), _of_trace(trial, body, _parts(trial.fresh()))
        if where := _first(body, expected, divided):
            return (
                f"the first module whose output differs is {where}, on microbatches of {list(trial.rows.counts)} rows"
            )
    return _first_gradient(division.whole, found)


def _of_model(trial: Trial, rows: Rows) -> Outputs:
    """The outputs of each module of the unsplit model, with batch statistics per microbatch of ``rows``."""
    seen: dict[str, list[Sequence[Parts]]] = defaultdict(list)

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[path].append([[t.detach().clone()] for t in tensors_in(output)])

        return note

    with (
        left_as_before(trial.model, reach=trial.reach),
        without_caches(trial.model, trial.batch.call.has_cache),
        ExitStack() as stack,
    ):
        for path, module in trial.model.named_modules():
            stack.callback(module.register_forward_hook(hook(path)).remove)
        stack.enter_context(statistics_of(rows))
        near = stack.enter_context(on_one_device(trial.model))
        args, kwargs = trial.batch.call.rebuild(near(trial.batch.call.tensors))
        out = trial.forward(*args, **kwargs)
    own = [[t.detach().clone()] if isinstance(t, Tensor) else [] for t in leaves_of(out)]
    return {**seen, STEP: [own]}


def _of_trace(trial: Trial, traced: Traced, parts: Sequence[Mapping[str, Tensor]]) -> Outputs:
    """The values of the nodes that are modules' outputs, from the parts of a batch."""
    captured = traced.captured
    own = {name for _, nodes in traced.returns for name in nodes if name is not None}
    names = {name + suffix for name in own for suffix in ("", "_share", "_part")}
    values: dict[str, list[Tensor]] = defaultdict(list)
    tensors = {n: t if t.requires_grad else t.detach().clone() for n, t in captured.tensors.items()}
    with left_as_before(trial.model, reach=trial.reach), on_one_device(trial.model) as near:
        tensors = near(tensors)
        for part in parts:  # leaves run the user's Python
            evaluator = Evaluator(
                near(part), tensors.__getitem__, lambda target: captured.leaf(target, tensors), call=drawn_alike
            )
            for node in captured.graph.nodes:
                if node.name in names and node.op != "output":
                    values[node.name].append(evaluator.value(node).detach().clone())
    seen: dict[str, list[Sequence[Parts]]] = defaultdict(list)
    for path, nodes in traced.returns:
        seen[path].append([_whole_value(trial, values, str(name), len(parts)) for name in nodes])
    return seen


def _whole_value(trial: Trial, values: Mapping[str, Parts], name: str, parts: int) -> Parts:
    """A value in its parts, or as one part if it sums the microbatches' shares; empty if no node computes it."""
    if parts > 1:
        own = (name,) if trial.batch.joins.get(name) == Partial() else ()
        for share in (*own, f"{name}_share", f"{name}_part"):
            if share in values:
                return [torch.stack(list(values[share])).sum(0)]
    return values.get(name, [])


def _parts(trial: Trial) -> list[dict[str, Tensor]]:
    """The inputs of each microbatch of a trial."""
    batch = trial.batch
    return scatter(batch.call, batch.rows, batch.compiled.run_before(batch.call), batch.division.before)


def _first(traced: Traced, expected: Outputs, seen: Outputs) -> str:
    """The first module, in the order in which calls return, with an output that differs; empty if all agree."""
    captured = traced.captured
    coarsest = coarsest_type(node.meta.get("val") for node in captured.graph.nodes)
    kinds = {path: type(module).__name__ for path, module in captured.model.named_modules()}
    calls: Counter[str] = Counter()
    for path, _ in traced.returns:
        number = calls[path]
        calls[path] += 1
        if number >= len(expected.get(path, ())):
            continue
        for ours, theirs in zip(seen[path][number], expected[path][number], strict=False):
            it = _compared(path, ours, theirs[0], coarsest) if theirs else None
            if it is not None and it.verdict == "different":
                return f"{_named(path, kinds, after='' in expected)}, {it.amount}"
    return ""


def _named(path: str, kinds: Mapping[str, str], after: bool) -> str:
    """A module in words.

    Args:
        after: whether the step goes on after the model itself, with a loss function.
    """
    if path == STEP and after:
        return "the loss function"
    name = repr(path) if path in kinds and path else "'the model itself'"
    return f"{name} ({kinds.get(path, kinds[''])})"


def _compared(path: str, ours: Parts, theirs: Tensor, coarsest: torch.dtype | None) -> Difference | None:
    """The difference of a module's output from the unsplit model's; None if its parts cannot be joined."""
    if len(ours) == 1:
        return difference("output", path, ours[0], theirs, coarsest=coarsest)
    if not ours or any(part.ndim != theirs.ndim for part in ours):
        return None
    if all(torch.equal(part, ours[0]) for part in ours):
        return difference("output", path, ours[0], theirs, coarsest=coarsest)
    for dim in range(theirs.ndim):
        rest = [(*part.shape[:dim], *part.shape[dim + 1 :]) for part in ours]
        fits = sum(part.shape[dim] for part in ours) == theirs.shape[dim]
        if fits and all(other == (*theirs.shape[:dim], *theirs.shape[dim + 1 :]) for other in rest):
            return difference("output", path, torch.cat(list(ours), dim), theirs, coarsest=coarsest)
    return None


def _first_gradient(captured: Captured, found: Sequence[Difference]) -> str:
    """Describes the module nearest to the loss with a parameter whose gradient differs."""
    wrong = {it.name: it for it in found if it.kind == "gradient" and it.verdict == "different"}
    last = {path: position for position, (path, _) in enumerate(captured.returns)}
    by_owner = sorted(wrong, key=lambda name: last.get(name.rpartition(".")[0], -1))
    if by_owner:
        owner = by_owner[-1].rpartition(".")[0]
        return (
            f"every module's output agrees; in the order of the backward the first gradient that differs is that of "
            f"{by_owner[-1]!r}, in module {owner or 'the model itself'!r}"
        )
    return "every module's output agrees, and so do the gradients of all parameters"
