"""``pipe.pipeline.metrics()`` on devices that run their work late, and tell what memory they have used."""

from __future__ import annotations

import torch
from machines import LATE
from scenes import Net, built, floats, inside, piped


def test_metrics_wait_for_the_step_and_have_the_peak_of_each_device() -> None:
    LATE.start()
    pipe = piped(built(Net), LATE)
    inside(pipe, *floats(0))
    found, timeline = pipe.pipeline.metrics(), pipe.pipeline.timeline
    assert found["step_seconds"] == timeline.makespan > 0
    assert {name for name in found if "peak" in name} == {"virt_0_peak_bytes", "virt_1_peak_bytes"}
    assert found["virt_1_peak_bytes"] == torch.accelerator.max_memory_allocated(1) > 0
    assert found["sent_bytes"] > 0
