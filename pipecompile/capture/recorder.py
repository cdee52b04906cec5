"""The recording mode: runs every torch function on fake tensors and appends it to a ``torch.fx`` graph.

Functions are recorded as the model calls them (``F.linear`` is one node), not as modules or aten operations: this is
the level at which costs are profiled, losses are recognized, and people read a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipecompile.capture.counted_masks import GETITEM, by_positions, found, is_constant, masks_of
from pipecompile.capture.data_writes import DataWrites
from pipecompile.capture.decompositions import decomposition_of
from pipecompile.capture.effects import Effects
from pipecompile.capture.fake_kernels import RECORDED
from pipecompile.capture.fake_runs import run_on_fakes
from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.functorch_transforms import Below
from pipecompile.capture.hidden_tensors import holds_fakes
from pipecompile.capture.higher_order_functions import body_of, takes_function
from pipecompile.capture.input_reads import READS, Values
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.opaque_recording import LeafRecorder
from pipecompile.capture.overrides import as_they_say, others_than_tensors
from pipecompile.capture.repeated_calls import RepeatedCalls
from pipecompile.capture.repeated_views import RepeatedViews
from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.capture.state.executed_code import Ran
from pipecompile.capture.unseen_calls import check_results, check_tensors
from pipecompile.errors import DependsOnData
from pipecompile.ops.autograd_functions import Applied, held
from pipecompile.ops.functional import after, hooked, setitem
from pipecompile.ops.randomness import passes
from pipecompile.ops.source_lines import caller_file, is_library
from pipecompile.ops.tensor_args import is_real, printable, silently_written, tensors_in, version
from pipecompile.ops.torch_internals import (
    DataDependentOutputException,
    DisableTorchFunction,
    FakeTensor,
    _disable_current_modes,
    pytree,
)

_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_DETACH = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_LAYOUTS: dict[Callable[..., Any], Callable[[torch.layout], Any]] = {
    Tensor.layout.__get__: lambda layout: layout,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__: lambda layout: layout == torch.sparse_coo,  # type: ignore[attr-defined]
    Tensor.is_sparse_csr.__get__: lambda layout: layout == torch.sparse_csr,  # type: ignore[attr-defined]
}
_STORAGES = (Tensor.untyped_storage, Tensor.storage)
_BASE = Tensor._base.__get__  # type: ignore[union-attr]
_OF_HISTORY = frozenset(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf"))


class NeedsOperations(Exception):
    """Forward computes a gradient through recorded functions, so the trace must record aten operations instead."""


class Recorder(TorchFunctionMode):
    """Records one run of a model.

    Args:
        table: Receives the nodes; contains the placeholders already.
        values: Answers what Python reads from tensors.
        leaves: Records parts kept whole.
        counting: Whether entries of masks that depend on buffers only are counted.
    """

    def __init__(self, table: NodeTable, values: Values, leaves: LeafRecorder, counting: bool = False) -> None:
        super().__init__()
        self.table = table
        self.scopes = table.scopes
        self.values = values
        self.leaves = leaves
        self.counting = counting
        self.could_count = False  # whether there was such a mask
        self.repeated = RepeatedCalls(table.sizes.shapes)
        self.views = RepeatedViews(table.sizes.shapes)
        self.data_writes = DataWrites(table)
        self.ran = Ran()
        self.has_operations = False  # aten operations were recorded
        self.detaching = False  # the model calls detach; autograd also does, to save values
        self.returns: list[tuple[str, tuple[fx.Node | None, ...]]] = []  # of each call of a module, as calls end
        self.hooks: list[tuple[Any, Any, fx.Node]] = []  # on gradients: handle, what it is removed from, its node
        self.generators: set[int] = {id(torch.default_generator)}  # those that existed before the call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        looking = self.ran.pause()
        try:
            if self._is_recording and (others := others_than_tensors(types)):
                self.ran.resume(looking)
                with self:  # they say which functions of tensors to call instead
                    return as_they_say(others, func, types, args, kwargs or {})
            return self._called(func, args, kwargs or {}, looking)
        finally:
            self.ran.resume(looking)

    @property
    def _is_recording(self) -> bool:
        return not self.scopes.inside_leaf and not self.scopes.inside_transform

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], looking: bool) -> Any:
        if self.scopes.inside_transform and func is Tensor.register_hook:
            raise DependsOnData(
                f"{self.scopes.here}: a hook on a gradient is registered inside torch.vmap or torch.func, or together "
                f"with torch.autograd.grad, where it cannot be recorded; move it out, or keep the module around it "
                f"whole"
            )
        if self.scopes.inside_leaf:
            return func(*args, **kwargs)
        if self.scopes.inside_transform:
            self.detaching = func in _DETACH
            return func(*args, **kwargs)
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor) and args[0].is_leaf:
            return self._copied(*args)  # writes to the memo
        args, kwargs = without_stand_ins(args), without_stand_ins(kwargs)
        if func in _OF_HISTORY and id(args[0]) not in self.table.names and not is_library(caller_file(2)):
            self.ran.asked.add(torch.is_grad_enabled)  # it decides what the tensor answers
        if func is torch.autograd.grad:
            return self._gradient(*args, **kwargs)
        if func in _LAYOUTS and id(args[0]) in self.table.layouts:
            return _LAYOUTS[func](self.table.layouts[id(args[0])])
        if func in READS and isinstance(args[0], FakeTensor):
            return self._read(func, args, kwargs)
        if func is Tensor.register_hook:
            return self._hook(*args, **kwargs)
        if func == _BASE:
            return self._base_of(args[0])
        if func == _SET_REQUIRES_GRAD:
            return self.call(Tensor.requires_grad_, args, kwargs, Tensor.requires_grad_)
        if func == _SET_DATA:
            return self.data_writes.set_data(func, *args)
        if func in _STORAGES and isinstance(args[0], FakeTensor) and not is_library(caller_file(2)):
            raise self.data_writes.asks_for_storage()
        if takes_function(func, args, kwargs):
            self.ran.resume(looking)  # the body calls functions of the model
            with self:
                return body_of(func)(*args, **kwargs)
        if (several := decomposition_of(func, args, kwargs)) is not None:
            with self:
                return several(*args, **kwargs)
        if passes(func, args, kwargs):
            return args[0] if args else kwargs["input"]
        if self._counts(masks := masks_of(func, args, kwargs)):
            return self._counted(func, args, kwargs, masks)
        return self.call(func, args, kwargs, func)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> Any:
        """Runs ``run`` on fake tensors and records it as a call of ``func``."""
        table = self.table
        if any(is_real(t) for t in tensors_in((args, kwargs))):
            args, kwargs = table.fake(args), table.fake(kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if any(isinstance(it, torch.Generator) and id(it) not in self.generators for it in (*args, *kwargs.values())):
            return self._drawn_alike_each_call(func, args, kwargs, tensors)
        check_tensors(table, tensors)
        key = (
            self.repeated.key(func, args, kwargs, tensors) if run is func and not self.scopes.inside_transform else None
        )
        if (known := self.repeated.known(key)) is not None:
            out = run_on_fakes(known.again, (tensors,), {}, table.sizes.shapes)
            self.record(func, args, kwargs, out)
            return out
        versions = [version(t) for t in tensors]
        form = _form(tensors[0]) if _reshapes(func) else None
        with Effects(self.views) as effects:
            try:
                out = run_on_fakes(run, args, kwargs, table.sizes.shapes)
            except DataDependentOutputException:  # perhaps a tensor was passed where a number is needed
                args, kwargs = self._with_numbers(args), self._with_numbers(kwargs)
                out = run_on_fakes(run, args, kwargs, table.sizes.shapes)
        if form is not None:  # the earlier value keeps its own shape
            table.node_of(tensors[0]).meta["val"] = run_on_fakes(
                torch.as_strided, (tensors[0], *form), {}, table.sizes.shapes
            )
        written = [t for t, before in zip(tensors, versions, strict=True) if version(t) != before]
        moved = silently_written(func, args, kwargs)
        effects.written -= set(map(storage_key, [*written, *moved]))
        unseen = list({storage_key(t): t for t in effects.among(tensors)}.values())  # by autograd
        if not written and not moved and not unseen:
            self.repeated.learn(key, tensors, out)
        if isinstance(func, Applied):
            func.draws = effects.draws
        self.record(func, args, kwargs, out, written + unseen, moved)
        return out

    def _base_of(self, tensor: Tensor) -> Tensor | None:
        """What a tensor is a view of: a value like any other, which a stage need not view to have it."""
        if is_real(tensor):
            tensor = self.table.fake(tensor)
        base = tensor._base
        asked = tensor if base is None else base
        if not self.table.is_known(asked):
            raise self.table.out_of_sight(asked)
        if id(asked) not in self.table.names and self.table.node_of(asked).op == "placeholder":
            raise DependsOnData(
                f"{self.scopes.here}: forward asks what an argument is a view of (_base), which is another tensor in "
                f"a microbatch; pass that tensor as an argument too, or keep the module around this line whole"
            )
        return base

    def _copied(self, tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
        """Records ``copy.deepcopy`` of a tensor, which torch makes from the storage: a fake has none.

        Tensors that share memory have copies that share memory.
        """
        if id(tensor) in memo:
            found: Tensor = memo[id(tensor)]
            return found
        form, key = (tensor.shape, tensor.stride(), tensor.storage_offset()), (Tensor, storage_key(tensor))
        if key not in memo:
            alone = self.call(torch.detach, (tensor,), {}, torch.detach)
            memo[key] = form, self.call(torch.clone, (alone,), {}, torch.clone)
        elif memo[key][0] != form:
            raise DependsOnData(
                f"{self.scopes.here}: copy.deepcopy copies different views of one tensor, whose copies would share "
                f"memory; copy the tensor alone, or keep the module around it whole"
            )
        copy: Tensor = self.call(torch.detach, (memo[key][1],), {}, torch.detach)
        if tensor.requires_grad:
            self.call(Tensor.requires_grad_, (copy,), {}, Tensor.requires_grad_)
        memo[id(tensor)] = copy
        return copy

    def _drawn_alike_each_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> Any:
        """Records numbers drawn from a generator that forward creates; they are equal in every call: a constant."""
        numbers = pytree.tree_leaves((args, kwargs))
        if tensors or any(isinstance(it, torch.SymInt | torch.SymFloat) for it in numbers):
            raise DependsOnData(
                f"{self.scopes.here}: forward draws random numbers from a generator that it creates itself, and how "
                f"many depends on the call; create the generator in __init__(), or draw outside and pass the numbers in"
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
        table = self.table
        check_results(table, tensors_in(out), func)
        for tensor in written:
            table.histories.note_write(tensor)
            table.aliases.prepare_write(tensor)
        if getattr(func, "__name__", "") == "__get__":
            func, args, kwargs = getattr, (args[0], func.__self__.__name__), {}  # type: ignore[attr-defined]
        func = printable(func)
        func = RECORDED.get(func, func)
        node = table.emit(*held(func, table.lower(args), table.lower(kwargs)), written=[*written, *moved])
        table.bind_results(node, out, list(tensors_in((args, kwargs))))
        for tensor in written:
            table.aliases.finish_write(tensor, node, out if isinstance(out, Tensor) else None)

    def returned(self, path: str, out: Any) -> None:
        """Notes which nodes the call of a module returned."""
        if not self.scopes.inside_leaf and not self.scopes.inside_transform:
            self.returns.append((path, tuple(self.table.nodes.get(id(tensor)) for tensor in tensors_in(out))))

    def _read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = printable(func)
        node = self.table.emit(func, self.table.lower(args), self.table.lower(kwargs))
        try:
            return self.values.read(node)
        except DependsOnData as error:
            keep = self.scopes.keep_whole
            raise DependsOnData(
                f"{self.scopes.here}: {error}; {keep}, or compute it from inputs; a number that is only logged is read "
                f"after the call: store the tensor (detached) in an attribute, or return it"
            ) from error

    def _counts(self, masks: Sequence[Tensor]) -> bool:
        """Whether entries are counted of masks on whose values the size of a result depends."""
        constant = masks and all(is_constant(self.table.node_of(it), self.values.is_parameter) for it in masks)
        self.could_count |= bool(constant)
        return bool(constant) and self.counting

    def _counted(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], masks: Sequence[Tensor]
    ) -> Any:
        """Records a call whose result has as many entries as masks select, which is read and guarded."""
        if func is not GETITEM:
            number = self.call(torch.count_nonzero, (masks[0],), {}, torch.count_nonzero)
            count = self._read(Tensor.item, (number,), {})
            return self.call(func, args, kwargs, lambda *args, **kwargs: found(func, args, kwargs, count))

        def positions(mask: Tensor) -> tuple[Tensor, ...]:
            entries: tuple[Tensor, ...] = self._counted(Tensor.nonzero, (mask,), {"as_tuple": True}, [mask])
            return entries

        return self.call(func, (args[0], by_positions(args[1], positions)), {}, func)

    def _with_numbers(self, value: Any) -> Any:
        """Returns arguments with each integer tensor without dimensions replaced by its value, as read by Python."""
        return pytree.tree_map_only(
            Tensor,
            lambda t: self._read(Tensor.item, (t,), {}) if t.ndim == 0 and not t.is_floating_point() else t,
            value,
        )

    def _hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Records a hook on a gradient: from now on, the model reads the tensor with the hook. Returns its handle."""
        table = self.table
        if holds_fakes(hook):
            raise DependsOnData(
                f"{self.scopes.here}: a hook on a gradient holds tensors that forward has computed, or parameters, "
                f"which a stage cannot give it; read parameters from the module, or keep the module around it whole"
            )
        before = table.node_of(tensor)
        node = table.emit(hooked(hook), (before,), like=before)
        table.aliases.groups.append((before, node))
        table.aliases.add(tensor, node, [tensor], (node,))
        table.nodes[id(tensor)] = node
        handle = self.call(Tensor.register_hook, (tensor, hook), {}, Tensor.register_hook)
        self.hooks.append((handle, handle.hooks_dict_ref(), node))
        return handle

    def drop_removed_hooks(self) -> None:
        """Takes the hooks out of the graph that forward itself has removed."""
        for handle, hooks, node in self.hooks:
            if handle.id not in hooks:
                node.target = after

    def _gradient(self, *args: Any, **kwargs: Any) -> Any:
        """Records the backward of ``torch.autograd.grad``, if everything that it reads was recorded."""
        try:
            with self.below():
                return torch.autograd.grad(*args, **kwargs)
        except DependsOnData as error:
            raise NeedsOperations from error

    @contextmanager
    def below(self) -> Iterator[None]:
        """A context for a transform (``torch.vmap``): aten operations are recorded instead of functions."""
        if self.scopes.inside_leaf or self.scopes.inside_transform:
            yield
            return
        self.scopes.inside_transform = self.has_operations = True
        try:
            with Below(self.operation):
                yield
        finally:
            self.scopes.inside_transform = False

    def operation(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> Any:
        """Records an aten operation. A detach by autograd, which saves a value so, does not become a node."""
        if func is not torch.ops.aten.detach.default or self.detaching:
            self.detaching = False
            return self.call(func, args, kwargs, run)
        kept = run(*args, **kwargs)
        self.table.bind(kept, self.table.node_of(args[0]))
        return kept


_RESHAPING = frozenset({"squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_"})


def _reshapes(func: Callable[..., Any]) -> bool:
    """Whether a function gives its argument itself another shape."""
    return getattr(func, "__name__", "").partition(".")[0] in _RESHAPING


def _form(tensor: Tensor) -> tuple[Any, Any, Any]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
