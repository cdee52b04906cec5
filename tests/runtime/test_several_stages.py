"""Schedules with several stages on each rank, and all others: a step has the numbers of the unsplit model."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from long import LONG
from models import MODELS, Model
from oracle import assert_same, microbatched, step
from pairs import pipe_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D, blocks

import pipecompile
from pipecompile import Batching, PlanOptions
from pipecompile.errors import InputError
from pipecompile.ir.instruction import Backward, BackwardWeight, Forward, Send
from pipecompile.schedule import SCHEDULES, SYNCHRONOUS
from pipecompile.schedule.grid import read_grid
from pipecompile.schedule.order_program import order_of

SEVERAL = [name for name in SYNCHRONOUS if SCHEDULES[name].placement.per_rank > 1]
SPLIT = ["zb-h1", "zb-h2", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v"]


def deep_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=6, n_head=2, use_cache=False, **off)
    )


class UNet(nn.Module):
    """Levels down and up again, with a skip from each one; its own loss."""

    def __init__(self, levels: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1) for _ in range(levels))
        self.up = nn.ModuleList(nn.Conv1d(6, 3, 3, padding=1) for _ in range(levels))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            skips.append(x)
            x = F.group_norm(torch.tanh(level(x)), 3)
        for level in self.up:
            x = torch.relu_(level(torch.cat([x, skips.pop()], dim=1)))
        return F.mse_loss(x, target)


class Towers(nn.Module):
    """Two towers of different heights, which meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text, self.picture = nn.Embedding(VOCABULARY, D), blocks(11), blocks(7)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        text, picture = self.text(self.words(ids)), self.picture(features)
        return (1 - F.cosine_similarity(text, picture, dim=-1)).mean()


def loss_of(output: Any) -> Tensor:
    return output


TRAINED = {
    "gpt2": Model("gpt2", deep_gpt2, MODELS["gpt2"].sample),
    "unet": Model("unet", UNet, lambda draw: ((draw.floats(3, 9), draw.floats(3, 9)), {}), loss=loss_of),
    "two_towers": Model("two_towers", Towers, lambda draw: ((draw.ids(VOCABULARY), draw.floats(D)), {}), loss=loss_of),
}
EVERY = [*product(SYNCHRONOUS, TRAINED, (2, 4, 8))]
SOME = [
    *((name, ["unet", "two_towers"][place % 2], 2 + 2 * (place % 3 == 0)) for place, name in enumerate(SYNCHRONOUS)),
    ("zb-v", "gpt2", 2),
]


@pytest.mark.parametrize(("schedule", "name", "ranks"), EVERY if LONG else SOME)
def test_a_step_equals_the_unsplit_model(schedule: str, name: str, ranks: int) -> None:
    model, it = TRAINED[name].build(), TRAINED[name]
    pipe = pipe_of(model, ranks, schedule=schedule, microbatches=5, verify="never", plan=PlanOptions(search_seconds=2))
    for batch in (5, 11, 2):  # the last has fewer rows than microbatches
        inputs = it.inputs(batch, 6)
        assert_same(step(pipe, model, it.loss, inputs), step(model, model, it.loss, inputs))
    plan, program = pipe.pipeline.plan, pipe.pipeline.program
    assert plan.rank_of == SCHEDULES[schedule].placement.rank_of(ranks)
    sends = [i for i in program.instructions if isinstance(i, Send)]
    assert not any(plan.rank_of[i.stage] == plan.rank_of[i.target] for i in sends)
    assert any(isinstance(i, BackwardWeight) for i in program.instructions) == (schedule in SPLIT)


class Sundry(nn.Module):
    """Frozen and tied parameters, dropout, and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(9))
        self.norm = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.words.weight
        self.layers[3].requires_grad_(False)
        self.layers[6].bias.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.words(ids)
        for layer in self.layers:
            h = F.dropout(torch.tanh(layer(h)), 0.2, self.training)
        return F.cross_entropy(self.head(self.norm(h)), labels)


def sundry() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    ids, labels = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    return Sundry().double(), ((ids, labels), {})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"plan": PlanOptions(recompute="always")},
    "compiled": {"stage_compile": "aot_eager"},
    "kept whole": {"leaf_modules": ["layers.2", "head"]},
    "deferred statistics": {"batching": Batching(batch_norm="deferred")},
    "one microbatch": {"microbatches": 1},
}
ORDERS = [name for name in SEVERAL if name[-2:] not in ("-3", "-4")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads it
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("schedule", ORDERS if LONG else ["interleaved-1f1b", "dualpipe-v"])
def test_what_a_model_may_have_is_as_under_1f1b(schedule: str, how: str) -> None:
    found = []
    for name in ("1f1b", schedule):
        model, inputs = sundry()
        pipe = pipe_of(model, 2, **{"schedule": name, "microbatches": 4, "verify": "never", **OPTIONS[how]})
        torch.manual_seed(3)
        found.append([step(pipe, model, loss_of, inputs) for _ in range(2)])
        frozen = model.layers[3].weight
        assert frozen.grad is None
    for one, other in zip(*found, strict=True):
        assert_same(other, one)


@pytest.mark.parametrize("schedule", ORDERS if LONG else ["zb-v"])
def test_a_pipe_evaluates_verifies_and_plans_again(schedule: str) -> None:
    model, ((ids, labels), _) = sundry()
    pipe = pipe_of(model, 2, schedule=schedule, microbatches=2)
    pipe(ids, labels).backward()  # verified against the unsplit model, with equal draws
    assert pipe.pipeline.proofs
    pipe.zero_grad()
    pipe.eval()
    with torch.no_grad():
        torch.testing.assert_close(pipe(ids, labels), model(ids, labels))
    assert pipe.pipeline.verify(ids, labels).exact
    pipe.train()
    pipe(ids, labels).backward()
    pipe.zero_grad()
    pipe.eval()
    before = pipe.pipeline.plan.stage_of
    pipe.pipeline.replan(PlanOptions(pins={"layers.0": 0, "layers.1": 1, "layers.7": 2, "layers.8": 3}))
    assert pipe.pipeline.plan.stage_of != before
    for _ in range(2):
        inputs = ((ids, labels), {})
        assert_same(step(pipe, model, loss_of, inputs), microbatched(model, loss_of, inputs, 1, inside=True))
    assert f"{schedule}, 2 stages on each rank" in str(pipe.pipeline.report)
    assert "rank 1, with stages 1, " in str(pipe.pipeline.report)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "interleaved-1f1b"])
def test_the_user_says_how_many_stages_a_rank_has(schedule: str) -> None:
    model, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(model, 2, schedule=schedule, verify="never", plan=PlanOptions(stages_per_rank=3))
    assert_same(step(pipe, model, it.loss, it.inputs(4, 6)), step(model, model, it.loss, it.inputs(4, 6)))
    assert pipe.pipeline.plan.rank_of == (0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ("zb-v", {"stages_per_rank": 3}, "stages_per_rank=3 does not fit schedule 'zb-v', which has exactly 2"),
        ("interleaved-1f1b", {"stages_per_rank": 1}, "which has 2 or more on each rank"),
        ("interleaved-1f1b-3", {"stages_per_rank": 2}, "which has exactly 3 on each rank"),
        ("zb-v", {"max_stages": 3}, "max_stages=3 does not work with 2 stages on each rank"),
        ("zb-v", {"replicas": [1, 1]}, None),
        ("zb-v", {"replicas": [2]}, "does not work with schedule='zb-v'"),
        ("1f1b", {"stages_per_rank": 2, "replicas": [2]}, "whose order is for one device per stage"),
        ("1f1b", {"stages_per_rank": 0}, "stages_per_rank=0; it must be a number of stages, at least 1"),
        ("auto", {"replicas": "auto"}, "does not work with schedule='auto'"),
    ],
)
def test_a_number_of_stages_that_cannot_be(schedule: str, options: dict[str, Any], words: str | None) -> None:
    if words is None:
        pipe_of(Towers(), schedule=schedule, plan=PlanOptions(**options))
        return
    with pytest.raises(InputError) as raised:
        pipe_of(Towers(), schedule=schedule, plan=PlanOptions(**options))
    assert words in str(raised.value)


def test_a_model_with_too_few_parts_is_refused_with_their_number() -> None:
    pipe = pipe_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 2, schedule="zb-v")
    with pytest.raises(pipecompile.PlanError, match="cannot be cut into 4 stages: it can be cut into at most 2"):
        pipe(torch.randn(4, 4))


def test_the_last_round_is_reported_where_it_is_not_full() -> None:
    model, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(model, 2, schedule="interleaved-1f1b", microbatches=5, verify="never")
    inputs, _ = it.inputs(5, 6)
    pipe(*inputs).backward()
    assert "the last round of a batch of 5 microbatches has 1 of 2" in str(pipe.pipeline.report.schedule)


# Schedules of one's own


GRID = """
    0: 0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1
    1: 1F0 2F0 1F1 2F1 2B0 1B0 2I1 1B1 2W1
"""


def in_pairs(ranks: int, microbatches: int) -> str:
    """Pairs of microbatches, forward and backward."""
    words = []
    for first in range(0, microbatches, 2):
        pair = range(first, min(first + 2, microbatches))
        words += [*(f"F{k}" for k in pair), *(f"B{k}" for k in pair)]
    return "\n".join(" ".join(words) for _ in range(ranks))


@pytest.mark.parametrize("given", [GRID, read_grid(GRID)], ids=["text", "order"])
def test_a_grid_of_ones_own_trains(given: Any) -> None:
    model, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(model, 2, schedule=given, microbatches=None, verify="never")
    inputs = it.inputs(4, 6)
    assert_same(step(pipe, model, it.loss, inputs), step(model, model, it.loss, inputs))
    assert order_of(pipe.pipeline.program).rows == read_grid(GRID).rows
    assert pipe.pipeline.microbatches == 2
    assert_same(step(pipe, model, it.loss, it.inputs(1, 6)), step(model, model, it.loss, it.inputs(1, 6)))
    assert "a batch of 1 microbatches runs as 1f1b" in str(pipe.pipeline.report.schedule)


def test_a_function_makes_an_order_for_every_number_of_microbatches() -> None:
    model, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(model, 2, schedule=in_pairs, microbatches=4)
    for rows in (4, 3):
        inputs = it.inputs(rows, 6)
        assert_same(step(pipe, model, it.loss, inputs), step(model, model, it.loss, inputs))
        row = [i for i in pipe.pipeline.program.row_of(0) if isinstance(i, Forward | Backward)]
        assert " ".join(map(str, row)).startswith("0F0 0F1 0B0 0B1 0F2")
        assert len(row) == 2 * rows
    assert pipe.pipeline.schedule == "in_pairs"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0: 0F0 0B0\n1: 1B0 1F0", "1B0 is before 1F0, which it needs; put 1F0 before it on rank 1"),
        ("0: 0F0 0B0\n1: 1F0 1X0", "'1X0' is not a computation"),
        ("0: 0F0 0B0 0F1 0B1\n1: 1F1 1F0 1B0 1B1", "rank 1 waits at 1F1 for 0F1"),
        ("0: 0F0 0B0", "the schedule is for 1 ranks, but there are 2 devices"),
        ("0: 0F0 0F1 0B0 0B1\n1: 1F0 1F1 1B0", "1B1 is missing"),
        (lambda ranks, n: in_pairs(ranks, n + 1), "asked for 4 microbatches, but its order has 5"),
        (lambda ranks, n: n, "returned 4 for 2 ranks and 4 microbatches"),
        (7, "schedule=7; it must be a name such as '1f1b'"),
        ("zigzag", "schedule='zigzag' is not known; it must be one of 'sequential'"),
        (GRID, "microbatches=4, but the order schedule= has 2"),
    ],
)
def test_a_wrong_schedule_is_refused_with_the_place(given: Any, words: str) -> None:
    with pytest.raises(pipecompile.PipecompileError) as raised:
        pipe_of(Towers(), schedule=given, microbatches=4)
    assert words in str(raised.value)


def test_microbatches_out_of_order_are_refused_where_stages_write_buffers() -> None:
    backwards = "0: 0F1 0F0 0B1 0B0\n1: 1F1 1F0 1B1 1B0"
    model, inputs = sundry()
    pipe = pipe_of(model, 2, schedule=backwards, microbatches=None, verify="never")
    with pytest.raises(InputError, match=r"1F0 is after 1F1 on rank 1, but stage 1 writes buffer 'norm\."):
        pipe(*inputs[0])
    free, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(free, 2, schedule=backwards, microbatches=None)
    assert_same(step(pipe, free, it.loss, it.inputs(4, 6)), step(free, free, it.loss, it.inputs(4, 6)))


# Chosen


def test_auto_chooses_and_says_what_it_weighed() -> None:
    model, it = TRAINED["two_towers"].build(), TRAINED["two_towers"]
    pipe = pipe_of(model, 2, schedule="auto", microbatches=4, plan=PlanOptions(stages_per_rank=2))
    inputs = it.inputs(4, 6)
    assert_same(step(pipe, model, it.loss, inputs), step(model, model, it.loss, inputs))
    said = pipe.pipeline.report.schedule
    assert said[0].startswith(f"{pipe.pipeline.schedule}, ")
    assert said[1].startswith(f"{pipe.pipeline.schedule}, 2 stages on each rank, 4 microbatches: predicted step")
    assert {"zb-v", "interleaved-1f1b", "1f1b"} <= {line.partition(",")[0] for line in said[1:]}
    assert "interleaved-1f1b-3" not in str(said)


def test_auto_has_nothing_to_choose_if_the_caller_computes_the_loss() -> None:
    model = blocks(5).double()
    pipe = pipe_of(model, 2, schedule="auto")
    pipe(torch.randn(4, D, dtype=torch.float64)).sum().backward()
    assert pipe.pipeline.schedule == "1f1b"
    assert "the caller computes the loss" in str(pipe.pipeline.report.schedule)
