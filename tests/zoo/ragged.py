"""Padded, ragged batches: each row with its own number of valid tokens, from none to all.

The first microbatch has no valid token and the last row is full, or the first is full and the last has none; between
them the lengths grow. Labels are -100 in the padding, and the attention mask is 0 there where a model takes one. The
oracle is the unsplit model on the whole batch; loss and every gradient must be equal, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from losses import cut_into, microbatches_of
from oracle import Inputs, Run
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import ExecutionError, PipecompileError
from zoo.check import FLOOR, STAGES, TOLERANCE, difference, first_line, one_capture_for_many_plans, run
from zoo.entry import Entry

BATCHES = (5, 7, 8)
MICROBATCHES = (2, 3, 4, 8)
IGNORED = -100
ATTENDED = ("padding is masked", "the first token of an empty row is attended", "no attention mask")


@dataclass(frozen=True)
class Variant:
    """A model called in one way.

    Attributes:
        name: empty for the plain call.
        arguments: what is passed beside the batch, from the number of valid labels.
    """

    name: str
    entry: Entry
    arguments: Callable[[int], dict[str, Any]] = lambda valid: {}
    batches: tuple[int, ...] = BATCHES


@dataclass
class Tally:
    """What the steps of one variant at one number of stages have come to."""

    steps: int = 0
    exact: int = 0
    refused: int = 0
    uncut: int = 0  # steps of fewer microbatches than there could be
    worst: float = 0.0  # difference of exact steps, of the loss or of a gradient's largest entry
    captures: int = 0
    seen: list[str] = field(default_factory=list)  # the first of each kind of trouble
    tail: str = ""


def takes_ragged(entry: Entry) -> bool:
    """Whether a model of the zoo takes labels for tokens, so that some can be left out."""
    labels = entry.inputs(BATCHES[0], entry.lengths[0])[1].get("labels")
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point() and not entry.mixes


def variants(entry: Entry) -> Iterator[Variant]:
    """The ways to call a model: plainly, with its experts' balancing loss, with the labels counted by the caller."""
    model: Any = entry.build()
    config = getattr(model, "config", None)
    if entry.dtype == torch.float32:
        double = replace(entry, dtype=torch.float64)
        if hasattr(model, "_can_set_experts_implementation") and model._can_set_experts_implementation():
            yield Variant("as built", entry, batches=BATCHES[1:2])
            double = replace(double, make=_batched_experts(entry.make))
        entry = double if _attended(Variant("", double), double.build()) is not None else entry
    yield Variant("", entry)
    takes = inspect.signature(model.forward).parameters
    if "output_router_logits" in takes and not getattr(config, "output_router_logits", True):
        yield Variant("router loss", entry, lambda valid: {"output_router_logits": True})
    if "kwargs" in takes:
        yield Variant("num_items", entry, lambda valid: {"num_items_in_batch": torch.tensor(valid)}, BATCHES[1:2])


def _batched_experts(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model with experts that can compute in float64."""

    def made() -> nn.Module:
        model: Any = make()
        model.set_experts_implementation("batched_mm")
        return model

    return made


def lengths(batch: int, microbatches: int, longest: int) -> Iterator[tuple[int, ...]]:
    """Valid tokens of each row: the first microbatch has none and the last row all, or the other way round."""
    low, high = -(-batch // microbatches), batch // min(batch, microbatches)
    rest = batch - low
    yield (*(0,) * low, *(longest * (i + 1) // rest for i in range(rest)))
    between = batch - low - high
    yield (*(longest,) * low, *(longest * (i + 1) // (between + 1) for i in range(between)), *(0,) * high)


def ragged(model: nn.Module, inputs: Inputs, valid: tuple[int, ...], attended: int) -> tuple[Inputs, int]:
    """Inputs with padding behind each row's valid tokens, and the number of labels that count.

    Args:
        attended: what is done about attention, by its place in ``ATTENDED``.
    """
    args, kwargs = inputs
    tokens = torch.tensor(valid)[:, None]
    labels = kwargs["labels"]
    labels = labels.masked_fill(torch.arange(labels.shape[1]) >= tokens, IGNORED)
    kwargs = {**kwargs, "labels": labels}
    if _is_masked(model, kwargs) and attended < 2:
        places = torch.arange(kwargs["input_ids"].shape[1])
        kwargs["attention_mask"] = (places < tokens.clamp(min=attended)).long()
    return (args, kwargs), int((labels != IGNORED).sum())


def _longest(entry: Entry) -> int:
    """The tokens of a row without padding; the places of a picture's features are among them."""
    kwargs = entry.inputs(1, entry.lengths[0])[1]
    return max(kwargs[name].shape[1] for name in ("input_ids", "labels") if name in kwargs)


def _is_masked(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    return "input_ids" in kwargs and "attention_mask" in inspect.signature(model.forward).parameters


def examine_ragged(
    entry: Entry,
    batches: tuple[int, ...] = BATCHES,
    microbatches: tuple[int, ...] = MICROBATCHES,
    splits: tuple[int, ...] = STAGES,
) -> Iterator[dict[str, Any]]:
    """Facts about a model, variant by variant: a tally for each number of stages."""
    plain: Run | None = None
    for variant in variants(entry):
        model = variant.entry.build()
        attended = _attended(variant, model)
        if attended is None:
            yield {f"{variant.name}: left out": "the unsplit model does not take it"}
            continue
        reference = _references(variant, model, attended)
        first = reference(BATCHES[0], next(lengths(BATCHES[0], 2, _longest(variant.entry))))
        if variant.name == "num_items" and plain is not None and torch.equal(first.loss, plain.loss):
            continue  # the model does not read it
        plain = first if not variant.name else plain
        facts = {"attention": ATTENDED[attended], "dtype": str(variant.entry.dtype).removeprefix("torch.")}
        yield {f"{variant.name}: {fact}": value for fact, value in facts.items()}
        chosen = tuple(batch for batch in batches if batch in variant.batches)
        with one_capture_for_many_plans():
            for stages in splits:
                yield {f"{variant.name}: stages {stages}": "hang"}
                tally = _train(variant, model, attended, stages, chosen, microbatches, reference)
                yield {f"{variant.name}: stages {stages}": vars(tally)}


def _attended(variant: Variant, model: nn.Module) -> int | None:
    """The first way to attend in which the unsplit model gives numbers for a row without tokens."""
    for attended in range(len(ATTENDED)):
        try:
            reference = _references(variant, model, attended)
            found = [reference(BATCHES[0], v) for v in lengths(BATCHES[0], 2, _longest(variant.entry))]
        except Exception:
            continue
        if all(_is_finite(run) for run in found):
            return attended
    return None


def _is_finite(found: Run) -> bool:
    tensors = [found.loss, *(g for g in found.gradients.values() if g is not None)]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _inputs(variant: Variant, model: nn.Module, batch: int, valid: tuple[int, ...], attended: int) -> Inputs:
    inputs = variant.entry.inputs(batch, variant.entry.lengths[0])
    (args, kwargs), counted = ragged(model, inputs, valid, attended)
    return args, {**kwargs, **variant.arguments(counted)}


def _references(variant: Variant, model: nn.Module, attended: int) -> Callable[[int, tuple[int, ...]], Run]:
    @cache
    def reference(batch: int, valid: tuple[int, ...]) -> Run:
        return run(variant.entry.loss, model, model, _inputs(variant, model, batch, valid, attended))

    return reference


def _train(
    variant: Variant,
    model: nn.Module,
    attended: int,
    stages: int,
    batches: tuple[int, ...],
    microbatches: tuple[int, ...],
    reference: Callable[[int, tuple[int, ...]], Run],
) -> Tally:
    """One pipeline for all batches and numbers of microbatches, so that captures are shared."""
    tally = Tally()
    pipe = pipecompile.compile(model, ["cpu"] * stages, schedule="1f1b", microbatches=2, costs="count")
    for batch in batches:
        for count in microbatches:
            cut_into(pipe, count)
            for valid in lengths(batch, count, _longest(variant.entry)):
                inputs = _inputs(variant, model, batch, valid, attended)
                _count(tally, variant, pipe, inputs, reference(batch, valid), valid)
        if tally.refused == tally.steps:
            break  # it would be refused for other batches too
    tally.captures = pipe.pipeline.captures
    if tally.exact:
        tally.tail = next((line for line in pipe.pipeline.report.microbatches if "computed once" in line), "")
    return tally


def _count(tally: Tally, variant: Variant, pipe: Any, inputs: Inputs, expected: Run, valid: tuple[int, ...]) -> None:
    tally.steps += 1
    said = ""
    try:
        actual = run(variant.entry.loss, pipe, pipe.pipeline.model, inputs)
    except ExecutionError as error:
        said = f"foreign: {first_line(error)}"
    except PipecompileError as error:
        said = f"refused: {first_line(error)}"
        tally.refused += 1
    except Exception as error:
        said = f"foreign: {first_line(error)}"
    else:
        said = difference(actual, expected, TOLERANCE[variant.entry.dtype], buffers=True)
        tally.exact += not said
        tally.uncut += microbatches_of(pipe) < min(len(valid), pipe.pipeline.microbatches)
        tally.worst = max(tally.worst, 0.0 if said else _apart(actual, expected))
    if said and len(tally.seen) < 5:
        tally.seen.append(f"{said} [{pipe.pipeline.microbatches} microbatches, lengths {', '.join(map(str, valid))}]")


def _apart(actual: Run, expected: Run) -> float:
    """The largest difference, of the loss or of a gradient's largest entry (or a hundredth of the largest of all)."""
    pairs = [(actual.gradients[name], g) for name, g in expected.gradients.items() if g is not None and g.numel()]
    largest = max(float(g.abs().max()) for _, g in pairs)
    found = [float((a - g).abs().max()) / max(float(g.abs().max()), FLOOR * largest) for a, g in pairs if a is not None]
    return max([*found, abs(float((actual.loss - expected.loss) / expected.loss))])
