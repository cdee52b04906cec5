"""Records the calls of parts kept whole, each as one node of the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch.fx as fx
from torch import nn

from pipecompile.capture.effects import Effects
from pipecompile.capture.hidden_tensors import hides_tensors
from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.opaque_calls import FunctionLeaf, LeafCall, attribute_of
from pipecompile.capture.opaque_outputs import watched
from pipecompile.capture.origin import Origin
from pipecompile.capture.state.container_proxies import without_stand_ins
from pipecompile.errors import DependsOnData
from pipecompile.ops.names import in_code
from pipecompile.ops.source_lines import user_line
from pipecompile.ops.tensor_args import tensors_in, version
from pipecompile.ops.torch_internals import DisableTorchFunction, _is_torch_function_mode_enabled


class LeafRecorder:
    """Records parts kept whole during one trace.

    Args:
        table: The nodes of the trace.
        paths: Paths of modules kept whole.
        learn: Runs an opaque call on real tensors. Returns the call with its output shapes filled in, and its outputs
            as fake tensors.
    """

    def __init__(
        self,
        table: NodeTable,
        paths: frozenset[str],
        learn: Callable[[LeafCall, list[Any]], tuple[LeafCall, Any]],
    ) -> None:
        self.table = table
        self.scopes = table.scopes
        self.paths = paths
        self.learn = learn
        self.calls: dict[str, list[LeafCall]] = {}  # of modules, by path

    @property
    def is_leaf(self) -> bool:
        """Whether the module being entered is kept whole."""
        return self.scopes.path in self.paths and not self.scopes.inside_leaf

    def call_module(self, module: nn.Module, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """Records the call of a module kept whole."""
        table, path = self.table, self.scopes.path
        args, kwargs = without_stand_ins(args), without_stand_ins(kwargs)
        if not all(id(t) in table.names for t in [*module.parameters(), *module.buffers()]):
            raise DependsOnData(f"{self.scopes.here}: module {path!r} holds tensors that forward itself created")
        call, changing = LeafCall.of(path, module, table.fake(args), table.fake(kwargs))
        call, out = self._run(call, changing, run)
        calls = self.calls.setdefault(path, [])
        calls.append(call)
        node = table.graph.call_module(in_code(attribute_of(path)), (len(calls) - 1, *map(table.lower, changing)))
        prefix = f"{path}."
        buffers = tuple(n for n in table.names.values() if n.startswith(prefix) and n not in table.trainable)
        return self._bind(node, call, changing, out, (*buffers, *(prefix + name for name in call.writes)))

    def call_function(
        self, function: FunctionType, original: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records the call of a function kept whole, unless it is called inside another part kept whole."""
        seen = _is_torch_function_mode_enabled() and not self.scopes.inside_leaf
        if not seen or next(tensors_in((args, kwargs)), None) is None:
            return original(*args, **kwargs)
        args, kwargs = without_stand_ins(args), without_stand_ins(kwargs)
        if hides_tensors((args, kwargs)):
            raise DependsOnData(
                f"{self.scopes.here}: function {function.__qualname__} reads tensors that are not among its arguments"
            )
        call, changing = LeafCall.of(self.scopes.path, original, self.table.fake(args), self.table.fake(kwargs))
        call, out = self._run(call, changing, original)
        if next(tensors_in(out), None) is None:
            raise DependsOnData(
                f"{self.scopes.here}: function {function.__qualname__} is kept whole but returns no tensor"
            )
        node = self.table.graph.call_function(FunctionLeaf(call), tuple(map(self.table.lower, changing)))
        return self._bind(node, call, changing, out)

    def _run(self, call: LeafCall, changing: list[Any], run: Callable[..., Any]) -> tuple[LeafCall, Any]:
        """Runs a leaf. Returns the call with what the run showed, and its output as fake tensors."""
        self.scopes.inside_leaf = True
        tensors = list(tensors_in(changing))
        versions = [version(tensor) for tensor in tensors]
        try:
            with DisableTorchFunction(), Effects(), watched(call.kept, tensors) as (written, parameters):
                args, kwargs = call.rebuild(tuple(changing))
                out = run(*args, **kwargs)
        except Exception:  # it reads data, or does what a fake tensor cannot: leave torch, run a custom kernel
            return self.learn(call, [self.table.lower(value) for value in changing])
        finally:
            self.scopes.inside_leaf = False
        if written or versions != [version(tensor) for tensor in tensors]:
            raise DependsOnData(f"{self.scopes.here}: {call.name} is kept whole but writes to its arguments")
        return replace(call, writes=tuple(parameters)), out

    def _bind(self, node: fx.Node, call: LeafCall, changing: list[Any], out: Any, buffers: tuple[str, ...] = ()) -> Any:
        node.meta["origin"] = Origin(
            path=call.path,
            source=user_line(),
            region=self.scopes.region,
            writes=buffers,
            mutates=False,
            recompute=self.scopes.recompute,
        )
        node.meta["val"] = results = call.tensors_of(out)
        self.table.bind_items(node, results, list(tensors_in(changing)), (node,))
        return out
