"""The grid of the processes of a pipeline: one row of ranks for each part of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh

from pipecompile.errors import InputError

DATA, STAGE = "data", "stage"  # names of the dimensions of a mesh


@dataclass(frozen=True)
class Grid:
    """Which process runs which rank on which part of the batch.

    Attributes:
        processes: the number of each process in the default process group, by part and by rank.
        parts_mesh: the mesh of the processes of this process's rank, by part, if there are several.
    """

    processes: tuple[tuple[int, ...], ...]
    parts_mesh: DeviceMesh | None = field(default=None, compare=False)

    @staticmethod
    def of(mesh: DeviceMesh) -> Grid:
        """The grid of a mesh with the dimension ``"stage"``, and perhaps ``"data"``.

        Raises:
            InputError: the mesh has other dimensions, or is not one of CPU devices.
        """
        names = mesh.mesh_dim_names
        if mesh.device_type != "cpu":
            raise InputError(
                f"mesh= is one of {mesh.device_type} devices, but values travel between processes over gloo, from CPU "
                f"devices; use init_device_mesh('cpu', ...), or devices= for accelerators of one process"
            )
        if mesh.ndim == 1 and names in (None, (STAGE,)):
            return Grid((tuple(mesh.mesh.tolist()),))
        if names is None or sorted(names) != [DATA, STAGE]:
            raise InputError(
                f"mesh= has the dimensions {names or mesh.ndim}, but a pipeline needs {STAGE!r} and may have {DATA!r}; "
                f"use init_device_mesh('cpu', (2, 4), mesh_dim_names=({DATA!r}, {STAGE!r}))"
            )
        by_part = mesh.mesh if names[0] == DATA else mesh.mesh.T
        return Grid(tuple(map(tuple, by_part.tolist())), mesh[DATA])

    @property
    def parts(self) -> int:
        """The number of parts of the batch."""
        return len(self.processes)

    @property
    def ranks(self) -> int:
        """The number of ranks of the pipeline."""
        return len(self.processes[0])

    @property
    def all(self) -> Sequence[int]:
        """All processes, part by part; the position of one is its place in errors."""
        return [process for row in self.processes for process in row]

    def find(self, process: int) -> tuple[int, int]:
        """The part and the rank of a process."""
        part, rank = divmod(self.all.index(process), self.ranks)
        return part, rank

    def row(self, part: int) -> Sequence[int]:
        """The processes of one part, by rank."""
        return self.processes[part]

    def column(self, rank: int) -> Sequence[int]:
        """The processes of one rank, by part."""
        return [row[rank] for row in self.processes]

    def place(self, part: int, rank: int) -> int:
        """The position of a process among ``all``."""
        return part * self.ranks + rank
