"""A training on accelerators goes on from a checkpoint, there and on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from machines import LATE, NO_CUDA, RANDOM, Machine
from resumed import Training, begun, on


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "machine", [LATE, *RANDOM[:2], pytest.param(Machine("cuda"), marks=[pytest.mark.cuda, NO_CUDA])], ids=str
)
def test_a_training_goes_on(tmp_path: Path, machine: Machine, asynchronous: bool) -> None:
    machine.start()

    def training(seed: int) -> Training:
        return begun("foreach", seed=seed, devices=[machine[0], machine[1]])

    straight = training(0).run(2)
    saving = straight.save(tmp_path / "step_2", asynchronous=asynchronous)
    straight.run(2)
    saving.wait()
    resumed = training(1).load(tmp_path / "step_2")
    places = {p.device for p in resumed.pipe.parameters()}
    assert places <= {machine[0], machine[1]}
    for parameter, values in resumed.optimizer.state.items():
        assert values["exp_avg"].device == parameter.device
        assert values["step"].device.type == "cpu"
    assert resumed.run(2).losses == {step: straight.losses[step] for step in (2, 3)}
    on_cpus = begun("foreach", seed=1, **on(2)).load(tmp_path / "step_2")
    assert [p.device.type for p in on_cpus.pipe.parameters()] == ["cpu"] * 16
    assert all(torch.isfinite(torch.tensor(loss)) for loss in on_cpus.run(2).losses.values())
