"""Captures a model, with as many symbolic sizes and as few parts kept whole as the model allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from pipecompile.capture.call import Call
from pipecompile.capture.captured import Captured, SymbolicSizes
from pipecompile.capture.fake_runs import DATA_DEPENDENT
from pipecompile.capture.locks import CAPTURING
from pipecompile.capture.opaque_scope import Part, Reason, all_alike, next_whole
from pipecompile.capture.other_threads import set_by_others
from pipecompile.capture.recorder import NeedsOperations
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
DISTURBED = 3  # traces that are repeated because another thread has changed the model


def capture(
    model: nn.Module,
    call: Call,
    microbatch: int | Sequence[int] | None = None,
    forward: Callable[..., Any] | None = None,
    leaves: Iterable[str] = (),
    symbolic: Sequence[SymbolicSizes] = SYMBOLIC_ATTEMPTS,
    reach: Reach | None = None,
) -> Captured:
    """Captures one call of a model.

    Sizes are symbolic as far as the model allows: batch and lengths, or one of the two, or none. A part that depends
    on activations is kept whole: the innermost module or function around it becomes a leaf, and the trace starts
    again. The notes say which sizes had to be fixed and which parts are kept whole.

    Args:
        model: The model to capture.
        call: Sample arguments, for the whole batch.
        microbatch: Rows of each microbatch; an int may leave a smaller last one. By default the batch is one
            microbatch. The trace uses the first microbatch; values that Python reads from inputs must be valid for
            every microbatch of that size.
        forward: Runs instead of the model's own forward and without the hooks on the model itself; it must not use
            other parameters than the model's.
        leaves: Paths of modules to keep whole.
        symbolic: Which sizes to make symbolic, one entry per attempt, the widest first and ``NONE`` last.
        reach: Reach of the model and ``forward``, if already known.

    Raises:
        CaptureError: The model cannot be traced. The message names the module path and the source line.
        InputError: A parameter has no shape yet, or ``leaves`` names something that is not a module of the model.
    """
    _refuse_lazy(model)
    _refuse_slots(model)
    kept: dict[Part, Reason] = _with_backward_hooks(model, forward is None)
    kept.update(dict.fromkeys(_known(model, leaves), Reason("it is in leaf_modules=")))
    reach = reach_of(model, [] if forward is None else [forward]) if reach is None else reach
    rows, run = _rows(call, microbatch), forward or partial(called_bare, model)
    reasons: list[str] = []

    def attempt(what: SymbolicSizes, unknown: Errors) -> Captured:
        captured = _with_leaves(model, call, rows, run, what, unknown, kept, reach, reasons)
        if broken := captured.broken_guard(call.alike(rows), call.tensors):
            raise _BrokenGuard(broken)
        return captured

    failure: Exception | None = None
    for what in symbolic:
        if isinstance(failure, NeedsNumbers) and what is not symbolic[-1]:
            continue
        try:
            return attempt(what, DATA_DEPENDENT)
        except Exception as error:  # an operation that needs plain sizes: try again with fewer symbols
            if not _may_need_plain_sizes(error):
                raise
            failure = error
            reasons.append(_in_short(error))
    if not isinstance(failure, _BrokenGuard):  # an operation does not support fake tensors: keep the part around it
        with suppress(Exception):  # if that does not help either, report the earlier failure
            return attempt(symbolic[-1], ANYTHING)
    raise CaptureError(
        f"the model cannot be captured: {getattr(failure, 'origin', '')}: {failure}; create what this line creates in "
        f"__init__(), or move it into a module of its own and name that module in leaf_modules=[...]"
    ) from failure


class _BrokenGuard(CaptureError):
    """The trace of a call does not hold for the call itself."""


def _may_need_plain_sizes(error: Exception) -> bool:
    return isinstance(error, _BrokenGuard) or not isinstance(error, CaptureError | ReentryError)


def _named(error: Exception) -> str:
    """The class of an error, and the operation that it names, if it does."""
    operation = getattr(error, "func", None)
    return type(error).__name__ + (f" in {operation}" if operation is not None else "")


def _in_short(error: Exception) -> str:
    if isinstance(error, _BrokenGuard):
        return str(error)
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


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
    """Traces until no further part must be kept whole. Adds each part that must be, with the reason, to ``kept``.

    Args:
        unknown: Errors for which the part that raises them is kept whole.
    """
    wanted = torch.is_grad_enabled()
    gradients = follow = True  # follow: stand-ins for random numbers of Python and numpy, which not all code accepts
    operations = counting = False
    tries = 0
    while True:
        others: list[str] = []
        attempt = partial(
            Trace, model, call, rows, forward, symbolic, kept, reach,
            follow=follow, gradients=gradients, operations=operations, counting=counting,
        )  # fmt: skip
        trace = attempt()
        try:
            with CAPTURING.taken(), quiet(), not_collecting(), set_by_others(model) as others:
                captured = trace.run(reasons)
                if trace.asks_for_gradients and gradients != wanted:
                    gradients = wanted
                    continue
                _refuse_inference_mode(trace)
                captured = _following(captured, trace, attempt, reasons)
        except NeedsOperations:
            operations = True
        except Exception as error:
            if others:
                tries = _again(tries, others)
                continue
            if trace.stood_in:
                follow = False
                continue
            if not isinstance(error, unknown):
                raise
            if trace.recorder.could_count and not counting:
                counting = True
                continue
            part = next_whole(error, trace.scopes.paths, kept)
            if part is None:
                if isinstance(error, CaptureError):
                    raise
                raise CaptureError(
                    f"{getattr(error, 'origin', '')}: what the model does here depends on values that are known only "
                    f"while a step runs ({_named(error)}); move it into a module of its own, which can be kept whole, "
                    f"with all that works on a result whose size is not known (such as pack_padded_sequence, the "
                    f"recurrent layer and pad_packed_sequence)"
                ) from error
            kept[part] = Reason.of(error)
            kept.update(all_alike(model, part, kept))
        else:
            if not others:
                return captured
            tries = _again(tries, others)


def _again(tries: int, others: Sequence[str]) -> int:
    """The number of repeated traces, one more, after other threads have set attributes in a trace."""
    if tries == DISTURBED:
        raise CaptureError(
            f"another thread has set {others[0]!r} of the model in each of {tries + 1} traces, so it is not known what "
            f"forward reads; make the first call, or pass example_inputs= to compile(), before that thread starts"
        )
    return tries + 1


def _refuse_inference_mode(trace: Trace) -> None:
    if torch.is_inference_mode_enabled() and torch.is_inference_mode_enabled in trace.recorder.ran.asked:
        raise CaptureError(
            "forward calls torch.is_inference_mode_enabled(), but a capture runs with inference mode off; call the "
            "pipeline under torch.no_grad() instead of torch.inference_mode()"
        )


def _following(first: Captured, trace: Trace, again: Callable[..., Trace], reasons: list[str]) -> Captured:
    """Traces again to follow the numbers that forward reads and sets. Returns the first trace if that fails."""
    if not trace.counters:
        return first
    try:
        second = again(trace.counters).run(reasons)
    except Exception:  # a stand-in was used where only a number can be: keep the trace that is valid for these numbers
        return first
    return second if len(second.attributes.updates) == len(first.attributes.updates) else first


def _with_backward_hooks(model: nn.Module, bare: bool) -> dict[Part, Reason]:
    """Returns the modules with backward hooks, which a graph of functions would lose.

    Args:
        bare: Ignore the hooks on the model itself.

    Raises:
        CaptureError: A split model cannot run a hook.
    """
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise CaptureError(
            "global backward hooks are registered (register_module_full_backward_hook), but a split model has other "
            "modules; remove them, and call register_full_backward_hook() on the modules inside that need them"
        )
    modules = [(path, m) for path, m in model.named_modules() if path or not bare]
    hooked = {path: m for path, m in modules if m._backward_hooks or m._backward_pre_hooks}
    for path, module in hooked.items():
        if module._backward_hooks and module._is_full_backward_hook is False:
            raise CaptureError(
                f"module {path!r} has a hook from register_backward_hook(), which gets the gradients of the module's "
                f"last function only, and a split model does not keep that function; use register_full_backward_hook()"
            )
    if "" in hooked:
        raise CaptureError(
            "the model itself has a backward hook (register_full_backward_hook), which a split model cannot run; "
            "register it on a module inside the model, or use hooks on parameters"
        )
    return dict.fromkeys(hooked, Reason("it has backward hooks"))


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet, because its module takes the shape from the first batch; call "
                f"the model once on a batch before the first step: with torch.no_grad(): model(...)"
            )


def _refuse_slots(model: nn.Module) -> None:
    for path, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if any(n[:2] != "__" for n in vars(kind).get("__slots__", ()))]
        if kinds:
            where = f"module {path!r}" if path else "the model itself"
            raise CaptureError(
                f"{where} keeps attributes in the __slots__ of class {kinds[0].__qualname__}, where changes cannot be "
                f"detected (torch cannot copy such a module either); remove __slots__ from the class"
            )


def _known(model: nn.Module, leaves: Iterable[str]) -> list[str]:
    paths = dict(model.named_modules())
    for path in leaves:
        if path not in paths or not path:
            raise InputError(
                f"leaf_modules= names {path!r}, which is not a module inside the model; use a path from "
                f"model.named_modules()"
            )
    return list(leaves)
