"""torch's own logs while a model is tried: dropped, unless the user has asked for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.capture.state.quiet_torch import quiet

LOGGER = "torch.fx.experimental.symbolic_shapes"


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """The names of loggers whose warnings and errors reach a handler."""
    records: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.name)

    handler = Note(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "torch", LOGGER)]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def test_errors_are_dropped_inside_only(seen: list[str]) -> None:
    with quiet():
        logging.getLogger(LOGGER).error("a size cannot be a symbol")
        assert seen == []
    logging.getLogger(LOGGER).error("a size cannot be a symbol")
    assert LOGGER in seen


def test_a_user_who_has_asked_for_logs_gets_them(seen: list[str]) -> None:
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with quiet():
            logger.error("a size cannot be a symbol")
    finally:
        logger.setLevel(level)
    assert LOGGER in seen


class Counts(nn.Module):
    """Its inner part branches on data, so that the first traces of it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Inner(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x))).square().mean()


class Inner(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        positive = h[h[:, 0] > 0]
        if positive.shape[0] > 1:
            return h * 2
        return h


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_tried_in_several_ways_logs_nothing(
    seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pipecompile.compile(Counts(), ["cpu", "cpu"], microbatches=1, costs="count")
    pipe(torch.randn(6, 4)).backward()
    assert pipe.pipeline.report.notes  # a part was kept whole
    assert seen == []
    assert capsys.readouterr().err == ""
