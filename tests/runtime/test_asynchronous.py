"""PipeDream: training without a flush ends with the weights of the recurrence, and stashes no more than is due."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import Recurrence, pipedream, split

import pipecompile
from pipecompile.ir.program import Program
from pipecompile.schedule import SCHEDULES, Schedule, gpipe
from pipecompile.schedule import pipedream as segment_of_pipedream

MODEL = MODELS["skip_to_loss"]
CALLS = [MODEL.inputs(8, 6, seed) for seed in range(5)]
MICROBATCHES = 4  # each a minibatch: twenty steps

OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def trained(
    stages: int, optimizer: Callable[..., torch.optim.Optimizer], schedule: str = "pipedream"
) -> tuple[Any, list[float]]:
    pipe = pipecompile.compile(
        MODEL.build(),
        devices=["cpu"] * stages,
        schedule=schedule,
        microbatches=MICROBATCHES,
        optimizer=optimizer,
        costs="count",
    )
    losses = [pipe(*args, **kwargs).item() for args, kwargs in CALLS]
    pipe.pipeline.flush()
    return pipe, losses


def recurrence(pipe: Any, optimizer: Callable[..., torch.optim.Optimizer]) -> Recurrence:
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    minibatches = [part for call in CALLS for part in split(call, MICROBATCHES)]
    delay = range(len(names))[::-1]
    return pipedream(MODEL.build(), MODEL.loss, minibatches, names, delay, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_twenty_minibatches_over_five_calls_equal_the_recurrence(
    stages: int, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    pipe, losses = trained(stages, optimizer)
    expected = recurrence(pipe, optimizer)
    assert pipe.pipeline.plan.num_stages == stages
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected.parameters.pop(name), msg=name)
    assert not expected.parameters
    means = [sum(expected.losses[i : i + MICROBATCHES]) / MICROBATCHES for i in range(0, 20, MICROBATCHES)]
    torch.testing.assert_close(losses, means)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_stage_holds_as_many_versions_as_there_are_stages_from_it_on(stages: int) -> None:
    pipe, _ = trained(stages, OPTIMIZERS["momentum"])
    assert pipe.pipeline.versions == tuple(range(stages, 0, -1))


def test_weights_that_lag_behind_show() -> None:
    pipe, _ = trained(3, OPTIMIZERS["momentum"])
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    minibatches = [part for call in CALLS for part in split(call, MICROBATCHES)]
    plain = pipedream(MODEL.build(), MODEL.loss, minibatches, names, [0, 0, 0], OPTIMIZERS["momentum"])
    apart = [name for name, p in pipe.named_parameters() if not torch.allclose(p, plain.parameters[name])]
    assert "body.0.0.weight" in apart


def test_an_entry_in_the_registry_makes_another_asynchronous_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Program] = []

    def segment(*args: Any) -> Program:
        made.append(segment_of_pipedream(*args))
        return made[-1]

    monkeypatch.setitem(SCHEDULES, "second", Schedule(gpipe, segment))  # type: ignore[arg-type]
    pipe, losses = trained(3, OPTIMIZERS["momentum"], "second")
    expected, expected_losses = trained(3, OPTIMIZERS["momentum"])
    assert losses == expected_losses
    for (name, parameter), same in zip(pipe.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, same), name
    assert len([program for program in made if program.carried]) >= len(CALLS) - 1  # it went on from call to call
    args, kwargs = CALLS[0]
    assert pipe.pipeline.verify(*args, **kwargs).exact
    for refused in ({}, {"optimizer": torch.optim.SGD, "plan": pipecompile.PlanOptions(replicas=[1, 1, 2])}):
        with pytest.raises(pipecompile.InputError, match="schedule='second'"):
            pipecompile.compile(MODEL.build(), ["cpu"] * 4, schedule="second", **refused)
