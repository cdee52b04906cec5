"""A pipeline of several processes trains bit for bit as the same pipeline in threads."""

from __future__ import annotations

from typing import Any

import pytest
from launcher import Launcher
from long import LONG
from models import MODELS
from training_scenes import MORE, WAYS

EVERY = ["gpt2", "long_skip", "skip_to_loss", "t5", "two_towers", "unet", *MORE]
SOME = [
    "gpt2",
    "tied",
    "dropping",
    "contrastive",
    "skip_to_loss",
    "dataclass_output",
    "nested_output",
    "buffers_in_place",
]
SEVERAL = ["named_tuple_output", "nested_output"]  # the caller's loss reads outputs of several stages
SCHEDULES = [
    "sequential",
    "gpipe",
    "1f1b",
    "zb-h1",
    "zb-h2",
    "pipedream",
    "pipedream-vertical-sync",
    "pipedream-2bw",
]
STAGES_PER_RANK = ["interleaved-1f1b", "bfs", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v", "auto"]


@pytest.mark.parametrize("name", [*MODELS, *MORE] if LONG else SOME)
def test_a_model_trains_alike(launcher: Launcher, name: str) -> None:
    outputs = "all" if name in SEVERAL else None
    found = launcher.returned("training_scenes:train", 2, name=name, schedule="1f1b", outputs=outputs)
    assert found == [[], []]


@pytest.mark.parametrize("schedule", SCHEDULES if LONG else ["1f1b", "pipedream-2bw"])
@pytest.mark.parametrize("name", EVERY if LONG else ["skip_to_loss"])
def test_a_schedule_trains_alike_over_four_processes(launcher: Launcher, name: str, schedule: str) -> None:
    found = launcher.returned("training_scenes:train", 4, name=name, schedule=schedule)
    refused = all(each and each[0].startswith("refused: ") for each in found)  # in the same words as in threads
    away = all(each and "needs 'scale' in rank 0, which has sent it away" in each[0] for each in found)
    assert found == [[], [], [], []] or (
        (refused or (away and name == "contrastive")) and schedule.startswith("pipedream")
    )


@pytest.mark.parametrize("schedule", STAGES_PER_RANK if LONG else ["zb-v"])
@pytest.mark.parametrize("name", ["skip_to_loss", "gpt2", "unet", "two_towers", "tied"] if LONG else ["tied"])
def test_several_stages_of_a_process_train_alike(launcher: Launcher, name: str, schedule: str) -> None:
    found = launcher.returned("training_scenes:train", 2, name=name, schedule=schedule)
    assert found == [[], []]


def test_a_later_call_that_needs_a_parameter_of_another_rank_is_refused(launcher: Launcher) -> None:
    """PipeDream's microbatches are batches of their own, so the loss is in a stage; an evaluation's is in the tail."""
    found = launcher.returned("training_scenes:train", 2, name="contrastive", schedule="pipedream")
    assert found[0] == found[1]
    assert "trained, but CaptureError: this call needs 'scale' in rank 0, which has sent it away" in found[0][0]


@pytest.mark.parametrize("way", WAYS)
def test_a_training_loop_of_another_kind(launcher: Launcher, way: str) -> None:
    assert launcher.returned("training_scenes:train_in", 2, way=way) == [[], []]


@pytest.fixture(scope="module")
def found(launcher: Launcher) -> list[Any]:
    return launcher.returned("training_scenes:tuned_and_scaled", 2)


def test_an_infinite_gradient_of_one_process_skips_the_step_of_all(found: list[Any]) -> None:
    assert [each["scaled"] for each in found] == [[True, True, 1.0, 1.0]] * 2


def test_steps_tell_all_processes_what_stages_take(found: list[Any]) -> None:
    one, two = (each["train"] for each in found)
    assert one.pop("same")
    assert two.pop("same")
    assert one == two
    assert "per microbatch in 3 training steps: " in one["learned"][0]
    assert not one["first"]
    assert one["corrections"] == ("corrected by training steps",)


def test_steps_tell_all_processes_of_a_cut_that_pays_after_a_call_that_was_refused(found: list[Any]) -> None:
    one, two = (each["pays"] for each in found)
    assert one.pop("same")
    assert two.pop("same")
    assert one == two
    (said,) = one["learned"]
    assert said.startswith("stages took 6.00 ms, 300 us per microbatch in 3 training steps: in another cut the slowest")
    assert said.endswith("PlanOptions(tune='rehearse') finds it before weights are placed")


def test_processes_rehearse_before_weights_are_placed(found: list[Any]) -> None:
    one, two = (each["rehearse"] for each in found)
    assert one.pop("same")
    assert two.pop("same")
    assert one == two
    assert "rehearsal" in one["corrections"][0]
    assert not one["learned"]


def test_what_one_process_refuses_several_refuse_in_the_same_words(launcher: Launcher) -> None:
    found = launcher.returned("training_scenes:train", 2, name="tied", schedule="pipedream")
    assert found[0] == found[1]
    assert found[0][0].startswith("refused: ")
