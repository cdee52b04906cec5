"""The memory of one microbatch in a stage: bytes kept from its Forward to its Backward, and temporary bytes.

Both passes are simulated node by node, with the live storages after each. A value is live until its last reader has
run, a tensor that autograd keeps until the last backward that reads it, and a gradient from the first backward that
adds to it until the backward of its own node. Bytes are those of storages, so that views, and tensors that several
nodes keep, count once. Workspace inside kernels is not known.

A split backward (``ops/split_backward.py``) leaves the inputs of some functions, and the gradients of their outputs, to
the gradients of weights. A value that a stage of the same rank has made is in the memory of that one, which keeps it
until its own Backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from functools import cached_property

from pipecompile.ir.graph import CostedGraph, Footprint, Node
from pipecompile.ir.plan import Plan, members
from pipecompile.ir.split_nodes import split_nodes

IN_PLACE = frozenset(("linear", "addmm", "matmul"))  # split, these add to a gradient without memory beside it


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes per microbatch in one stage."""

    saved: int  # kept from Forward to Backward, without the following
    movable: int  # the part of it that an Offload takes to the host
    received: dict[int, int]  # by source stage: values, from arrival to Backward; none from a stage of the same rank
    returned: dict[int, int]  # by target stage: gradients of sent values, from arrival to Backward
    outputs: int  # its part of the model output, until the end of the step
    forward: int  # peak during the Forward, ``saved`` and ``outputs`` included
    backward: int  # peak during the Backward, beyond what exists before
    first_backward: int  # the same if the parameters have no gradients yet, those included
    split_backward: int  # the same of a Backward that leaves gradients of weights
    left: int  # kept from such a Backward to its BackwardWeight
    queued: int  # gradients of parameters that it leaves, and so does every other node that reads them
    weights: int  # peak during a BackwardWeight, beyond what exists before
    first_weights: int  # the same if the queued gradients do not exist yet, those included


def load(costed: CostedGraph, plan: Plan, stage: int) -> Load:
    """The memory of one microbatch in a stage."""
    walk = _Stage(costed, plan, stage)
    graph = costed.graph
    split_backward, left = walk.split_backward()
    return Load(
        saved=walk.bytes_of(walk.resting - walk.outputs),
        movable=walk.bytes_of(walk.movable),
        received={c.source: c.nbytes * (plan.rank_of[c.source] != plan.rank_of[stage]) for c in plan.incoming[stage]},
        returned={c.target: sum(_gradient_bytes(graph.nodes[i]) for i in c.values) for c in plan.outgoing[stage]},
        outputs=walk.bytes_of(walk.outputs),
        forward=walk.forward(),
        backward=walk.backward(first=False),
        first_backward=walk.backward(first=True),
        split_backward=split_backward,
        left=left,
        queued=sum(graph.parameter_bytes[name] for name in walk.queued),
        weights=walk.weights(first=False),
        first_weights=walk.weights(first=True),
    )


def _gradient_bytes(node: Node) -> int:
    return sum(spec.nbytes for spec in node.outputs if spec.requires_grad)


class _Stage:
    """The nodes and storages of one stage."""

    def __init__(self, costed: CostedGraph, plan: Plan, stage: int) -> None:
        self.costed, self.graph, self.again = costed, costed.graph, stage in plan.recomputed
        self.nodes = members(self.graph, plan, stage)
        here = set(self.nodes)
        self.received = self._values(v for channel in plan.incoming[stage] for v in channel.values)
        self.sent = {v for channel in plan.outgoing[stage] for v in channel.values}
        self.outputs = self._values(i for i in self.graph.outputs if i in here) - self.received
        self.trainable = {p.name for p in self.graph.parameters if p.spec.requires_grad}

    def bytes_of(self, storages: Iterable[int]) -> int:
        return sum(self.costed.storages[number] for number in storages)

    def _values(self, nodes: Iterable[int]) -> set[int]:
        return {number for i in nodes for number in self.costed.footprints[i].values}

    def _footprint(self, i: int) -> Footprint:
        """A node's footprint. If the whole stage is recomputed, its nodes form one stretch."""
        footprint = self.costed.footprints[i]
        if not self.again:
            return footprint
        if not footprint.repeats and self.graph.nodes[i].op != "input":
            return replace(
                footprint, saved=(*footprint.saved, *(n for n in footprint.values if n not in footprint.saved))
            )
        kept = footprint.values if self.graph.nodes[i].op == "input" else ()
        inner = footprint.saved if footprint.stretch is None else footprint.again
        return Footprint(
            values=footprint.values,
            saved=kept,
            forward_bytes=footprint.forward_bytes,
            backward_bytes=footprint.backward_bytes,
            again=inner,
            stretch=-1 if inner else None,
        )

    @cached_property
    def footprints(self) -> dict[int, Footprint]:
        return {i: self._footprint(i) for i in self.nodes}

    @cached_property
    def resting(self) -> set[int]:
        """Storages kept from the Forward to the Backward, without received ones."""
        saved = {number for footprint in self.footprints.values() for number in footprint.saved}
        return (saved | self._values(self.sent) | self.outputs) - self.received

    @cached_property
    def movable(self) -> set[int]:
        """Storages that only autograd keeps: not those sent, given to the model, or kept to recompute others."""
        kept = {n for it in self.footprints.values() if it.stretch is not None for n in it.saved}
        inputs = self._values(i for i in self.nodes if self.graph.nodes[i].op == "input")
        return self.resting - self._values(self.sent) - self.outputs - kept - inputs

    def forward(self) -> int:
        """Peak of the live bytes during the Forward."""
        last_read = {n: i for i in self.nodes for source in self.graph.nodes[i].inputs for n in self._values([source])}
        alive: set[int] = set()
        now = most = 0
        for i in self.nodes:
            footprint = self.footprints[i]
            most = max(most, now + footprint.forward_bytes)
            new = {*footprint.values, *footprint.saved} - alive - self.received
            dead = {n for n in alive | new if n not in self.resting and last_read.get(n, -1) <= i}
            now += self.bytes_of(new) - self.bytes_of(dead)
            alive = (alive | new) - dead
        return max(most, now)

    @cached_property
    def split(self) -> frozenset[int]:
        """The nodes whose weights a split backward leaves."""
        return split_nodes(self.costed, self.nodes, self.again)

    @cached_property
    def queued(self) -> set[str]:
        """The trainable parameters whose gradients come from gradients of weights alone."""
        read = {name for i in self.nodes if i not in self.split for name in self.graph.nodes[i].parameters}
        return {name for i in self.split for name in self.graph.nodes[i].parameters if name in self.trainable} - read

    def weights(self, first: bool) -> int:
        """Peak of the live bytes during a BackwardWeight, beyond those before it.

        It takes the nodes in the order of the Backward, and lets go of what each needed. Products of matrices are added
        to a gradient in place, other gradients are computed beside it.
        """
        inputs = Counter(number for i in self.split for number in self.footprints[i].saved)
        owners = self._backward(False, self.split)[1]
        gradients = Counter(owners.values())
        missing = set(self.queued) if first else set()
        now = most = 0
        for i in sorted(self.split, reverse=True):
            node, saved = self.graph.nodes[i], self.footprints[i].saved
            mine = self.trainable.intersection(node.parameters)
            now += sum(self.graph.parameter_bytes[name] for name in mine & missing)
            beside = [self.graph.parameter_bytes[name] for name in mine - missing if node.op not in IN_PLACE]
            missing -= mine
            most = max(most, now + max(beside, default=0))
            inputs.subtract(saved)
            now -= self.bytes_of(number for number in set(saved) if inputs[number] == 0)
            if i in owners:
                gradients[owners[i]] -= 1
                now -= _gradient_bytes(self.graph.nodes[owners[i]]) * (gradients[owners[i]] == 0)
        return most

    def backward(self, first: bool) -> int:
        """Peak of the live bytes during the Backward, beyond those before it."""
        return self._backward(first, set())[0]

    def split_backward(self) -> tuple[int, int]:
        """The same of a split one, and the bytes that it leaves."""
        most, owners = self._backward(False, self.split)
        inputs = {number for i in self.split for number in self.footprints[i].saved}
        kept = sum(_gradient_bytes(self.graph.nodes[owner]) for owner in set(owners.values()))
        return most, self.bytes_of(inputs) + kept

    def _backward(self, first: bool, split: Set[int]) -> tuple[int, dict[int, int]]:
        """The peak, and for each split node the value whose gradient it keeps."""
        held = self.received | self._values(self.sent) | self.outputs  # until the end of the whole backward
        held |= {number for i in split for number in self.footprints[i].saved}
        gradients = _Gradients(self.sent)
        kept = Counter(number for footprint in self.footprints.values() for number in footprint.saved)
        stretches = self._stretches()
        summed: set[str] = set()
        again: Counter[int] = Counter()
        freed = most = 0
        for i in reversed(self.nodes):
            node, footprint = self.graph.nodes[i], self.footprints[i]
            if footprint.stretch is not None and footprint.stretch in stretches:
                again = stretches.pop(footprint.stretch)
            now = self.bytes_of(again) + gradients.now - freed
            if _gradient_bytes(node):
                most = max(most, now + footprint.backward_bytes)
                for source in dict.fromkeys(node.inputs):
                    gradients.give(source, i, _gradient_bytes(self.graph.nodes[source]), footprint.backward_bytes == 0)
                new = {name for name in node.parameters if name in self.trainable} - summed
                summed |= new
                gradients.now += sum(self.graph.parameter_bytes[name] for name in new) * first
                if i not in split:
                    gradients.drop(i)
            kept.subtract(footprint.saved)
            freed += self.bytes_of(n for n in footprint.saved if kept[n] == 0 and n not in held)
            again.subtract(footprint.again)
            again = +again
            most = max(most, self.bytes_of(again) + gradients.now - freed)
        return most, {i: gradients.owner[i] for i in split if i in gradients.owner}

    def _stretches(self) -> dict[int, Counter[int]]:
        """For each stretch, the storages kept during its backward, and how many nodes keep each."""
        found: dict[int, Counter[int]] = {}
        for footprint in self.footprints.values():
            if footprint.stretch is not None:
                found.setdefault(footprint.stretch, Counter()).update(
                    n for n in footprint.again if n not in self.resting | self.received
                )
        return found


class _Gradients:
    """Gradients of values. Several may share a tensor, for example those of a view or a sum."""

    def __init__(self, received: set[int]) -> None:
        self.now = 0
        self.owner = {value: value for value in received}  # value -> the value whose gradient tensor it shares
        self.size = dict.fromkeys(received, 0)  # owner -> bytes; received gradients exist already

    def give(self, value: int, user: int, nbytes: int, shared: bool) -> None:
        """A user's backward adds to a value's gradient; ``shared``: it passes its own gradient on."""
        if value in self.owner or not nbytes:
            return
        if shared and user in self.owner:
            self.owner[value] = self.owner[user]
            return
        self.owner[value] = value
        self.size[value] = nbytes
        self.now += nbytes

    def drop(self, value: int) -> None:
        """Called when the value's own backward has run."""
        owner = self.owner.pop(value, None)
        if owner is not None and owner not in self.owner.values():
            self.now -= self.size.pop(owner)
