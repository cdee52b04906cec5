"""The processes that write or read one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipecompile.errors import CheckpointError, InputError, PipecompileError

T = TypeVar("T")


@dataclass(frozen=True)
class Company:
    """One process, seen among those that do the same.

    Args:
        gathered: the value of each rank, in all of them.
    """

    rank: int
    size: int
    gathered: Callable[[Any], list[Any]]

    def do(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in this process, once it has returned in all of them.

        Raises:
            InputError: it raised an error of pipecompile's in one of them.
        CheckpointError: it raised that, or an error that is not pipecompile's.
        """
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(make())
        except Exception as raised:
            error = raised
        said = self.gathered(None if error is None else (not _is_of_files(error), _told(error)))
        failed = {rank: each for rank, each in enumerate(said) if each is not None}
        if failed:
            rank, (is_input, text) = next(iter(failed.items()))
            same = len(failed) == self.size and len(set(failed.values())) == 1
            raise (InputError if is_input else CheckpointError)(text if same else f"rank {rank}: {text}") from error
        return result[0]

    def do_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, which alone calls it, in all of them; raises as ``do``."""
        value = self.do(lambda: make() if self.rank == 0 else None)
        return self.gathered(value)[0]  # type: ignore[no-any-return]


ALONE = Company(0, 1, lambda value: [value])


def _is_of_files(error: Exception) -> bool:
    return isinstance(error, CheckpointError) or not isinstance(error, PipecompileError)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, PipecompileError) else f"{type(error).__name__}: {error}"
