"""With ``outputs="loss"`` a call computes and returns its loss, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import pipecompile
from pipecompile.errors import InputError
from pipecompile.runtime.batch import Batch

WIDTH, CLASSES, ROWS = 8, 64, 8


class Out(NamedTuple):
    loss: Tensor | None
    logits: Tensor
    rows: int
    extra: dict[str, Tensor]


class Model(nn.Module):
    """A loss, its logits, a size, and a head that nothing but another output needs; counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
        self.other = nn.Linear(CLASSES, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Out:
        self.calls += 1
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Out(loss, logits, x.shape[0], {"other": self.other(logits)})


class Pair(nn.Module):
    """Two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"first": h.square().mean(), "second": h.abs().mean(), "h": h}


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def pair(make: Any, **options: Any) -> tuple[nn.Module, Any]:
    """The unsplit model and a pipe of the same weights."""
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    return model, pipecompile.compile(make(), ["cpu", "cpu"], microbatches=4, costs="count", **options)


def assert_same_gradients(pipe: nn.Module, model: nn.Module) -> None:
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in pipe.named_parameters()}
    assert found.keys() == expected.keys()
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_loss_and_its_gradients_are_the_models_and_nothing_else_is_returned(schedule: str) -> None:
    model, pipe = pair(Model, outputs="loss", schedule=schedule)
    for rows in (ROWS, 5):
        expected, out = model(*batch(rows)), pipe(*batch(rows))
        assert type(out) is Out
        assert (out.logits, out.rows, out.extra) == (None, rows, {"other": None})
        torch.testing.assert_close(out.loss, expected.loss)
        expected.loss.backward()
        out.loss.backward()
    assert_same_gradients(pipe, model)
    assert torch.equal(pipe.calls, model.calls)


def test_a_model_of_transformers_returns_its_own_type() -> None:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=60, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model, pipe = pair(lambda: GPT2LMHeadModel(config), outputs="loss")
    ids = torch.randint(60, (8, 6))
    expected, out = model(ids, labels=ids), pipe(ids, labels=ids)
    assert type(out) is type(expected)
    assert list(out) == ["loss"]
    assert out.logits is None
    expected.loss.backward()
    out.loss.backward()
    assert_same_gradients(pipe, model)


def test_a_call_without_a_loss_returns_all() -> None:
    model, pipe = pair(Model, outputs="loss")
    x, _ = batch()
    out = pipe(x)
    assert out.loss is None
    torch.testing.assert_close(out.logits, model(x).logits)


def test_what_only_other_outputs_need_is_not_computed_or_kept() -> None:
    _, every = pair(Model)
    _, only = pair(Model, outputs="loss")
    every(*batch())
    only(*batch())
    modules = [{node.path for node in pipe.pipeline.costs.graph.nodes} for pipe in (every, only)]
    assert modules[0] - modules[1] == {"other"}
    kept = [pipe.pipeline.memory.stages[-1].outputs for pipe in (every, only)]
    assert kept[1] <= 2 * 4 * 4 < ROWS * CLASSES * 4 <= kept[0]  # 4 microbatches of a float32, twice
    assert any("None because of outputs='loss': logits, extra.other" in note for note in only.pipeline.report.notes)
    assert not any("None because" in note for note in every.pipeline.report.notes)


def test_the_comparison_with_the_unsplit_model_finds_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe = pair(Model, outputs="loss")
    assert pipe.pipeline.verify(*batch()).exact
    _, pipe = pair(Model, outputs="loss")
    run = Batch.finish
    monkeypatch.setattr(Batch, "finish", lambda self, *args: [1.01 * tensor for tensor in run(self, *args)])
    with pytest.raises(pipecompile.ExactnessError, match="loss"):
        pipe(*batch())


def test_of_several_losses_the_user_names_one() -> None:
    x, _ = batch()
    model, pipe = pair(Pair, outputs="loss", loss_output="second")
    out = pipe(x)
    assert (out["first"], out["h"]) == (None, None)
    out["second"].backward()
    model(x)["second"].backward()
    assert_same_gradients(pipe, model)
    _, pipe = pair(Pair, outputs="loss")
    with pytest.raises(InputError, match=r"outputs first, second could each be it; name it with loss_output="):
        pipe(x)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InputError, match=r"outputs='none' is not known; it must be 'all', or 'loss'"):
        pair(Model, outputs="none")
