"""The recording mode: runs every torch function on fake tensors and appends it to a ``torch.fx`` graph.

Functions are recorded as the model calls them (``F.linear`` is one node), not as modules or aten operations: this is
the level at which costs are profiled, losses are recognized, and people read a graph. A tensor is looked up by
identity; all tensors are kept alive during the trace, so that no identity is used twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipecompile.capture.autograd_history import Histories
from pipecompile.capture.effects import Effects
from pipecompile.capture.fake_kernels import RECORDED, STAND_INS
from pipecompile.capture.functionalize import Aliases, storage_key
from pipecompile.capture.functorch_transforms import Below
from pipecompile.capture.hidden_tensors import hides_tensors
from pipecompile.capture.higher_order_functions import body_of, takes_function
from pipecompile.capture.input_reads import READS, Values
from pipecompile.capture.opaque_calls import FunctionLeaf, LeafCall, attribute_of
from pipecompile.capture.opaque_outputs import watched
from pipecompile.capture.origin import Origin, origin_of
from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.capture.state.counters import Argument, Number, WholeArgument, is_number
from pipecompile.capture.state.executed_code import Ran
from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.autograd_functions import Applied, held
from pipecompile.ops.functional import hooked, setitem, with_data
from pipecompile.ops.modes import PLAIN, Region
from pipecompile.ops.names import in_code
from pipecompile.ops.randomness import passes
from pipecompile.ops.source_lines import caller_file, is_library, user_line
from pipecompile.ops.symbols import Sizes
from pipecompile.ops.tensor_args import is_real, printable, silently_written, tensors_in, version
from pipecompile.ops.torch_internals import (
    DataDependentOutputException,
    DisableTorchFunction,
    DynamicOutputShapeException,
    FakeTensor,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
    _disable_current_modes,
    _is_torch_function_mode_enabled,
    pytree,
)

_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
DETACH = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
LAYOUTS: dict[Callable[..., Any], Callable[[torch.layout], Any]] = {
    Tensor.layout.__get__: lambda layout: layout,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__: lambda layout: layout == torch.sparse_coo,  # type: ignore[attr-defined]
    Tensor.is_sparse_csr.__get__: lambda layout: layout == torch.sparse_csr,  # type: ignore[attr-defined]
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_STORAGES = (Tensor.untyped_storage, Tensor.storage)

# Raised by a run on fake tensors where real values are needed.
DATA_DEPENDENT = (
    DependsOnData,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)


_OF_HISTORY = frozenset(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf"))


class NeedsOperations(Exception):
    """Forward computes a gradient through recorded functions, so the trace must record aten operations instead."""


class Recorder(TorchFunctionMode):
    """Records one run of a model.

    Args:
        graph: Receives the nodes; contains the placeholders already.
        sizes: Turns symbolic sizes into nodes.
        values: Answers what Python reads from tensors.
        constant: Returns a name and a fake for a real tensor that is not a parameter or buffer.
        leaves: Paths of modules kept whole.
        learn: Runs an opaque call on real tensors. Returns the call with its output shapes filled in, and its outputs
            as fake tensors.
        number: Returns the node of a number that Python computes before each step.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sizes: Sizes,
        values: Values,
        constant: Callable[[Tensor], tuple[str, Tensor]],
        leaves: frozenset[str] = frozenset(),
        learn: Callable[[LeafCall, list[Any]], tuple[LeafCall, Any]] | None = None,
        number: Callable[[Number], fx.Node] | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.sizes = sizes
        self.values = values
        self.constant = constant
        self.leaves = leaves
        self.learn = learn
        self.number = number
        self.ran = Ran()
        self.leaf_calls: dict[str, list[LeafCall]] = {}  # by path
        self.inside_leaf = False
        self.fakes: dict[int, Tensor] = {}  # by the identity of the real tensor
        self.paths: list[str] = [""]  # of the modules being run, innermost last
        self.checkpoints: list[int] = []  # of the model, being run, innermost last
        self.num_checkpoints = 0
        self.inside_transform = False  # aten operations are being recorded, not functions
        self.detaching = False  # the model calls detach; autograd also does, to save values
        self.autocasts: list[tuple[str, str, bool]] = []  # entered by the model
        self.nodes: dict[int, fx.Node] = {}
        self.returns: list[tuple[str, tuple[fx.Node | None, ...]]] = []  # of each call of a module, as calls end
        self.names: dict[int, str] = {}  # parameters, buffers and constants
        self.attributes: dict[str, fx.Node] = {}  # the nodes that read them
        self.moved: dict[str, Tensor] = {}  # those whose .data was set
        self.trainable: set[str] = set()  # those that are parameters
        self.layouts: dict[int, torch.layout] = {}  # of tensors whose fakes are dense
        self.alive: list[Any] = []
        self.generators: set[int] = {id(torch.default_generator)}  # those that existed before the call
        self.aliases = Aliases(self.emit, self.nodes.__setitem__)
        self.histories = Histories(self._is_known)

    def add_input(self, tensor: Tensor, placeholder: fx.Node) -> None:
        self._bind(tensor, placeholder)
        self.aliases.add(tensor, placeholder, [], ())

    def add_attribute(self, name: str, fake: Tensor, real: Tensor) -> None:
        """Adds a parameter, buffer or constant that the graph reads under ``name``."""
        self.names.setdefault(id(fake), name)
        if isinstance(real, nn.Parameter):
            self.trainable.add(name)
        if real.layout != torch.strided:
            self.layouts[id(fake)] = real.layout
        self.fakes[id(real)] = fake
        self.alive += [fake, real]
        self.aliases.add_buffer(name, fake)

    def returned(self, path: str, out: Any) -> None:
        """Notes which nodes the call of a module returned."""
        if not self.inside_leaf and not self.inside_transform:
            self.returns.append((path, tuple(self.nodes.get(id(tensor)) for tensor in tensors_in(out))))

    @property
    def is_leaf(self) -> bool:
        """Whether the module being entered is kept whole."""
        return self.paths[-1] in self.leaves and not self.inside_leaf

    def call_leaf(self, module: nn.Module, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Records the call of a module kept whole."""
        path, args, kwargs = self.paths[-1], without_stand_ins(args), without_stand_ins(kwargs)
        if not all(id(t) in self.names for t in [*module.parameters(), *module.buffers()]):
            raise DependsOnData(f"{self.here}: module {path!r} holds tensors that forward itself created")
        call, changing = LeafCall.of(path, module, self._fake(args), self._fake(kwargs))
        call, out = self._learn(call, changing, run)
        calls = self.leaf_calls.setdefault(path, [])
        calls.append(call)
        node = self.graph.call_module(in_code(attribute_of(path)), (len(calls) - 1, *map(self.lower, changing)))
        prefix = f"{path}."
        buffers = tuple(n for n in self.names.values() if n.startswith(prefix) and n not in self.trainable)
        return self._bind_leaf(node, call, changing, out, (*buffers, *(prefix + name for name in call.writes)))

    def call_function_leaf(
        self, function: FunctionType, original: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records the call of a function kept whole, unless it is called inside another part kept whole."""
        seen = _is_torch_function_mode_enabled() and not self.inside_leaf
        if not seen or next(tensors_in((args, kwargs)), None) is None:
            return original(*args, **kwargs)
        args, kwargs = without_stand_ins(args), without_stand_ins(kwargs)
        if hides_tensors((args, kwargs)):
            raise DependsOnData(
                f"{self.here}: function {function.__qualname__} reads tensors that are not among its arguments"
            )
        call, changing = LeafCall.of(self.paths[-1], original, self._fake(args), self._fake(kwargs))
        call, out = self._learn(call, changing, original)
        if next(tensors_in(out), None) is None:
            raise DependsOnData(f"{self.here}: function {function.__qualname__} is kept whole but returns no tensor")
        node = self.graph.call_function(FunctionLeaf(call), tuple(map(self.lower, changing)))
        return self._bind_leaf(node, call, changing, out)

    def _bind_leaf(
        self, node: fx.Node, call: LeafCall, changing: list[Any], out: Any, buffers: tuple[str, ...] = ()
    ) -> Any:
        node.meta["origin"] = Origin(call.path, user_line(), self.region, buffers, False, self.recompute)
        node.meta["val"] = results = call.tensors_of(out)
        self._bind_items(node, results, list(tensors_in(changing)), (node,))
        return out

    def _learn(self, call: LeafCall, changing: list[Any], run: Callable[..., Any]) -> tuple[LeafCall, Any]:
        """Runs a leaf. Returns the call with what the run showed, and its output as fake tensors."""
        self.inside_leaf = True
        tensors = list(tensors_in(changing))
        versions = [version(tensor) for tensor in tensors]
        try:
            with DisableTorchFunction(), Effects(), watched(call.kept, tensors) as (written, parameters):
                args, kwargs = call.rebuild(tuple(changing))
                out = run(*args, **kwargs)
        except Exception:  # it reads data, or does what a fake tensor cannot: leave torch, run a custom kernel
            assert self.learn is not None
            return self.learn(call, [self.lower(value) for value in changing])
        finally:
            self.inside_leaf = False
        if written or versions != [version(tensor) for tensor in tensors]:
            raise DependsOnData(f"{self.here}: {call.name} is kept whole but writes to its arguments")
        return replace(call, writes=tuple(parameters)), out

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        looking = self.ran.pause()
        try:
            return self._called(func, args, kwargs or {}, looking)
        finally:
            self.ran.resume(looking)

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], looking: bool) -> Any:
        if self.inside_transform and func is Tensor.register_hook:
            raise DependsOnData(
                f"{self.here}: a hook on a gradient is registered inside torch.vmap or torch.func, or together with "
                f"torch.autograd.grad, where it cannot be recorded; move it out, or keep the module around it whole"
            )
        if self.inside_leaf:
            return func(*args, **kwargs)
        if self.inside_transform:
            self.detaching = func in DETACH
            return func(*args, **kwargs)
        args, kwargs = without_stand_ins(args), without_stand_ins(kwargs)
        if func in _OF_HISTORY and id(args[0]) not in self.names and not is_library(caller_file(2)):
            self.ran.asked.add(torch.is_grad_enabled)  # it decides what the tensor answers
        if func is torch.autograd.grad:
            return self._gradient(*args, **kwargs)
        if func in LAYOUTS and id(args[0]) in self.layouts:
            return LAYOUTS[func](self.layouts[id(args[0])])
        if func in READS and isinstance(args[0], FakeTensor):
            return self._read(func, args, kwargs)
        if func is Tensor.register_hook:
            self._hook(*args, **kwargs)
        elif func == _SET_REQUIRES_GRAD:
            return self.call(Tensor.requires_grad_, args, kwargs, Tensor.requires_grad_)
        elif func == _SET_DATA:
            return self.set_data(func, *args)
        elif func in _STORAGES and isinstance(args[0], FakeTensor) and not is_library(caller_file(2)):
            raise self._asks_for_storage()
        elif takes_function(func, args, kwargs):
            self.ran.resume(looking)  # the body calls functions of the model
            with self:
                return body_of(func)(*args, **kwargs)
        if passes(func, args, kwargs):
            return args[0] if args else kwargs["input"]
        return self.call(func, args, kwargs, func)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> Any:
        """Runs ``run`` on fake tensors and records it as a call of ``func``."""
        if any(is_real(t) for t in tensors_in((args, kwargs))):
            args, kwargs = self._fake(args), self._fake(kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if any(isinstance(it, torch.Generator) and id(it) not in self.generators for it in (*args, *kwargs.values())):
            return self._drawn_alike_each_call(func, args, kwargs, tensors)
        self.check(tensors)
        versions = [version(t) for t in tensors]
        with Effects() as effects:
            try:
                out = self.run(run, args, kwargs)
            except DataDependentOutputException:  # perhaps a tensor was passed where a number is needed
                args, kwargs = self._with_numbers(args), self._with_numbers(kwargs)
                out = self.run(run, args, kwargs)
        written = [t for t, before in zip(tensors, versions, strict=True) if version(t) != before]
        moved = silently_written(func, args, kwargs)
        effects.written -= set(map(storage_key, [*written, *moved]))
        unseen = list({storage_key(t): t for t in effects.among(tensors)}.values())  # by autograd
        if isinstance(func, Applied):
            func.draws = effects.draws
        self.record(func, args, kwargs, out, written + unseen, moved)
        return out

    def _drawn_alike_each_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> Any:
        """Records numbers drawn from a generator that forward creates; they are equal in every call: a constant."""
        numbers = pytree.tree_leaves((args, kwargs))
        if tensors or any(isinstance(it, torch.SymInt | torch.SymFloat) for it in numbers):
            raise DependsOnData(
                f"{self.here}: forward draws random numbers from a generator that it creates itself, and how many "
                f"depends on the call; create the generator in __init__(), or draw outside and pass the numbers in"
            )
        with DisableTorchFunction(), _disable_current_modes():
            drawn = func(*args, **kwargs)
        return self.call(torch.clone, (drawn,), {}, torch.clone)  # forward may write to it

    def record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        written: Sequence[Tensor] = (),
        moved: Sequence[Tensor] = (),
    ) -> None:
        """Appends a call that returned ``out``, wrote to ``written``, and updated the running statistics ``moved``."""
        if func is torch.Tensor.__setitem__:
            func, out = setitem, args[0]
        if not written and not moved and next(tensors_in(out), None) is None:
            return
        self._check_results(list(tensors_in(out)), func)
        for tensor in written:
            self.histories.note_write(tensor)
            self.aliases.prepare_write(tensor)
        if getattr(func, "__name__", "") == "__get__":
            func, args, kwargs = getattr, (args[0], func.__self__.__name__), {}  # type: ignore[attr-defined]
        func = printable(func)
        func = RECORDED.get(func, func)
        node = self.emit(*held(func, self.lower(args), self.lower(kwargs)), written=[*written, *moved])
        self._bind_results(node, out, list(tensors_in((args, kwargs))))
        for tensor in written:
            self.aliases.finish_write(tensor, node, out if isinstance(out, Tensor) else None)

    def set_data(self, func: Callable[..., Any], tensor: Tensor, value: Tensor) -> None:
        """Records ``tensor.data = value``: the tensor keeps its autograd history and gets other values."""
        tensor, value = self._fake(tensor), self._fake(value)
        if storage_key(tensor) == storage_key(value) and _geometry(tensor) == _geometry(value):
            return  # x.data += y
        if tensor.shape != value.shape or tensor.dtype != value.dtype:
            raise CaptureError(
                f"{self.here}: forward sets the .data of a {tensor.dtype} tensor of shape {tuple(tensor.shape)} to a "
                f"{value.dtype} tensor of shape {tuple(value.shape)}; it must keep its shape and dtype"
            )
        self.check([tensor, value])
        before, data = self.node_of(tensor), self.node_of(value)
        name = self.names.get(id(tensor))
        if name is None:  # tensors of the model are cloned where their last value is written back
            before = self.emit(torch.clone, (before,), like=before)
        self.aliases.leave(tensor)
        self._keep_values(tensor)
        self.run(func, (tensor, value), {})
        node = self.emit(with_data, (before, data))
        node.meta["origin"] = replace(origin_of(node), region=PLAIN, copies=() if name is None else (name,))
        self._bind(tensor, node)
        self.aliases.add(tensor, node, [value], (node,))
        self.aliases.groups.append((before, node))
        if name is not None:
            self.moved[name] = tensor

    def _keep_values(self, tensor: Tensor) -> None:
        """Keeps the memory of a tensor that is about to change as the value of its earlier nodes."""
        held = tensor.detach().requires_grad_(tensor.requires_grad)
        self.alive.append(held)
        for node in self.graph.nodes:
            if node.meta.get("val") is tensor:
                node.meta["val"] = held

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Raises ``DependsOnData`` if a call that was not recorded changed one of the tensors."""
        if self.inside_transform:
            return  # there, operations are recorded below autograd
        for tensor in tensors:
            if self._is_known(tensor) and (node := self.histories.stranger(tensor)) is not None:
                raise DependsOnData(
                    f"{origin_of(self.node_of(tensor))}: a tensor of shape {tuple(tensor.shape)} created here gets "
                    f"its gradient from {node.name()}, which ran before {self.here} and which the tracer did not see; "
                    f"name the module around it in leaf_modules="
                )

    def check_module(self, out: Any) -> None:
        """Checks what a module returns, also for tensors that were not recorded: here the module to keep is known."""
        if self.inside_leaf or not _is_torch_function_mode_enabled():
            return
        with DisableTorchFunction():
            for tensor in tensors_in(out):
                if not self.inside_transform and not is_real(tensor) and not self._is_known(tensor):
                    raise self._out_of_sight(tensor)
                self.check([tensor])

    def _check_results(self, results: list[Tensor], func: Callable[..., Any]) -> None:
        if not self.inside_transform and (lost := self.histories.lost(results)) is not None:
            raise DependsOnData(
                f"{self.here}: {getattr(func, '__name__', func)} reads a tensor of shape {tuple(lost.shape)} that is "
                f"not among its arguments, so its gradient would be lost; name the module around it in leaf_modules="
            )

    def _is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self.nodes or id(tensor) in self.names

    def _out_of_sight(self, tensor: Tensor) -> DependsOnData:
        return DependsOnData(
            f"{self.here}: a tensor of shape {tuple(tensor.shape)} was created by a call that the tracer did not see; "
            f"name the module around it in leaf_modules="
        )

    def emit(
        self,
        func: Any,
        args: Any,
        kwargs: Any = None,
        like: fx.Node | None = None,
        written: Sequence[Tensor] = (),
    ) -> fx.Node:
        node = self.graph.call_function(func, tuple(args), kwargs or {})
        region = self.region if like is None else like.meta.get("origin", Origin()).region
        region = PLAIN if func is torch.clone and like is not None else region
        buffers = tuple(name for name in map(self.aliases.buffer_of, written) if name is not None)
        node.meta["origin"] = Origin(self.paths[-1], user_line(), region, buffers, bool(written), self.recompute)
        if like is not None:
            node.meta["val"] = like.meta.get("val")
        return node

    def set_storage(self, func: Callable[..., Any], tensor: Tensor, *source: Any, **kwargs: Any) -> None:
        """Records ``tensor.set_(source)``.

        Raises:
            DependsOnData: The source is a storage, not a tensor.
        """
        if len(source) != 1 or not isinstance(source[0], Tensor) or kwargs:
            raise self._asks_for_storage()
        self.set_data(func, tensor, source[0])

    def _asks_for_storage(self) -> DependsOnData:
        return DependsOnData(
            f"{self.here}: forward accesses the storage of a tensor, and the tracer cannot see writes to a storage; "
            f"write to the tensor itself, or name the module around it in leaf_modules="
        )

    @property
    def region(self) -> Region:
        return Region(torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), tuple(self.autocasts))

    @property
    def recompute(self) -> int | None:
        """The outermost checkpoint being run; everything inside it is recomputed."""
        return self.checkpoints[0] if self.checkpoints else None

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """A context for a function that the model runs under ``torch.utils.checkpoint``."""
        self.checkpoints.append(self.num_checkpoints)
        self.num_checkpoints += 1
        try:
            yield
        finally:
            self.checkpoints.pop()

    @contextmanager
    def below(self) -> Iterator[None]:
        """A context for a transform (``torch.vmap``): aten operations are recorded instead of functions."""
        if self.inside_leaf or self.inside_transform:
            yield
            return
        self.inside_transform = True
        try:
            with Below(self.operation):
                yield
        finally:
            self.inside_transform = False

    def operation(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> Any:
        """Records an aten operation. A detach by autograd, which saves a value so, does not become a node."""
        if func is not torch.ops.aten.detach.default or self.detaching:
            self.detaching = False
            return self.call(func, args, kwargs, run)
        kept = run(*args, **kwargs)
        self._bind(kept, self.node_of(args[0]))
        return kept

    @property
    def here(self) -> Origin:
        return Origin(self.paths[-1], user_line())

    def lower(self, value: Any) -> Any:
        """Returns an argument with its tensors and symbolic sizes replaced by nodes."""
        if is_number(value):
            return value.concrete()
        if type(value) in (Argument, WholeArgument) and self.number is not None:
            return self.number(value.number)
        match value:
            case Tensor():
                return self.node_of(value)
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return self.sizes.node(value)
            case torch.Size() | list() | tuple():
                items = [self.lower(item) for item in value]
                if isinstance(value, tuple) and hasattr(value, "_fields"):
                    return type(value)(*items)
                return items if isinstance(value, list) else tuple(items)
            case dict():
                return {key: self.lower(item) for key, item in value.items()}
            case slice():
                return slice(self.lower(value.start), self.lower(value.stop), self.lower(value.step))
            case np.ndarray():
                return value.tolist()
            case _ if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
                return value.item()
            case _:
                return value

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Returns the present node of a tensor.

        Raises:
            DependsOnData: It is a fake tensor that no recorded function created.
        """
        node = self.nodes.get(id(tensor))
        if node is not None:
            return node
        name = self.names.get(id(tensor))
        if name is None:
            if is_real(tensor):
                return self.node_of(self._fake(tensor))
            raise self._out_of_sight(tensor)
        node = self.graph.get_attr(in_code(name))
        node.meta["val"] = tensor
        self._bind(tensor, node)
        self.aliases.add(tensor, node, [], ())
        self.attributes[name] = node
        return node

    def attribute(self, name: str, tensor: Tensor) -> fx.Node:
        """Returns the node that reads the value of a parameter, buffer or constant before forward."""
        if name not in self.attributes:
            self.node_of(tensor)
        return self.attributes[name]

    def _fake(self, value: Any) -> Any:
        """Returns arguments with each real tensor replaced by its fake."""
        if isinstance(value, Tensor):
            if not is_real(value):
                return value
            if id(value) not in self.fakes:
                name, fake = self.constant(value)
                self.add_attribute(name, fake, value)
            return self.fakes[id(value)]
        if isinstance(value, slice):
            return slice(self._fake(value.start), self._fake(value.stop), self._fake(value.step))
        if isinstance(value, list | tuple | dict):
            return pytree.tree_map(lambda leaf: self._fake(leaf) if isinstance(leaf, Tensor | slice) else leaf, value)
        return value

    def _with_numbers(self, value: Any) -> Any:
        """Returns arguments with each integer tensor without dimensions replaced by its value, as read by Python."""
        return pytree.tree_map_only(
            Tensor,
            lambda t: self._read(Tensor.item, (t,), {}) if t.ndim == 0 and not t.is_floating_point() else t,
            value,
        )

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = STAND_INS.get(func, func)
        shapes = self.sizes.shapes
        if shapes is None:
            return func(*args, **kwargs)
        shapes.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            shapes.inside -= 1

    def _hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
        """Records a hook on a gradient: from now on, the model reads the tensor with the hook."""
        before = self.node_of(tensor)
        node = self.emit(hooked(hook), (before,), like=before)
        self.aliases.groups.append((before, node))
        self.aliases.add(tensor, node, [tensor], (node,))
        self.nodes[id(tensor)] = node

    def _gradient(self, *args: Any, **kwargs: Any) -> Any:
        """Records the backward of ``torch.autograd.grad``, if everything that it reads was recorded."""
        try:
            with self.below():
                return torch.autograd.grad(*args, **kwargs)
        except DependsOnData as error:
            raise NeedsOperations from error

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = printable(func)
        node = self.emit(func, self.lower(args), self.lower(kwargs))
        try:
            return self.values.read(node)
        except DependsOnData as error:
            raise DependsOnData(
                f"{self.here}: {error}; keep the module around it whole with leaf_modules=, or compute it from inputs"
            ) from error

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        node.meta.setdefault("val", tensor)
        (self.histories.forget if self.inside_transform else self.histories.note)(tensor)

    def _bind_results(self, node: fx.Node, out: Any, sources: list[Tensor]) -> None:
        if isinstance(out, Tensor):
            self._bind(out, node)
            self.aliases.add(out, node, sources, (node,))
        elif isinstance(out, tuple | list):
            node.meta.setdefault("val", out)
            self._bind_items(node, out, sources, (node,))
        elif out is not None:
            raise CaptureError(
                f"{self.here}: {node.target} returns a {type(out).__name__}, which cannot be recorded in the graph; "
                f"name the module around it in leaf_modules="
            )

    def _bind_items(self, node: fx.Node, out: Any, sources: list[Tensor], recipe: tuple[fx.Node, ...]) -> None:
        for index, item in enumerate(out):
            if isinstance(item, Tensor):
                picked = self.emit(operator.getitem, (node, index))
                self._bind(item, picked)
                self.aliases.add(item, picked, sources, (*recipe, picked))
            elif isinstance(item, tuple | list):
                picked = self.emit(operator.getitem, (node, index))
                picked.meta["val"] = item
                self._bind_items(picked, item, sources, (*recipe, picked))


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
