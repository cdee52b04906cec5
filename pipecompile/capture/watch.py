"""What one trace learns of its model's Python attributes: what it read becomes guards, what it set becomes updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipecompile.capture.attributes import NOT_PLAIN, TORCHS_OWN, Attribute, Attributes, Update, constant, frozen
from pipecompile.capture.numbers import is_number, start
from pipecompile.capture.reads import Key, Reads
from pipecompile.errors import CaptureError


class Watch:
    """Watches one run of a forward.

    Args:
        paths: the modules of the model by identity.
        states: their attributes before the trace, by identity.
        numbers: attributes that an earlier trace has both read and set, which get stand-ins.
        ignored: attributes, by owner's identity and name, on which the trace does not depend.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        states: Mapping[int, Mapping[str, Any]],
        numbers: Sequence[Attribute] = (),
        ignored: Set[Key] = frozenset(),
    ) -> None:
        self.reads = Reads(paths, states, ignored)
        self.numbers = tuple(numbers)
        self.questions: list[tuple[Update, Any]] = []
        self.changes: list[tuple[Attribute, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time of the forward; objects that modules hold are put back at its end, the modules by the caller."""
        try:
            for number in self.numbers:
                value = number.value()  # before its owner is watched
                self.reads.hold(number)
                number.owner.__dict__[number.name] = start(value, (id(number.owner), number.name), self.questions)
            with self.reads.watching():
                yield
        finally:
            self.changes += self.reads.changes()

    @property
    def counters(self) -> tuple[Attribute, ...]:
        """The numbers that the forward has read and then set: another trace may follow them."""
        set_to = {(id(a.owner), a.name): value for a, value in self.changes}
        return tuple(
            attribute
            for key, (attribute, value) in self.reads.found.items()
            if type(value) in (int, float) and type(set_to.get(key)) in (int, float, torch.SymInt, torch.SymFloat)
        )

    def attributes(self, kept: Mapping[str, nn.Module]) -> tuple[Attributes, list[str]]:
        """Guards and updates, and what cannot be updated.

        Args:
            kept: modules kept whole, by path: they run on a copy of the attributes, all of which are guarded.

        Raises:
            CaptureError: a module that is kept whole counts in an attribute.
        """
        for attribute in self.counters:
            self._refuse_counting(attribute, kept)
        updates = [(attribute, _update(value)) for attribute, value in self.changes]
        lost = [attribute.label for attribute, update in updates if update is None]
        set_by_forward = {(id(a.owner), a.name) for a, _ in self.changes}
        read = dict(self.reads.found)
        for path, module in kept.items():
            read |= {key: guard for key, guard in _all_of(path, module).items() if key not in set_by_forward}
        found = Attributes(
            read=tuple(read.values()),
            numbers=self.numbers,
            questions=tuple(self.questions),
            updates=tuple((attribute, update) for attribute, update in updates if update is not None),
        )
        return found, lost

    def _refuse_counting(self, attribute: Attribute, kept: Mapping[str, nn.Module]) -> None:
        for path, module in kept.items():
            if any(attribute.owner is inner for inner in module.modules()):
                raise CaptureError(
                    f"module {path!r} is kept whole and its forward counts in self.{attribute.name}, which each "
                    f"microbatch would count for itself; make it a buffer: "
                    f"self.register_buffer({attribute.name!r}, ...)"
                )


def _update(value: Any) -> Update | None:
    return value.of if is_number(value) else constant(value)


def _all_of(path: str, module: nn.Module) -> dict[Key, tuple[Attribute, Any]]:
    found: dict[Key, tuple[Attribute, Any]] = {}
    for inner, owner in module.named_modules():
        label = f"{path}.{inner}." if inner else f"{path}."
        for name, value in owner.__dict__.items():
            plain = frozen(value)
            if name not in TORCHS_OWN and plain is not NOT_PLAIN:
                found[id(owner), name] = (Attribute(owner, name, label + name), plain)
    return found
