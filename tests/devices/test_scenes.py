"""Every feature on accelerators that run their work late, early, or in any order: the figures of the CPU."""

from __future__ import annotations

import pytest
import torch
from long import LONG
from machines import EARLY, LATE, NO_CUDA, RANDOM, THREADS, Machine
from scenes import OWN_NUMBERS, SCENES, expected

# What sync_mutants.py has found to show a synchronization that is missing.
SHOWING = {
    "from_cpu_to_device": (LATE, EARLY),
    "evaluated_on_one_device": (EARLY,),
    "loss_outside": (LATE, EARLY),
    "inputs_loaded_on_another_stream": (EARLY,),
}


def machines_of(number: int, name: str) -> list[Machine]:
    """Each scene runs late, early, or in one of five random orders; in long runs in all, and in threads."""
    if LONG:
        return [LATE, EARLY, *RANDOM, THREADS]
    return [*SHOWING.get(name, ())] or [(LATE, RANDOM[number % len(RANDOM)], EARLY)[number % 3]]


VIRTUAL = [
    pytest.param(machine, name, id=f"{machine}-{name}")
    for number, name in enumerate(SCENES)
    for machine in machines_of(number, name)
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
