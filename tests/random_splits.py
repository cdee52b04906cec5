"""The property of random models: a split one gives the unsplit model's numbers. What fails is shrunk and printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import pytest
import torch
from long import LONG
from oracle import Inputs, Loss, Run, assert_same, leaves, microbatched, step
from random_models import Program, drawn, shrunk
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import InfeasibleError
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.instruction import Backward, Forward
from pipecompile.ir.plan import Plan

SHAPES = [(4, 3), (8, 5), (5, 4), (4, 7)]  # batch and length; 6, the width, is neither
COUNT = int(os.environ.get("RANDOM_MODELS", "256" if LONG else "8"))  # of each test
FIRST = 2 * COUNT * int(os.environ.get("RANDOM_SEED", "0"))  # seeds that no other day has
SCHEDULES = ["sequential", "gpipe", "1f1b", "zb-h2", "interleaved-1f1b", "interleaved-zb", "bfs", "zb-v", "dualpipe-v"]
LARGEST = 1e4  # of a loss, so that rounding stays small


def assert_a_split_equals_eager(seed: int, monkeypatch: pytest.MonkeyPatch, random_plan: bool) -> None:
    """Draws programs from a seed until one trains in eager mode, and holds its split to the unsplit model's numbers."""
    program = next(p for p in map(drawn, count(seed * 1000)) if trains(p))
    if random_plan:
        monkeypatch.setattr("pipecompile.planning.search_spec.partition", _planned(seed))
    error = failure(program)
    if error is not None:
        smallest = shrunk(program, lambda p: trains(p) and type(failure(p)) is type(error))
        pytest.fail(f"seed {program.seed}:\n{smallest.source}\n{choices(smallest)}\n{failure(smallest) or error}")


def trains(program: Program) -> bool:
    """Whether eager mode can train it: some programs write what autograd has saved, or reach no parameter."""
    model, loss, parts = program.build(), loss_of(program), choices(program)["microbatches"]
    try:
        for shape in shapes_of(program):
            run = step(model, model, loss, program.inputs(*shape))
            microbatched(model, loss, program.inputs(*shape), parts, program.inside)
            if not any(g is not None for g in run.gradients.values()) or not run.loss.abs() < LARGEST:
                return False
    except (RuntimeError, IndexError):
        return False
    return True


def failure(program: Program) -> BaseException | None:
    try:
        _check(program)
    except Exception as error:
        return error
    return None


def choices(program: Program) -> dict[str, Any]:
    draw = Random(program.seed)
    return {
        "devices": ["cpu"] * draw.choice([2, 3, 4]),
        "microbatches": draw.choice([1, 2, 3, 4]),
        "schedule": draw.choice(SCHEDULES),
    }


def shapes_of(program: Program) -> list[tuple[int, int]]:
    """The shapes of the two steps."""
    draw = Random(program.seed + 1)
    return [draw.choice(SHAPES[:2]), draw.choice(SHAPES)]


def _check(program: Program) -> None:
    model, loss, shapes = program.build(), loss_of(program), shapes_of(program)
    pipe = _compiled(model, program, shapes[0])
    for shape in shapes:
        actual = _numbers(program, shape, lambda inputs: step(pipe, model, loss, inputs))
        assert pipe.pipeline.program is not None
        parts = len({i.microbatch for i in pipe.pipeline.program.instructions if isinstance(i, Forward | Backward)})
        parted = _numbers(
            program, shape, lambda inputs, parts=parts: microbatched(model, loss, inputs, parts, program.inside)
        )
        normed = "self.batch_norm(" in program.source and parts > 1
        if not normed:
            assert_same(actual, _numbers(program, shape, lambda inputs: step(model, model, loss, inputs)))
        if not program.writes:
            assert_same(actual, parted)


def _compiled(model: nn.Module, program: Program, shape: tuple[int, int]) -> Any:
    """The model's pipeline; of fewer stages if what must stay together leaves no more."""
    options = choices(program)
    while True:
        try:
            return pipecompile.compile(model, **options, costs="count", example_inputs=program.inputs(*shape))
        except InfeasibleError:
            options["devices"] = options["devices"][1:]


def _numbers(program: Program, shape: tuple[int, int], run: Callable[[Inputs], Run]) -> Run:
    """A step's numbers on fresh inputs, the gradient of ``x`` among them."""
    inputs = program.inputs(*shape)
    found = run(inputs)
    return replace(found, gradients={**found.gradients, "x": inputs[0][0].grad})


def loss_of(program: Program) -> Loss:
    return _inner_loss if program.inside else _outer_loss


def _inner_loss(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss


def _outer_loss(output: Any) -> Tensor:
    floats = [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() / i for i, leaf in enumerate(floats, 1)]).sum()


def _planned(seed: int) -> Any:
    """In place of ``partition``: a random plan, which keeps together what must be, and sends values forward."""

    def plan(costed: CostedGraph, num_stages: int, *args: Any) -> Plan:
        return random_plan(costed.graph, num_stages, Random(seed), args[-1])

    return plan


def random_plan(graph: Graph, num_stages: int, draw: Random, rank_of: Sequence[int] = ()) -> Plan:
    """Mostly a cut by position, with strays; moved to later stages until no value flows back.

    Args:
        rank_of: the rank of each stage; by default its own.
    """
    size = len(graph)
    cuts = sorted(draw.randrange(size + 1) for _ in range(num_stages - 1))
    stage_of = [sum(cut <= i for cut in cuts) for i in range(size)]
    for i in range(size):
        if draw.random() < 0.15:
            stage_of[i] = draw.randrange(num_stages)
    moved = True
    while moved:
        before = list(stage_of)
        for i, node in enumerate(graph.nodes):
            placed = [stage_of[j] for j in node.inputs if not graph.nodes[j].rematerialized]
            stage_of[i] = max([stage_of[i], *placed])
        for group in graph.together:
            for i in group:
                stage_of[i] = max(stage_of[j] for j in group)
        moved = stage_of != before
    return Plan.of(graph, stage_of, rank_of or range(num_stages))
