"""Divides a captured model into what runs on each microbatch and what runs once on the whole batch.

    before   values of the whole batch that follow from its inputs: the number of valid targets, the number of rows
    body     what the stages run on each microbatch, with sums over the batch weighted by each microbatch's share
    tail     everything after the first function that mixes samples (a contrastive loss, a balancing loss, a
             perplexity), and writes to buffers: runs once, on the joined values of the microbatches

A mean over the batch becomes a sum of parts: ``mean(x)`` of a microbatch is multiplied by its share of the rows, and a
cross entropy is summed and divided by the number of valid targets in the whole batch. Loss and gradients are then the
whole batch's. (The mean of the microbatches' means differs as soon as microbatches have different numbers of tokens.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.batch_norm import uses_batch_statistics
from pipecompile.batching.division import Before, Division, Tail
from pipecompile.batching.infer_batch_types import Analysis, analyse
from pipecompile.batching.rules import Instead, Recount, RowsArgument, Share, ShareArgument, Squeeze, WholeArgument
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Local, Mixed, Partial, is_mixed
from pipecompile.batching.rules.size_pair import Scale
from pipecompile.batching.tail_weights import MOST, share_of_weights, weights_of
from pipecompile.capture import Captured, Output
from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.call import SHARE
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import has_effect
from pipecompile.errors import CaptureError
from pipecompile.ops.functional import over, part_of, with_data
from pipecompile.ops.operators import taking_tensor
from pipecompile.ops.tensor_args import SILENT_WRITES


def divide(
    small: Captured, large: Captured, allowed: Iterable[str] = (), out_dims: Mapping[str, int | None] | None = None
) -> Division:
    """Divides a trace so that several microbatches give the values of the whole batch.

    Args:
        small: the trace of a microbatch.
        large: the trace of the whole batch by the same program; ``small`` itself if its batch is symbolic.
        allowed, out_dims: the user's options; see ``analyse``.

    Raises:
        CaptureError: samples mix in the body of the model.
        InputError: ``out_dims`` does not fit the outputs.
    """
    return _Divider(small, large, analyse(small, large, allowed, out_dims)).division()


def twins_differ(small: Captured, large: Captured) -> str:
    """Says where the traces of a microbatch and of the whole batch run different programs; empty if they do not."""
    mine, other = list(small.graph.nodes), list(large.graph.nodes)
    sizes = f"for a microbatch of {small.microbatch} rows and for a batch of {large.microbatch} rows"
    for a, b in zip(mine, other, strict=False):
        if (a.op, a.name) != (b.op, b.name):
            return f"{origin_of(a)}: the model calls different functions {sizes} ({a.name} and {b.name})"
    if len(mine) != len(other):
        return f"the model calls different numbers of functions {sizes} ({len(mine)} and {len(other)})"
    return ""


class _Divider:
    def __init__(self, small: Captured, large: Captured, analysis: Analysis) -> None:
        self.small, self.large, self.analysis = small, large, analysis
        self.written = {name for n in small.graph.nodes if _is_write(n) for name in origin_of(n).writes}
        self.twins = dict(zip(small.graph.nodes, large.graph.nodes, strict=True))
        self.before: dict[str, Before] = {}
        self.notes: list[str] = []
        self.tail_nodes: list[fx.Node] = []
        self.received: dict[fx.Node, None] = {}
        self.at_least = 1

    def division(self) -> Division:
        small = self.small
        outputs = {n.name: n for n in next(n for n in small.graph.nodes if n.op == "output").all_input_nodes}
        late = [n for n in outputs.values() if self._is_whole_only(n)]
        self._collect_tail([*late, *(n for n in small.graph.nodes if _is_write(n))])
        weights = self._weights_of_the_tail()
        given = [*(n for n in outputs.values() if n not in late), *self.received]
        body, copies = self._body(given)
        tail = None
        if self.tail_nodes:
            why = [n for n in self.tail_nodes if self._begins_mixing(n)]
            tail = Tail(
                nodes=tuple(n.name for n in self.tail_nodes),
                joined={n.name: copies[n].name for n in self.received},
                outputs=tuple(n.name for n in late),
                writes=tuple(sorted(self.written)),
                weights=weights,
                why=tuple(dict.fromkeys(f"{_why(self.analysis.kinds[n])[0]} ({origin_of(n)})" for n in why)),
            )
        joins = {copies[n].name: self._kind(n) for n in given if n in copies}
        places = {name: name if n in late else copies[n].name for name, n in outputs.items()}
        used = {n.name for n in body.graph.nodes if n.op == "placeholder"}
        before = tuple(b for b in self.before.values() if b.name in used)
        return Division(
            captured=small, whole=self.large, body=body, joins=joins, before=before, tail=tail, places=places,
            reweighted=tuple(dict.fromkeys(self.notes)), tried=self.analysis.tried,
            at_least=self.at_least, at_most=self.analysis.at_most,
            norms_apart=any(uses_batch_statistics(n) and self._is_apart(n) for n in copies),
        )  # fmt: skip

    def _kind(self, node: fx.Node) -> Kind:
        kind = self.analysis.kinds[node]
        assert not isinstance(kind, tuple)
        return kind

    def _is_apart(self, node: fx.Node) -> bool:
        kind = self.analysis.kinds[node]
        return isinstance(kind, Batched) and (kind.dim != 0 or kind.outer > 1 or kind.ragged)

    def _is_whole_only(self, node: fx.Node) -> bool:
        kind = self.analysis.kinds[node]
        return node in self.analysis.whole or (is_mixed(kind) and node not in self.analysis.inside)

    def _begins_mixing(self, node: fx.Node) -> bool:
        kind = self.analysis.kinds[node]
        return is_mixed(kind) and not any(is_mixed(self.analysis.kinds[n]) for n in node.all_input_nodes)

    # The tail

    def _collect_tail(self, roots: Iterable[fx.Node]) -> None:
        """Walks from values that need the whole batch up to inputs, attributes, and values of the body."""
        needed: set[fx.Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in needed or node in self.received:
                continue
            if not self._in_tail(node):
                self.received[node] = None
                continue
            needed.add(node)
            stack.extend(node.all_input_nodes)
        self.tail_nodes = [n for n in self.small.graph.nodes if n in needed]
        self.received = {n: None for n in self.small.graph.nodes if n in self.received}

    def _in_tail(self, node: fx.Node) -> bool:
        """Whether the tail computes a node, instead of joining the body's values of it."""
        if node in self.analysis.early or node.op in ("get_attr", "placeholder") or _is_write(node):
            return True
        if _is_size_of_inputs(node):
            return True
        return self._is_whole_only(node) or self._follows_a_write(node)

    def _follows_a_write(self, node: fx.Node) -> bool:
        """Whether a shared value reads a buffer that the forward writes."""
        if self.analysis.kinds[node] != SHARED:
            return False
        return any(
            (n.op == "get_attr" and str(n.target) in self.written) or _is_write(n) or self._follows_a_write(n)
            for n in node.all_input_nodes
        )

    def _weights_of_the_tail(self) -> tuple[str, ...]:
        """The weights that work on the whole batch.

        Refuses so many that the stages are left with too few, and a batch normalization of samples.
        """
        mixing = [n for n in self.tail_nodes if is_mixed(self.analysis.kinds[n]) and n not in self.analysis.early]
        weights = {n: found for n, found in weights_of(self.small, mixing).items() if found}
        names = tuple(dict.fromkeys(name for found in weights.values() for name in found))
        share = share_of_weights(self.small, names)
        first_mixing = next(iter(mixing), None)
        norm = next((n for n in mixing if uses_batch_statistics(n) and self._normalizes_samples(n)), None)
        if share > MOST:
            node, heavy = next(iter(weights.items()))
            reached = (
                f"{heavy[0]} ({origin_of(node)}); microbatches cannot give what the whole batch gives, and what works "
                f"on the whole batch has {share:.0%} of the weights (a third at most may run behind the stages)"
            )
        elif norm is not None:
            node = norm
            reached = (
                f"a batch normalization ({origin_of(norm)}), which would have the statistics of the whole batch, "
                f"unlike those of the stages"
            )
        elif first_mixing is not None and not self._stages_have_work():
            node = first_mixing
            reached = "all that computes with weights, so nothing is left to the stages"
        else:
            return names
        first = next((n for n in self.tail_nodes if self._begins_mixing(n) and n in ancestors([node])), node)
        path = origin_of(first).path
        accept = f", or let this module see one microbatch at a time: batching=Batching(allow_mixing=[{path!r}])"
        if not path:
            accept = (
                ", or, if a sample's result depends on it alone, move this into a module, which is tried out on samples"
            )
        why, instead = _why(self.analysis.kinds[node])
        if instead:
            raise CaptureError(f"{origin_of(first)}: {why}; {instead}, or use microbatches=1")
        raise CaptureError(
            f"{origin_of(first)}: samples of the batch mix here ({why}), and the result goes through {reached}; "
            f"use microbatches=1{accept}"
        )

    def _stages_have_work(self) -> bool:
        """Whether a value of samples is computed from weights before they mix."""
        weighted: set[fx.Node] = set()
        behind = set(self.tail_nodes)
        for node in self.small.graph.nodes:
            if node.op in ("get_attr", "call_module") or not weighted.isdisjoint(node.all_input_nodes):
                weighted.add(node)
                if node not in behind and isinstance(self.analysis.kinds.get(node), Batched | Partial):
                    return True
        return False

    def _normalizes_samples(self, norm: fx.Node) -> bool:
        """Whether the first dimension, which batch normalization takes for the batch, grows with the batch."""
        x = norm.kwargs.get("input", norm.args[0] if norm.args else None)
        return isinstance(x, fx.Node) and 0 in Scale(self.small, self.large).growing(x)

    # The body

    def _body(self, wanted: Iterable[fx.Node]) -> tuple[Captured, dict[fx.Node, fx.Node]]:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.small.graph.nodes:
            if node.op == "placeholder":
                copies[node] = graph.node_copy(node)
        self.inputs: dict[str, fx.Node] = {}
        self._taken = {node.name for node in self.small.graph.nodes}
        self.graph = graph
        self._first = graph.create_node("placeholder", SHARE, name=SHARE)
        self._first.meta["val"] = torch.empty((), dtype=torch.float64, device="meta")
        for node in self.small.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._copy(node, copies)
        wanted = list(wanted)
        self._refuse_the_unreachable([n for n in wanted if n not in copies])
        kept = [copies[n] for n in wanted]
        graph.output(tuple(dict.fromkeys(kept)))
        graph.eliminate_dead_code(is_impure_node=_must_stay)
        for node in [self._first, *self.inputs.values()]:
            if not node.users:
                graph.erase_node(node)
        outputs = tuple(_output(n) for n in dict.fromkeys(kept))
        alive = {n.name for n in graph.nodes}
        groups = [tuple(name for name in group if name in alive) for group in self.small.groups]
        groups = [group for group in groups if len(group) > 1]
        return replace(self.small, graph=graph, outputs=outputs, left=(), groups=tuple(groups), checked={}), copies

    def _refuse_the_unreachable(self, nodes: Iterable[fx.Node]) -> None:
        """Raises ``CaptureError`` for a value that is said to be of microbatches and is not computed in the body."""
        for node in nodes:
            late = next(n for n in self.small.graph.nodes if n in ancestors([node]) and self._begins_mixing(n))
            raise CaptureError(
                f"{origin_of(node)}: this is to see one microbatch at a time, but it reads what needs the whole batch "
                f"({origin_of(late)}); use microbatches=1, or name in Batching(allow_mixing=...) the module that mixes "
                f"samples first"
            )

    def _copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
        """Copies a node into the body, if the body computes it."""
        if node in self.analysis.whole:
            copies[node] = self._of_the_whole(node, self.analysis.kinds[node])
            return
        if self._is_whole_only(node) or any(n not in copies for n in node.all_input_nodes):
            return
        copy = self.graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr" and str(node.target) in self.written:
            copy = self._new(torch.clone, (copy,), f"{node.name}_before", node)  # the tail writes the buffer itself
        if _is_write(node):
            copy.meta["origin"] = replace(origin_of(node), writes=(), copies=origin_of(node).writes)
        copies[node] = self._edited(node, copy)

    def _of_the_whole(self, node: fx.Node, kind: Kind | tuple[Kind, ...]) -> fx.Node:
        """The input that holds an early value of the whole batch, or a microbatch's rows of it."""
        rows = kind if isinstance(kind, Batched) else None
        name = self._unused(f"{'rows' if rows else 'whole'}_{node.name}")
        return self._input(name, node.meta["val"], Before(name, node.name, rows))

    def _edited(self, node: fx.Node, copy: fx.Node) -> fx.Node:
        for edit in self.analysis.edits.get(node, ()):
            match edit:
                case WholeArgument(position):
                    number = self._whole_number(node, copy, position)
                    copy.update_arg(position, number)
                    if isinstance(number, fx.Node):
                        copy.target = taking_tensor(copy.target, position)
                case RowsArgument(position):
                    numbers = node.args[position]
                    assert isinstance(numbers, fx.Node)
                    kind = self.analysis.kinds[numbers]
                    assert isinstance(kind, Local)
                    copy.update_arg(position, self._of_the_whole(numbers, Batched(kind.dim)))
                case ShareArgument(position):
                    part = self._new(part_of, (copy.args[position], self._first), f"{node.name}_part", node)
                    part.meta["val"] = _part_of(copy.args[position])
                    copy.prepend(part)
                    copy.update_arg(position, part)
                    self.notes.append(f"added to each microbatch by its share of the rows: {origin_of(node)}")
                case Instead(function):
                    copy.target = function
                case Squeeze(dims):
                    copy.target, copy.args, copy.kwargs = torch.squeeze, (copy.args[0], dims), {}
                    self.at_least = 2
                case Share():
                    copy = self._new(part_of, (copy, self._first), f"{node.name}_share", node)
                    self.notes.append(f"mean over rows: {origin_of(node)}")
                case Recount():
                    copy = self._recounted(node, copy, edit)
                    self.notes.append(f"mean over valid targets: {origin_of(node)}")
        return copy

    def _recounted(self, node: fx.Node, copy: fx.Node, edit: Recount) -> fx.Node:
        name = self._unused(f"valid_{node.name}")
        weight = None if edit.weight is None else edit.weight.name
        dtype = torch.int64 if edit.weight is None else edit.weight.meta["val"].dtype
        value = torch.empty((), dtype=dtype, device="meta")
        ignored = edit.ignore_index.name if isinstance(edit.ignore_index, fx.Node) else edit.ignore_index
        total = self._input(name, value, Before(name, edit.target.name, count=(ignored, weight)))
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        arguments: dict[str, Any] = {**dict(zip(names, copy.args, strict=False)), **copy.kwargs}
        kept: dict[str, Any] = {
            k: arguments[k] for k in ("weight", "ignore_index", "label_smoothing") if k in arguments
        }
        assert callable(copy.target)
        new = self._new(
            over(copy.target), (total, arguments["input"], arguments["target"]), f"{node.name}_part", node, kept
        )
        self.graph.erase_node(copy)
        return new

    def _whole_number(self, node: fx.Node, copy: fx.Node, position: int) -> Any:
        """A number that counts samples of the whole batch: a constant of its trace, or an input."""
        argument, twin = node.args[position], self.twins[node].args[position]
        if not isinstance(argument, fx.Node):
            return twin
        name = self._unused(f"whole_{argument.name}")
        is_real = isinstance(argument.meta["val"], float | torch.SymFloat)
        value = torch.empty((), dtype=torch.float64 if is_real else torch.int64, device="meta")
        whole = self._input(name, value, Before(name, argument.name))
        dtype = _dtype_beside(node) if is_real else torch.int64
        if dtype == value.dtype:
            return whole
        fitting = self._new(torch.Tensor.to, (whole, dtype), f"{node.name}_whole", node)
        fitting.meta["val"] = value.to(dtype)
        copy.prepend(fitting)
        return fitting

    def _unused(self, name: str) -> str:
        """A name that no argument or node of the model has, always the same one."""
        while name in self._taken:
            name += "_"
        return name

    def _input(self, name: str, value: Any, before: Before) -> fx.Node:
        if name not in self.inputs:
            with self.graph.inserting_before(self._first):
                self.inputs[name] = self.graph.create_node("placeholder", name, name=name)
            self.inputs[name].meta["val"] = value
            self.before[name] = before
        return self.inputs[name]

    def _new(
        self, function: Any, args: tuple[Any, ...], name: str, like: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        new = self.graph.create_node("call_function", function, args, kwargs or {}, name=name)
        new.meta.update({**like.meta, "origin": replace(origin_of(like), writes=())})
        return new


def _must_stay(node: fx.Node) -> bool:
    """Whether a node of the body has an effect: a write past autograd changes backwards of earlier reads."""
    if node.op in ("placeholder", "output") or has_effect(node):
        return True
    if not origin_of(node).copies:
        return False
    return node.target is with_data or any(n.target is getattr and n.args[1] == "data" for n in ancestors([node]))


def _dtype_beside(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor that stands for a real number among a call's arguments, and promotes them no further.

    A tensor of float64 without dimensions is a number to tensors of floats that have dimensions, and only to them.
    """
    tensors = [value for n in node.all_input_nodes if isinstance(value := n.meta.get("val"), Tensor)]
    if any(it.ndim and (it.is_floating_point() or it.is_complex()) for it in tensors):
        return torch.float64
    return reduce(torch.promote_types, (torch.result_type(it, 1.0).to_real() for it in tensors))


def _is_size_of_inputs(node: fx.Node) -> bool:
    """Whether a node is a number that follows from the sizes of inputs, which may require a gradient."""
    if not isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return all(n.op == "placeholder" or _is_size_of_inputs(n) for n in node.all_input_nodes)


def _is_write(node: fx.Node) -> bool:
    """Whether a node writes a buffer itself, not inside batch norm or a module kept whole as a leaf."""
    return bool(origin_of(node).writes) and node.op != "call_module" and node.target not in SILENT_WRITES


def _why(kind: Kind | tuple[Kind, ...]) -> tuple[str, str]:
    """What mixes samples, or is in the way instead, and what to do about the latter."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return next(((k.why, k.instead) for k in kinds if isinstance(k, Mixed)), ("a buffer is written", ""))


def _part_of(argument: Any) -> Any:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, Tensor) else torch.empty((), dtype=torch.float64, device="meta")


def _output(node: fx.Node) -> Output:
    value = node.meta.get("val")
    wants = isinstance(value, Tensor) and value.requires_grad
    return Output(node.name, node.name, requires_grad=wants)
