import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import SHAPES, dag, plans, rows

from pipecompile.errors import DeadlockError, ProgramError
from pipecompile.ir.between_stages import Made, Tied
from pipecompile.ir.instruction import Backward, Fetch, Forward, Offload, Recv, Reduce, Send, Share, Step, parse
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program, dependencies, linearize
from pipecompile.schedule import one_f_one_b

CHAIN = Plan.chain(2)
number = st.integers(0, 999)
result = st.one_of(
    *(st.builds(kind, number, number) for kind in (Forward, Backward, Reduce)),
    st.builds(Share, number, number, number, number),
)
instruction = st.one_of(
    result,
    *(st.builds(kind, number, number) for kind in (Step, Offload, Fetch)),
    st.builds(Send, result, number),
    st.builds(Recv, result, number),
)


@given(instruction)
def test_an_instruction_reads_back_from_its_text(i):
    assert parse(str(i)) == i


@pytest.mark.parametrize(
    "text", ["", "F0", "2X0", "-1F0", "2F", "2F0>", "1<2F0>3", "2F0 ", "1.0F0", "2A7", "2A7@1", "2F7@1/2"]
)
def test_a_word_that_is_no_instruction_is_refused_with_examples(text):
    with pytest.raises(ProgramError, match="is not an instruction; write one such as 2F0"):
        parse(text)


def test_a_step_leaves_nothing_to_send():
    with pytest.raises(ProgramError, match="a Step has no result to send"):
        parse("0S3>1")


@given(plans(tied=True), st.integers(1, 4))
def test_a_program_reads_back_from_its_text(plan, num_microbatches):
    program = one_f_one_b(plan, num_microbatches)
    assert program.instructions
    assert Program.parse(str(program), plan) == program


def test_blank_lines_and_indentation_do_not_matter():
    program = Program.parse("\n  0: 0F0 0B0\n\n  1:\n", Plan.chain(2))
    assert str(program) == "0: 0F0 0B0\n1: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 1F0", "must start with a rank and a colon"),
        ("rank 0: 0F0", "must start with a rank and a colon"),
        ("0: 0F0\n2: 2F0", r"consecutive from 0; got rows for the ranks \[0, 2\]"),
        ("0: 0F0 nop", "'nop' is not an instruction"),
    ],
)
def test_a_text_that_is_no_program_is_refused(text, message):
    with pytest.raises(ProgramError, match=message):
        Program.parse(text, CHAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0F0", "1 rows, but the plan has 2 ranks"),
        ("0: 1F0\n1:", "1F0 is on rank 0, which does not run stage 1"),
        ("0: 2F0\n1:", "2F0 is on rank 0, which does not run stage 2"),
        ("0: 0F0 0F0\n1: 1F0", "0F0 occurs 2 times"),
        ("0: 0F0\n1: 1<0F0 1F0", "1<0F0 waits for 0F0>1, which is not in the program"),
        ("0: 0F0 0F0>1\n1: 1F0", "0F0>1 needs 1<0F0, which is not in the program"),
    ],
)
def test_a_broken_program_is_refused_with_the_instruction_that_breaks_it(text, message):
    with pytest.raises(ProgramError, match=message):
        Program.parse(text, CHAIN).validate()


def test_what_an_earlier_program_has_done_is_not_done_again():
    with pytest.raises(ProgramError, match="0F0 occurs 2 times"):
        Program.parse("0: 0F0\n1:", CHAIN, carried=[Forward(0, 0)]).validate()


def test_carried_instructions_count_as_done():
    Program.parse("0: 0B0\n1: 1B0", CHAIN, carried=[Forward(0, 0), Forward(1, 0)]).validate()


def test_a_deadlock_names_every_rank_and_what_it_waits_for():
    program = Program.parse("0: 0F0 0B0 0F1\n1: 1F0 1F1 1B0", CHAIN)
    with pytest.raises(DeadlockError) as error:
        program.validate()
    assert str(error.value) == "no rank can continue:\n  rank 0 waits at 0B0 for 1B0\n  rank 1 waits at 1F1 for 0F1"


def test_a_receive_that_was_forgotten_is_a_deadlock():
    program = Program.parse("0: 0F0 0F0>1 0F1\n1: 1<0F0 1F0 1F1", CHAIN)
    with pytest.raises(DeadlockError, match="rank 1 waits at 1F1 for 1<0F1"):
        program.validate()


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("0F1", ""),
        ("2F1", "2<0F1 1F1"),
        ("1B1", "1F1 2B1"),
        ("0B1", "0F1 0<1B1 0<2B1"),
        ("2R1", "2B1"),
        ("0R1", "0B1 0<2R1"),
        ("0S1", "0R1"),
        ("1S1", "1B1"),
        ("0F1>2", "0F1"),
        ("2<0F1", "0F1>2"),
    ],
)
def test_dependencies_are_what_is_read_and_what_comes_from_other_ranks_is_received(text, needed):
    plan = dag([(0, 1), (0, 2), (1, 2)], (0, 1, 1), [Tied("w", (0, 2))])
    assert " ".join(map(str, dependencies(parse(text), plan))) == needed


@given(plans(tied=True), st.integers(1, 4))
def test_linearize_yields_all_instructions_in_an_order_that_keeps_rows_and_dependencies(plan, num_microbatches):
    program = one_f_one_b(plan, num_microbatches, step=True)
    order = list(linearize(program))
    place = {i: n for n, (_, i) in enumerate(order)}
    assert len(order) == len(place) == len(program.instructions) > 0
    for rank, row in enumerate(program.ranks):
        assert tuple(i for r, i in order if r == rank) == row
    for i in place:
        for needed in dependencies(i, plan):
            assert place[needed.result if isinstance(needed, Recv) else needed] < place[i]


def test_row_of_leaves_out_other_stages_and_transfers():
    program = Program.parse("0: 0F0 2F0 0F0>1\n1: 1<0F0 1F0", Plan.chain(3, (0, 1, 0)))
    assert program.row_of(0) == (Forward(0, 0),)


def test_microbatches_are_those_that_enter():
    program = Program.parse("0: 0F3 0F4 0B2\n1: 1F3", CHAIN)
    assert program.microbatches == (3, 4)


def test_every_shape_prints_as_rows():
    assert str(one_f_one_b(SHAPES["one rank"], 1)) == rows("0: 0F0 1F0 2F0 2B0 1B0 0B0")


SHARING = Plan((), (0, 1), CHAIN.channels, made=(Made(0), Made(1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0F0 1A0@0/2\n1: 1F0", "the outputs of stage 1 are shared, but not with all ranks; add 1A0@1/2"),
        ("0: 0F0\n1: 1F0 1A0@1/2", "the outputs of stage 1 are shared, but not with all ranks; add 1A0@0/2"),
        ("0: 0F0 1A0@0/2\n1: 1F0 1A1@1/2 1F1", r"1A1@1/2 is before 1F1, whose outputs it shares; put it after"),
        ("0: 0F0 1A0@1/2\n1: 1F0 1A0@0/2", "1A0@1/2 is on rank 0, which is for another rank"),
        ("0: 0F0 1A0@0/3\n1: 1F0 1A0@1/3", "the program has 2 rows, but its outputs go to 3 ranks"),
        ("0: 0F0 1A0@0/2\n1: 1F0 1A0@1/2\n2: 1A0@2/3", r"1A0@0/2 is of 2 ranks, but the program has 3 rows"),
        ("0: 0F0 5A0@0/2\n1: 1F0", "5A0@0/2 is on rank 0, which is for another rank"),
    ],
)
def test_outputs_that_do_not_reach_all_ranks_in_time_are_refused(text, message):
    with pytest.raises(ProgramError, match=message):
        Program.parse(text, SHARING).validate()


def test_a_share_waits_for_every_stage_of_its_rank_that_makes_outputs():
    plan = Plan.chain(3, (0, 1, 0))
    both = Plan((), plan.rank_of, plan.channels, made=(Made(0), Made(2)))
    share = Share(2, 1, 0, 2)
    assert set(dependencies(share, both)) == {Forward(0, 1), Forward(2, 1)}
    assert set(dependencies(share, plan)) == {Forward(2, 1)}
    assert set(dependencies(Share(2, 1, 1, 2), both)) == {Recv(share, 1)}
