"""Rewrites a stage so that ``torch.compile`` compiles it in as few parts as possible.

A part is a stretch of calls that torch can trace into one graph. Between the parts stay, as they are, the calls that it
cannot trace, or might trace into something else:

- random functions, which seed a generator for themselves (``ops/randomness.py``);
- modules and functions kept whole, custom autograd functions, custom operators and hooks, which are the user's Python;
- the calls that enter and leave regions, so that each part is traced in the modes in which it runs;
- functions whose results have sizes that depend on data, and what computes with such sizes;
- what reads or writes a buffer that the stage writes, and writes to the results of other calls. torch.compile (2.13)
  drops the copy of an old value (``old = b.clone(); b.mul_(2); x * old``), so that the gradient is computed from the
  new one, and the write to a float64 tensor without dimensions. What is known to be right is compiled: a counter, the
  statistics of batch normalization.

A checkpointed part of the model stays one call, whose own graph is rewritten in the same way. A size is not passed to a
part, where another value would compile it again: each part reads it from the tensor that it is the size of.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.opaque_calls import FunctionLeaf
from pipecompile.capture.origin import origin_of
from pipecompile.ops.autograd_functions import Applied, Holding
from pipecompile.ops.backends import Backend, backend_of, name_of
from pipecompile.ops.checkpoint import Recomputed
from pipecompile.ops.compiled_part import CompiledPart
from pipecompile.ops.functional import is_traceable, with_data
from pipecompile.ops.modes import enter_region, exit_region
from pipecompile.ops.names import placeholder
from pipecompile.ops.operators import is_opaque
from pipecompile.ops.randomness import is_seeded
from pipecompile.ops.symbols import FUNCTIONS, only_data_tells
from pipecompile.ops.torch_internals import pytree
from pipecompile.runtime.split import Stage, quiet

REPLACED = (with_data, torch.Tensor.set_, torch.Tensor.resize_)  # what a tensor's size is depends on when it is asked
UNTRACED = (Applied, Holding, Recomputed)
NORMALIZATIONS = (F.batch_norm, torch.batch_norm)
FEWEST = 2  # calls that make tensors in a part: a single one gains nothing


def compile_stage(stage: Stage, given: Literal[True] | str | Backend) -> Stage:
    """A stage with the same arguments and results, whose parts are compiled at their first calls.

    Args:
        stage: the stage.
        given: ``stage_compile=`` of the user.
    """
    uncompiled: Counter[str] = Counter()
    rewriter = _Rewriter(
        old=stage.module.graph,
        backend=backend_of(given),
        where=f"stage {stage.index}",
        numbers=count(),
        uncompiled=uncompiled,
    )
    module = quiet(fx.GraphModule(stage.module, rewriter.rewritten(), class_name=f"Stage{stage.index}"))
    return replace(stage, module=module, backend=name_of(given), uncompiled=uncompiled)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph, without those that compute sizes."""
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output") and not _is_size(n)]


def _left_out(graph: fx.Graph) -> dict[fx.Node, str]:
    """The calls that are not compiled, each with the reason in a word or two."""
    calls = _calls(graph)
    if any(node.target in REPLACED for node in calls):
        return dict.fromkeys(calls, "in a stage that replaces tensors")
    buffers = {name for node in calls for name in (*origin_of(node).writes, *origin_of(node).copies)}
    in_place = [node for node in calls if origin_of(node).writes and node.target not in NORMALIZATIONS]
    memory = {key for node in in_place for key in _memory(node)}
    seen = {key for node in graph.nodes if node.op in ("placeholder", "get_attr") for key in _memory(node)}
    made: set[int | None] = set()  # the memory that the present part has made
    left: dict[fx.Node, str] = {}
    for node in calls:
        reads = any(_attribute(n) in buffers or not memory.isdisjoint(_memory(n)) for n in node.all_input_nodes)
        origin = origin_of(node)
        why = _not_traceable(node)
        if not why and reads and not _only_counts(node):
            why = "written buffer"
        elif not why and origin.mutates and not origin.writes and not made.issuperset(_memory(node)):
            why = "write"
        if why:
            left[node] = why
            made.clear()
        else:
            made.update(set(_memory(node)) - seen)
        seen.update(_memory(node))
    return left


def _not_traceable(node: fx.Node) -> str:
    """Why torch cannot trace a call, or not into what it is; empty if it can."""
    if node.op == "call_module" or isinstance(node.target, FunctionLeaf):
        return "kept whole"
    if is_seeded(node.target):
        return "random"
    if node.target in (enter_region, exit_region):
        return "mode"
    if (whole := _taken_from(node)) is not None and (why := _not_traceable(whole)):
        return why
    if any(map(_depends_on_data, [node, *node.all_input_nodes])):
        return "of a size that depends on data"
    if not is_traceable(node.target) and (isinstance(node.target, UNTRACED) or is_opaque(node.target)):
        return "custom"
    return "" if _tensors(node) else "without tensors"


def _only_counts(node: fx.Node) -> bool:
    """Whether a call writes buffers in a way that torch compiles rightly: statistics, or a count."""
    integers = not any(tensor.is_floating_point() or tensor.is_complex() for tensor in _tensors(node))
    return node.target in NORMALIZATIONS or (bool(origin_of(node).writes) and integers)


def _attribute(node: fx.Node) -> str:
    """The parameter or buffer that a value is; empty if it is none."""
    return str(node.meta.get("attribute", ""))


def _taken_from(node: fx.Node) -> fx.Node | None:
    """The call that returns several values, of which a node takes one."""
    if node.target is not operator.getitem or not isinstance(whole := node.args[0], fx.Node):
        return None
    return None if isinstance(whole.meta.get("val"), Tensor) else whole


def _values(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves(node.meta.get("val"))


def _tensors(node: fx.Node) -> list[Tensor]:
    return [value for value in _values(node) if isinstance(value, Tensor)]


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes a number from sizes, and nothing else: ``ops/symbols.Sizes`` wrote it."""
    if node.op == "call_method":
        return node.target == "size"
    numbers = node.op == "call_function" and node.target in FUNCTIONS.values() and bool(node.all_input_nodes)
    return numbers and all(map(_is_size, node.all_input_nodes))


def _memory(node: fx.Node) -> list[int | None]:
    """The identities of the memory of a value, in the trace."""
    return [storage_key(tensor) for tensor in _tensors(node)]


def _depends_on_data(node: fx.Node) -> bool:
    """Whether a size of a node's value, or the value itself, is known only from data."""
    sizes = [size for tensor in _tensors(node) for size in tensor.shape]
    symbols = [s for it in (*sizes, *_values(node)) if isinstance(it, torch.SymInt) for s in it.node.expr.free_symbols]
    return any(map(only_data_tells, symbols))


@dataclass(frozen=True)
class _Rewriter:
    """Rewrites one graph.

    Args:
        old: the graph.
        backend: compiles a part.
        where: the stage in messages.
        numbers: of the next parts of the stage.
        uncompiled: counts the calls that are not compiled, by reason.
    """

    old: fx.Graph
    backend: Backend
    where: str
    numbers: Iterator[int]
    uncompiled: Counter[str]

    def rewritten(self) -> fx.Graph:
        new = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        parts = self._parts()
        part_of = {node: part for part in parts for node in part}

        def copy(node: fx.Node) -> fx.Node:
            """The copy of a node; sizes and attributes are copied where they are first read."""
            if node not in copies:
                copies[node] = new.node_copy(node, copy)
            return copies[node]

        for node in self.old.nodes:
            if node.op == "placeholder":
                copy(node)
            elif node in part_of:
                part = part_of[node]
                if node is part[0]:
                    self._write(new, part, copy, copies)
            elif isinstance(node.target, Recomputed):
                inner = replace(self, old=node.target.module.graph).rewritten()
                module = quiet(fx.GraphModule(nn.Module(), inner))
                copy(node).target = Recomputed(module, node.target.__name__)
            elif node.op != "get_attr" and not _is_size(node):
                copy(node)
        return new

    def _parts(self) -> list[list[fx.Node]]:
        """The stretches of calls that are compiled."""
        left = _left_out(self.old)
        parts: list[list[fx.Node]] = [[]]
        for node in _calls(self.old):
            if node in left:
                parts.append([])
            else:
                parts[-1].append(node)
        large = [part for part in parts if sum(bool(_tensors(node)) for node in part) >= FEWEST]
        alone = sum(len(part) for part in parts) - sum(len(part) for part in large)
        taken = [node for node in left if _taken_from(node) is None and not isinstance(node.target, Recomputed)]
        self.uncompiled.update([*(left[node] for node in taken), *["alone"] * alone])
        return large

    def _write(self, new: fx.Graph, part: list[fx.Node], copy: Any, copies: dict[fx.Node, fx.Node]) -> None:
        """Writes the call of a part, and the values that are read from it."""
        inside = set(part)
        arguments = list(dict.fromkeys(source for node in part for source in _sources(node) if source not in inside))
        results = [node for node in part if _is_read(node, inside)]
        graph = fx.Graph()
        inner: dict[fx.Node, fx.Node] = {}
        for argument in arguments:
            inner[argument] = placeholder(graph, argument.name)

        def copy_in(node: fx.Node) -> fx.Node:
            if node not in inner:
                inner[node] = graph.node_copy(node, copy_in)
            return inner[node]

        for node in part:
            copy_in(node)
        graph.output(tuple(copy_in(node) for node in results))
        changing = {position: _changing(argument) for position, argument in enumerate(arguments)}
        name = f"compiled_{next(self.numbers)}"
        where = f"{self.where}, {name} ({_modules(part)})"
        module = quiet(fx.GraphModule(nn.Module(), graph, class_name=name.title()))
        call = new.call_function(CompiledPart(module, name, self.backend, changing, where), tuple(map(copy, arguments)))
        for index, result in enumerate(results):
            copies[result] = new.create_node("call_function", operator.getitem, (call, index), name=result.name)
            copies[result].meta = dict(result.meta)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a call reads; for a size, the tensors that it is computed from."""
    for source in node.all_input_nodes:
        if _is_size(source):
            yield from _sources(source)
        else:
            yield source


def _is_read(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a value of a part is read outside of it, perhaps for its size only."""
    return any(_is_read(user, inside) if _is_size(user) else user not in inside for user in node.users)


def _changing(node: fx.Node) -> list[int]:
    """The dimensions of a value whose sizes differ from call to call."""
    value = None if _attribute(node) else node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    return [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]


def _modules(part: list[fx.Node]) -> str:
    paths = [path for path in (origin_of(node).path for node in part) if path]
    return f"modules {paths[0]!r} to {paths[-1]!r}" if paths else "the model's own forward"
