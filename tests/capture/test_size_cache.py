"""Arithmetic on sizes that a trace remembers: the same traces as without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from long import some
from models import MODELS, Model
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pipecompile.capture import Captured, capture, patches, read_call, summarize
from pipecompile.ops.symbols import Shapes


def captured(model: Model) -> Captured:
    module = model.build()
    args, kwargs = model.inputs(4, model.lengths[0])
    return capture(module, read_call(module.forward, args, kwargs), 2)


def reading(capture: Captured) -> Mapping[str, Any]:
    return {
        "code": capture.graph.python_code("self").src,
        "graph": summarize(capture),
        "guards": [(str(expr), str(answer)) for expr, answer in capture.guards],
        "outputs": [(output.name, output.batch_dim, output.is_shared) for output in capture.outputs],
        "notes": capture.notes,
    }


@pytest.mark.parametrize("name", some(MODELS))
def test_a_trace_that_remembers_is_the_trace_that_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = reading(captured(MODELS[name]))
    monkeypatch.setattr(patches, "REMEMBERED", {})
    assert reading(captured(MODELS[name])) == remembered


def test_sizes_are_remembered_by_their_own_trace_alone() -> None:
    mine, other = Shapes(), Shapes()
    a, b = mine.symbol("a", 6), other.symbol("b", 9)
    with patches._arithmetic():
        assert (a + 1).node is (a + 1).node
        assert (b + 1).node is not (a + 1).node
    assert len(other.known) == len(mine.known) > 0


def test_sizes_of_other_traces_are_left_alone() -> None:
    shapes = ShapeEnv()
    symbol = shapes.create_symbol(6, ConstantSource("a"))
    a = shapes.create_symintnode(symbol, hint=6)
    with patches._arithmetic():
        assert (a + 1).node is not (a + 1).node


def test_what_a_trace_learns_later_holds_for_what_it_remembers() -> None:
    shapes = Shapes()
    a, b = shapes.symbol("a", 6), shapes.symbol("b", 6)
    with patches._arithmetic():
        total = a + b
        assert total.node.maybe_as_int() is None
        assert bool(a == b)
        assert (a + b).node.expr == (2 * b).node.expr
        assert bool(b == 6)
        assert total.node.maybe_as_int() == 12
        assert (a + b).node.maybe_as_int() == 12


@pytest.mark.parametrize(
    ("question", "answer", "teaches"),
    [
        (lambda a, b: a == b, True, True),
        (lambda a, b: a != b, False, True),
        (lambda a, b: a == b + 1, False, False),
        (lambda a, b: a != b + 1, True, False),
        (lambda a, b: a < b + 1, True, False),
        (lambda a, b: a > b, False, False),
    ],
)
def test_only_equality_says_that_one_size_stands_for_another(question: Any, answer: bool, teaches: bool) -> None:
    shapes = Shapes()
    asked = question(shapes.symbol("a", 6), shapes.symbol("b", 6))
    assert bool(asked) is answer
    assert bool(shapes.replacements) is teaches
    assert len(shapes.answers) == 1
