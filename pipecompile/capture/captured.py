"""A captured model: its torch.fx graph, what the trace depends on, and how values go in and come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.call import Call
from pipecompile.capture.checkpoint_regions import repeatable
from pipecompile.capture.input_reads import settled
from pipecompile.capture.opaque_calls import FunctionLeaf, Leaf, LeafCall, attribute_of
from pipecompile.capture.state.fingerprints import same
from pipecompile.capture.state.guards import Attributes, Update
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.errors import DependsOnData
from pipecompile.ops.symbols import resolve
from pipecompile.ops.torch_internals import pytree


@dataclass(frozen=True, slots=True)
class Output:
    """One leaf of the model's output: a tensor of the graph, a size, or a Python value that every call returns alike.

    ``batch_dim`` is the dimension along which the microbatches' parts are joined; None where there is none.
    """

    name: str  # "loss", "logits", "0"
    node: str | None  # the fx node's name
    value: Any = None
    batch_dim: int | None = None
    is_scalar: bool = False  # no dimension, floating point
    is_shared: bool = False  # computed from arguments without a batch alone, or from none
    requires_grad: bool = False


class SymbolicSizes(Flag):
    """Which sizes of a call may change without another trace."""

    NONE = 0
    BATCH = auto()
    LENGTHS = auto()

    def __str__(self) -> str:
        return " and ".join(str(part.name).lower() for part in self)


@dataclass(frozen=True)
class Captured:
    """The recording of one run of a model; see the package's docstring for what its graph may hold."""

    model: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor]  # real tensors met on the way that are no parameters or buffers of the model
    call: Call  # the sample
    device: torch.device  # that the trace was made for: constants of this device move with their stage
    microbatch: int  # rows of the sample that the trace was taken at
    symbolic: SymbolicSizes
    outputs: tuple[Output, ...]
    left: tuple[Output, ...]  # tensors that the forward leaves behind, beside its outputs
    out_spec: pytree.TreeSpec
    sizes: Mapping[sympy.Symbol, tuple[str, int]]  # symbol -> placeholder, dimension
    shapes: Mapping[str, tuple[Any, ...]]  # placeholder -> expected sizes: expressions or numbers
    guards: tuple[tuple[sympy.Basic, Any], ...]  # what Python asked, then what functions needed
    assumed: tuple[tuple[sympy.Basic, Any], ...]  # the latter
    reads: fx.GraphModule | None  # computes what Python read from the inputs
    read_values: tuple[Any, ...]
    read_extremes: tuple[bool, ...]  # whether a value is the largest or smallest of all
    leaves: Mapping[str, tuple[LeafCall, ...]]  # modules kept whole, by path: the calls of each
    groups: tuple[tuple[str, ...], ...]  # nodes that share memory which one of them writes
    recomputed: Mapping[str, int]  # nodes that the backward computes again -> the checkpoint they stand in
    attributes: Attributes  # Python attributes that the trace holds for, and what it makes of them
    notes: tuple[str, ...]  # what the user should know
    numbers: Mapping[str, Update] = field(default_factory=dict)  # inputs that Python computes before each call
    draws_whole: bool = False  # whether a part that is kept whole draws random numbers of Python or numpy
    returns: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # module calls as they end: path, nodes of the output
    data_sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)  # what planning takes other symbols for
    written_inputs: Mapping[str, str] = field(default_factory=dict)  # tensors of the call -> what is written to them
    checked: dict[tuple[int, ...], str] = field(default_factory=dict)  # answers of _check_sizes, by sizes

    @property
    def results(self) -> tuple[Output, ...]:
        """What the graph gives: the tensors among the outputs, and what the forward leaves behind."""
        return (*(output for output in self.outputs if output.node is not None), *self.left)

    @cached_property
    def repeatable(self) -> frozenset[str]:
        """The names of the nodes that a backward may compute again."""
        return repeatable(self.graph, self.groups)

    def leaf(self, target: str, tensors: Mapping[str, Tensor]) -> Leaf:
        """What a ``call_module`` node runs, on given parameters and buffers by full name."""
        return Leaf(self.leaves[self._path_of(target)], tensors)

    def leaf_call(self, node: fx.Node) -> LeafCall | None:
        """The call of a part kept whole that a node stands for."""
        if isinstance(node.target, FunctionLeaf):
            return node.target.call
        if node.op != "call_module":
            return None
        return self.leaves[self._path_of(str(node.target))][node.args[0]]  # type: ignore[index]

    def leaf_parameters(self, target: str) -> tuple[str, ...]:
        """The names of the parameters that a ``call_module`` node reads."""
        path = self._path_of(target)
        named = self.model.named_parameters(remove_duplicate=False)
        own = (self.first_names[id(p)] for name, p in named if name.startswith(f"{path}."))
        return tuple(dict.fromkeys(own))

    def _path_of(self, target: str) -> str:
        """The path of a module kept whole, by its name in the graph."""
        return next(path for path in self.leaves if attribute_of(path) == target)

    @property
    def first_names(self) -> dict[int, str]:
        """The first name of each parameter and buffer, by identity: tied ones have several."""
        return {id(tensor): name for name, tensor in reversed(named_tensors(self.model))}

    @property
    def leaf_writes(self) -> dict[str, str]:
        """Modules kept whole that write to a parameter of their own, with its name in them."""
        return {path: call.writes[0] for path, calls in self.leaves.items() for call in calls if call.writes}

    @property
    def is_fixed(self) -> bool:
        """Whether the trace holds for its own number of rows alone."""
        if self.call.batch is None:
            return True
        more = max(2, self.microbatch) + 1
        sizes = {n: (more, *t.shape[1:]) if n in self.call.batched else t.shape for n, t in self.call.tensors.items()}
        return bool(self.misfit({n: torch.empty(size, device="meta") for n, size in sizes.items()}))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the graph may read, by name: the model's parameters and buffers, and constants."""
        return {**dict(named_tensors(self.model)), **self.constants}

    def filled(self, call: Call) -> Call:
        """A call with the numbers that the graph takes beside its arguments."""
        if not self.numbers:
            return call
        state = self.attributes.state(self.size_values(call.tensors), {})
        numbers = {
            name: torch.tensor(of(state), dtype=self.call.tensors[name].dtype) for name, of in self.numbers.items()
        }
        return replace(call, tensors={**call.tensors, **numbers})

    def size_values(self, tensors: Mapping[str, Tensor]) -> dict[sympy.Symbol, int]:
        """The sizes' symbols for a set of inputs."""
        return {symbol: int(tensors[name].shape[dim]) for symbol, (name, dim) in self.sizes.items()}

    @property
    def sample_sizes(self) -> dict[sympy.Symbol, int]:
        """All symbols of the graph, as they are for the sample microbatch."""
        return {**sample_sizes(self.sizes, self.call, self.microbatch), **self.data_sizes}

    def sample_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input at the sample microbatch."""
        shape = tuple(self.call.tensors[name].shape)
        return (self.microbatch, *shape[1:]) if name in self.call.batched else shape

    def broken_guard(self, microbatches: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
        """Why the trace does not hold for the inputs of all microbatches, and of the whole batch; empty if it does."""
        for microbatch in microbatches:
            key = tuple(size for name in self.shapes for size in microbatch[name].shape)
            if key not in self.checked:
                self.checked[key] = self._check_sizes(microbatch)
            if self.checked[key]:
                return self.checked[key]
        return self.misread(microbatches, whole)

    def misfit(self, microbatch: Mapping[str, Tensor]) -> str:
        """Why the trace's functions cannot run on inputs of these sizes; empty if they can.

        What the model's Python asked about sizes is left aside: a part of a batch is run as the batch would be.
        """
        return self._check_shapes(microbatch) or self._check_guards(self.assumed, microbatch)

    def _check_sizes(self, microbatch: Mapping[str, Tensor]) -> str:
        return self._check_shapes(microbatch) or self._check_guards(self.guards, microbatch)

    def _check_shapes(self, microbatch: Mapping[str, Tensor]) -> str:
        values = self.size_values(microbatch)
        for name, shape in self.shapes.items():
            for dim, size in enumerate(shape):
                expected, seen = resolve(size, values), int(microbatch[name].shape[dim])
                if expected != seen:
                    return f"dimension {dim} of {name!r} is {seen}, the trace holds for {expected}"
        return ""

    def _check_guards(self, guards: Sequence[tuple[sympy.Basic, Any]], microbatch: Mapping[str, Tensor]) -> str:
        values = self.size_values(microbatch)
        for expr, answer in guards:
            if resolve(expr, values) != resolve(answer, values):
                return f"{expr} = {answer} does not hold for the sizes {values}"
        return ""

    def misread(self, microbatches: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
        """Why what Python reads from inputs is not what the trace holds for; empty if it is."""
        if self.reads is None:
            return ""
        parts = [self._read(microbatch) for microbatch in microbatches]
        for i, (expected, extreme) in enumerate(zip(self.read_values, self.read_extremes, strict=True)):
            try:
                seen = settled([part[i] for part in parts], lambda i=i: self._read(whole)[i], extreme)  # type: ignore[misc]
            except DependsOnData as error:
                return str(error)
            if not same(seen, expected):
                return f"the model reads {seen} from its inputs, the trace holds for {expected}"
        return ""

    def _read(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What Python reads from inputs."""
        assert self.reads is not None
        wanted = [node.name for node in self.reads.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            values: tuple[Any, ...] = self.reads(*(inputs[name] for name in wanted))
        return values

    def rebuild_output(self, values: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Any:
        """The model's own output type with the given tensors by node name; sizes are those of the inputs."""
        sizes = self.size_values(inputs)
        leaves = [resolve(o.value, sizes) if o.node is None else values[o.node] for o in self.outputs]
        return pytree.tree_unflatten(leaves, self.out_spec)


def sample_sizes(sizes: Mapping[sympy.Symbol, tuple[str, int]], call: Call, microbatch: int) -> dict[sympy.Symbol, int]:
    """The values of the inputs' size symbols for a microbatch of a call."""
    whole = {symbol: int(call.tensors[name].shape[dim]) for symbol, (name, dim) in sizes.items()}
    rows = {symbol for symbol, (name, dim) in sizes.items() if dim == 0 and name in call.batched}
    return {symbol: microbatch if symbol in rows else size for symbol, size in whole.items()}


def device_of(model: nn.Module, call: Call) -> torch.device:
    """Where a model is; one without tensors is where its inputs are."""
    tensors = [*model.parameters(), *model.buffers(), *call.tensors.values()]
    return tensors[0].device if tensors else torch.device("cpu")
