"""Programs of whole steps: nothing is left out, and nothing is in them that a step does not run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipecompile.errors import DeadlockError, ProgramError
from pipecompile.ir.between_stages import Tied
from pipecompile.ir.check_step import check_step
from pipecompile.ir.instruction import Backward, BackwardWeight, Forward
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.halves import backward_only, forward_only

BOTH = (Forward, Backward)
STEP = """
0: 0F0 0F1 0B0 0B1 0W1 0R1
1: 1F0 1B0 1F1 1B1 1R1
"""


def tied() -> Plan:
    plan = Plan.chain(2)
    return Plan((), plan.rank_of, plan.channels, (Tied("w", (0, 1)),))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0B0 ", "", "0B0 is missing: a step runs each of its 2 microbatches through all stages"),
        ("0R1", "", "0R1 is missing: a step runs .* and reduces the gradients of tied parameters; put it on rank 0"),
        ("0R1", "0R1 0S1", "0S1 has no place in a step of 2 microbatches, from 0, whose optimizer is the caller's"),
        ("0R1", "0R1 0U1", "0U1 has no place"),
        ("1B0", "1B0 1R0", "1R0 has no place"),
        ("0W1", "0P0", "0P0 has no place"),
        ("0F1", "0F1 0F2", "0F2 has no place"),
        ("0B1 0W1 0R1", "0R1 0B1", "0B1 is after 0R1, which reads its gradients"),
        ("1B0 1F1 1B1 1R1", "1F1 1B1 1R1 1B0", "1B0 is after 1R1, which reads its gradients; put it before"),
    ],
)
def test_a_step_that_would_lose_a_gradient_is_refused(old: str, new: str, message: str) -> None:
    check_step(Program.parse(STEP, tied()), 2, BOTH)
    assert old in STEP
    with pytest.raises(ProgramError, match=message):
        check_step(Program.parse(STEP.replace(old, new), tied()), 2, BOTH)


def test_a_microbatch_that_no_stage_runs_is_missing() -> None:
    program = SCHEDULES["1f1b"].program(Plan.chain(2), 3)
    check_step(program, 3, BOTH)
    with pytest.raises(ProgramError, match=r"0F3 is missing: a step runs each of its 4 microbatches"):
        check_step(program, 4, BOTH)
    with pytest.raises(ProgramError, match=r"0F2 has no place in a step of 2 microbatches"):
        check_step(program, 2, BOTH)


def test_halves_of_a_step_have_one_kind() -> None:
    check_step(forward_only(tied(), 3), 3, (Forward,))
    check_step(backward_only(tied(), 3), 3, (Backward,))
    with pytest.raises(ProgramError, match="0B0 is missing"):
        check_step(forward_only(tied(), 3), 3, BOTH)
    with pytest.raises(ProgramError, match="0B0 has no place"):
        check_step(SCHEDULES["gpipe"].program(Plan.chain(2), 3), 3, (Forward,))


def test_a_program_that_cannot_run_is_refused_as_such() -> None:
    with pytest.raises(DeadlockError, match="waits at 1B0"):
        check_step(Program.parse("0: 0F0 0B0\n1: 1B0 1F0", Plan.chain(2)), 1, BOTH)


def test_backwards_are_whole_where_the_caller_computes_the_loss() -> None:
    """Their Forwards are of another program, which does not say that they are to be split."""
    program = backward_only(Plan.chain(2), 2)
    check_step(program, 2, (Backward,))
    first, (*second, last) = program.ranks
    with pytest.raises(ProgramError, match=r"1W0 needs what its Forward notes .* leave it out"):
        check_step(replace(program, ranks=(first, (*second, BackwardWeight(1, 0), last))), 2, (Backward,))
