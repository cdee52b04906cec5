"""Symbolic sizes: which dimensions of the inputs are symbols, and what the trace has decided about them.

A size in the graph is an expression over the inputs' sizes, so a stage can compute any shape without communication.

Two kinds of decision make a trace depend on sizes:
- the model's own Python asks (``if x.shape[1] > 8``, ``range(x.shape[1])``): the question is stored with its answer;
- an operation needs two sizes to be equal, or one to be a number: torch's ``ShapeEnv`` stores these as replacements.

Both are guards. What an operation only assumes about a size (that it is not 1, to choose a broadcast) is not a guard,
because the operation decides again when it runs on the real sizes. So a batch of 1 does not need its own trace.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.torch_internals import DimDynamic, ShapeEnv, SymT, constant_source, symbol_is_type


class Shapes(ShapeEnv):
    """A ``ShapeEnv`` that stores what the model's own Python asked about sizes."""

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.inside = 0  # nesting of torch functions being run; their questions are not the model's
        self.answers: dict[sympy.Basic, Any] = {}
        self.known: dict[Any, Any] = {}  # results of arithmetic (see capture/size_cache.py)

    def evaluate_sym_node(self, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
        if _teaches_nothing(sym_node.expr, sym_node.hint):
            answer = sympy.true if sym_node.hint else sympy.false
        else:
            answer = super().evaluate_sym_node(sym_node, *args, **kwargs)
        if not self.inside:
            self.answers[sym_node._expr] = answer
        return answer

    def _set_replacement(self, a: sympy.Symbol, tgt: sympy.Expr, msg: str) -> None:
        """Called by torch when an operation needs a size to have a certain value.

        Raises:
            DependsOnData: The size depends on data, and the operation is in the graph itself.
        """
        super()._set_replacement(a, tgt, msg)
        if only_data_tells(a) and a in self.replacements and not msg.startswith(_RENAMES):
            raise DependsOnData(f"an operation needs a size that depends on the model's data to be {tgt}")

    @property
    def learned(self) -> int:
        """Changes when the trace learns that a symbol equals something."""
        return int(self._replacements_version_counter)

    def _get_user_frame(self) -> None:
        """Called by torch for the line that it names beside a guard, in messages that no user sees.

        torch would import its exporter and its compiler to know their files, which takes longer than a small model.
        """

    def symbol(self, name: str, hint: int) -> int | torch.SymInt:
        """Returns a new symbol for a size; torch may assume that it is at least 2 (see the module docstring)."""
        source = constant_source(name)
        symbol = self.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=hint < 2)
        return self.create_symintnode(symbol, hint=hint, source=source)

    def decided(self) -> tuple[tuple[sympy.Basic, Any], ...]:
        """Returns expressions over the input symbols, with the values for which the trace is valid."""
        asked = [(expr, answer) for expr, answer in self.answers.items() if expr.free_symbols]
        asked = [(expr, answer) for expr, answer in asked if not any(map(only_data_tells, expr.free_symbols))]
        return (*asked, *self.assumed())

    def assumed(self) -> tuple[tuple[sympy.Basic, Any], ...]:
        """Returns those of the decisions that functions needed, without what the model's own Python asked."""
        return tuple((symbol, expr) for symbol, expr in self.replacements.items() if not only_data_tells(symbol))


_RENAMES = ("eliminate_unbacked", "rename_unbacked_to", "find")  # replace one name of a size with another


def only_data_tells(symbol: Any) -> bool:
    """Whether a size depends on data; questions about it that have an answer have it for every size."""
    return bool(symbol_is_type(symbol, SymT.UNBACKED_INT))


def _teaches_nothing(expr: Any, answer: Any) -> bool:
    """Whether an answer only says that two sizes differ, or which of them is larger.

    Such an answer replaces no symbol, so torch need not try to prove it; the sizes of the sample decide.
    """
    if not isinstance(answer, bool):
        return False
    if isinstance(expr, sympy.Eq | sympy.Ne):
        return isinstance(expr, sympy.Ne) is answer
    return isinstance(expr, sympy.Rel)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod, "Pow": operator.pow, "PowByNatural": operator.pow,
    "FloatPow": operator.pow, "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
    "Max": max, "Min": min, "ToFloat": float, "OpaqueUnaryFn_sqrt": math.sqrt, "OpaqueUnaryFn_log": math.log,
    "CeilToInt": math.ceil, "FloorToInt": math.floor, "TruncToInt": math.trunc, "RoundToInt": round,
}  # fmt: skip


class Sizes:
    """Turns symbolic numbers into graph nodes that compute them from the inputs' sizes."""

    def __init__(self, graph: fx.Graph, shapes: Shapes | None) -> None:
        self.graph = graph
        self.shapes = shapes
        self.sources: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        self.nodes: dict[sympy.Basic, fx.Node] = {}

    def declare(self, size: torch.SymInt, placeholder: fx.Node, dim: int) -> None:
        """Sets the placeholder and dimension from which a symbol is read at run time."""
        self.sources.setdefault(size.node._expr, (placeholder, dim))

    def node(self, number: torch.SymInt | torch.SymFloat | torch.SymBool) -> fx.Node | float:
        """Returns the node that computes a symbolic number, or its value, guarded, if it has no known expression."""
        expr = number.node.expr
        if not expr.free_symbols or not self._known(expr):
            return number.node.guard_bool("", 0) if isinstance(number, torch.SymBool) else _concrete(number)
        node = self._build(expr)
        node.meta.setdefault("val", number) if isinstance(node, fx.Node) else None
        return node

    def _known(self, expr: sympy.Basic) -> bool:
        return all(
            part.is_number or part in self.sources or type(part).__name__ in FUNCTIONS
            for part in sympy.preorder_traversal(expr)
        )

    def _build(self, expr: Any) -> fx.Node | float:
        if expr.is_Integer:
            return int(expr)
        if expr.is_number:
            return float(expr)
        if expr not in self.nodes:
            self.nodes[expr] = self._emit(expr)
        return self.nodes[expr]

    def _emit(self, expr: Any) -> fx.Node:
        if expr in self.sources:
            return self.graph.call_method("size", self.sources[expr])
        function = FUNCTIONS[type(expr).__name__]
        arguments = [self._build(argument) for argument in expr.args]
        result = arguments[0] if len(arguments) > 1 else self.graph.call_function(function, (arguments[0],))
        for argument in arguments[1:]:
            result = self.graph.call_function(function, (result, argument))
        return result  # type: ignore[return-value]


def expression(size: Any) -> Any:
    """The expression of a symbolic number; any other value itself. Equal for sizes that are written alike."""
    return size.node._expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def _concrete(number: torch.SymInt | torch.SymFloat) -> float:
    """Returns the value of a symbolic number in the trace; torch records that the trace is valid only for it."""
    return int(number) if isinstance(number, torch.SymInt) else float(number)


def resolve(expr: Any, values: Mapping[sympy.Symbol, int]) -> Any:
    """Returns the value of a symbolic (or plain) number for given sizes of the inputs.

    Raises:
        CaptureError: The number does not follow from the inputs' sizes, but depends on data.
    """
    if isinstance(expr, torch.SymInt | torch.SymFloat | torch.SymBool):
        own, known = expr.node._expr, expr.node.expr  # a part kept whole may show that a data size is an input size
        expr = own if own.free_symbols <= values.keys() else known
    if not isinstance(expr, sympy.Basic):
        return expr
    result = expr.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if result in (sympy.true, sympy.false):
        return bool(result)
    if not result.is_number:
        raise CaptureError(
            f"the number {result} depends on the model's data, not only on the sizes of its inputs; name the module "
            f"that computes it in leaf_modules="
        )
    return int(result) if result.is_integer else float(result)
