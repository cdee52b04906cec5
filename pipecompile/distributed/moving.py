"""Moves a model's parameters between processes when its cut has moved, with gradients and the optimizers' state.

    before   rank 0: a b c    rank 1: d e
    after    rank 0: a b      rank 1: c d e      c goes to rank 1, and what the optimizer of rank 0 keeps for it

Each process has an optimizer of its own parameters, made by the same script. So a parameter's place in the optimizer of
one process, its group, is its place in that of any other: the groups must have the same options in all of them. The
groups and the optimizers stay the same objects, so learning rate schedulers go on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.distributed.ownership import foreign_buffers, held, owned
from pipecompile.distributed.processes import Processes
from pipecompile.errors import InputError
from pipecompile.ops.away import bring, is_away, send_away
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.lane import Value

Optimizers = Sequence[torch.optim.Optimizer]
PARAMETERS, NAMES = "params", "param_names"  # of a group; each process has its own of both


@dataclass(frozen=True)
class Had:
    """What one rank has of a model.

    Attributes:
        memory: the parameters that it has memory for, and the buffers of which it has the present values.
        trained: the parameters that it trains.
    """

    memory: frozenset[str]
    trained: frozenset[str]

    @staticmethod
    def of(captures: Sequence[Compiled], rank: int) -> Had:
        """By the plan of the captures of a pipeline, the first one first."""
        stale = frozenset[str]().union(*(foreign_buffers(compiled, rank) for compiled in captures))
        return Had(held(captures[0], rank) - stale, owned(captures[0], rank))


@dataclass(frozen=True)
class Packed:
    """What travels with a tensor, but for the values of its tensors.

    Attributes:
        group: its place in the optimizers: which one, and which group; None if none steps it.
        called: its name there, if the optimizer was made of named parameters.
        state: what the optimizer keeps for it, but for tensors.
        keys: of all of that, in order.
        has_gradient: whether a gradient is among the tensors, after the value.
        strides: of each tensor.
    """

    group: tuple[int, int] | None
    called: str
    state: Mapping[str, Any]
    keys: Sequence[str]
    has_gradient: bool
    strides: Sequence[tuple[int, ...]]


class Move:
    """The move of one model to another cut.

    Args:
        model: whose parameters move.
        processes: that run it.
        before, after: its captures, with the present plan and with the next one.
        optimizers: of this process.
        stand_in: a parameter for an optimizer that has no other left.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        before: Sequence[Compiled],
        after: Sequence[Compiled],
        optimizers: Optimizers,
        stand_in: nn.Parameter,
    ) -> None:
        self.processes = processes
        self.rank, ranks = processes.rank, range(processes.grid.ranks)
        self.optimizers = optimizers
        self.stand_in = stand_in
        self.before = [Had.of(before, rank) for rank in ranks]
        self.after = [Had.of(after, rank) for rank in ranks]
        first: dict[int, str] = {}
        for name, tensor in named_tensors(model):
            first.setdefault(id(tensor), name)
        self.tensors = {first[id(tensor)]: tensor for _, tensor in named_tensors(model)}

    def check(self) -> None:
        """Makes sure that what moves can be put into the optimizers of other processes.

        Raises:
            InputError: it cannot; raised in all processes, and nothing has moved.
        """
        said = self.processes.all.gathered((self._refusal(), self._groups()))
        for rank, (refusal, groups) in enumerate(said):
            if refusal:
                reason, remedy = refusal
                raise InputError(f"replan() in rank {rank}: {reason}; {remedy}")
            if groups != said[0][1]:
                mine, its = next(
                    ((a, b) for a, b in zip(said[0][1], groups, strict=False) if a != b),
                    (f"{len(said[0][1])} groups", f"{len(groups)} groups"),
                )
                raise InputError(
                    f"the optimizers of rank 0 have {mine}, and those of rank {rank} {its}, so replan() cannot say in "
                    f"which group a parameter goes on; make the same optimizers with the same groups in all processes, "
                    f"with an empty list of parameters where a process has none for a group"
                )

    def _refusal(self) -> tuple[str, str] | None:
        """Why what this process has cannot move, and what to do."""
        steps = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group[PARAMETERS]}
        for optimizer in self.optimizers:
            if isinstance(optimizer, (*_of_parts(), torch.optim.LBFGS)):
                reason = f"{type(optimizer).__name__} keeps state that does not belong to one parameter"
                return reason, "save a checkpoint and load it with the new plan"
        for name in self._leaving(self.rank):
            tensor = self.tensors[name]
            if id(tensor) not in steps and tensor.requires_grad and self.optimizers:
                return f"parameter {name!r} is to move, but no optimizer that was passed steps it", "pass all of them"
            if tensor.grad is not None and tensor.grad.layout != torch.strided:
                return f"parameter {name!r} is to move, but its gradient is sparse", "call zero_grad() first"
        return None

    def _groups(self) -> list[str]:
        """What is told of each group: its optimizer and its options."""
        own = (PARAMETERS, NAMES)
        return [
            f"{type(optimizer).__name__}({', '.join(f'{k}={v}' for k, v in sorted(group.items()) if k not in own)})"
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]

    def make(self) -> None:
        """Moves all that changes its process. All processes must be here, after ``check``."""
        ranks = range(len(self.before))
        packed = {name: self._packed(name) for rank in ranks for name in self._taken(rank, self.rank)}
        told = self.processes.row.gathered(packed)
        given = {r: tuple(self._given(r)) for r in ranks if self._taken(r, self.rank)}
        sources = [rank for rank in ranks if self._taken(self.rank, rank)]
        came = self.processes.passed(given, sources)
        for name in self._leaving(self.rank):
            self._leave(name)
        parameters = [name for name, t in self.tensors.items() if isinstance(t, nn.Parameter)]
        gone = self.before[self.rank].memory - self.after[self.rank].memory
        send_away(self.tensors[name] for name in parameters if name in gone)
        for source in sources:
            values = iter(came[source])
            for name in self._taken(self.rank, source):
                self._take(name, told[source][name], values)
        for optimizer in self.optimizers:
            if not any(group[PARAMETERS] for group in optimizer.param_groups):
                _add(optimizer.param_groups[0], self.stand_in, "")

    def _taken(self, rank: int, source: int) -> list[str]:
        """What a rank gets from another one: what it has no present value of, from the first that has one."""
        before, after, found = self.before[rank], self.after[rank], []
        for name, tensor in self.tensors.items():
            is_parameter = isinstance(tensor, nn.Parameter)
            begins = name in after.trained and name not in before.trained
            if begins or (name in after.memory and name not in before.memory):
                having = (each.trained if is_parameter else each.memory for each in self.before)
                if next((r for r, names in enumerate(having) if name in names), None) == source:
                    found.append(name)
        return found

    def _leaving(self, rank: int) -> list[str]:
        """The parameters that a rank trains no more."""
        gone = self.before[rank].trained - self.after[rank].trained
        return [name for name in self.tensors if name in gone]

    def _moves(self, name: str, rank: int) -> bool:
        """Whether a rank begins to train a parameter."""
        return name in self.after[rank].trained - self.before[rank].trained

    def _where(self, tensor: Tensor) -> tuple[int, int] | None:
        for number, optimizer in enumerate(self.optimizers):
            for place, group in enumerate(optimizer.param_groups):
                if any(tensor is other for other in group[PARAMETERS]):
                    return number, place
        return None

    def _packed(self, name: str) -> Packed:
        tensor = self.tensors[name]
        group, state = self._where(tensor), self._state(tensor)
        tensors = [tensor, *([] if tensor.grad is None else [tensor.grad]), *filter(_is_tensor, state.values())]
        plain = {key: value for key, value in state.items() if not _is_tensor(value)}
        return Packed(
            group=group,
            called=self._called(tensor),
            state=plain,
            keys=list(state),
            has_gradient=tensor.grad is not None,
            strides=[each.stride() for each in tensors],
        )

    def _called(self, tensor: Tensor) -> str:
        """The name of a tensor in its optimizer; empty if it has none."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for other, name in zip(group[PARAMETERS], group.get(NAMES, ()), strict=False):
                    if other is tensor:
                        return str(name)
        return ""

    def _state(self, tensor: Tensor) -> dict[str, Any]:
        where = self._where(tensor)
        return {} if where is None else dict(self.optimizers[where[0]].state.get(tensor, {}))

    def _given(self, rank: int) -> Iterator[Value]:
        """The tensors that a rank gets from this one, in an order that both know."""
        for name in self._taken(rank, self.rank):
            tensor = self.tensors[name]
            yield tensor.detach()
            if self._moves(name, rank):
                yield from (grad.detach() for grad in [tensor.grad] if grad is not None)
                yield from (value.detach() for value in self._state(tensor).values() if _is_tensor(value))

    def _leave(self, name: str) -> None:
        tensor = self.tensors[name]
        tensor.grad = None
        for optimizer in self.optimizers:
            optimizer.state.pop(tensor, None)
            for group in optimizer.param_groups:
                stays = [other is not tensor for other in group[PARAMETERS]]
                for own in (PARAMETERS, NAMES):
                    if own in group:
                        group[own][:] = compress(group[own], stays)

    def _take(self, name: str, packed: Packed, values: Iterator[Value]) -> None:
        tensor, strides = self.tensors[name], iter(packed.strides)
        value = _strided(next(values), next(strides))
        if is_away(tensor):
            bring(tensor, value)
        else:
            tensor.data.copy_(value)
        if not self._moves(name, self.rank):
            return
        if packed.has_gradient:
            tensor.grad = _strided(next(values), next(strides))
        if packed.group is None:
            return
        number, place = packed.group
        optimizer = self.optimizers[number]
        _add(optimizer.param_groups[place], tensor, packed.called)
        for key in packed.keys:
            is_plain = key in packed.state
            optimizer.state[tensor][key] = packed.state[key] if is_plain else _strided(next(values), next(strides))


def _add(group: dict[str, Any], tensor: Tensor, called: str) -> None:
    """Adds a parameter to a group of an optimizer, and its name if the others have theirs."""
    group[PARAMETERS].append(tensor)
    if NAMES in group:
        group[NAMES].append(called)


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _strided(value: Value, strides: Sequence[int]) -> Tensor:
    """A tensor that has come, with the strides that it had."""
    assert value is not None
    if value.stride() == tuple(strides):
        return value
    return torch.empty_strided(value.shape, tuple(strides), dtype=value.dtype).copy_(value)


def _of_parts() -> tuple[type, ...]:
    """Optimizers of torch that keep state of parts only. Their module is not imported: that takes long."""
    module = sys.modules.get("torch.distributed.optim")
    return () if module is None else (module.ZeroRedundancyOptimizer,)
