"""The promise: a step of the split model gives the unsplit model's loss, output, gradients and buffers.

Two levels. Against the unsplit model on the whole batch, buffers too, to the default tolerances of
``torch.testing.assert_close`` in float64. Against the unsplit model over the same microbatches in the same order, bit
for bit, unless ``ROUNDED`` says why the order of addition differs, or the model writes buffers: the pipeline does
once a batch what the unsplit model does for each microbatch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from long import LONG, some
from models import MODELS, Model
from oracle import Run, assert_same, microbatched, step
from torch import nn

import pipecompile
from pipecompile.compiler import compile_call, plan_call

TIED = "the uses of a tied weight are added up stage by stage, not microbatch by microbatch"
ROUNDED = {
    **dict.fromkeys(
        ["gpt2", "gpt2_padded", "bert", "t5", "tied", "tied_thrice", "used_twice", "label_shift", "options"], TIED
    ),
    "llama": "a cut between three uses of one value adds up their gradients in another order",
}

WRITES = {"buffers_in_place", "buffers_rebound", "buffer_read"}  # the unsplit model over microbatches writes more often

VERBS = {"capture": (compile_call, compile_call.capture), "profile": (plan_call, plan_call.profile)}


@cache
def built(name: str) -> nn.Module:
    return MODELS[name].build()


@cache
def whole(name: str, length: int) -> Run:
    return step(built(name), built(name), MODELS[name].loss, MODELS[name].inputs(MODELS[name].rows, length))


@cache
def in_order(name: str, length: int, microbatches: int) -> Run:
    model = MODELS[name]
    return microbatched(built(name), model.loss, model.inputs(model.rows, length), microbatches, model.inside)


@cache
def _remembered(verb: str, key: Hashable) -> list[Any]:
    return []


def remembered(verb: str, subject: Any, call: Any, size: Any, *rest: Any, **options: Any) -> Any:
    """What ``capture(model, call, size, ...)`` or ``profile(captured, graph, how, ...)`` gave before."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # transformers' attention asks the environment, which is guarded whole
    known = _remembered(verb, (id(subject), getattr(call, "key", None), size))
    if not known:
        # alive, so that its id is its own
        known.append((subject, VERBS[verb][1](subject, call, size, *rest, **options)))
    return known[0][1]


def check(pipe: Callable[..., object], model: Model, length: int, microbatches: int) -> None:
    actual = step(pipe, built(model.name), model.loss, model.inputs(model.rows, length))
    if microbatches == 1 or not model.mixes or model.name in WRITES:
        assert_same(actual, whole(model.name, length))
    if microbatches == 1 or model.name not in WRITES:
        expected = in_order(model.name, length, microbatches)
        assert_same(actual, expected, exact=model.name not in ROUNDED, buffers=model.name != "resnet50")


@pytest.fixture
def _one_capture_for_many_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages and schedules come after the capture and the profile; with the same call these would be the same."""
    for verb, (module, _) in VERBS.items():
        monkeypatch.setattr(module, verb, partial(remembered, verb))


SETTINGS = [*product((2, 3), ("gpipe", "1f1b"), (1, 2, 4))]
SOME = [(2, "1f1b", 2), (3, "gpipe", 4), (3, "1f1b", 1)]  # each number of stages and microbatches, each schedule
CASES = [(name, *setting) for i, name in enumerate(MODELS) for setting in (SETTINGS if LONG else [SOME[i % 3]])]


@pytest.mark.usefixtures("_one_capture_for_many_plans")
@pytest.mark.parametrize(("name", "stages", "schedule", "microbatches"), CASES)
def test_a_step_equals_the_unsplit_model(name: str, stages: int, schedule: str, microbatches: int) -> None:
    model = MODELS[name]
    pipe = pipecompile.compile(
        built(name), devices=["cpu"] * stages, schedule=schedule, microbatches=microbatches, costs="count"
    )
    check(pipe, model, model.lengths[0], microbatches)
    assert pipe.pipeline.plan.num_stages == stages


@pytest.mark.parametrize("name", some(MODELS))
def test_steps_of_other_lengths_follow_one_another(name: str) -> None:
    model = MODELS[name]
    pipe = pipecompile.compile(built(name), devices=["cpu", "cpu"], schedule="1f1b", microbatches=2)
    for length in (*model.lengths, model.lengths[0]):
        check(pipe, model, length, 2)


def test_gpt2_of_twelve_layers_takes_two_lengths() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=997, n_embd=768 if LONG else 96, use_cache=False, **off)).double()
    costs = "measure" if LONG else "count"
    pipe = pipecompile.compile(model, devices=["cpu", "cpu"], schedule="1f1b", microbatches=2, costs=costs)
    for length in (7, 12):
        ids = torch.randint(997, (4, length))
        inputs = ((), {"input_ids": ids, "labels": ids})
        assert_same(
            step(pipe, model, lambda output: output.loss, inputs),
            step(model, model, lambda output: output.loss, inputs),
        )
