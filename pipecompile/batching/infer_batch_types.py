"""Infers the kind of every value of a captured model: how a microbatch's value relates to the whole batch's.

torch's DTensor propagates similar kinds over a mesh of devices (Shard, Replicate, Partial). Where an operation mixes
shards, it gathers them, which microbatches that run one after the other cannot do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching.rules import RULES, Answer, Edit, Edited, Use, WholeArgument
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed, Partial, Shared, is_mixed
from pipecompile.batching.rules.numbers import counts_samples
from pipecompile.batching.rules.size_pair import Scale
from pipecompile.batching.separability_trial import Experiment
from pipecompile.batching.trial_samples import Samples
from pipecompile.capture import Captured
from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import has_effect, name_of
from pipecompile.errors import InputError
from pipecompile.ops.functional import number
from pipecompile.ops.operators import function_of, is_opaque
from pipecompile.ops.torch_internals import pytree


@dataclass(frozen=True)
class Analysis:
    """The kinds of a graph's values, and the edits that make them hold.

    Attributes:
        kinds: by node; for a node that gives a tuple, the kind of each item.
        edits: edits of calls, by node.
        early: nodes that are computed from inputs alone: the whole batch's value is known before the step.
        whole: early nodes that are replaced by the whole batch's value, or by a microbatch's rows of it.
        inside: nodes inside modules that passed an experiment as a whole; no other module reads them.
        tried: places of modules and functions without a rule whose samples stayed apart in an experiment.
        at_most: the sizes (symbols) that experiments ran on and that their results may depend on.
    """

    kinds: Mapping[fx.Node, Kind | tuple[Kind, ...]]
    edits: Mapping[fx.Node, tuple[Edit, ...]]
    early: frozenset[fx.Node]
    whole: frozenset[fx.Node]
    inside: frozenset[fx.Node]
    tried: tuple[str, ...]
    at_most: Mapping[Any, int]


def analyse(
    small: Captured, large: Captured, allowed: Iterable[str] = (), out_dims: Mapping[str, int | None] | None = None
) -> Analysis:
    """Infers the kinds of a trace's values.

    Args:
        small: the trace of a microbatch.
        large: the trace of the whole batch, with the same nodes; ``small`` itself if its batch is symbolic.
        allowed: paths of modules that may mix samples; they see one microbatch at a time.
        out_dims: by name of an output, the dimension along which the microbatches' values are joined, or None to take
            the first microbatch's value. Nodes that only such outputs depend on may mix samples too.

    Raises:
        InputError: ``out_dims`` names an unknown output, or a dimension that does not grow with the batch.
    """
    return _Analyst(small, large, tuple(allowed), out_dims or {}).run()


@dataclass
class _Analyst:
    small: Captured
    large: Captured
    allowed: tuple[str, ...]
    out_dims: Mapping[str, int | None]
    kinds: dict[fx.Node, Kind | tuple[Kind, ...]] = field(default_factory=dict)
    edits: dict[fx.Node, tuple[Edit, ...]] = field(default_factory=dict)
    early: set[fx.Node] = field(default_factory=set)
    whole: set[fx.Node] = field(default_factory=set)
    inside: set[fx.Node] = field(default_factory=set)
    tried: list[str] = field(default_factory=list)
    sizes: set[Any] = field(
        default_factory=set
    )  # symbols of the larger trace, in the values that experiments have computed

    def run(self) -> Analysis:
        self.scale = Scale(self.small, self.large)
        self.samples = Samples(self.small, self.large, self.scale, self.kinds)
        self.experiment = Experiment(self.samples)
        self.written = {name for n in self.small.graph.nodes for name in origin_of(n).writes}
        self.parameters = dict(self.small.model.named_parameters(remove_duplicate=False))
        joined = joined_by_hand(self.small, self.out_dims)
        others = [n for n in _outputs(self.small.graph) if n not in joined]
        self.own = ancestors(joined) - ancestors(others)
        for node in self.small.graph.nodes:
            if node.op == "output":
                continue
            if self._is_early(node):
                self.early.add(node)
            if node in self.kinds:
                continue
            self._settle(node, self._answer(node))
        for node, (name, dim) in joined.items():
            if node not in self.whole and not is_mixed(self.kinds[node]):
                self.kinds[node] = self._joined(node, name, dim)
        return Analysis(
            kinds=self.kinds, edits=self.edits, early=frozenset(self.early), whole=frozenset(self.whole),
            inside=frozenset(self.inside), tried=tuple(dict.fromkeys(self.tried)),
            at_most={symbol: size for symbol, size in self.scale.sizes_tried.items() if symbol in self.sizes},
        )  # fmt: skip

    def _is_early(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) not in self.parameters and str(node.target) not in self.written
        if _wants_gradient(node):
            return False  # it depends on an input that requires a gradient, which only the step can compute
        return node.op != "call_module" and not has_effect(node) and all(n in self.early for n in node.all_input_nodes)

    def _answer(self, node: fx.Node) -> Answer:
        if node.op == "placeholder":
            return Batched(0) if node.name in self.small.call.batched else SHARED
        if node.op == "get_attr" or node.op == "call_method" or node.target is number or self._is_number(node):
            return SHARED
        mixed = [kind for n in node.all_input_nodes if isinstance(kind := self.kinds[n], Mixed)]
        if mixed:
            return mixed[0]
        known = RULES.get(function_of(node.target)) if node.op == "call_function" else None
        if known is None:
            return self._unruled(node)
        name, rule = known
        use = Use(node=node, name=name, kinds=self.kinds, scale=self.scale, early=self.early)
        try:
            answer = rule(use)
        except (
            IndexError,
            KeyError,
            AttributeError,
            TypeError,
            ValueError,
        ):  # a form of the call that the rule does not cover
            return self._unruled(node)
        return self._checked(use, answer)

    def _checked(self, use: Use, answer: Answer) -> Answer:
        """The answer if it fits the result's sizes at both batches, and numbers that count samples; else mixed."""
        kind = answer.kind if isinstance(answer, Edited) else answer
        if kind is None or is_mixed(kind):
            return answer
        handled = isinstance(answer, Edited) and any(isinstance(edit, WholeArgument) for edit in answer.edits)
        if counts_samples(node := use.node, self.scale) and not handled:
            return use.mixed(f"{name_of(node)} with a number that depends on the batch size", certain=True)
        kinds = list(enumerate(kind)) if isinstance(kind, tuple) else [(None, kind)]
        fits = all(self.scale.fits(use.node, item, one) for item, one in kinds)
        return answer if fits else use.mixed(f"{use.name} with sizes that do not grow with the batch")

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a node computes a size."""
        value = node.meta.get("val")
        return not isinstance(value, Tensor | tuple | list) and not any(
            isinstance(n.meta.get("val"), Tensor | tuple | list) for n in node.all_input_nodes
        )

    def _unruled(self, node: fx.Node) -> Answer:
        """A function without a rule: shared if its arguments are, else left to an experiment."""
        kinds = [self.kinds[n] for n in node.all_input_nodes]
        if all(isinstance(kind, Shared) for kind in kinds) and not self.scale.growing(node):
            if is_opaque(node.target) and _wants_gradient(node) and not self.experiment.adds_up(node):
                why = f"the backward of {name_of(node)} is not linear in the incoming gradients"
                return self._written_gradient(node) or Mixed(why, certain=True)
            items = self.scale.shapes(node)
            return SHARED if self.scale.shape(node) is not None else (SHARED,) * len(items)
        return None

    def _settle(self, node: fx.Node, answer: Answer) -> None:
        kind: Kind | tuple[Kind, ...] | None = answer.kind if isinstance(answer, Edited) else answer
        if node in self.early and self._is_of_the_whole(node, answer, kind):
            self.whole.add(node)
            self.kinds[node] = SHARED
            return
        if node in self.early and isinstance(kind, Mixed) and isinstance(own := self.samples.by_growth(node), Batched):
            self.whole.add(node)  # it counts samples: each microbatch gets its rows of the whole batch's value
            self.kinds[node] = own
            return
        if isinstance(kind, Partial) and self._may_mix(node):
            self.kinds[node] = SHARED
            return
        if kind is None or is_mixed(kind):
            spoilt = any(is_mixed(self.kinds[n]) for n in node.all_input_nodes)
            certain = isinstance(kind, Mixed) and kind.certain
            if self._allowed(node) or (not spoilt and self._try_out(node, by_itself=not certain)):
                return
            kind = kind or self._written_gradient(node) or Mixed(f"{name_of(node)}, which has no rule")
        if isinstance(answer, Edited):
            self.edits[node] = answer.edits
        self.kinds[node] = kind

    def _written_gradient(self, node: fx.Node) -> Mixed | None:
        """Why a function is not divided whose backward writes where it must not; None for any other."""
        if not (is_opaque(node.target) and _wants_gradient(node) and self.experiment.writes_gradients(node)):
            return None
        return Mixed(
            f"the backward of {name_of(node)} writes into the gradient that comes into it, which others may still read",
            certain=True,
            instead="return a new tensor from it (grad * 2 in place of grad.mul_(2))",
        )

    def _is_of_the_whole(self, node: fx.Node, answer: Answer, kind: Kind | tuple[Kind, ...] | None) -> bool:
        """Whether only the whole batch gives an early value, whose shape does not depend on the batch size."""
        if not (isinstance(answer, Edited) or isinstance(kind, Partial | Mixed)) or isinstance(kind, Batched):
            return False
        return not self.scale.growing(node) and self.scale.shape(node) is not None

    def _joined(self, node: fx.Node, name: str, dim: int | None) -> Kind:
        """The kind that ``out_dims`` gives an output."""
        shape = self.scale.shape(node) or ()
        grows = self.scale.growing(node)
        at = None if dim is None else dim % len(shape)
        kind = SHARED if at is None else Batched(at, 1, shape[at] // self.scale.rows)
        if not self.scale.fits(node, None, kind):
            raise InputError(
                f"out_dims= gives {dim} for output {name!r}, but the dimensions of its shape {shape} (at "
                f"{self.scale.rows} rows) that grow with the batch are {list(grows)}; give one whose size is a "
                f"multiple of the rows, or None if the shape does not grow"
            )
        return kind

    def _may_mix(self, node: fx.Node) -> bool:
        if node in self.own:
            return True
        path = origin_of(node).path
        return any(path == name or path.startswith(f"{name}.") for name in self.allowed)

    def _allowed(self, node: fx.Node) -> bool:
        """Whether a node may mix samples by the user's options; its value is then each microbatch's own."""
        if not self._may_mix(node):
            return False
        kind = self.samples.by_growth(node)
        self.kinds[node] = tuple(map(_own, kind)) if isinstance(kind, tuple) else _own(kind)
        return True

    def _try_out(self, node: fx.Node, by_itself: bool = True) -> bool:
        """Finds the node itself, or the smallest module around it, that keeps samples apart as a whole."""
        for region in islice(regions(node, self.small.graph), 0 if by_itself else 1, None):
            if len(region) > LARGEST_REGION or any(n in self.kinds and is_mixed(self.kinds[n]) for n in region):
                return False
            found = self.experiment.kinds_of(region)
            if found is None:
                continue
            for inner in region:
                self.inside.add(inner)
                self.kinds[inner] = found.get(inner, SHARED)
                self.edits.pop(inner, None)
                self.whole.discard(inner)
            self.inside -= set(found)
            self.tried.append(str(origin_of(node)))
            seen = {n for inner in region for n in (inner, *inner.all_input_nodes)}
            self.sizes |= {symbol for n in seen for symbol in _symbols(self.scale.twin[n])}
            return True
        return False


def _symbols(node: fx.Node) -> Iterator[Any]:
    """The symbols in the sizes of a node's tensors, or in its number."""
    for value in pytree.tree_leaves(node.meta.get("val")):
        for size in value.shape if isinstance(value, Tensor) else [value]:
            if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                yield from size.node._expr.free_symbols


def _own(kind: Kind) -> Kind:
    """The kind of a value of a module that may mix samples: without a batch, each microbatch uses its own."""
    return SHARED if isinstance(kind, Mixed) else kind


def joined_by_hand(captured: Captured, out_dims: Mapping[str, int | None]) -> dict[fx.Node, tuple[str, int | None]]:
    """The outputs in ``out_dims``, with their names and dimensions.

    Raises:
        InputError: the model has no output of a name, or the output does not have the dimension.
    """
    names = {output.name: output.node for output in captured.outputs if output.node is not None}
    for name in out_dims:
        if name not in names:
            raise InputError(
                f"out_dims= names {name!r}, which is not an output of the model; its outputs are {', '.join(names)}"
            )
    nodes = {n.name: n for n in _outputs(captured.graph)}
    for name, dim in out_dims.items():
        shape = tuple(nodes[names[name]].meta["val"].shape)
        if dim is not None and not -len(shape) <= dim < len(shape):
            raise InputError(
                f"out_dims= gives {dim} for output {name!r}, which has {len(shape)} dimensions; give one of "
                f"them, or None"
            )
    return {nodes[names[name]]: (name, dim) for name, dim in out_dims.items()}


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)


def _wants_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(item, Tensor) and item.requires_grad for item in items)


LARGEST_REGION = 600  # nodes; larger modules are not run by experiments


def regions(node: fx.Node, graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The node by itself, then the calls of the modules around it, from the innermost outwards."""
    yield [node]
    nodes = [n for n in graph.nodes if n.op not in ("output", "placeholder", "get_attr")]
    at = nodes.index(node)
    path = origin_of(node).path
    while path:
        first = last = at
        while first > 0 and _within(nodes[first - 1], path):
            first -= 1
        while last + 1 < len(nodes) and _within(nodes[last + 1], path):
            last += 1
        yield nodes[first : last + 1]
        path = path.rpartition(".")[0]


def _within(node: fx.Node, path: str) -> bool:
    origin = origin_of(node)
    if not origin.path and not origin.source:
        return True  # added by the tracer
    return origin.path == path or origin.path.startswith(f"{path}.")
