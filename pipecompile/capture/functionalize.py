"""Turns in-place writes into new values, for all aliases, before the graph is cut.

A graph that is cut into stages must not depend on the order of writes to shared memory: a stage that rematerializes or
receives a value would miss them. So the tracer keeps, for every storage, the family of nodes that view it. A write is
one of three cases:

    x.relu_()              Nothing else has read x: the call stays as it is, and its result is x from now on.
    v = x[:, 1:]; v += 1   Other nodes read or view x: the base of the family is cloned, its views are taken again from
                           the clone, and the write goes there. Later reads use the new family; earlier reads keep the
                           old values.
    self.count += 1        x is a buffer or a parameter of the model: the write stays where it is, as an effect that
                           runs once per microbatch. Later reads come after it.

``x.data = y`` moves x from its family to that of y. For a tensor of the model, the last value is written back.
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
    """Returns the identity of a tensor's memory, or None for layouts without a storage."""
    try:
        with DisableTorchFunction():
            return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


NOBODY = 0  # no tensor's id


@dataclass(slots=True)
class Alias:
    """One tensor of a family: the nodes that compute it from its parent (none for the base), and its present node."""

    tensor: int  # id
    node: fx.Node
    parent: int | None = None  # position in the family
    recipe: tuple[fx.Node, ...] = ()  # the view call, and the getitem that selects the tensor from its result
    parent_node: fx.Node | None = None  # the node that the recipe reads as the parent


@dataclass(slots=True)
class Family:
    """All tensors that share one storage, the base first; ``buffer`` is its name in the model, if it has one."""

    members: list[Alias] = field(default_factory=list)
    buffer: str | None = None
    written: tuple[fx.Node, ...] = ()  # the nodes of the members before the call that is being recorded

    def position(self, tensor: Tensor) -> int | None:
        return next((i for i, member in enumerate(self.members) if member.tensor == id(tensor)), None)


class Aliases:
    """The families of one trace.

    Args:
        emit: ``emit(function, args, kwargs, like=node)`` appends a call whose value has the metadata of ``node``.
        bind: ``bind(tensor id, node)`` sets the node of a tensor.
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
        self.passed: dict[fx.Node, fx.Node] = {}  # call that returned its own argument -> node of the argument

    def add_buffer(self, name: str, tensor: Tensor) -> None:
        """Adds a parameter or buffer of the model; writes to it are effects."""
        key = storage_key(tensor)
        if key is not None:
            self.families.setdefault(key, Family(buffer=name))

    def buffer_of(self, tensor: Tensor) -> str | None:
        family = self._family(tensor)
        return None if family is None else family.buffer

    def leave(self, tensor: Tensor) -> None:
        """Removes a tensor that is about to get other memory from its family."""
        family = self._family(tensor)
        if family is not None and (known := family.position(tensor)) is not None:
            family.members[known].tensor = NOBODY

    def add(self, tensor: Tensor, node: fx.Node, sources: list[Tensor], recipe: tuple[fx.Node, ...]) -> None:
        """Adds a tensor that a node produced, possibly as a view of one of its sources."""
        key = storage_key(tensor)
        if key is None:
            return
        family = self.families.setdefault(key, Family())
        parent = next((p for s in sources if (p := family.position(s)) is not None), None)
        known = family.position(tensor)
        alias = Alias(id(tensor), node)
        if parent is not None and parent != known:
            alias = Alias(
                tensor=id(tensor), node=node, parent=parent, recipe=recipe, parent_node=family.members[parent].node
            )
        if known is None:
            family.members.append(alias)
        else:  # the same Python object again: x.contiguous(), dropout in eval mode, or the result of a write
            self.passed[node] = family.members[known].node
            family.members[known].node = node

    def prepare_write(self, tensor: Tensor) -> None:
        """Prepares for a write to ``tensor`` by the next call: copies the family if other nodes read it."""
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
        """Binds every tensor of the family to its value after ``writer``."""
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
        """Returns the node, and the nodes whose value it passed through."""
        names = [node]
        while names[-1] in self.passed:
            names.append(self.passed[names[-1]])
        return names

    def _is_private(self, node: fx.Node) -> bool:
        """Whether no other node has read the value of a node so far."""
        first, *others = self._names_of(node)
        alone = not first.users and all(len(other.users) == 1 for other in others)
        return alone and [first, *others][-1].op == "call_function"

    def _family(self, tensor: Tensor) -> Family | None:
        key = storage_key(tensor)
        return None if key is None else self.families.get(key)

    def _copy(self, member: Alias, family: Family, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """Returns the member in a new storage: a clone of the base, or a view of the copied parent."""
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
