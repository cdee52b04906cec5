"""Every feature on accelerators that run their work late, early, or in any order: the figures of the CPU."""

from __future__ import annotations

import pytest
import torch
from long import LONG
from machines import EARLY, LATE, NO_CUDA, RANDOM, THREADS, Machine
from scenes import OWN_NUMBERS, SCENES, expected

# Every scene late and early, and in one of five random orders; in long runs, in all of them, and in threads.
VIRTUAL = [
    pytest.param(machine, name, id=f"{machine}-{name}")
    for number, name in enumerate(SCENES)
    for machine in (LATE, EARLY, *((*RANDOM, THREADS) if LONG else (RANDOM[number % len(RANDOM)],)))
]
REAL = [
    pytest.param(Machine("cuda"), name, id=f"cuda-{name}", marks=[pytest.mark.cuda, NO_CUDA])
    for name in SCENES
    if name not in OWN_NUMBERS  # those are compared with the virtual device's own numbers
]


@pytest.mark.parametrize(("machine", "name"), [*VIRTUAL, *REAL])
def test_figures_are_the_cpus(machine: Machine, name: str) -> None:
    wanted = expected(name)
    machine.start()
    found = SCENES[name](machine)
    assert found.keys() == wanted.keys()
    assert len(found) > 5
    for figure, value in wanted.items():
        torch.testing.assert_close(found[figure], value, rtol=1e-9, atol=1e-11, msg=lambda m, f=figure: f"{f}: {m}")
