"""PipeDream: training without a flush ends with the weights of the recurrence, and stashes no more than is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import Inputs, Recurrence, pipedream, split
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D, Tied, blocks

import pipecompile
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.program import Program
from pipecompile.planning.calibration import update_seconds
from pipecompile.schedule import SCHEDULES, Schedule, gpipe
from pipecompile.schedule import pipedream as segment_of_pipedream


class Translator(nn.Module):
    """The source's table is the target's too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, D)
        self.target_words = nn.Embedding(VOCABULARY, D)
        self.target_words.weight = self.words.weight
        self.encoder, self.decoder = blocks(4), blocks(4)
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read = self.encoder(self.words(source)).mean(dim=1, keepdim=True)
        logits = self.head(self.decoder(self.target_words(target) + read))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def sentences(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (8, 6), generator=generator) for _ in range(2)), {}


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    loss: Callable[[Any], Tensor]
    calls: list[Inputs]


MODEL = MODELS["skip_to_loss"]
SKIPS = Case(MODEL.build, MODEL.loss, [MODEL.inputs(8, 6, seed) for seed in range(5)])
SHARED = Case(lambda: Translator().double(), lambda output: output, [sentences(seed) for seed in range(5)])
MICROBATCHES = 4  # each a minibatch: twenty steps

OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def trained(
    stages: int,
    optimizer: Callable[..., torch.optim.Optimizer],
    schedule: str = "pipedream",
    case: Case = SKIPS,
    **options: Any,
) -> tuple[Any, list[float]]:
    pipe = pipecompile.compile(
        case.build(),
        devices=["cpu"] * stages,
        schedule=schedule,
        microbatches=MICROBATCHES,
        optimizer=optimizer,
        costs="count",
        **options,
    )
    losses = [pipe(*args, **kwargs).item() for args, kwargs in case.calls]
    pipe.pipeline.flush()
    return pipe, losses


def recurrence(pipe: Any, optimizer: Callable[..., torch.optim.Optimizer], case: Case = SKIPS) -> Recurrence:
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    minibatches = [part for call in case.calls for part in split(call, MICROBATCHES)]
    delay = range(len(names))[::-1]
    return pipedream(case.build(), case.loss, minibatches, names, delay, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_twenty_minibatches_over_five_calls_equal_the_recurrence(
    stages: int, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    _equals_the_recurrence(*trained(stages, optimizer), stages, optimizer, SKIPS)


def _equals_the_recurrence(
    pipe: Any, losses: list[float], stages: int, optimizer: Callable[..., torch.optim.Optimizer], case: Case
) -> None:
    expected = recurrence(pipe, optimizer, case)
    assert pipe.pipeline.plan.num_stages == stages
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected.parameters.pop(name), msg=name)
    assert not expected.parameters
    means = [sum(expected.losses[i : i + MICROBATCHES]) / MICROBATCHES for i in range(0, 20, MICROBATCHES)]
    torch.testing.assert_close(losses, means)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
def test_readers_of_a_parameter_with_nothing_between_share_a_stage(stages: int, limited: bool) -> None:
    memory = 10**5 if limited else None
    cluster = Cluster(tuple(Device(f"rank {rank}", memory=memory) for rank in range(stages)))
    momentum = OPTIMIZERS["momentum"]
    pipe, losses = trained(stages, momentum, case=SHARED, cluster=cluster)
    _equals_the_recurrence(pipe, losses, stages, momentum, SHARED)
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    assert ["words.weight" in each for each in names] == [True] + [False] * (stages - 1)
    assert all(names)
    (line,) = pipe.pipeline.report.tied
    assert line == "words.weight in stage 0 with all 2 nodes that read it, since stages step apart"


def test_readers_of_a_parameter_with_a_body_between_are_refused_with_its_name() -> None:
    enclosing = Case(lambda: Tied().double(), lambda output: output[0], SHARED.calls)
    with pytest.raises(pipecompile.PlanError, match=r"embedding.weight is tied across stages 0, 1, .* or colocate="):
        trained(2, OPTIMIZERS["momentum"], case=enclosing)


class FrozenWords(Tied):
    """The loss alone; the weight of embedding and head is not trained."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding.weight.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().forward(ids, labels)[0]


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-vertical-sync", "pipedream-2bw"])
def test_a_frozen_parameter_may_be_read_by_stages_apart(schedule: str) -> None:
    case = Case(lambda: FrozenWords().double(), lambda output: output, SHARED.calls)
    momentum = OPTIMIZERS["momentum"]
    pipe, _ = trained(2, momentum, schedule, case)
    names = [{name for name, _ in stage.named_parameters()} for stage in pipe.pipeline.stages]
    assert set.intersection(*names) == {"embedding.weight"}
    if schedule == "pipedream":
        minibatches = [part for call in case.calls for part in split(call, MICROBATCHES)]
        trained_in = [each - {"embedding.weight"} for each in names]
        expected = pipedream(case.build(), case.loss, minibatches, trained_in, [1, 0], momentum)
        assert expected.parameters
        for name, value in expected.parameters.items():
            torch.testing.assert_close(pipe.get_parameter(name).detach(), value, msg=name)


def test_pins_that_part_the_readers_of_a_parameter_are_refused_with_its_name() -> None:
    apart = pipecompile.PlanOptions(pins={"words": 0, "target_words": 1})
    with pytest.raises(pipecompile.PlanError, match=r"words.weight is tied across stages 0, 1"):
        trained(2, OPTIMIZERS["momentum"], case=SHARED, plan=apart)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_stage_holds_as_many_versions_as_there_are_stages_from_it_on(stages: int) -> None:
    pipe, _ = trained(stages, OPTIMIZERS["momentum"])
    assert pipe.pipeline.versions == tuple(range(stages, 0, -1))


def test_weights_that_lag_behind_show() -> None:
    pipe, _ = trained(3, OPTIMIZERS["momentum"])
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    minibatches = [part for call in SKIPS.calls for part in split(call, MICROBATCHES)]
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
    assert len([program for program in made if program.carried]) >= len(SKIPS.calls) - 1  # it went on from call to call
    args, kwargs = SKIPS.calls[0]
    assert pipe.pipeline.verify(*args, **kwargs).exact
    for refused in ({}, {"optimizer": torch.optim.SGD, "plan": pipecompile.PlanOptions(replicas=[1, 1, 2])}):
        with pytest.raises(pipecompile.InputError, match="schedule='second'"):
            pipecompile.compile(MODEL.build(), ["cpu"] * 4, schedule="second", **refused)


def test_the_prediction_has_the_seconds_of_the_last_updates() -> None:
    pipe = pipecompile.compile(
        SHARED.build(), ["cpu"] * 2, schedule="pipedream-2bw", microbatches=4, costs="count", verify="never",
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )  # fmt: skip
    args, _ = SHARED.calls[0]
    for _ in range(3):
        pipe(*args)
    pipeline = pipe.pipeline
    took, predicted = (update_seconds(timeline, 2) for timeline in (pipeline.timeline, pipeline.predicted))
    assert min(took) > 0
    assert predicted == pytest.approx(took)
