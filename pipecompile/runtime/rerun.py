"""What a call's numbers follow from, beside its arguments: enough to run it once more and get the same.

A pipeline's backward has run before the caller asks for it, or runs once when it does. A gradient that this run did not
foresee is found by running the call again (``steps`` says when). That gives the call's own numbers only with the modes
and random numbers that it had, on weights and inputs that nobody has written to, and on the buffers as it found them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecompile.capture import Call
from pipecompile.errors import ExecutionError
from pipecompile.ops.randomness import Generators
from pipecompile.ops.torch_internals import _StopRecomputationError
from pipecompile.runtime import Ambient
from pipecompile.runtime.compiled import Compiled

STOPPED = _StopRecomputationError  # no failure: a checkpoint around the call has all of it that it needs


@dataclass(frozen=True)
class Snapshot:
    """Taken before a call is run."""

    ambient: Ambient
    seeds: Sequence[int | None]  # of each microbatch's random functions
    read: Mapping[str, tuple[Tensor, int]]  # what the call reads and does not write, with its version counter
    written: Sequence[tuple[Tensor, Tensor]]  # buffers that the call writes, and copies of them
    generators: Generators

    @staticmethod
    def of(
        compiled: Compiled, call: Call, draw: Callable[[], Sequence[int | None]], devices: Sequence[torch.device]
    ) -> Snapshot:
        """The state before a call, in the modes of the calling thread.

        Args:
            draw: gives the seeds, from the caller's generator.
        """
        generators = Generators.of(devices, compiled.runs_python)
        inputs = {f"argument {name!r}": tensor for name, tensor in call.tensors.items()}
        tracked = {**compiled.read, **inputs}
        return Snapshot(
            Ambient.of_caller(frozenset(device.type for device in devices)),
            draw(),
            {name: (t, t._version) for name, t in tracked.items() if not t.is_inference()},
            [(buffer, buffer.detach().clone()) for buffer in compiled.written],
            generators,
        )

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """In which the call runs: if it raises, buffers and random generators are as they were found here."""
        try:
            yield
        except STOPPED:
            raise
        except BaseException:
            _write(self.written)
            self.generators.put_back()
            raise

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state that the call was made in; afterwards buffers are as they were found here.

        Raises:
            ExecutionError: a parameter, an input or a buffer has been changed since.
        """
        for name, (tensor, version) in self.read.items():
            if tensor._version != version:
                raise ExecutionError(
                    f"{name} was changed in place between the call of the pipeline and this backward, which has to run "
                    f"the call again; call backward() before optimizer.step(), and write to inputs after it"
                )
        present = [(buffer, buffer.detach().clone()) for buffer, _ in self.written]
        _write(self.written)
        try:
            with self.ambient.entered():
                yield
        finally:
            _write(present)


def _write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
