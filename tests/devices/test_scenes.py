"""Every feature on accelerators that run their work late, early, or in any order: the figures of the CPU."""

from __future__ import annotations

import pytest
import torch
from machines import MACHINES, Machine
from scenes import OWN_NUMBERS, SCENES, expected


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("machine", MACHINES)
def test_figures_are_the_cpus(machine: Machine, name: str) -> None:
    if name in OWN_NUMBERS and not machine.is_virtual:
        pytest.skip("compared with the virtual device's own numbers")
    wanted = expected(name)
    machine.start()
    found = SCENES[name](machine)
    assert found.keys() == wanted.keys()
    assert len(found) > 5
    for figure, value in wanted.items():
        torch.testing.assert_close(found[figure], value, rtol=1e-9, atol=1e-11, msg=lambda m, f=figure: f"{f}: {m}")
