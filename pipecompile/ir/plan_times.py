"""The times and the memory that a plan was made for: what a schedule can adapt the order of its computations to."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.halves import Halves


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds and bytes per microbatch.

    Attributes:
        forward, backward: seconds of each stage on its device.
        saved_bytes: what each stage saves for its backward.
        transfer: seconds of each channel of the plan, in its order.
        halves: seconds of each stage on its device where its backward is split; empty: both halves are equal.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    saved_bytes: tuple[int, ...]
    transfer: tuple[float, ...]
    halves: tuple[Halves, ...] = ()
