"""Models of other libraries, chosen by walking each library's registry: tiny, random, each with inputs and a loss.

``LIBRARIES`` gives the entries of one library, which it imports; the environment that has them all is ``.venv-wild``
(``make wild`` makes it and runs them).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from zoo.entry import Entry

NAMES = (
    "timm", "diffusers", "segmentation", "monai", "x_transformers", "open_clip", "geometric", "speechbrain", "kornia",
    "neuralforecast", "peft", "litgpt", "mambapy", "torchaudio", "sentence_transformers",
    "lucidrains", "tabular", "flows", "dynamics", "criteria", "further",
)  # fmt: skip


def entries(library: str) -> tuple[Entry, ...]:
    """The models of one library, which is imported."""
    walk: Callable[[], tuple[Entry, ...]] = import_module(f"wild.of_{library}").entries
    return walk()
