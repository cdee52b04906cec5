"""Captures a model: traces it with as many symbolic sizes, and as few modules kept whole, as it allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from pipecompile.capture.call import Call
from pipecompile.capture.captured import Captured, SymbolicSizes
from pipecompile.capture.locks import CAPTURING
from pipecompile.capture.opaque_scope import Part, Reason, all_alike, next_whole
from pipecompile.capture.recorder import DATA_DEPENDENT, NeedsOperations
from pipecompile.capture.state.quiet_torch import not_collecting, quiet
from pipecompile.capture.state.reachable import Reach, reach_of
from pipecompile.capture.trace import NeedsNumbers, Trace
from pipecompile.errors import CaptureError, InputError, ReentryError
from pipecompile.ops.module_tree import called_bare

SYMBOLIC_ATTEMPTS = (
    SymbolicSizes.BATCH | SymbolicSizes.LENGTHS,
    SymbolicSizes.LENGTHS,
    SymbolicSizes.BATCH,
    SymbolicSizes.NONE,
)  # widest first
Errors = tuple[type[Exception], ...]
ANYTHING: Errors = (Exception,)


def capture(
    model: nn.Module,
    call: Call,
    microbatch: int | Sequence[int] | None = None,
    forward: Callable[..., Any] | None = None,
    leaves: Iterable[str] = (),
    symbolic: Sequence[SymbolicSizes] = SYMBOLIC_ATTEMPTS,
) -> Captured:
    """Captures one call of a model.

    Sizes are symbolic as far as the model allows: batch and lengths, else one of the two, else none. What depends on
    activations is kept whole: the innermost module or function around it becomes a leaf, and the trace begins anew.
    What had to be given up or kept whole is in the notes.

    Args:
        call: the sample arguments, of the whole batch.
        microbatch: rows of each microbatch, or of all but perhaps the last; by default all of the batch in one. The
            trace is taken at the first; what Python reads from inputs holds for all of its size.
        forward: what to run instead of the model's own forward, without the hooks on the model itself; it may only
            use the model's parameters.
        leaves: paths of modules to keep whole.
        symbolic: what to try, the widest first and ``NONE`` last.

    Raises:
        CaptureError: the model cannot be traced; names the module path and the source line.
    """
    _refuse_lazy(model)
    _refuse_slots(model)
    rows = _rows(call, microbatch)
    kept: dict[Part, Reason] = _with_backward_hooks(model, forward is None)
    kept.update(dict.fromkeys(_known(model, leaves), Reason("as asked")))
    reasons: list[str] = []
    attempts: list[tuple[SymbolicSizes, Errors]] = [(what, DATA_DEPENDENT) for what in symbolic]
    reach = reach_of(model, [forward] if forward is not None else [])
    forward = forward or partial(called_bare, model)
    while attempts:
        what, unknown = attempts.pop(0)
        try:
            captured = _with_leaves(model, call, rows, forward, what, unknown, kept, reach, reasons)
            broken = captured.broken_guard(call.alike(rows), call.tensors)
        except Exception as error:  # an operation that needs plain sizes: try with fewer symbols
            if unknown is ANYTHING:
                break  # no part of the model takes it either: what had failed before is said
            if isinstance(error, CaptureError | ReentryError):
                raise
            failure = error
            reasons.append(str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
            if isinstance(error, NeedsNumbers):
                del attempts[:-1]
            if not attempts:  # an operation that fake tensors do not take: kept whole, with what is around it
                attempts.append((symbolic[-1], ANYTHING))
            continue
        if not broken:
            return captured
        failure = CaptureError(broken)
        reasons.append(broken)
    raise CaptureError(
        f"the model cannot be traced: {getattr(failure, 'origin', '')}: {failure}; make what this line makes in the "
        f"constructor, or move it into a module of its own and name that in leaf_modules=[...]"
    ) from failure


def _rows(call: Call, microbatch: int | Sequence[int] | None) -> tuple[int, ...]:
    batch = call.batch or 1
    if not isinstance(microbatch, int):
        return tuple(microbatch or (batch,))
    return (*[microbatch] * (batch // microbatch), *([batch % microbatch] if batch % microbatch else []))


def _with_leaves(
    model: nn.Module,
    call: Call,
    rows: Sequence[int],
    forward: Callable[..., Any],
    symbolic: SymbolicSizes,
    unknown: Errors,
    kept: dict[Part, Reason],
    reach: Reach,
    reasons: list[str],
) -> Captured:
    """Traces until no more parts have to be kept whole; adds them, with the reason, to ``kept``.

    Args:
        unknown: errors for which the part that raises them is kept whole.
    """
    wanted = torch.is_grad_enabled()
    gradients = follow = True  # random numbers of Python and numpy have stand-ins, which not all code takes
    operations = False
    while True:
        attempt = partial(
            Trace, model, call, rows, forward, symbolic, kept, reach,
            follow=follow, gradients=gradients, operations=operations,
        )  # fmt: skip
        trace = attempt()
        try:
            with CAPTURING.taken(), quiet(), not_collecting():
                captured = trace.run(reasons)
                if trace.asks_for_gradients and gradients != wanted:
                    gradients = wanted
                    continue
                _refuse_inference_mode(trace)
                return _following(captured, trace, attempt, reasons)
        except NeedsOperations:
            operations = True
        except Exception as error:
            if trace.stood_in:
                follow = False
                continue
            if not isinstance(error, unknown):
                raise
            part = next_whole(error, trace.recorder.paths, kept)
            if part is None:
                if isinstance(error, CaptureError):
                    raise
                raise CaptureError(
                    f"{getattr(error, 'origin', '')}: what the model does here depends on values that only a running "
                    f"step knows ({type(error).__name__}); move it into a module of its own, which can be kept whole"
                ) from error
            kept[part] = Reason.of(error)
            kept.update(all_alike(model, part, kept))


def _refuse_inference_mode(trace: Trace) -> None:
    if torch.is_inference_mode_enabled() and torch.is_inference_mode_enabled in trace.recorder.ran.asked:
        raise CaptureError(
            "forward asks torch.is_inference_mode_enabled(), and a trace cannot answer that it is on; call the "
            "pipeline under torch.no_grad() in place of torch.inference_mode()"
        )


def _following(first: Captured, trace: Trace, again: Callable[..., Trace], reasons: list[str]) -> Captured:
    """A trace that follows the numbers which the forward reads and sets; the first one if that cannot be done."""
    if not trace.counters:
        return first
    try:
        second = again(trace.counters).run(reasons)
    except Exception:  # a stand-in went where only a number can go: the first trace holds for these numbers alone
        return first
    return second if len(second.attributes.updates) == len(first.attributes.updates) else first


def _with_backward_hooks(model: nn.Module, bare: bool) -> dict[Part, Reason]:
    """Modules whose own backward hooks a graph of functions would lose.

    Args:
        bare: those on the model itself are not for the trace.

    Raises:
        CaptureError: a hook stands where a split model has no place for it.
    """
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise CaptureError(
            "there are backward hooks of all modules (register_module_full_backward_hook), and a split model has other "
            "modules; remove them, and register_full_backward_hook on the modules inside that they are for"
        )
    modules = [(path, m) for path, m in model.named_modules() if path or not bare]
    hooked = {path: m for path, m in modules if m._backward_hooks or m._backward_pre_hooks}
    for path, module in hooked.items():
        if module._backward_hooks and module._is_full_backward_hook is False:
            raise CaptureError(
                f"module {path!r} has a hook of register_backward_hook, whose gradients are those of the module's last "
                f"function alone, which a split model does not keep; use register_full_backward_hook"
            )
    if "" in hooked:
        raise CaptureError(
            "the model itself has a backward hook (register_full_backward_hook), which a split model has no place for; "
            "register it on a module inside, or use hooks on parameters"
        )
    return dict.fromkeys(hooked, Reason("it has backward hooks"))


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet: its module takes it from the first batch; call the model once "
                f"on such a batch before the first step: with torch.no_grad(): model(...)"
            )


def _refuse_slots(model: nn.Module) -> None:
    for path, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if any(n[:2] != "__" for n in vars(kind).get("__slots__", ()))]
        if kinds:
            where = f"module {path!r}" if path else "the model itself"
            raise CaptureError(
                f"{where} keeps attributes in the __slots__ of class {kinds[0].__qualname__}, where nobody would see "
                f"them change (torch cannot copy such a module either); remove __slots__ from the class"
            )


def _known(model: nn.Module, leaves: Iterable[str]) -> list[str]:
    paths = dict(model.named_modules())
    for path in leaves:
        if path not in paths or not path:
            raise InputError(f"leaf_modules= names {path!r}, which is no module inside the model")
    return list(leaves)
