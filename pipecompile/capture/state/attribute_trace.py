"""Collects the Python attributes that one trace reads, which become guards, and those it sets, which become updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture.state.attribute_hooks import Key, Reads
from pipecompile.capture.state.code_guards import CodeRead, known_place
from pipecompile.capture.state.container_proxies import Ledgers
from pipecompile.capture.state.counters import seen_in_place, start
from pipecompile.capture.state.environment import Environment
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
from pipecompile.capture.state.iterators import Advanced, is_iterator
from pipecompile.capture.state.loggers import Loggers
from pipecompile.capture.state.model_state import Change, Entries, first_tensor, named_tensors
from pipecompile.capture.state.namespaces import owns_names, put
from pipecompile.capture.state.python_random_trace import Drawing
from pipecompile.capture.state.reachable import Reach
from pipecompile.capture.state.sources import Fact
from pipecompile.capture.state.updates import Recipes
from pipecompile.errors import CaptureError
from pipecompile.ops.tensor_args import is_real


class Watch:
    """Observes one run of forward.

    Args:
        model: The model whose forward runs.
        reach: Other state that forward may read and change.
        states: Attributes of the model's modules before the trace, by identity.
        numbers: Attributes that an earlier trace both read and set, which get stand-ins.
        ignored: Attributes, by identity of the owner and name, on which the trace does not depend.
        follow: Whether random numbers that forward draws get stand-ins.
        is_leaf: Whether a part kept whole is running.
        ran: Receives the functions that run.
        arguments: Arguments of the call other than tensors.
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
        self._is_leaf = is_leaf
        self.questions: list[tuple[Update, Any]] = []
        self.drawing = Drawing(reach.generators, self.questions, follow, is_leaf)
        self.environment = Environment()
        self.loggers = Loggers()
        self.ledgers = Ledgers(self._given, is_leaf)
        self.reads = Reads(paths, states, self.ledgers, ignored)
        self.changes: list[Change] = []
        self.filled: list[tuple[Itself, list[Any], list[Any]]] = []
        self.written: list[str] = []  # data that forward has written past attributes and tensors

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward; at its end everything is restored except the attributes of the model's modules."""
        reads = self.reads
        try:
            reads.hold_all(self.reach.owners)
            for path, module in self.model.named_modules():
                self.ledgers.place(module, path, reads.states[id(module)])
            for number in self.numbers:
                value = number.value()  # before its owner is observed
                reads.hold(number)
                put(number.owner, number.name, start(value, (id(number.owner), number.name), self.questions))
            with (
                reads.watching(),
                self.drawing.watching(),
                self.environment.watching(),
                self.loggers.watching(),
                seen_in_place(),
                self.code.ran.seen(self._begun),
            ):
                self._meet_given()
                yield
        finally:
            self.written += self.reads.raw.put_back()
            self.ledgers.take_back()
            self.changes += reads.changes()

    def own(self, objects: Iterable[Any]) -> None:
        """Notes objects that exist for this call alone; what forward reads and sets in them is not state."""
        self.reads.made.update((id(each), each) for each in objects)

    def _meet_given(self) -> None:
        """Observes objects that forward reaches without reading an attribute: hooks, arguments, those of classes."""
        for argument in self.arguments:
            self.reads.meet(argument, "an argument")
        for owner, label, _ in self.reach.owners:
            if isinstance(owner, type):  # an only instance that a class holds
                for name, value in [*vars(owner).items()]:
                    self.reads.meet(value, f"{label}.{name}")
        for module in self.model.modules():
            for table in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in module.__dict__[table].values():
                    self.reads.meet(hook, f"a hook of {type(module).__name__}")

    def _given(self, value: Any, label: str) -> Any:
        """What forward gets for a value that is no container."""
        if is_iterator(value):
            return Advanced(value, label)
        return self.reads.stand_in(self.drawing.stand_in(self.reads.raw.meet(value, label)))

    def _begun(self, frame: FrameType) -> None:
        for value, label in self.code.begun(frame, self._is_leaf()):
            self.reads.meet(value, label)

    def note(self, changes: Iterable[Change], filled: Iterable[tuple[Itself, list[Any], list[Any]]]) -> None:
        """Adds what was set on the model's modules, and guards what was set where reads are not observed.

        Args:
            changes: Changes of the model's modules.
            filled: Containers without a ledger, with their present and their earlier contents.
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
        """Guards what forward has set to the value it already had: from another value, that is a change.

        What is set past ``nn.Module.__setattr__`` is not observed: it may be whatever the code that ran names.
        """
        changed = {(id(change.place.owner), change.place.name) for change in self.changes}
        stored, spelled = self.code.stored()
        for path, module in self.model.named_modules():
            state = self.reads.states[id(module)]
            own: Any = type(module).__setattr__
            named = spelled if own is nn.Module.__setattr__ else stored | spelled
            for name in state.keys() - TORCHS_OWN:
                key, plain = (id(module), name), frozen(state[name])
                if (key in self.reads.set or name in named) and key not in changed and plain is not NOT_PLAIN:
                    label = f"{path}.{name}" if path else name
                    self.reads.found.setdefault((id(module), name), (Attribute(module, name, label), plain))

    @property
    def counters(self) -> tuple[Attribute, ...]:
        """The numbers that forward has read and then set; another trace may follow them."""
        set_to = {(id(c.place.owner), c.place.name): c.value for c in self.changes}
        return tuple(
            attribute
            for key, (attribute, value) in self.reads.found.items()
            if type(value) in (int, float) and type(set_to.get(key)) in (int, float, torch.SymInt, torch.SymFloat)
        )

    def attributes(self, kept: Mapping[str, nn.Module], tensor: Callable[[Tensor], Update]) -> Attributes:
        """Returns the guards and updates of the trace.

        Args:
            kept: Modules kept whole, by path. They run on a copy of their attributes, all of which are guarded.
            tensor: Returns how a later call computes a tensor that forward stores.

        Raises:
            CaptureError: A part kept whole changes Python state, or forward stores a tensor that later calls cannot
                reproduce.
        """
        for label in self.written:
            raise CaptureError(
                f"forward writes into {label} in place, and later calls can repeat only what it writes into tensors; "
                f"keep the numbers in a buffer (self.register_buffer), or set an attribute to a new array instead"
            )
        for attribute in self.counters:
            self._refuse_counting(attribute, kept)
        set_by_forward = {(id(c.place.owner), c.place.name) for c in self.changes}
        read = dict(self.reads.found)
        for path, module in kept.items():
            read |= {key: guard for key, guard in _all_of(path, module).items() if key not in set_by_forward}
        places = [*self.reads.places.values(), *self.environment.places.values(), *self.loggers.places.values()]
        readings = [ledger.reading() for ledger in self.ledgers.made.values()]
        readings += [Held(place, type(place.holder), (), tuple(before)) for place, _, before in self.filled]
        return Attributes(
            read=tuple(read.values()),
            held=tuple(reading for reading in readings if reading is not None),
            numbers=self.numbers,
            questions=tuple(self.questions),
            updates=tuple(self._effects(Recipes(tensor, self._known), kept)),
            draws=self.drawing.draws(),
            facts=(*map(Fact.of, places), *self._code_facts()),
            apart=frozenset(id(module.__dict__) for module in self.model.modules()),
        )

    def _code_facts(self) -> list[Fact]:
        """Returns what the functions that ran depend on, except places that forward sets and containers it fills."""
        owners = [*self.model.modules(), *(owner for owner, *_ in self.reads.holders)]
        kinds = {type(owner) for owner in owners if owns_names(owner)}
        known = {known_place(change.place.owner, change.place.name) for change in self.changes}
        known |= {known_place(number.owner, number.name) for number in self.numbers}
        held: list[tuple[Any, str]] = [
            (f, f.__qualname__) for _, f in self.reads.found.values() if isinstance(f, FunctionType)
        ]
        held += [(tensor, name) for name, tensor in named_tensors(self.model)]
        return self.code.facts(kinds, held, known, self.ledgers.made.keys())

    @property
    def _known(self) -> set[int]:
        """The identities of containers that existed before the trace."""
        return {*self.ledgers.made, *(id(holder) for holder, _ in self.reach.containers)}

    def _effects(self, recipes: Recipes, kept: Mapping[str, nn.Module]) -> Iterator[Effect]:
        whole = {id(module) for kept_whole in kept.values() for module in kept_whole.modules()}
        for change in self.changes:
            if id(change.place.owner) in whole and isinstance(change.value, Tensor):
                if _is_generator_state(change.value):
                    yield Setting(change.place, lambda _: torch.get_rng_state())
                    continue
                raise CaptureError(
                    f"a module that is kept whole sets {change.place.label}, which every microbatch would set again; "
                    f"return the tensor instead, or make it a buffer: "
                    f"self.register_buffer({change.place.name!r}, ...)"
                )
            owner = change.place.owner
            if isinstance(owner, Entries) and id(owner.module) in whole and isinstance(change.value, Tensor):
                raise first_tensor("a module", change.place.label)
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
                    f"{ledger.by_leaf}: a module or function that is kept whole changes {ledger.place.label}, which "
                    f"every microbatch would do again; {_instead(kept)}"
                )
            if ledger.is_changed:
                with _left_at(ledger.place):
                    yield recipes.effect(ledger)

    def _refuse_counting(self, attribute: Attribute, kept: Mapping[str, nn.Module]) -> None:
        for path, module in kept.items():
            if any(attribute.owner is inner for inner in module.modules()):
                raise CaptureError(
                    f"module {path!r} is kept whole and its forward counts in self.{attribute.name}, which every "
                    f"microbatch would increase again; make it a buffer: "
                    f"self.register_buffer({attribute.name!r}, ...)"
                )


def _instead(kept: Mapping[str, nn.Module]) -> str:
    """What to do instead of storing something in a part kept whole."""
    hooked = [path for path, module in kept.items() if module._backward_hooks or module._backward_pre_hooks]
    if hooked:
        return (
            f"module {hooked[0]!r} is kept whole for its backward hook: remove that, store the module's output in a "
            f"forward hook, and call retain_grad() on it"
        )
    return (
        "return what it stores there instead, or, in a hook, store the tensor itself and read its numbers after the "
        "call"
    )


def _is_generator_state(value: Tensor) -> bool:
    """Whether a tensor is the state of torch's generator on the CPU, which a reversible layer notes for its backward.

    The backward of a microbatch has the one that its own forward has noted.
    """
    state = torch.default_generator.get_state()
    return is_real(value) and (value.dtype, value.shape, value.device) == (state.dtype, state.shape, state.device)


@contextmanager
def _left_at(place: Place) -> Iterator[None]:
    """Names, in errors, the place where something was stored."""
    try:
        yield
    except CaptureError as error:
        raise CaptureError(
            f"forward stores a tensor in {place.label} that later calls cannot reproduce ({error}); return it from "
            f"forward, or register it as a buffer"
        ) from error


def _expected(before: Any) -> Any:
    """Returns what a name that the trace has set must be before a call, as the trace may depend on it."""
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
