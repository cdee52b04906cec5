"""The cluster that is planned for where the user gives devices alone."""

from __future__ import annotations

import pytest
import torch

from pipecompile.compiler import devices


def test_ranks_on_one_device_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "total_memory", lambda device: {"meta": 1000}.get(device.type))
    shared, alone = torch.device("meta"), torch.device("cpu")
    cluster = devices.cluster_of([shared, alone, shared, shared])
    assert [device.memory for device in cluster.devices] == [333, None, 333, 333]
