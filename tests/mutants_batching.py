"""Mutants of the batching: a microbatch's value is taken for something that it is not of the whole batch's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from broken import WIDTH, Mutant, bypass, calls, captured, divided, patched
from mutants_capture import Net, ids, net
from torch import Tensor, nn
from torch.nn import functional as F

from pipecompile.batching import SHARED, Batched, Division, Partial, Rows
from pipecompile.batching.division import Before
from pipecompile.batching.rules import RULES, Recount, Share, Use
from pipecompile.capture import Captured
from pipecompile.ops.operators import named
from pipecompile.runtime import batch

DIVIDE = sys.modules["pipecompile.batching.divide"]
EXPERIMENT = sys.modules["pipecompile.batching.separability_trial"]


class Ends(nn.Module):
    """Three layers, and what a mutant is about at the end: a loss of the last features."""

    def __init__(self, end: Callable[[Ends, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.last(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Words(nn.Module):
    """The mean over targets that count, of which rows have unequally many."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 9)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.middle(self.words(ids))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__(lambda net, h: net.norm(h), lambda net: setattr(net, "norm", nn.BatchNorm1d(WIDTH)))


def end(loss: Callable[[Ends, Tensor], Any]) -> Callable[[], Ends]:
    return lambda: Ends(loss)


def rule(name: str, answer: Callable[[Use], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Another rule of a function."""

    @contextmanager
    def broken() -> Iterator[None]:
        with patch.dict(RULES, {key: (known, answer) for key, known in named(name).items()}):
            yield

    return broken


def per_row(use: Use) -> Any:
    """What the first argument is."""
    kind = use.kind(use.node.args[0])
    return kind if use.scale.shape(use.node) is not None else (kind,) * len(use.scale.shapes(use.node))


class Never:
    """What no edit is."""


def without(edit: str) -> Callable[[], AbstractContextManager[Any]]:
    """An edit of calls is not made."""
    return patched(DIVIDE, edit, lambda original: Never)


def mean_of_means(original: Callable[..., Any]) -> Callable[..., Any]:
    def edited(self: Any, node: torch.fx.Node, copy: torch.fx.Node) -> torch.fx.Node:
        edits = self.analysis.edits.get(node, ())
        weighed = tuple(Share() if isinstance(edit, Recount) else edit for edit in edits)
        self.analysis = replace(self.analysis, edits={**self.analysis.edits, node: weighed})
        return original(self, node, copy)

    return edited


@contextmanager
def believes_all() -> Iterator[None]:
    """Trials of functions and of their backwards compare nothing."""
    modules = (EXPERIMENT, sys.modules["pipecompile.batching.backward_trial"])
    names = [(m, name) for m in modules for name in ("same_rows", "same_entries") if hasattr(m, name)]
    with ExitStack() as stack:
        for module, name in names:
            stack.enter_context(patch.object(module, name, lambda *given, **more: True))
        yield


def joined_as(kind: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    def edit(division: Division) -> Division:
        return replace(division, joins={name: kind(known) for name, known in division.joins.items()})

    return divided(edit)


def only_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather(kind: Any, parts: Any, rows: Rows) -> Tensor:
        whole = original(kind, parts, rows)
        return torch.cat([parts[0]] * len(parts))[: len(whole)] if isinstance(kind, Batched) else whole

    return gather


def norm_twice(it: Captured) -> None:
    (node,) = calls(it.graph, "batch_norm")
    with it.graph.inserting_after(node):
        again = it.graph.call_function(node.target, node.args, node.kwargs)
    again.meta.update(node.meta)


def lose_copies(division: Division) -> None:
    for node in [n for n in division.body.graph.nodes if n.name.endswith("_before")]:
        bypass(node)


def lose_tail_write(division: Division) -> Division:
    tail = division.tail
    assert tail is not None
    return replace(division, tail=replace(tail, nodes=tuple(name for name in tail.nodes if "add" not in name)))


def decay(net: Net, h: Tensor) -> Tensor:
    net.state.mul_(0.9)
    return h + net.state


def state(net: Net) -> None:
    net.register_buffer("state", torch.ones(WIDTH))


def count(net: Net, h: Tensor) -> Tensor:
    net.count.add_(1)
    return h


def counter(net: Net) -> None:
    net.register_buffer("count", torch.zeros(()))


def regularised(net: Ends, o: Tensor) -> Tensor:
    return o.pow(2).mean() + 0.1 * net.first.weight.pow(2).sum()


def numbered(net: Ends, o: Tensor) -> Tensor:
    return (o * torch.arange(o.shape[0])[:, None]).mean()


def over_the_batch(name: str, loss: Callable[[Tensor], Tensor], answer: Callable[[Use], Any] = per_row) -> Mutant:
    treated = "a function of each row" if answer is per_row else "a value that all microbatches share"
    return Mutant(f"{name} over the batch", f"`{name}` over the batch is treated as {treated}", rule(name, answer),
             end(lambda net, o: loss(o)))  # fmt: skip


BATCHING = (
    over_the_batch("softmax", lambda o: (torch.softmax(o, 0) * o).mean()),
    over_the_batch("sort", lambda o: (torch.sort(o[:, 0], dim=0)[0] * o[:, 1]).mean()),
    over_the_batch("cumsum", lambda o: torch.cumsum(o, 0).pow(2).mean()),
    over_the_batch("flip", lambda o: (torch.flip(o, [0]) * o).mean()),
    over_the_batch("roll", lambda o: (torch.roll(o, 1, 0) * o).mean()),
    over_the_batch("normalize", lambda o: (F.normalize(o, dim=0) * o.exp()).mean()),
    over_the_batch("logsumexp", lambda o: torch.logsumexp(o, 0).pow(2).mean(), lambda use: SHARED),
    over_the_batch("std", lambda o: (o / torch.std(o, 0, keepdim=True)).exp().mean(), lambda use: SHARED),
    Mutant(
        "mean over the batch",
        "`mean(0)` is treated as a value that all microbatches share",
        rule("mean", lambda use: SHARED),
        end(lambda net, o: (o - o.mean(0, keepdim=True)).pow(2).sum()),
    ),
    Mutant(
        "Share lost",
        "the means of microbatches are added without weights",
        without("Share"),
        end(lambda n, o: o.pow(2).mean()),
    ),
    Mutant(
        "Recount lost",
        "each microbatch takes the mean over its own valid targets",
        patched(DIVIDE._Divider, "_edited", mean_of_means),
        Words,
        ids,
    ),
    Mutant(
        "ShareArgument lost",
        "a regularization term is added once per microbatch",
        without("ShareArgument"),
        end(regularised),
    ),
    Mutant(
        "WholeArgument lost",
        "a sum is divided by the number of rows of a microbatch",
        without("WholeArgument"),
        end(lambda net, o: o.pow(2).sum() / o.shape[0]),
    ),
    Mutant("RowsArgument lost", "row numbers start at 0 in each microbatch", without("RowsArgument"), end(numbered)),
    Mutant(
        "wrong count of targets",
        "the number of valid targets is doubled",
        patched(Before, "value", lambda original: lambda self, values: 2 * original(self, values)),
        Words,
        ids,
    ),
    Mutant(
        "partial sum joined as shared",
        "the first microbatch's part of a loss is returned as the loss",
        joined_as(lambda kind: SHARED if isinstance(kind, Partial) else kind),
        end(lambda n, o: o.pow(2).mean()),
    ),
    Mutant(
        "outputs joined the wrong way",
        "an output with two blocks of rows is joined as one block",
        joined_as(lambda kind: replace(kind, outer=1) if isinstance(kind, Batched) else kind),
        end(lambda net, o: torch.stack([o, o.exp()]).flatten(0, 1)),
    ),
    Mutant(
        "tail sees the first microbatch",
        "the tail gets the values of the first microbatch, repeated",
        patched(batch, "gather", only_first),
        end(lambda net, o: torch.logsumexp(o, 0).mean()),
    ),
    Mutant(
        "equal weights",
        "microbatches are weighted as if they had equal numbers of rows",
        patched(Rows, "weights", lambda original: property(lambda self: (1 / len(self),) * len(self))),
        end(lambda net, o: o.pow(2).mean()),
    ),
    Mutant(
        "statistics written twice",
        "the running statistics of a batch normalization are updated twice",
        captured(norm_twice),
        Normalised,
        draws=True,
    ),
    Mutant(
        "buffer without a copy", "each microbatch writes to the buffer itself", divided(lose_copies), net(decay, state)
    ),
    Mutant(
        "tail forgets a write",
        "a buffer is written only in the copies of the microbatches",
        divided(lose_tail_write),
        net(count, counter),
    ),
    Mutant(
        "trial always passes",
        "a function without a rule passes its trial, although it mixes samples",
        believes_all,
        end(lambda net, o: (torch.renorm(o, 2, 1, 0.5) * o).mean()),
    ),
)
