"""A captured model: its torch.fx graph, its guards, and how inputs and outputs map to the graph."""

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
from pipecompile.capture.purity import is_random
from pipecompile.capture.state.fingerprints import same
from pipecompile.capture.state.guards import Attributes, Update
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.errors import DependsOnData
from pipecompile.ops.module_tree import called_bare
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.symbols import resolve
from pipecompile.ops.torch_internals import pytree


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor of the call, which forward returns as it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Output:
    """One leaf of the model's output: a tensor of the graph, a size, or a Python value that is the same in every call.

    Attributes:
        name: Path in the output: ``"loss"``, ``"logits"``, ``"0"``.
        node: Name of the fx node; None if the graph does not compute the output.
        value: The size, as an expression, or the Python value, or ``Given``.
        batch_dim: Dimension along which the microbatches are joined; None if the output has no batch.
        is_scalar: Whether it is a floating-point tensor without dimensions.
        is_shared: Whether it depends on no batched argument.
        requires_grad: Whether it requires grad.
        retains_grad: Whether forward has called ``retain_grad()`` on it.
        is_dropped: Whether it is a tensor that the user does not want, and is None instead.
    """

    name: str
    node: str | None
    value: Any = None
    batch_dim: int | None = None
    is_scalar: bool = False
    is_shared: bool = False
    requires_grad: bool = False
    retains_grad: bool = False
    is_dropped: bool = False


class SymbolicSizes(Flag):
    """Which sizes of a call may change without a recapture."""

    NONE = 0
    BATCH = auto()
    LENGTHS = auto()

    def __str__(self) -> str:
        return " and ".join(str(part.name).lower() for part in self)


@dataclass(frozen=True)
class Captured:
    """One capture of a model. The package docstring lists what its graph contains."""

    model: nn.Module
    graph: fx.Graph
    constants: Mapping[str, Tensor]  # real tensors that forward uses and that are not parameters or buffers
    call: Call  # the sample
    device: torch.device  # of the trace; constants on this device move with their stage
    microbatch: int  # rows of the sample that was traced
    symbolic: SymbolicSizes
    outputs: tuple[Output, ...]
    left: tuple[Output, ...]  # tensors that forward stores somewhere, in addition to its outputs
    out_spec: pytree.TreeSpec
    sizes: Mapping[sympy.Symbol, tuple[str, int]]  # symbol -> placeholder, dimension
    shapes: Mapping[str, tuple[Any, ...]]  # placeholder -> expected sizes: expressions or numbers
    guards: tuple[tuple[sympy.Basic, Any], ...]  # what Python asked about sizes, then what functions needed
    assumed: tuple[tuple[sympy.Basic, Any], ...]  # only what functions needed
    reads: fx.GraphModule | None  # computes the values that Python read from the inputs
    read_values: tuple[Any, ...]
    read_extremes: tuple[bool, ...]  # whether a value is the largest or smallest entry of a tensor
    leaves: Mapping[str, tuple[LeafCall, ...]]  # path of a module kept whole -> its calls
    groups: tuple[tuple[str, ...], ...]  # nodes that share memory which one of them writes
    recomputed: Mapping[str, int]  # node recomputed in the backward -> number of its checkpoint
    attributes: Attributes  # guards on Python attributes, and their updates
    notes: tuple[str, ...]  # for the user
    numbers: Mapping[str, Update] = field(default_factory=dict)  # inputs that Python computes before each call
    draws_whole: bool = False  # whether a part kept whole draws random numbers of Python or numpy
    returns: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # module calls as they end: path, nodes of the output
    data_sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)  # values that planning uses for other symbols
    written_inputs: Mapping[str, str] = field(default_factory=dict)  # tensor of the call -> node written to it
    checked: dict[tuple[int, ...], str] = field(default_factory=dict)  # results of _check_sizes, by sizes
    fitted: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False, compare=False)  # of misfit
    read_before: dict[tuple[torch.Size, ...], tuple[Any, ...]] = field(  # results of _read, by sizes, if these decide
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def results(self) -> tuple[Output, ...]:
        """The results of the graph: the tensors among the outputs, and those that forward stores somewhere."""
        return (*(output for output in self.outputs if output.node is not None), *self.left)

    @cached_property
    def repeatable(self) -> frozenset[str]:
        """The names of the nodes that a backward may recompute."""
        return repeatable(self.graph, self.groups)

    def leaf(self, target: str, tensors: Mapping[str, Tensor]) -> Leaf:
        """Returns what a ``call_module`` node runs, on the given parameters and buffers by full name."""
        return Leaf(self.leaves[self._path_of(target)], tensors)

    def leaf_call(self, node: fx.Node) -> LeafCall | None:
        """Returns the call of a part kept whole that a node represents, or None."""
        if isinstance(node.target, FunctionLeaf):
            return node.target.call
        if node.op != "call_module":
            return None
        return self.leaves[self._path_of(str(node.target))][node.args[0]]  # type: ignore[index]

    def leaf_parameters(self, target: str) -> tuple[str, ...]:
        """Returns the names of the parameters that a ``call_module`` node reads."""
        path = self._path_of(target)
        named = self.model.named_parameters(remove_duplicate=False)
        own = (self.first_names[id(p)] for name, p in named if name.startswith(f"{path}."))
        return tuple(dict.fromkeys(own))

    def _path_of(self, target: str) -> str:
        """Returns the path of a module kept whole, from its name in the graph."""
        return next(path for path in self.leaves if attribute_of(path) == target)

    @property
    def first_names(self) -> dict[int, str]:
        """The first name of each parameter and buffer, by identity; a tied one has several names."""
        return {id(tensor): name for name, tensor in reversed(named_tensors(self.model))}

    @property
    def leaf_writes(self) -> dict[str, str]:
        """The paths of modules kept whole that write to one of their parameters -> the parameter's name in them."""
        return {path: call.writes[0] for path, calls in self.leaves.items() for call in calls if call.writes}

    @property
    def is_fixed(self) -> bool:
        """Whether the capture is valid only for its own number of rows."""
        if self.call.batch is None:
            return True
        more = max(2, self.microbatch) + 1
        sizes = {n: (more, *t.shape[1:]) if n in self.call.batched else t.shape for n, t in self.call.tensors.items()}
        return bool(self.misfit({n: torch.empty(size, device="meta") for n, size in sizes.items()}))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the graph may read, by name: parameters, buffers and constants."""
        return {**dict(named_tensors(self.model)), **self.constants}

    def filled(self, call: Call) -> Call:
        """Returns the call with the numbers that the graph takes in addition to its arguments."""
        if not self.numbers:
            return call
        state = self.attributes.state(self.size_values(call.tensors), {})
        numbers = {
            name: torch.tensor(of(state), dtype=self.call.tensors[name].dtype) for name, of in self.numbers.items()
        }
        return replace(call, tensors={**call.tensors, **numbers})

    def size_values(self, tensors: Mapping[str, Tensor]) -> dict[sympy.Symbol, int]:
        """Returns the values of the size symbols for a set of inputs."""
        return {symbol: int(tensors[name].shape[dim]) for symbol, (name, dim) in self.sizes.items()}

    @property
    def sample_sizes(self) -> dict[sympy.Symbol, int]:
        """The values of all size symbols of the graph for the sample microbatch."""
        return {**sample_sizes(self.sizes, self.call, self.microbatch), **self.data_sizes}

    def sample_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an input for the sample microbatch."""
        shape = tuple(self.call.tensors[name].shape)
        return (self.microbatch, *shape[1:]) if name in self.call.batched else shape

    def broken_guard(self, microbatches: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
        """Returns why the capture is not valid for the inputs of a microbatch or the batch; empty if it is valid."""
        for microbatch in microbatches:
            key = self._sizes(microbatch)
            if key not in self.checked:
                self.checked[key] = self._check_sizes(microbatch)
            if self.checked[key]:
                return self.checked[key]
        return self.misread(microbatches, whole)

    def misfit(self, microbatch: Mapping[str, Tensor]) -> str:
        """Returns why the functions of the graph cannot run on inputs of these sizes; empty if they can.

        Guards on what the model's Python asked about sizes are not checked: a part of a batch runs as the batch would.
        """
        key = self._sizes(microbatch)
        if key not in self.fitted:
            self.fitted[key] = self._check_shapes(microbatch) or self._check_guards(self.assumed, microbatch)
        return self.fitted[key]

    def _sizes(self, microbatch: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The sizes of the inputs, one after another."""
        return tuple([size for name in self.shapes for size in microbatch[name].shape])

    def _check_sizes(self, microbatch: Mapping[str, Tensor]) -> str:
        return self._check_shapes(microbatch) or self._check_guards(self.guards, microbatch)

    def _check_shapes(self, microbatch: Mapping[str, Tensor]) -> str:
        values = self.size_values(microbatch)
        for name, shape in self.shapes.items():
            for dim, size in enumerate(shape):
                expected, seen = resolve(size, values), int(microbatch[name].shape[dim])
                if expected != seen:
                    return f"dimension {dim} of {name!r} is {seen}, captured with {expected}"
        return ""

    def _check_guards(self, guards: Sequence[tuple[sympy.Basic, Any]], microbatch: Mapping[str, Tensor]) -> str:
        values = self.size_values(microbatch)
        for expr, answer in guards:
            if resolve(expr, values) != resolve(answer, values):
                return f"{expr} = {answer} does not hold for the sizes {values}"
        return ""

    def misread(self, microbatches: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor]) -> str:
        """Returns how the values that Python reads from inputs differ from the captured ones; empty if they do not."""
        if self.reads is None:
            return ""
        parts = [self._read(microbatch) for microbatch in microbatches]
        for i, (expected, extreme) in enumerate(zip(self.read_values, self.read_extremes, strict=True)):
            try:
                seen = settled([part[i] for part in parts], lambda i=i: self._read(whole)[i], extreme)  # type: ignore[misc]
            except DependsOnData as error:
                return str(error)
            if not same(seen, expected):
                return f"the model reads {seen} from its inputs, captured with {expected}"
        return ""

    def _read(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The values that Python reads from inputs; computed once for inputs of the same sizes, if these decide."""
        assert self.reads is not None
        read = [inputs[name] for name in self._read_inputs]
        sizes = tuple([tensor.shape for tensor in read])
        if sizes in self.read_before:
            return self.read_before[sizes]
        with torch.no_grad():
            values: tuple[Any, ...] = called_bare(self.reads, *read)
        if self._reads_sizes_only:
            self.read_before[sizes] = values
        return values

    @cached_property
    def _reads_sizes_only(self) -> bool:
        """Whether what Python reads from inputs, such as whether a mask made by forward is causal, needs no values."""
        assert self.reads is not None
        nodes = self.reads.graph.nodes
        return all(
            all((user.op, user.target) == ("call_method", "size") for user in node.users)
            if node.op == "placeholder"
            else node.op in ("call_function", "call_method", "output")
            and not is_opaque(node.target)
            and not is_random(node)
            for node in nodes
        )

    @cached_property
    def _read_inputs(self) -> list[str]:
        """The names of the inputs from which Python reads values."""
        assert self.reads is not None
        return [node.name for node in self.reads.graph.nodes if node.op == "placeholder"]

    def rebuild_output(self, values: Mapping[str, Any], inputs: Mapping[str, Tensor], dropped: Any = None) -> Any:
        """Returns the model's output.

        Args:
            values: Tensors by node name.
            inputs: Inputs by name, from which sizes in the output are computed.
            dropped: What stands for a tensor that the user does not want.
        """
        sizes = self.size_values(inputs)
        leaves = [_value(o.value, sizes, inputs) if o.node is None else values[o.node] for o in self.outputs]
        leaves = [dropped if o.is_dropped else leaf for o, leaf in zip(self.outputs, leaves, strict=True)]
        return pytree.tree_unflatten(leaves, self.out_spec)


def _value(value: Any, sizes: Mapping[sympy.Symbol, int], inputs: Mapping[str, Tensor]) -> Any:
    return inputs[value.name] if isinstance(value, Given) else resolve(value, sizes)


def sample_sizes(sizes: Mapping[sympy.Symbol, tuple[str, int]], call: Call, microbatch: int) -> dict[sympy.Symbol, int]:
    """Returns the values of the inputs' size symbols for a microbatch of a call."""
    whole = {symbol: int(call.tensors[name].shape[dim]) for symbol, (name, dim) in sizes.items()}
    rows = {symbol for symbol, (name, dim) in sizes.items() if dim == 0 and name in call.batched}
    return {symbol: microbatch if symbol in rows else size for symbol, size in whole.items()}


def device_of(model: nn.Module, call: Call) -> torch.device:
    """Returns the device of a model; for a model without tensors, that of the inputs."""
    tensors = [*model.parameters(), *model.buffers(), *call.tensors.values()]
    return tensors[0].device if tensors else torch.device("cpu")
