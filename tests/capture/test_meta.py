"""A model that no machine here could hold is captured, planned and cut on the meta device."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
import transformers

import pipecompile
from pipecompile.errors import InputError
from pipecompile.ir.plan import members

GIB = 2**30
LAYERS, STAGES = 4, 4


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Four layers of a 70-billion-parameter Llama, at a length and batch that stay symbols."""
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(1000, (4, 128))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = pipecompile.compile(
        model, devices=["cpu"] * STAGES, microbatches=2, example_inputs={"input_ids": ids, "labels": ids}
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    nbytes = sum(p.nbytes for p in model.parameters())
    assert nbytes > 20 * GIB
    assert grown < GIB, f"{grown / GIB:.1f} GiB were taken for a model of {nbytes / GIB:.0f} GiB on the meta device"
    return made


def test_no_weight_has_memory(pipe: Any) -> None:
    weights = [*pipe.parameters(), *(p for stage in pipe.pipeline.stages for p in stage.parameters())]
    assert len(weights) > 2 * 9 * LAYERS
    assert all(weight.untyped_storage().nbytes() == weight.itemsize for weight in weights)


def test_every_parameter_has_a_stage(pipe: Any) -> None:
    compiled = pipe.pipeline._capture_in_use
    read = {
        name
        for stage in range(STAGES)
        for i in members(compiled.graph, compiled.plan, stage)
        for name in compiled.graph.nodes[i].parameters
    }
    assert read == {name for name, _ in pipe.named_parameters()} != set()
    assert read == {name for stage in pipe.pipeline.stages for name, _ in stage.named_parameters()}


def test_stages_are_balanced_and_a_step_is_predicted(pipe: Any) -> None:
    compiled = pipe.pipeline._capture_in_use
    assert compiled.planned.costed.origin == "counted"
    seconds = [0.0] * STAGES
    for cost, stage in zip(compiled.planned.costed.costs, compiled.plan.stage_of, strict=True):
        if stage is not None:
            seconds[stage] += cost.seconds
    assert max(seconds) < 1.3 * sum(seconds) / STAGES
    assert pipe.pipeline.predicted.makespan > max(seconds)


def test_a_call_is_refused_in_words(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1000, (4, 128))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**17)  # a machine of 16 GiB
    with pytest.raises(InputError, match=r"values would take \d+ GiB of this machine's 16 GiB of memory; use more"):
        pipe(input_ids=ids, labels=ids)


def test_experts_can_be_planned_too() -> None:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(1000, (4, 16))
    made = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, example_inputs={"input_ids": ids, "labels": ids})
    assert made.pipeline.plan.num_stages == 2
    assert made.pipeline._capture_in_use.planned.costed.seconds > 0
