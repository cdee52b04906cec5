"""In-place writes become new values, along all aliases, before the graph is cut.

A graph that is cut into stages must not depend on the order of writes to shared memory: a stage that recomputes a
value, or receives it, would miss them. So the tracer keeps, for every storage, the family of nodes that view it, and
each write does one of three things:

    x.relu_()              nobody else has read x: the call stays as it is, and its result is x from now on;
    v = x[:, 1:]; v += 1   others read x, or view it: the family's base is cloned, its views are taken again from the
                           clone, the write goes there, and every name moves on to the new family; what was read
                           before keeps the old values;
    self.count += 1        x is a buffer or a parameter of the model: the write is an effect that stays where it is,
                           once a microbatch; every name moves on, so that who reads later reads after the write.

``x.data = y`` takes x out of its family into that of y. Of the model's own tensors what they hold last is written back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.ops.functional import after
from pipecompile.ops.torch_internals import DisableTorchFunction


def storage_key(tensor: Tensor) -> int | None:
    """Identifies the memory behind a tensor; None for layouts without a storage."""
    try:
        with DisableTorchFunction():
            return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


NOBODY = 0  # no tensor's id


@dataclass(slots=True)
class Alias:
    """One tensor of a family: the nodes that make it from its parent (none for the base) and the node it is now."""

    tensor: int  # id
    node: fx.Node
    parent: int | None = None  # position in the family
    recipe: tuple[fx.Node, ...] = ()  # the view call, and the getitem that picks the tensor out of its result
    parent_node: fx.Node | None = None  # what the recipe reads as its parent


@dataclass(slots=True)
class Family:
    """All the tensors that share one storage, the base first; ``buffer`` is the model's name for it if it has one."""

    members: list[Alias] = field(default_factory=list)
    buffer: str | None = None
    written: tuple[fx.Node, ...] = ()  # the members' nodes as the call that is being recorded finds them

    def position(self, tensor: Tensor) -> int | None:
        return next((i for i, member in enumerate(self.members) if member.tensor == id(tensor)), None)


class Aliases:
    """The families of one trace.

    Args:
        emit: ``emit(function, args, kwargs, like=node)`` appends a call whose value looks like that of ``node``.
        bind: ``bind(tensor id, node)`` says which node a tensor is from now on.
    """

    def __init__(
        self,
        emit: Callable[..., fx.Node],
        bind: Callable[[int, fx.Node], None],
    ) -> None:
        self.emit = emit
        self.bind = bind
        self.families: dict[int, Family] = {}
        self.groups: list[tuple[fx.Node, ...]] = []  # nodes that share memory which one of them writes
        self.passed: dict[fx.Node, fx.Node] = {}  # calls that gave back what they were given -> the node of that

    def add_buffer(self, name: str, tensor: Tensor) -> None:
        """A parameter or buffer of the model: writes to it are effects."""
        key = storage_key(tensor)
        if key is not None:
            self.families.setdefault(key, Family(buffer=name))

    def buffer_of(self, tensor: Tensor) -> str | None:
        family = self._family(tensor)
        return None if family is None else family.buffer

    def leave(self, tensor: Tensor) -> None:
        """A tensor is about to get other memory: what happens to that of its family no longer concerns it."""
        family = self._family(tensor)
        if family is not None and (known := family.position(tensor)) is not None:
            family.members[known].tensor = NOBODY

    def add(self, tensor: Tensor, node: fx.Node, sources: list[Tensor], recipe: tuple[fx.Node, ...]) -> None:
        """A tensor that a node made, perhaps as a view of one of its sources."""
        key = storage_key(tensor)
        if key is None:
            return
        family = self.families.setdefault(key, Family())
        parent = next((p for s in sources if (p := family.position(s)) is not None), None)
        known = family.position(tensor)
        alias = Alias(id(tensor), node)
        if parent is not None and parent != known:
            alias = Alias(id(tensor), node, parent, recipe, family.members[parent].node)
        if known is None:
            family.members.append(alias)
        else:  # the same Python object again: x.contiguous(), dropout of nothing, or the result of a write
            self.passed[node] = family.members[known].node
            family.members[known].node = node

    def prepare_write(self, tensor: Tensor) -> None:
        """Makes it safe that the next call writes to ``tensor``."""
        family = self._family(tensor)
        if family is None:
            return
        if family.buffer is None and (len(family.members) > 1 or not self._is_private(family.members[0].node)):
            copies: dict[fx.Node, fx.Node] = {}
            for member in family.members:
                member.node = self._copy(member, family, copies)
                self.bind(member.tensor, member.node)
        family.written = tuple(node for member in family.members for node in self._names_of(member.node))

    def finish_write(self, tensor: Tensor, writer: fx.Node, result: Tensor | None) -> None:
        """Every name of the family stands for its value after ``writer`` from now on."""
        family = self._family(tensor)
        if family is None:
            return
        self.passed.pop(writer, None)
        for member in family.members:
            if result is not None and member.tensor == id(result):
                member.node = writer
            elif member.node is not writer:
                member.node = self.emit(after, (member.node, writer), like=member.node)
            self.bind(member.tensor, member.node)
        self.groups.append((*family.written, writer, *(member.node for member in family.members)))

    def _names_of(self, node: fx.Node) -> list[fx.Node]:
        """The node, and those that it has passed on."""
        names = [node]
        while names[-1] in self.passed:
            names.append(self.passed[names[-1]])
        return names

    def _is_private(self, node: fx.Node) -> bool:
        """Whether nothing but the model's own name for it reads a node's value so far."""
        first, *others = self._names_of(node)
        alone = not first.users and all(len(other.users) == 1 for other in others)
        return alone and [first, *others][-1].op == "call_function"

    def _family(self, tensor: Tensor) -> Family | None:
        key = storage_key(tensor)
        return None if key is None else self.families.get(key)

    def _copy(self, member: Alias, family: Family, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """The member in a fresh storage: the base cloned, a view taken again from its copied parent."""
        if member.parent is None or member.parent_node is None:
            return self.emit(torch.clone, (member.node,), like=member.node)
        copies[member.parent_node] = family.members[member.parent].node
        for node in member.recipe:
            if node not in copies:
                copies[node] = self.emit(
                    node.target,
                    fx.map_arg(node.args, lambda n: copies.get(n, n)),
                    fx.map_arg(node.kwargs, lambda n: copies.get(n, n)),
                    like=node,
                )
        return copies[member.recipe[-1]]
