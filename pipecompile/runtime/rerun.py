"""The state that a call's results depend on besides its arguments: enough to rerun the call with the same results.

The backward of a pipeline runs before the caller asks for it, or once when the caller does. A gradient that this run
does not cover is computed by rerunning the call (``steps`` says when). A rerun gives the same results only in the same
modes, with the same random numbers, on unchanged weights and inputs, and on the buffers as the call found them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.capture import Call
from pipecompile.errors import ExecutionError
from pipecompile.ops.randomness import Generators
from pipecompile.ops.torch_internals import _StopRecomputationError
from pipecompile.runtime import Ambient
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.out_of_memory import OutOfMemoryError
from pipecompile.runtime.weights import Homes

STOPPED = _StopRecomputationError  # not a failure: a checkpoint around the call has all that it needs


@dataclass(frozen=True)
class Snapshot:
    """The state before a call."""

    call: int  # its number, the same in all processes
    ambient: Ambient
    seeds: Sequence[int | None]  # one per microbatch, for its random functions
    read: Mapping[str, tuple[Tensor, int]]  # tensors that the call only reads, with their version counters
    written: Sequence[tuple[Tensor, Tensor]]  # buffers that the call writes, and copies of them
    generators: Generators

    @staticmethod
    def of(
        compiled: Compiled,
        call: Call,
        draw: Callable[[], Sequence[int | None]],
        devices: Sequence[torch.device],
        homes: Homes,
        number: int,
    ) -> Snapshot:
        """The state before a call, in the modes of the calling thread.

        Args:
            draw: draws the seeds from the caller's generator.
            homes: of the model's tensors.
            number: of the call.
        """
        generators = Generators.of(devices, compiled.runs_python)
        with _outside_the_stages():
            written = [(buffer, buffer.detach().clone()) for buffer in compiled.written]
        inputs = {f"argument {name!r}": tensor for name, tensor in call.tensors.items()}
        tracked = {**{name: homes.home(tensor) for name, tensor in compiled.read.items()}, **inputs}
        return Snapshot(
            call=number,
            ambient=Ambient.of_caller(frozenset(device.type for device in devices)),
            seeds=draw(),
            read={name: (t, t._version) for name, t in tracked.items() if not t.is_inference()},
            written=written,
            generators=generators,
        )

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Runs the call; if it raises, buffers and random generators are restored.

        Raises:
            OutOfMemoryError: memory ran out in the caller's thread, where no stage runs.
        """
        try:
            with _outside_the_stages():
                yield
        except STOPPED:
            raise
        except BaseException:
            with suppress(torch.AcceleratorError):  # a device that has failed keeps nothing
                _write(self.written)
            self.generators.put_back()
            raise

    def refuse_changes(self) -> None:
        """Raises ``ExecutionError`` if a parameter, an input or a buffer has changed since the call."""
        for name, (tensor, version) in self.read.items():
            if tensor._version != version:
                raise ExecutionError(
                    f"{name} was changed in place between the call of the pipeline and this backward, which must rerun "
                    f"the call; call backward() before optimizer.step() and before writing to inputs"
                )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the state before the call; at exit, buffers get back their present values."""
        present = [(buffer, buffer.detach().clone()) for buffer, _ in self.written]
        _write(self.written)
        try:
            with self.ambient.entered():
                yield
        finally:
            _write(present)


@contextmanager
def _outside_the_stages() -> Iterator[None]:
    """Says where memory has run out, if it is not in a stage."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"outside the stages, where outputs are joined: {error}; use a smaller batch, or return fewer outputs"
        ) from error


def _write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
