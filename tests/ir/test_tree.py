import pytest

from pipecompile.ir.tree import children, parent

SIZES = range(1, 10)


@pytest.mark.parametrize("size", SIZES)
def test_a_tree_reaches_each_rank_once(size: int) -> None:
    for root in range(size):
        reached = [child for rank in range(size) for child in children(rank, root, size)]
        assert sorted([root, *reached]) == list(range(size))
        assert all(parent(child, root, size) == rank for rank in range(size) for child in children(rank, root, size))
        assert len([*children(root, root, size)]) == (size - 1).bit_length()
