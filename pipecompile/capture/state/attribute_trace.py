"""What one trace learns of its model's Python attributes: what it read becomes guards, what it set becomes updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.attribute_hooks import Key, Reads
from pipecompile.capture.state.code_guards import CodeRead, known_place
from pipecompile.capture.state.container_proxies import Ledgers
from pipecompile.capture.state.counters import seen_in_place, start
from pipecompile.capture.state.executed_code import Ran
from pipecompile.capture.state.guards import (
    MISSING,
    NOT_PLAIN,
    TORCHS_OWN,
    Attribute,
    Attributes,
    Effect,
    Held,
    Itself,
    OfKind,
    Place,
    Same,
    Setting,
    Update,
    frozen,
)
from pipecompile.capture.state.model_state import Change
from pipecompile.capture.state.namespaces import owns_names, put
from pipecompile.capture.state.python_random_trace import Drawing
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.sources import Fact
from pipecompile.capture.state.updates import Recipes
from pipecompile.errors import CaptureError


class Watch:
    """Watches one run of a forward.

    Args:
        model: whose forward it is.
        reach: what else it may read and change.
        states: the attributes of the model's modules before the trace, by identity.
        numbers: attributes that an earlier trace has both read and set, which get stand-ins.
        ignored: attributes, by owner's identity and name, on which the trace does not depend.
        follow: whether random numbers that the forward draws have stand-ins.
        is_leaf: whether a part is being run that is kept whole.
        ran: receives the functions that run.
        arguments: those of the call, without tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        reach: Reach,
        states: Mapping[int, Mapping[str, Any]],
        numbers: Sequence[Attribute] = (),
        ignored: Set[Key] = frozenset(),
        follow: bool = True,
        is_leaf: Callable[[], bool] = lambda: False,
        ran: Ran | None = None,
        arguments: Sequence[Any] = (),
    ) -> None:
        paths = {id(module): path for path, module in reversed([*model.named_modules()])}
        self.model = model
        self.reach = reach
        self.code = CodeRead(ran or Ran())
        self.arguments = arguments
        self.numbers = tuple(numbers)
        self.questions: list[tuple[Update, Any]] = []
        self.drawing = Drawing(reach.generators, self.questions, follow, is_leaf)
        self.ledgers = Ledgers(self.drawing.stand_in, is_leaf)
        self.reads = Reads(paths, states, self.ledgers, ignored)
        self.changes: list[Change] = []
        self.filled: list[tuple[Itself, list[Any], list[Any]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time of the forward; at its end all is put back but the attributes of the model's modules."""
        reads = self.reads
        try:
            reads.hold_all(self.reach.owners)
            for path, module in self.model.named_modules():
                self.ledgers.place(module, path, reads.states[id(module)])
            for number in self.numbers:
                value = number.value()  # before its owner is watched
                reads.hold(number)
                put(number.owner, number.name, start(value, (id(number.owner), number.name), self.questions))
            with reads.watching(), self.drawing.watching(), seen_in_place(), self.code.ran.seen(self._begun):
                self._meet_given()
                yield
        finally:
            self.ledgers.take_back()
            self.changes += reads.changes()

    def _meet_given(self) -> None:
        """Objects that the forward finds where no attribute is read: hooks and arguments."""
        for argument in self.arguments:
            self.reads.meet(argument, "an argument")
        for module in self.model.modules():
            for table in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in module.__dict__[table].values():
                    self.reads.meet(hook, f"a hook of {type(module).__name__}")

    def _begun(self, frame: FrameType) -> None:
        for value, label in self.code.begun(frame):
            self.reads.meet(value, label)

    def note(self, changes: Iterable[Change], filled: Iterable[tuple[Itself, list[Any], list[Any]]]) -> None:
        """Takes up what was set on the model's modules, and guards what was set where reads are not seen.

        Args:
            filled: containers without a ledger, with what they hold and what they held.
        """
        self.filled += filled
        followed = {(id(number.owner), number.name) for number in self.numbers}
        for change in self.changes:
            owner, name = change.place.owner, change.place.name
            if self.reads.sees(owner) or (id(owner), name) in followed:
                continue
            before = self.reads.states[id(owner)].get(name, MISSING)
            self.reads.found.setdefault((id(owner), name), (change.place, _expected(before)))
        self.changes += changes
        self._guard_set_to_itself()

    def _guard_set_to_itself(self) -> None:
        """Guards what the forward may have set to the value that it had: where it has another, that is a change."""
        changed = {(id(change.place.owner), change.place.name) for change in self.changes}
        stored = self.code.stored()
        for path, module in self.model.named_modules():
            state = self.reads.states[id(module)]
            for name in stored & state.keys() - TORCHS_OWN:
                plain = frozen(state[name])
                if (id(module), name) not in changed and plain is not NOT_PLAIN:
                    label = f"{path}.{name}" if path else name
                    self.reads.found.setdefault((id(module), name), (Attribute(module, name, label), plain))

    @property
    def counters(self) -> tuple[Attribute, ...]:
        """The numbers that the forward has read and then set: another trace may follow them."""
        set_to = {(id(c.place.owner), c.place.name): c.value for c in self.changes}
        return tuple(
            attribute
            for key, (attribute, value) in self.reads.found.items()
            if type(value) in (int, float) and type(set_to.get(key)) in (int, float, torch.SymInt, torch.SymFloat)
        )

    def attributes(self, kept: Mapping[str, nn.Module], tensor: Callable[[Tensor], Update]) -> Attributes:
        """Guards and updates.

        Args:
            kept: modules kept whole, by path: they run on a copy of the attributes, all of which are guarded.
            tensor: what a tensor that the forward leaves behind becomes on a later call.

        Raises:
            CaptureError: a module that is kept whole counts in an attribute, or something was left behind that no later
                call could leave.
        """
        for attribute in self.counters:
            self._refuse_counting(attribute, kept)
        set_by_forward = {(id(c.place.owner), c.place.name) for c in self.changes}
        read = dict(self.reads.found)
        for path, module in kept.items():
            read |= {key: guard for key, guard in _all_of(path, module).items() if key not in set_by_forward}
        readings = [ledger.reading() for ledger in self.ledgers.made.values()]
        readings += [Held(place, type(place.holder), (), tuple(before)) for place, _, before in self.filled]
        return Attributes(
            read=tuple(read.values()),
            held=tuple(reading for reading in readings if reading is not None),
            numbers=self.numbers,
            questions=tuple(self.questions),
            updates=tuple(self._effects(Recipes(tensor, self._known), kept)),
            draws=self.drawing.draws(),
            facts=(*map(Fact.of, self.reads.places.values()), *self._code_facts()),
            apart=frozenset(id(module.__dict__) for module in self.model.modules()),
        )

    def _code_facts(self) -> list[Fact]:
        """What the functions that ran depend on, but for places that the forward sets and containers that it fills."""
        owners = [*self.model.modules(), *(owner for owner, *_ in self.reads.holders)]
        kinds = {type(owner) for owner in owners if owns_names(owner)}
        known = {known_place(change.place.owner, change.place.name) for change in self.changes}
        known |= {known_place(number.owner, number.name) for number in self.numbers}
        return self.code.facts(kinds, known, self.ledgers.made.keys())

    @property
    def _known(self) -> set[int]:
        """The identities of containers that were there before the trace."""
        return {*self.ledgers.made, *(id(holder) for holder, _ in self.reach.containers)}

    def _effects(self, recipes: Recipes, kept: Mapping[str, nn.Module]) -> Iterator[Effect]:
        whole = {id(module) for kept_whole in kept.values() for module in kept_whole.modules()}
        for change in self.changes:
            if id(change.place.owner) in whole and isinstance(change.value, Tensor):
                raise CaptureError(
                    f"a module that is kept whole sets {change.place.label}, which each microbatch would do for "
                    f"itself; let it return the tensor, or make it a buffer: "
                    f"self.register_buffer({change.place.name!r}, ...)"
                )
            with _left_at(change.place):
                if change.items is None:
                    yield Setting(change.place, recipes.of(change.value))
                else:
                    yield recipes.filling(change.place, change.value, change.items)
        for place, items, _ in self.filled:
            with _left_at(place):
                yield recipes.filling(place, place.holder, items)
        for ledger in self.ledgers.made.values():
            if ledger.by_leaf:
                raise CaptureError(
                    f"a module or function that is kept whole fills {ledger.place.label}, which each microbatch would "
                    f"do for itself; let it return what it puts there"
                )
            if ledger.is_changed:
                with _left_at(ledger.place):
                    yield recipes.effect(ledger)

    def _refuse_counting(self, attribute: Attribute, kept: Mapping[str, nn.Module]) -> None:
        for path, module in kept.items():
            if any(attribute.owner is inner for inner in module.modules()):
                raise CaptureError(
                    f"module {path!r} is kept whole and its forward counts in self.{attribute.name}, which each "
                    f"microbatch would count for itself; make it a buffer: "
                    f"self.register_buffer({attribute.name!r}, ...)"
                )


@contextmanager
def _left_at(place: Place) -> Iterator[None]:
    """Says in errors where something was left."""
    try:
        yield
    except CaptureError as error:
        raise CaptureError(
            f"forward leaves something in {place.label} that no later call could leave: {error}"
        ) from error


def _expected(before: Any) -> Any:
    """What a name must be that the trace has set, perhaps for what it was."""
    if isinstance(before, Tensor):
        return OfKind(type(before))
    plain = frozen(before)
    return Same(before) if plain is NOT_PLAIN else plain


def _all_of(path: str, module: nn.Module) -> dict[Key, tuple[Attribute, Any]]:
    found: dict[Key, tuple[Attribute, Any]] = {}
    for inner, owner in module.named_modules():
        label = f"{path}.{inner}." if inner else f"{path}."
        for name, value in owner.__dict__.items():
            plain = frozen(value)
            if name not in TORCHS_OWN and plain is not NOT_PLAIN:
                found[id(owner), name] = (Attribute(owner, name, label + name), plain)
    return found
