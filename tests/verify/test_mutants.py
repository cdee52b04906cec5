"""A pipeline broken in many ways, each really wrong, never passes its first call: the net beneath the analysis."""

from __future__ import annotations

import pytest
import torch
from broken import Mutant
from long import some
from mutants import MUTANTS

from pipecompile.errors import ExactnessError

GROSS = {  # what shows beyond the rounding of any dtype
    "custom backward lost", "buffer write forgotten", "arguments swapped", "no_grad added", "tied weight detached",
    "dropout dropped", "attribute update dropped", "Share lost", "partial sum joined as shared",
    "backward of a microbatch lost", "backward lost, loss outside", "seed scaled", "loss not scaled", "Reduce skipped",
    "values swapped", "outputs swapped", "outputs of microbatches exchanged", "gradients of microbatches exchanged",
    "forwards received in another order",
}  # fmt: skip
SMALL = {"mean over the batch"}  # what is within the rounding of bfloat16, but not of float32
SHOWS = {torch.float32: GROSS | SMALL, torch.bfloat16: GROSS}
COARSE = [m.of(dtype) for dtype, names in SHOWS.items() for m in MUTANTS if m.name in names]


@pytest.mark.parametrize("mutant", [*some(MUTANTS), *some(COARSE, 20)], ids=str)
def test_a_mutant_is_wrong_and_refused(mutant: Mutant) -> None:
    right = mutant.split("first")
    assert mutant.draws or not mutant.apart(right, mutant.eager()), "the model is exact where nothing is broken"
    with mutant.breaks():
        assert mutant.apart(mutant.split("never"), right), "the mutant is wrong"
        with pytest.raises(ExactnessError) as error:
            mutant.split("first")
    assert mutant.blamed in str(error.value)


def test_each_mutant_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.name for mutant in MUTANTS} >= GROSS | SMALL
