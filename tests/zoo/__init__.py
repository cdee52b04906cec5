"""The zoo: tiny, random models of more than 200 architectures, each with inputs and a loss.

``ZOO`` holds them by name. None needs a download. ``make zoo`` and ``make nightly`` run them all; ``QUARTER`` has
every fourth, for a look in between (``zoo_run.py --quarter``).
"""

from __future__ import annotations

from zoo.audio import audio
from zoo.decoders import decoders
from zoo.detection import detection
from zoo.encoders import encoders
from zoo.entry import ROWS, Entry
from zoo.experts import experts
from zoo.hand_written import hand_written
from zoo.pairs import pairs
from zoo.photographs import photographs
from zoo.state_space import state_space
from zoo.translators import translators
from zoo.vision import vision

__all__ = ["QUARTER", "ROWS", "ZOO", "Entry"]

_FAMILIES = (
    decoders, experts, state_space, encoders, translators, vision, detection, pairs, audio, photographs, hand_written,
)  # fmt: skip

ZOO: dict[str, Entry] = {entry.name: entry for family in _FAMILIES for entry in family()}
QUARTER: tuple[str, ...] = tuple(ZOO)[::4]
