import pytest
from plans import rows

from pipecompile.errors import DeadlockError, ProgramError
from pipecompile.schedule.catalog import RECIPES
from pipecompile.schedule.grid import read_grid, read_torch_csv, write_grid, write_torch_csv
from pipecompile.schedule.order import Order
from pipecompile.schedule.shape import Shape, v_shape


def test_1f1b_is_drawn_with_its_bubbles():
    assert write_grid(RECIPES["1f1b"].order(3, 4)) == rows("""
        0: 0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3
        1: .   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3
        2: .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """)


def test_zb_h1_is_drawn_with_weights_in_place_of_bubbles():
    assert write_grid(RECIPES["zb-h1"].order(2, 3)) == rows("""
        0: 0F0 0F1 .   0B0 0W0 0F2 0B1 0W1 0B2 0W2
        1: .   1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2
    """)


def test_a_grid_of_a_person_is_read():
    assert read_grid("""
        rank 0: F0 F1 .  B0 | .  B1
        rank 1: .  F0 B0 F1 | B1
    """) == RECIPES["1f1b"].order(2, 2)
    assert read_grid("# of\n0: F0 F1 . B0 B1 # mine: 0\n#\n1: F0 B0 F1 B1") == RECIPES["1f1b"].order(2, 2)
    assert read_grid("0F0,0B0") == RECIPES["gpipe"].order(1, 1)
    folded = read_grid("0: 0F0 3F0 3I0 3W0 0I0 0W0\n1: 1F0 2F0 2B0 1B0", v_shape(2))
    assert folded.shape == v_shape(2)
    assert read_grid("F0 B0\nF0 B0\nF0 B0", Shape((0, 1, 2), ((0, 2), (1, 2)))).shape.edges == ((0, 2), (1, 2))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("p", "n"), [(1, 1), (2, 3), (4, 9)])
def test_what_is_written_is_read(name, p, n):
    order = RECIPES[name].order(p, n)
    assert read_grid(write_grid(order), order.shape) == order
    assert read_torch_csv(write_torch_csv(order), order.shape) == order
    if order.shape.is_chain:
        assert read_grid(write_grid(order)) == order


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no computation"),
        (". . .", "no computation"),
        ("F0 X0", "'X0' is not a computation"),
        ("F0 B-1", "'B-1' is not a computation"),
        ("1: F0 B0\n0: F0 B0", "for rank 1, but it is in the place of rank 0"),
        ("0F0 B0", "some words name their stage"),
        ("F0 I0", "I0 has no W"),
        ("F0 B0 F2 B2", "0F1 is missing"),
        ("0F0 0B0\n2F0 2B0", "stages must be consecutive"),
        ("0F0 0B0\n0F1 0B1", "0F1 is on rank 1, but stage 0 is on rank 0 too"),
        ("F0 B0 B0", "0B0 occurs twice"),
        ("0: 0F0 0B0\n1:", "rank 1 has no computation; write words such as 1F0, or leave out its line"),
        ("0: .\n1: 0F0 0B0", "rank 0 has no computation"),
        ("F0 B0 F99999999999 B99999999999", "F99999999999 of rank 0 is of microbatch 99999999999, but there are 4"),
    ],
)
def test_what_is_no_grid_is_refused(text, words):
    with pytest.raises(ProgramError, match=words):
        read_grid(text)


def test_a_grid_that_cannot_run_is_refused():
    with pytest.raises(DeadlockError, match=r"(?s)rank 0 waits at 0B0 for 1B0.*rank 1 waits at 1F1 for 0F1"):
        read_grid("F0 B0 F1 B1\nF0 F1 B0 B1")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no computation"), ("0F0,0QUX0", "'0QUX0' is not a computation"), ("0F0,(0F1;0B0)", "is not a computation")],
)
def test_what_is_no_file_of_torch_is_refused(text, words):
    with pytest.raises(ProgramError, match=words):
        read_torch_csv(text)


def test_a_function_of_the_user_makes_an_order():
    def two_at_a_time(rank, p, n):
        for k in range(0, n, 2):
            pair = range(k, min(k + 2, n))
            yield from (f"F{each}" for each in pair)
            yield from (f"B{each}" for each in pair)

    order = read_grid("\n".join(" ".join(two_at_a_time(rank, 3, 5)) for rank in range(3)))
    assert isinstance(order, Order)
    assert str(order).splitlines()[2] == "2: 2F0 2F1 2B0 2B1 2F2 2F3 2B2 2B3 2F4 2B4"
