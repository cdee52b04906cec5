"""Some of the zoo on padded, ragged batches, and models whose losses mix samples: the step is the whole batch's.

``make ragged`` runs every model that takes labels for tokens; ``docs/exact.md`` is what it has found.
"""

from __future__ import annotations

import pytest
from long import LONG
from losses import microbatches_of
from zoo import ZOO
from zoo.check import TOLERANCE, difference, run
from zoo.ragged import IGNORED, examine_ragged, lengths, ragged, takes_ragged

import pipecompile

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = {
    "llama": {"", "num_items"},
    "bert": {""},
    "t5": {""},
    "recurrent_gemma": {"", "num_items"},
    "mixtral": {"as built", "", "router loss", "num_items"},
    "olmoe": {"as built", "", "router loss", "num_items"},
}


@pytest.mark.parametrize("name", VARIANTS if LONG else ["bert", "t5"])
def test_a_padded_batch_is_exact(name: str) -> None:
    found = {}
    for facts in examine_ragged(ZOO[name], batches=(7,), microbatches=(4,), splits=(2,)):
        found.update({key: fact for key, fact in facts.items() if isinstance(fact, dict)})
    assert set(found) == {f"{variant}: stages 2" for variant in VARIANTS[name]}
    for key, tally in found.items():
        assert (tally["steps"], tally["exact"], tally["uncut"], tally["seen"]) == (2, 2, 0, []), key
        assert bool(tally["tail"]) == key.startswith("router loss"), key


@pytest.mark.parametrize("name", ["clip", "siglip", "blip"] if LONG else ["clip"])
def test_pairs_of_pictures_and_words_train_exactly(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    for rows in (5, 8):
        inputs = entry.inputs(rows, entry.lengths[0])
        expected = run(entry.loss, model, model, inputs)
        found = run(entry.loss, pipe, model, inputs)
        assert difference(found, expected, TOLERANCE[entry.dtype], buffers=True) == ""
        assert microbatches_of(pipe) == 4
    assert any("computed once" in line for line in pipe.pipeline.report.microbatches)


def test_lengths_go_from_none_to_all() -> None:
    assert list(lengths(5, 3, 8)) == [(0, 0, 2, 5, 8), (8, 8, 2, 5, 0)]
    assert list(lengths(5, 8, 8)) == [(0, 2, 4, 6, 8), (8, 2, 4, 6, 0)]


def test_padding_is_neither_a_label_nor_attended() -> None:
    entry = ZOO["llama"]
    (_, kwargs), count = ragged(entry.build(), entry.inputs(2, 8), (0, 3), 0)
    assert (kwargs["labels"] != IGNORED).sum(1).tolist() == kwargs["attention_mask"].sum(1).tolist() == [0, 3]
    assert count == 3


def test_models_without_labels_for_tokens_are_left_out() -> None:
    assert [name for name in ("llama", "vit", "clip", "t5") if takes_ragged(ZOO[name])] == ["llama", "t5"]
