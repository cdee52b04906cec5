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
# Of scenes that differ in a schedule or in where stages are, the others run in long runs.
LATER = {
    "a_device_twice",
    "batch_norm_once",
    "from_other_streams",
    "inputs_on_device_0",
    "inputs_on_device_1_stages_on_cpu_too",
    "offloaded_1f1b",
    "optimizer_foreach",
    "pipedream_adam",
    "replicas_first",
    "sequential",
    "three_stages",
    "two_stages_on_each_device_and_the_cpu",
    "zero_bubble",
}
assert SCENES.keys() >= LATER


def machines_of(number: int, name: str) -> list[Machine]:
    """A scene runs late, early, or in one of five random orders; in long runs each in all, and in threads."""
    if LONG:
        return [LATE, EARLY, *RANDOM, THREADS]
    if name in LATER:
        return []
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
