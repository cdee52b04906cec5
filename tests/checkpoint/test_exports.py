"""``from_pretrained`` reads what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS

import pipecompile


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
@pytest.mark.parametrize(("name", "stages"), [("gpt2", 3), ("gpt2", 0), ("t5", 2)])
def test_transformers_reads_it(tmp_path: Path, name: str, stages: int, shard_bytes: int) -> None:
    model: Any = MODELS[name].build().float()
    place = {"devices": ["cpu"] * stages, "microbatches": 2, "costs": "count"}
    pipe = pipecompile.compile(model, **place) if stages else model
    pipecompile.export_safetensors(tmp_path / "out", pipe, shard_bytes)
    loaded = type(model).from_pretrained(tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 10_000)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == model.config.model_type
