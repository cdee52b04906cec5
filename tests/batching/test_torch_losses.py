"""Every loss class of torch.nn, with each reduction and option, is the whole batch's over uneven microbatches.

Five rows in four microbatches, one of which has no target that counts. The oracle is the unsplit model in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import CLASSES, IGNORED, WIDTH, Tokens, assert_step_equal, microbatches_of
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import CaptureError

LENGTH = 5
OTHER = 2  # another ignored class
WEIGHTS = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)

# What a loss is called with, of logits x (rows, length, classes), hidden states h (rows, length, width), labels y
# (rows, length), some ignored, and real numbers t (rows, length, classes).
Form = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
FORMS: dict[str, Form] = {
    "values": lambda x, h, y, t: (x, t),
    "rates": lambda x, h, y, t: (x.exp(), t.abs()),
    "variances": lambda x, h, y, t: (x, t, F.softplus(x) + 0.1),
    "variance a token": lambda x, h, y, t: (x, t, F.softplus(x[..., :1]) + 0.1),
    "probabilities": lambda x, h, y, t: (x.sigmoid(), t.sigmoid()),
    "logits": lambda x, h, y, t: (x, t.sigmoid()),
    "distributions": lambda x, h, y, t: (x.log_softmax(-1), t.softmax(-1)),
    "log distributions": lambda x, h, y, t: (x.log_softmax(-1), t.log_softmax(-1)),
    "labels": lambda x, h, y, t: (x.reshape(-1, CLASSES), y.reshape(-1)),
    "labels at once": lambda x, h, y, t: (x.transpose(1, 2), y),
    "labels shifted": lambda x, h, y, t: (x[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1)),
    "other label": lambda x, h, y, t: (x.reshape(-1, CLASSES), y.masked_fill(y < 0, OTHER).reshape(-1)),
    "soft labels": lambda x, h, y, t: (x.reshape(-1, CLASSES), t.softmax(-1).reshape(-1, CLASSES)),
    "log labels": lambda x, h, y, t: (x.log_softmax(-1).reshape(-1, CLASSES), y.reshape(-1)),
    "log labels at once": lambda x, h, y, t: (x.log_softmax(-1).transpose(1, 2), y),
    "log labels of pictures": lambda x, h, y, t: (
        x.log_softmax(-1).transpose(1, 2)[..., None].contiguous(), y[..., None]
    ),
    "other log label": lambda x, h, y, t: (
        x.log_softmax(-1).transpose(1, 2), y.masked_fill(y < 0, OTHER)
    ),
    "hidden labels": lambda x, h, y, t: (h.reshape(-1, WIDTH), y.reshape(-1)),
    "other hidden label": lambda x, h, y, t: (h.reshape(-1, WIDTH), y.masked_fill(y < 0, OTHER).reshape(-1)),
    "ranks": lambda x, h, y, t: (x[:, 0], x[:, 1], t[:, 0].sign()),
    "rank a row": lambda x, h, y, t: (x[:, 0, 0], x[:, 1, 0], t[:, 0, 0].sign()),
    "signs": lambda x, h, y, t: (x, t.sign()),
    "several labels": lambda x, h, y, t: (x[:, 0], y.clamp(min=-1).repeat(1, 2)[:, :CLASSES]),
    "flags": lambda x, h, y, t: (x[:, 0], t[:, 0].gt(0).double()),
    "classes": lambda x, h, y, t: (x[:, 0], y[:, 0].clamp(min=0)),
    "pairs": lambda x, h, y, t: (h[:, 0], h[:, 1], t[:, 0, 0].sign()),
    "triplets": lambda x, h, y, t: (h[:, 0], h[:, 1], h[:, 2]),
    "triplet a token": lambda x, h, y, t: (h, h.roll(1, dims=1), h.flip(1)),
    "sequences": lambda x, h, y, t: (
        x.transpose(0, 1).log_softmax(-1), y[:, :2].clamp(min=1), (y[:, :2] >= -100).sum(1) + 3, (y[:, :2] > 0).sum(1)
    ),
    "sequences too long": lambda x, h, y, t: (
        x.transpose(0, 1).log_softmax(-1), y.clamp(min=1), (y >= 0).sum(1), (y > 0).sum(1)
    ),
}  # fmt: skip
COUNTED = {"labels", "labels at once", "log labels", "log labels at once", "hidden labels"}


@dataclass(frozen=True)
class Case:
    kind: str
    form: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.kind, self.form, *self.options])

    @property
    def reductions(self) -> tuple[str, ...]:
        return ("mean", "sum", "none", *(["batchmean"] if self.kind == "KLDivLoss" else []))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(one, other, dim=-1)


BASE = ({},)
CLASS_OPTIONS = ({}, {"weight": WEIGHTS})
SMOOTH = ({"label_smoothing": 0.1}, {"weight": WEIGHTS, "label_smoothing": 0.1})
TRIPLET = ({}, {"margin": 0.3}, {"swap": True})
BOTH = {"weight": WEIGHTS, "pos_weight": WEIGHTS}
OTHERS = ({"ignore_index": OTHER}, {"ignore_index": OTHER, "weight": WEIGHTS})
TABLE: tuple[tuple[str, str, tuple[dict[str, Any], ...]], ...] = (
    ("L1Loss", "values", BASE),
    ("MSELoss", "values", BASE),
    ("HuberLoss", "values", ({}, {"delta": 0.5})),
    ("SmoothL1Loss", "values", ({}, {"beta": 0.5}, {"beta": 0.0})),
    ("PoissonNLLLoss", "values", ({}, {"full": True})),
    ("PoissonNLLLoss", "rates", ({"log_input": False}, {"log_input": False, "eps": 0.1, "full": True})),
    ("GaussianNLLLoss", "variances", ({}, {"full": True}, {"eps": 0.5})),
    ("GaussianNLLLoss", "variance a token", BASE),
    ("KLDivLoss", "distributions", BASE),
    ("KLDivLoss", "log distributions", ({"log_target": True},)),
    ("BCELoss", "probabilities", CLASS_OPTIONS),
    ("BCEWithLogitsLoss", "logits", (*CLASS_OPTIONS, {"pos_weight": WEIGHTS}, BOTH)),
    ("CrossEntropyLoss", "labels", (*CLASS_OPTIONS, *SMOOTH)),
    ("CrossEntropyLoss", "labels at once", (*CLASS_OPTIONS, *SMOOTH)),
    ("CrossEntropyLoss", "labels shifted", CLASS_OPTIONS),
    ("CrossEntropyLoss", "other label", (*OTHERS, {"ignore_index": OTHER, "label_smoothing": 0.1})),
    ("CrossEntropyLoss", "soft labels", (*CLASS_OPTIONS, *SMOOTH)),
    ("LinearCrossEntropyLoss", "hidden labels", (*CLASS_OPTIONS, *SMOOTH, {"bias": True})),
    ("LinearCrossEntropyLoss", "other hidden label", OTHERS),
    ("NLLLoss", "log labels", CLASS_OPTIONS),
    ("NLLLoss", "log labels at once", CLASS_OPTIONS),
    ("NLLLoss", "other log label", OTHERS),
    ("NLLLoss2d", "log labels of pictures", CLASS_OPTIONS),
    ("MarginRankingLoss", "ranks", ({}, {"margin": 0.5})),
    ("MarginRankingLoss", "rank a row", ({}, {"margin": 0.5})),
    ("HingeEmbeddingLoss", "signs", ({}, {"margin": 0.5})),
    ("SoftMarginLoss", "signs", BASE),
    ("MultiLabelMarginLoss", "several labels", BASE),
    ("MultiLabelSoftMarginLoss", "flags", CLASS_OPTIONS),
    ("MultiMarginLoss", "classes", (*CLASS_OPTIONS, {"p": 2}, {"margin": 0.5}, {"p": 2, "weight": WEIGHTS})),
    ("CosineEmbeddingLoss", "pairs", ({}, {"margin": 0.1})),
    ("TripletMarginLoss", "triplets", (*TRIPLET, {"p": 1.0}, {"eps": 0.1})),
    ("TripletMarginLoss", "triplet a token", TRIPLET),
    ("TripletMarginWithDistanceLoss", "triplets", (*TRIPLET, {"distance_function": cosine})),
    ("TripletMarginWithDistanceLoss", "triplet a token", ({"distance_function": cosine},)),
    ("CTCLoss", "sequences", ({}, {"zero_infinity": True})),
    ("CTCLoss", "sequences too long", ({"zero_infinity": True},)),
)
OWN_SIZES = {"LinearCrossEntropyLoss": (WIDTH, CLASSES)}
REFUSED = {"AdaptiveLogSoftmaxWithLoss"}
CASES = tuple(Case(kind, form, options) for kind, form, sets in TABLE for options in sets)


class Loss(nn.Module):
    """A loss of torch.nn with every reduction, each with a weight of its own.

    What it leaves unreduced is averaged by hand, over the targets that count.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.form, self.is_counted = FORMS[case.form], case.form in COUNTED
        kind, sizes = getattr(nn, case.kind), OWN_SIZES.get(case.kind, ())
        self.losses = nn.ModuleList(kind(*sizes, **case.options, reduction=name) for name in case.reductions)

    def forward(self, x: Tensor, h: Tensor, y: Tensor, t: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for weight, loss in enumerate(self.losses, 1):
            found = loss(*self.form(x, h, y, t))
            if found.ndim:
                found = found.sum() / (y != IGNORED).sum() if self.is_counted else found.mean()
            total = total + found / weight
        return total


def batch(rows: int) -> dict[str, Tensor]:
    """The row before the last has no target that counts, the second only one."""
    drawn = torch.Generator().manual_seed(rows)
    ids, y = (torch.randint(CLASSES, (rows, LENGTH), generator=drawn) for _ in range(2))
    y[rows - 2], y[1, 1:] = IGNORED, IGNORED
    return {"ids": ids, "y": y, "t": torch.randn(rows, LENGTH, CLASSES, generator=drawn, dtype=torch.float64)}


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides", "ignore:.NLLLoss2d. has been deprecated")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_loss_of_torch_is_the_whole_batchs(case: Case) -> None:
    torch.manual_seed(0)
    model = Tokens(Loss(case)).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    for rows in (5, 7):
        assert_step_equal(model, pipe, batch(rows))
        assert microbatches_of(pipe) == 4


class Clusters(nn.Module):
    """A softmax by clusters: which of them are computed depends on the labels, so the module is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, CLASSES, [3, 6], div_value=1.5)

    def forward(self, x: Tensor, h: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return self.softmax(h[:, 0], y[:, 0].clamp(min=0)).loss


def test_a_mean_inside_a_module_that_is_kept_whole_is_refused_by_its_line() -> None:
    model = Tokens(Clusters()).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=4, costs="count")
    with pytest.raises(CaptureError, match=r"module 'loss\.softmax'.*test_torch_losses\.py:\d+.*use microbatches=1"):
        pipe(**batch(5))
    whole = pipecompile.compile(model, ["cpu", "cpu"], microbatches=1, costs="count")
    assert_step_equal(model, whole, batch(5))


def test_every_loss_class_of_torch_is_in_the_table() -> None:
    classes = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and "Loss" in name}
    assert classes == {kind for kind, _, _ in TABLE} | REFUSED
