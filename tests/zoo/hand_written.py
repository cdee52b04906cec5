"""Hand-written hard cases: those that the other tests train."""

from __future__ import annotations

import dataclasses

from models import MODELS

from zoo.entry import Entry

ELSEWHERE = ("gpt2", "gpt2_padded", "bert", "llama", "t5", "vit", "resnet50", "resnet50_frozen_norm")


def hand_written() -> tuple[Entry, ...]:
    return tuple(
        Entry(
            **{field.name: getattr(model, field.name) for field in dataclasses.fields(model)} | _once(name),
            family="hand-written",
        )
        for name, model in MODELS.items()
        if name not in ELSEWHERE
    )


def _once(name: str) -> dict[str, str]:
    """The unsplit model over microbatches writes this one's buffer for each; the pipeline does once a batch."""
    return {"mixes": ""} if name == "buffer_read" else {}
