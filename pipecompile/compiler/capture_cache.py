"""The captures of a pipeline: which of them a call can use, and why each was made.

Each kind of call (train or eval, another tree of arguments, another flag, sizes that break a guard) needs a capture,
which takes time. If the kinds of calls are many, a warning lists the reasons for the captures.
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

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # attributes of a module
FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_IRRELEVANT = frozenset(nn.Module().__dict__) - {"training", "_is_full_backward_hook", *TABLES, *HOOKS}
MANY = 8  # number of captures at which a pipeline warns; it warns again at each power of two


class Modes(NamedTuple):
    """The state of a model that a capture depends on, in addition to the call."""

    training: tuple[bool, ...]
    modules: tuple[Any, ...]  # with their classes
    hooks: tuple[Any, ...]  # global hooks, then those of each module
    parameters: tuple[Any, ...]  # with requires_grad, dtype and shape
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
    """The hooks of a module, or the global hooks of torch, in order and with their flags."""
    flags = [held.get(f"{prefix}{name}", ()) for name in FLAGS]
    return tuple(
        (name, Same(hook), *(number in flag for flag in flags))
        for name in HOOKS
        for number, hook in held[f"{prefix}{name}"].items()
    )


def hooks_of_all_modules() -> bool:
    """Whether global hooks run before or after the forward of every module."""
    return any(vars(torch_module)[f"_global{name}"] for name in HOOKS[:2])


class States:
    """The states in which a pipeline's model has been seen.

    Attributes:
        number: the number of the last state; it increases whenever the model's modules may have changed.
        modes: the modes of the last state; equal modes are the same object.
    """

    def __init__(self) -> None:
        self.number = 0
        self.modes: Modes | None = None
        self._known: dict[Modes, Modes] = {}
        self._sweep: Sweep | None = None

    def look(self, model: nn.Module, check: Callable[[nn.Module], None] = lambda _: None) -> Modes:
        """Returns the present modes of the model; fast if nothing has changed.

        Args:
            model: the model.
            check: called with the model if something may have changed.
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
        """A context for known changes of attributes; the model is in the same state after them."""
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
    """The settings of torch, of the process and of the thread, that a forward may depend on."""
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
    """Refuses a call under a default device of another type than the stages': it does not apply in their threads.

    Raises:
        InputError: tensors that forward creates without ``device=`` would be on another device.
    """
    if _len_torch_function_stack() == 0:
        return
    modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]  # type: ignore[no-untyped-call]
    kinds = {device.type for device in devices}
    if modes and modes[-1].device.type not in kinds:
        raise InputError(
            f"torch's default device is {modes[-1].device}, but the stages are on {', '.join(sorted(kinds))}; call the "
            f"pipeline under torch.device({min(kinds)!r}), or call torch.set_default_device(None)"
        )


def _of_mode(mode: Any) -> Any:
    return str(mode.device) if isinstance(mode, DeviceContext) else Same(mode)


class Key(NamedTuple):
    """What two calls must have in common, in addition to guards, to use the same capture."""

    arguments: tuple[Any, ...]
    model: Same  # the modes of the model
    autocast: tuple[Any, ...]
    settings: tuple[Any, ...] = ()


class Captures:
    """The captures of one pipeline, and the reason for each."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._known: dict[Key, list[Compiled]] = {}
        self._last: Key | None = None

    def copied(self) -> Captures:
        """A copy of the cache, with the same captures."""
        copy = Captures()
        copy.reasons, copy._last = [*self.reasons], self._last
        copy._known = {key: [*known] for key, known in self._known.items()}
        return copy

    def __len__(self) -> int:
        return len(self.reasons)

    def of(self, key: Key) -> list[Compiled]:
        """The captures that a call can use if their guards hold, oldest first."""
        return self._known.get(key, [])

    def only(self, old: Compiled, new: Compiled) -> Captures:
        """A cache with ``new`` in place of ``old``, and without all other captures."""
        cache = Captures()
        (key,) = (key for key, known in self._known.items() if any(each is old for each in known))
        cache.reasons, cache._known, cache._last = [*self.reasons[:1]], {key: [new]}, key
        return cache

    def recut(self, old: Compiled, new: Compiled, following: Callable[[Compiled], Compiled | None]) -> Captures:
        """A cache with ``new`` in place of ``old``, and all other captures as ``following`` returns them."""
        cache = self.copied()
        for key, known in self._known.items():
            cut = [new if each is old else following(each) for each in known]
            cache._known[key] = [each for each in cut if each is not None]
        return cache

    def use(self, key: Key) -> None:
        """Records the key of the present call; the reason for the next capture is how its key differs."""
        self._last = key

    def add(self, key: Key, compiled: Compiled, broken: str) -> None:
        """Adds a capture, and warns if there are many.

        Args:
            key: of the call.
            compiled: the capture.
            broken: why the last capture with the same key could not be used; empty if the key is new.
        """
        self.reasons.append(broken or _difference(key, self._last))
        self._known.setdefault(key, []).append(compiled)
        self.use(key)
        if len(self) >= MANY and (len(self) & (len(self) - 1)) == 0:
            warnings.warn(_many(self.reasons), stacklevel=7)


def _many(reasons: list[str]) -> str:
    listed = "\n".join(f"  {number}: {reason}" for number, reason in enumerate(reasons, 1))
    return (
        f"the model has been captured {len(reasons)} times, once per kind of call, and each capture takes time:\n"
        f"{listed}\n"
        f"To avoid recaptures, pad inputs to a few lengths, pass the same optional arguments in every call, and keep "
        f"numbers that change in every step in a buffer or a tensor argument, not in a Python attribute"
    )


def _difference(key: Key, last: Key | None) -> str:
    """How a kind of call differs from the one before, in words."""
    if last is None:
        return "the first call"
    return "; ".join(_differences(key, last)) or "a new kind of call"


def _differences(key: Key, last: Key) -> Iterator[str]:
    now: Modes = key.model.value
    before: Modes = last.model.value
    if now.training != before.training:
        training = {True: "train()", False: "eval()"}
        yield f"modules in {training[any(now.training)]}"
    if now.modules != before.modules:
        yield "replaced modules"
    if now.hooks != before.hooks:
        yield "other hooks"
    if now.parameters != before.parameters:
        yield "parameters that were replaced, frozen or unfrozen, or changed in shape or dtype"
    if now.buffers != before.buffers:
        yield "buffers that were replaced, or changed in shape or dtype"
    if key.settings != last.settings:
        yield "other settings of torch (default dtype or device, deterministic algorithms, matmul precision)"
    if key.autocast != last.autocast:
        yield "other autocast settings"
    if key.arguments != last.arguments:
        yield _other_arguments(key.arguments, last.arguments)


def _other_arguments(now: tuple[Any, ...], before: tuple[Any, ...]) -> str:
    names, last = {entry[0]: entry for entry in now[-1]}, {entry[0]: entry for entry in before[-1]}
    more, fewer = [n for n in names if n not in last], [n for n in last if n not in names]
    parts = [f"{word} {', '.join(these)}" for word, these in (("with", more), ("without", fewer)) if these]
    kinds = [f"{n} of {names[n][1]} with {names[n][2]} dimensions" for n in names if names[n] != last.get(n, names[n])]
    if not parts and not kinds and len(now[1]) == len(before[1]):
        pairs = [(new, old) for new, old in zip(now[1], before[1], strict=True) if new != old]
        parts = [f"{new[1]!r:.40} instead of {old[1]!r:.40}" for new, old in pairs]
    return f"other arguments: {', '.join([*parts, *kinds]) or 'another structure'}"
