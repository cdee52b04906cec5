"""All captures of a pipeline: which of them a call may run on, and why each was made.

Each kind of call (train or eval, another tree of arguments, another flag, sizes that break a guard) needs a capture,
and every capture takes time. A model whose calls keep differing is told so, with what differed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from pipecompile.compiled import Compiled

MANY = 8  # captures from which on a pipeline warns, again whenever their number has doubled


class Modes(NamedTuple):
    """What about a model, beside the call, makes a capture its own."""

    training: tuple[bool, ...]
    modules: tuple[tuple[type, int], ...]
    hooks: tuple[int, ...]
    parameters: tuple[tuple[int, bool], ...]  # identity, and whether it is trained
    buffers: tuple[int, ...]


def modes(model: nn.Module) -> Modes:
    """The present modes, hooks and tensors of a model."""
    modules = list(model.modules())
    training = tuple(module.training for module in modules)
    hooks = tuple(id(hook) for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    parameters = tuple((id(parameter), parameter.requires_grad) for parameter in model.parameters())
    kinds = tuple((type(module), id(module)) for module in modules)
    return Modes(training, kinds, hooks, parameters, tuple(map(id, model.buffers())))


class Key(NamedTuple):
    """What two calls must have in common, beside what guards check, to run on one capture."""

    arguments: tuple[Any, ...]
    modes: Modes
    autocast: tuple[Any, ...]


class Captures:
    """The captures of one pipeline, each with the reason why it was made."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._known: dict[Key, list[Compiled]] = {}
        self._last: Key | None = None

    def __len__(self) -> int:
        return len(self.reasons)

    def of(self, key: Key) -> list[Compiled]:
        """The captures that a call may run on if their guards hold, oldest first."""
        return self._known.get(key, [])

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
    if key.modes.training != last.modes.training:
        training = {True: "train()", False: "eval()"}
        yield f"modules in {training[any(key.modes.training)]}"
    if key.modes.modules != last.modes.modules:
        yield "modules that were exchanged"
    if key.modes.hooks != last.modes.hooks:
        yield "other hooks on modules"
    if key.modes.parameters != last.modes.parameters:
        yield "parameters that were exchanged or frozen"
    if key.modes.buffers != last.modes.buffers:
        yield "buffers that were exchanged"
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
