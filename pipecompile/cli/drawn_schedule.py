"""The program that ``pipecompile schedule`` draws: of a name, or of a file."""

from __future__ import annotations

from pathlib import Path

from pipecompile.errors import InputError
from pipecompile.ir.between_stages import Channel
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.grid import read_grid, read_torch_csv
from pipecompile.schedule.order import Order
from pipecompile.schedule.order_program import program_of

DRAWN = tuple(SCHEDULES)
READERS = {".txt": read_grid, ".csv": read_torch_csv}


def drawn_program(name: str, stages: int, microbatches: int) -> Program:
    """The bare program of a schedule for a chain of stages, or of the file that ``name`` is.

    Args:
        name: of ``DRAWN``, or a path; a file says its own stages and microbatches.
        stages: all stages; a schedule with several on each rank has fewer ranks.

    Raises:
        InputError: the name is not known, the file cannot be read, or the stages do not divide among ranks.
        ProgramError: the file is not an order of computations.
    """
    if name in SCHEDULES:
        per_rank = SCHEDULES[name].placement.per_rank
        if stages % per_rank:
            raise InputError(
                f"schedule {name!r} has {per_rank} stages on each rank, so --stages must be a multiple of {per_rank}; "
                f"got {stages}"
            )
        return SCHEDULES[name].program(Plan.chain(stages, _ranks(name, stages // per_rank)), microbatches)
    path = Path(name)
    if path.suffix not in READERS:
        raise InputError(
            f"schedule {name!r} is not known; it must be one of {', '.join(DRAWN)}, or a file that ends in "
            f"{' or '.join(READERS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {name}: {error}; give a file with a line per rank") from error
    return program_on_its_shape(READERS[path.suffix](text))


def _ranks(name: str, ranks: int) -> tuple[int, ...]:
    return SCHEDULES[name].placement.rank_of(ranks)


def program_on_its_shape(order: Order) -> Program:
    """The program of an order, on stages like those of its shape."""
    shape = order.shape
    return program_of(order, Plan((), shape.rank_of, tuple(Channel(*edge) for edge in shape.edges)))
