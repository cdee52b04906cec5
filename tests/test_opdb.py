"""Some of torch's own operators, as ``make opdb`` tries all of them."""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest")  # what torch's table of operators needs

from opdb import EXACT, OPERATORS, examine
from opdb_run import kind

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of some of its own samples
SOME = ("squeeze", "flip", "cumsum", "masked_scatter", "where", "nn.functional.multi_margin_loss")


def test_there_are_hundreds_of_operators() -> None:
    assert len(OPERATORS) > 300


@pytest.mark.parametrize("name", SOME)
def test_an_operator_is_exact_or_refused(name: str) -> None:
    found = {sample: said for facts in examine(name) for sample, said in facts.items()}
    assert {kind(said) for said in found.values()} <= {"exact", "refused"}, found
    assert found["0, 1"] == EXACT


def test_a_fixed_batch_is_told_so_in_one_sentence() -> None:
    found = {sample: said for facts in examine("cholesky") for sample, said in facts.items()}
    assert found["0, 1"] == EXACT
    assert "this model works for a batch of 5 only; use microbatches=1 (with the 2 rows" in found["0, 3"]
