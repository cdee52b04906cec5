"""Fills a model that has no values yet, by the plan of a capture."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from pipecompile.errors import InputError
from pipecompile.materialize.absent import Absent, Gathered, in_all
from pipecompile.runtime.compiled import Compiled


def fill(absent: Absent, compiled: Compiled, kept: Container[str], gathered: Gathered) -> None:
    """Gives the tensors that this process keeps their values, on the devices of their stages.

    Args:
        absent: the model, and what fills it.
        compiled: its first capture.
        kept: the names of the tensors.
        gathered: brings together what each process says.

    Raises:
        InputError: the same in all processes: a tensor that is neither a parameter nor a buffer is on the meta device,
            or as ``Absent.fill``.
    """
    for name, constant in compiled.captured.constants.items():
        if constant.is_meta:
            raise InputError(
                f"forward reads a tensor of shape {tuple(constant.shape)} ({name}) that is on the meta device and is "
                f"neither a parameter nor a buffer, so it has no known values; make it a buffer that "
                f"reset_parameters() sets, or create it with device='cpu'"
            )
    devices = {
        id(tensor): stage.device
        for stage in reversed(compiled.stages)  # a tied parameter is placed with the first one
        for tensor in compiled.tensors(stage.index).values()
    }
    devices |= {id(buffer): buffer.device for buffer in compiled.captured.model.buffers()}

    def place(tensor: Tensor) -> torch.device:
        return devices.get(id(tensor), torch.device("cpu"))

    in_all(lambda: absent.fill(kept, place), gathered)
