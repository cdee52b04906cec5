"""Whether backwards are split if the user names no schedule: 1F1B, or ZB-H1, which keeps about as much in memory.

ZB-H1 (Qi et al., ICLR 2024, section 2) computes gradients of weights where 1F1B waits for other stages. That is worth
most with few microbatches, of which each takes longer per row the fewer rows it has. But to split a backward takes time
too (``ir/split_nodes.py``), so ZB-H1 is taken if its step is predicted to be shorter by ``PAYS``.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.planning.planned import Planned
from pipecompile.planning.schedule_choice import Weighed, weighed
from pipecompile.planning.training_spec import Workload
from pipecompile.schedule import SCHEDULES

WHOLE, SPLIT = "1f1b", "zb-h1"
PAYS = 0.03  # the share of a step that split backwards are predicted to save, where they are taken


def under(name: str, work: Workload) -> Workload:
    """The workload under another schedule with one stage on each rank."""
    return replace(work, schedule=SCHEDULES[name].steady)


def or_split(found: Planned) -> Planned:
    """A plan for 1F1B, under 1F1B or ZB-H1, with both as they were weighed."""
    works = {name: under(name, found.work) for name in (WHOLE, SPLIT)}
    whole, split = (weighed(name, found.costed, found.plan, found.cluster, works[name]) for name in works)
    best, other = (split, whole) if _pays(split, whole) and _fits(found, works[SPLIT]) else (whole, split)
    return replace(found, work=works[best.schedule], schedule=best.schedule, weighed=(best, other))


def _pays(split: Weighed, whole: Weighed) -> bool:
    assert split.seconds is not None
    assert whole.seconds is not None
    return split.seconds < whole.seconds * (1 - PAYS)


def _fits(found: Planned, work: Workload) -> bool:
    needed = work.memory(found.costed, found.plan, found.cluster).ranks
    return all(
        device.memory is None or nbytes <= device.memory
        for device, nbytes in zip(found.cluster.devices, needed, strict=False)
    )
