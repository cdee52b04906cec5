"""The promise: a step of the split model gives the unsplit model's loss, output, gradients and buffers.

Two levels. Against the unsplit model on the whole batch, to the default tolerances of ``torch.testing.assert_close`` in
float64. Against the unsplit model over the same microbatches in the same order, bit for bit, unless ``ROUNDED`` says
why the order of addition differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from models import MODELS, Model
from oracle import Run, assert_same, microbatched, step
from torch import nn

import pipecompile

BATCH = 4
ROUNDED: dict[str, str] = {}

ALL = pytest.mark.parametrize("name", MODELS)


@cache
def built(name: str) -> nn.Module:
    return MODELS[name].build()


@cache
def whole(name: str, length: int) -> Run:
    return step(built(name), built(name), MODELS[name].loss, MODELS[name].inputs(BATCH, length))


@cache
def in_order(name: str, length: int, microbatches: int) -> Run:
    model = MODELS[name]
    return microbatched(built(name), model.loss, model.inputs(BATCH, length), microbatches, model.inside)


def check(pipe: Callable[..., object], model: Model, length: int, microbatches: int) -> None:
    actual = step(pipe, built(model.name), model.loss, model.inputs(BATCH, length))
    if microbatches == 1 or not model.mixes:
        assert_same(actual, whole(model.name, length), buffers=microbatches == 1)
    assert_same(actual, in_order(model.name, length, microbatches), exact=model.name not in ROUNDED)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [2, 3])
@ALL
def test_a_step_equals_the_unsplit_model(name: str, stages: int, schedule: str, microbatches: int) -> None:
    model = MODELS[name]
    pipe = pipecompile.compile(built(name), devices=["cpu"] * stages, schedule=schedule, microbatches=microbatches)
    check(pipe, model, model.lengths[0], microbatches)
    assert pipe.plan.num_stages == stages


@ALL
def test_steps_of_other_lengths_follow_one_another(name: str) -> None:
    model = MODELS[name]
    pipe = pipecompile.compile(built(name), devices=["cpu", "cpu"], schedule="1f1b", microbatches=2)
    for length in (*model.lengths, model.lengths[0]):
        check(pipe, model, length, 2)


def test_gpt2_of_twelve_layers_and_768_features_takes_two_lengths() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=997, use_cache=False, **off)).double()
    pipe = pipecompile.compile(model, devices=["cpu", "cpu"], schedule="1f1b", microbatches=2)
    for length in (7, 12):
        ids = torch.randint(997, (2, length))
        inputs = ((), {"input_ids": ids, "labels": ids})
        assert_same(
            step(pipe, model, lambda output: output.loss, inputs),
            step(model, model, lambda output: output.loss, inputs),
        )
