"""What people write in forwards: each idiom trains as in eager, or is refused with a remedy.

The models are in ``idioms/``, by theme: written for these tests after what forwards of torchvision, transformers, timm,
diffusers, fairseq, MONAI, speechbrain, PyTorch Geometric, detectron2, vector-quantize-pytorch, cleanrl, nanoGPT and
lightning-bolts do. How they are compared is said in ``idioms/check.py``.

Here each is cut at random once: one half into two stages, one microbatch, with an evaluation behind the steps, the
other into three and four uneven microbatches. With ``IDIOMS=all`` in the environment each is tried with all stages,
microbatches and schedules, cut as planned.
"""

from __future__ import annotations

import os
import re
import zlib
from contextlib import nullcontext
from itertools import product

import pytest
from idioms import (
    applications,
    backwards,
    changes,
    criteria,
    draws,
    functions,
    layers,
    libraries,
    memories,
    objectives,
    precisions,
    programs,
    research,
    sequences,
    states,
    structures,
    tensors,
    wholes,
    wiring,
)  # fmt: skip
from idioms.check import REMEDY, outcome
from idioms.cuts import cut_at_random
from idioms.declare import IDIOMS, Idiom
from long import some

THEMES = (
    applications, backwards, changes, criteria, draws, functions, layers, libraries, memories, objectives, precisions,
    programs, research, sequences, states, structures, tensors, wholes, wiring,
)  # fmt: skip
THOROUGH = os.environ.get("IDIOMS") == "all"
SCHEDULES = ("sequential", "gpipe", "1f1b", "pipedream")
EVERY = list(product((2, 3), (1, 4), SCHEDULES))
QUICK = [(2, 1, "gpipe"), (3, 4, "1f1b")]
HELD_TO = sorted(name for name, idiom in IDIOMS.items() if not idiom.held)  # not as modules happen to be imported
TRIED = HELD_TO if THOROUGH else some(HELD_TO, 5)
ONCE_WRONG = (
    "EquilibriumByInnerGraph",
    "RemovedHook",
    "AdversarialStep",
    "InstanceNormTracked",
    "Dlrm",
    "FakeQuantize",
    "NetUnderTwoNames",
    "ReversibleLayers",
    "TableByClass",
    "PackedAlone",
    "CouplingByMask",
    "TwoViewsNormalized",
    "QuantizedByFields",
    "NamedPairInACall",
    "PatternParsedInALeaf",
    "FirstTensorOfABuffer",
    "SegmentsRoundedUp",
    "AdjointInTheModelItself",
    "StackedViewsNormalized",
    "RepeatedViewsNormalized",
    "MarginOfItsOwnClasses",
    "TiedBehindTheBatch",
    "BothWaysByTheBatch",
    "BothWaysNormalized",
    "FirstBatchSetsData",
    "LinearForEachSample",
    "BurgersResidual",
)
CASES = [
    (name, *setting) for i, name in enumerate(TRIED) for setting in (EVERY if THOROUGH else [QUICK[i % len(QUICK)]])
]
CASES = list(dict.fromkeys([*CASES, *((name, 2, 4, "1f1b") for name in ONCE_WRONG)]))


def test_there_are_enough() -> None:
    assert len(HELD_TO) >= 350
    assert all(theme.__doc__ for theme in THEMES)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads it
@pytest.mark.parametrize(("name", "stages", "microbatches", "schedule"), CASES)
def test_an_idiom_is_exact_or_refused(name: str, stages: int, microbatches: int, schedule: str) -> None:
    idiom = IDIOMS[name]
    cuts = nullcontext() if THOROUGH else cut_at_random(zlib.crc32(f"{name} {stages}".encode()))
    with cuts:
        found = outcome(idiom, stages, microbatches, schedule, evaluate=THOROUGH or microbatches == 1)
    if found != "exact":
        reason = allowed(idiom, microbatches, schedule)
        assert reason, f"{name} is {found}"
        assert re.search(reason, found), f"{name} is {found}, where {reason!r} was expected"
        assert REMEDY.search(found), f"no remedy in {found}"


@pytest.mark.parametrize("name", [name for i, name in enumerate(TRIED) if i % 10 == 0 and not THOROUGH])
def test_an_asynchronous_pipeline_begins_with_the_losses_of_eager(name: str) -> None:
    idiom = IDIOMS[name]
    with cut_at_random(zlib.crc32(name.encode())):
        found = outcome(idiom, 2, 2, "pipedream")
    if found != "exact":
        reason = allowed(idiom, 2, "pipedream")
        assert reason, f"{name} is {found}"
        assert re.search(reason, found), f"{name} is {found}, where {reason!r} was expected"


def allowed(idiom: Idiom, microbatches: int, schedule: str) -> str:
    """The pattern of the reasons for which an idiom may be refused; empty if it may not be."""
    reasons = [idiom.refused]
    if microbatches > 1:
        reasons.append(idiom.refused_parts)
    if schedule == "pipedream":
        reasons.append(idiom.refused_stream)
    return "|".join(filter(None, reasons))
