"""The topics of a report in the order in which a page shows them: their title, and whether they are open at first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TOPICS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "warnings": ("Warnings", True),
        "leaves": ("Leaves: modules and functions kept whole", True),
        "notes": ("What was kept whole, fixed or given up to capture the model", True),
        "microbatches": ("How microbatches compute what the whole batch computes", True),
        "guards": ("Guards: when a later call can use this capture", True),
        "attributes": ("Python attributes that a call sets", False),
        "verified": ("Compared with the unsplit model", False),
        "plan": ("Plan", False),
        "learned": ("What the first training steps told", False),
        "calibration": ("Measured and predicted seconds of stages", False),
        "memory": ("Peak memory of stages, predicted", False),
        "recomputed": ("Recomputed in the backward", False),
        "offloaded": ("Offloaded to the host's memory", False),
        "rematerialized": ("Rematerialized values", False),
        "tied": ("Tied parameters", False),
        "replicas": ("Replicas", False),
        "links": ("Links between devices", False),
        "costs": ("Where the costs come from", False),
        "captures": ("Captures", False),
        "compiled": ("Compiled stages", False),
        "remembered": ("Remembered from earlier processes", False),
        "caches": ("Key-value caches", False),
        "mapped": ("Batches of map that ran alone", False),
        "schedule": ("Schedule", False),
        "updates": ("Weights of asynchronous schedules", False),
        "rerun": ("Calls rerun in a backward", False),
        "observed": ("Observers of the calling thread", False),
        "timing": ("Seconds of the first call", False),
    }
)
