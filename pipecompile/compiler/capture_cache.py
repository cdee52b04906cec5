"""All captures of a pipeline: which of them a call may run on, and why each was made.

Each kind of call (train or eval, another tree of arguments, another flag, sizes that break a guard) needs a capture,
and every capture takes time. A model whose calls keep differing is told so, with what differed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from pipecompile.capture.state.fast_check import Sweep
from pipecompile.capture.state.fingerprints import Same
from pipecompile.capture.state.guards import TABLES
from pipecompile.errors import InputError
from pipecompile.ops.torch_internals import DeviceContext, _get_current_function_mode_stack, _len_torch_function_stack
from pipecompile.runtime.compiled import Compiled

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # what a module has them in
FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_IRRELEVANT = frozenset(nn.Module().__dict__) - {"training", "_is_full_backward_hook", *TABLES, *HOOKS}
MANY = 8  # captures from which on a pipeline warns, again whenever their number has doubled


class Modes(NamedTuple):
    """What about a model, beside the call, makes a capture its own."""

    training: tuple[bool, ...]
    modules: tuple[Any, ...]  # each with its class
    hooks: tuple[Any, ...]  # of each module, and of all
    parameters: tuple[Any, ...]  # with whether each is trained, and what it is
    buffers: tuple[Any, ...]


def modes(model: nn.Module) -> Modes:
    """The present modes, hooks and tensors of a model."""
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    return Modes(
        tuple(module.training for _, module in modules),
        tuple((path, Same(module), Same(type(module))) for path, module in modules),
        (_hooks(vars(torch_module), "_global"), *(_hooks(module.__dict__) for _, module in modules)),
        tuple((name, Same(p), p.requires_grad, p.dtype, p.shape) for name, p in parameters),
        tuple((n, Same(b), b.requires_grad, b.dtype, b.shape) for n, b in model.named_buffers(remove_duplicate=False)),
    )


def _hooks(held: Mapping[str, Any], prefix: str = "") -> tuple[Any, ...]:
    """The hooks that a module, or the file of all modules, holds: in their order, with their flags."""
    flags = [held.get(f"{prefix}{name}", ()) for name in FLAGS]
    return tuple(
        (name, Same(hook), *(number in flag for flag in flags))
        for name in HOOKS
        for number, hook in held[f"{prefix}{name}"].items()
    )


def hooks_of_all_modules() -> bool:
    """Whether hooks run before or after the forward of every module there is."""
    return any(vars(torch_module)[f"_global{name}"] for name in HOOKS[:2])


class States:
    """The states that a pipeline's model has been seen in.

    Attributes:
        number: of the last; another one whenever anything on the model's modules may have changed.
        modes: those of the last, the same object for equal ones.
    """

    def __init__(self) -> None:
        self.number = 0
        self.modes: Modes | None = None
        self._known: dict[Modes, Modes] = {}
        self._sweep: Sweep | None = None

    def look(self, model: nn.Module, check: Callable[[nn.Module], None] = lambda _: None) -> Modes:
        """Looks at the model as it is now; quickly where nothing has changed.

        Args:
            check: is called with the model where something may have changed.
        """
        if self.modes is None or self._sweep is None or not self._sweep.holds():
            check(model)
            now = modes(model)
            self.modes = self._known.setdefault(now, now)
            self.number += 1
            self._sweep = _sweep(model)
        return self.modes

    @contextmanager
    def followed(self) -> Iterator[None]:
        """The time of changes to attributes that are known: the model is in the same state after them."""
        still = self._sweep is not None and self._sweep.holds()
        yield
        if still and self._sweep is not None:
            self._sweep.follow()


def _sweep(model: nn.Module) -> Sweep:
    modules = [*model.modules()]
    held = [module.__dict__ for module in modules]
    tables = [each[name] for each in held for name in (*TABLES, *HOOKS)]
    flags = [each[name] for each in held if any(each[hooks] for hooks in HOOKS) for name in FLAGS]
    everywhere = [vars(torch_module)[f"_global{name}"] for name in (*HOOKS, *FLAGS[:2])]
    containers = [*tables, *flags, *everywhere]
    return Sweep(held, _IRRELEVANT, containers, modules, [*model.parameters(), *model.buffers()])


def settings() -> tuple[Any, ...]:
    """The settings of torch, for the process and the thread, that a forward may ask for or depend on."""
    function_modes = _len_torch_function_stack()
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        tuple(map(_of_mode, _get_current_function_mode_stack())) if function_modes else (),  # type: ignore[no-untyped-call]
    )


def refuse_default_device(devices: Iterable[torch.device]) -> None:
    """Refuses a call under a default device that no stage has: the stages' threads know of none.

    Raises:
        InputError: what the forward creates without ``device=`` would lie elsewhere.
    """
    if _len_torch_function_stack() == 0:
        return
    modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]  # type: ignore[no-untyped-call]
    kinds = {device.type for device in devices}
    if modes and modes[-1].device.type not in kinds:
        raise InputError(
            f"torch's default device is {modes[-1].device}, the stages are on {', '.join(sorted(kinds))}; call the "
            f"pipeline under torch.device({min(kinds)!r}), or torch.set_default_device(None)"
        )


def _of_mode(mode: Any) -> Any:
    return str(mode.device) if isinstance(mode, DeviceContext) else Same(mode)


class Key(NamedTuple):
    """What two calls must have in common, beside what guards check, to run on one capture."""

    arguments: tuple[Any, ...]
    model: Same  # its modes
    autocast: tuple[Any, ...]
    settings: tuple[Any, ...] = ()


class Captures:
    """The captures of one pipeline, each with the reason why it was made."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._known: dict[Key, list[Compiled]] = {}
        self._last: Key | None = None

    def copied(self) -> Captures:
        """The same captures in a cache of their own."""
        copy = Captures()
        copy.reasons, copy._last = [*self.reasons], self._last
        copy._known = {key: [*known] for key, known in self._known.items()}
        return copy

    def __len__(self) -> int:
        return len(self.reasons)

    def of(self, key: Key) -> list[Compiled]:
        """The captures that a call may run on if their guards hold, oldest first."""
        return self._known.get(key, [])

    def only(self, old: Compiled, new: Compiled) -> Captures:
        """A cache in which ``new`` stands for ``old``, and all other captures are to be made again."""
        cache = Captures()
        (key,) = (key for key, known in self._known.items() if any(each is old for each in known))
        cache.reasons, cache._known, cache._last = [*self.reasons[:1]], {key: [new]}, key
        return cache

    def use(self, key: Key) -> None:
        """Notes the kind of the present call, which the next capture is told apart from."""
        self._last = key

    def add(self, key: Key, compiled: Compiled, broken: str) -> None:
        """Adds a capture; ``broken`` is the guard of the capture before that did not hold.

        Warns if there have been many.
        """
        self.reasons.append(broken or _difference(key, self._last))
        self._known.setdefault(key, []).append(compiled)
        self.use(key)
        if len(self) >= MANY and (len(self) & (len(self) - 1)) == 0:
            warnings.warn(_many(self.reasons), stacklevel=6)


def _many(reasons: list[str]) -> str:
    listed = "\n".join(f"  {number}: {reason}" for number, reason in enumerate(reasons, 1))
    return (
        f"the model has been captured {len(reasons)} times, each for another kind of call, and each takes time:\n"
        f"{listed}\n"
        f"Make the calls more alike: pad inputs to a few lengths, keep optional arguments the same from call to call, "
        f"and keep numbers that change on every step in a buffer or a tensor argument, not in a Python attribute"
    )


def _difference(key: Key, last: Key | None) -> str:
    """What tells a kind of call from the one before, in words."""
    if last is None:
        return "the first call"
    return "; ".join(_differences(key, last)) or "a kind of call that was not made before"


def _differences(key: Key, last: Key) -> Iterator[str]:
    now: Modes = key.model.value
    before: Modes = last.model.value
    if now.training != before.training:
        training = {True: "train()", False: "eval()"}
        yield f"modules in {training[any(now.training)]}"
    if now.modules != before.modules:
        yield "modules that were exchanged"
    if now.hooks != before.hooks:
        yield "other hooks on modules"
    if now.parameters != before.parameters:
        yield "parameters that were exchanged, frozen, or of another shape or type"
    if now.buffers != before.buffers:
        yield "buffers that were exchanged, or of another shape or type"
    if key.settings != last.settings:
        yield "other settings of torch (default dtype or device, deterministic algorithms, precision of products)"
    if key.autocast != last.autocast:
        yield "another autocast around the call"
    if key.arguments != last.arguments:
        yield _other_arguments(key.arguments, last.arguments)


def _other_arguments(now: tuple[Any, ...], before: tuple[Any, ...]) -> str:
    names, last = {entry[0]: entry for entry in now[-1]}, {entry[0]: entry for entry in before[-1]}
    more, fewer = [n for n in names if n not in last], [n for n in last if n not in names]
    parts = [f"with {', '.join(more)}"] * bool(more) + [f"without {', '.join(fewer)}"] * bool(fewer)
    kinds = [f"{n} of {names[n][1]} with {names[n][2]} dimensions" for n in names if names[n] != last.get(n, names[n])]
    if not parts and not kinds and len(now[1]) == len(before[1]):
        pairs = [(new, old) for new, old in zip(now[1], before[1], strict=True) if new != old]
        parts = [f"{new[1]!r:.40} instead of {old[1]!r:.40}" for new, old in pairs]
    return f"other arguments: {', '.join([*parts, *kinds]) or 'another form'}"
