"""Runs an idiom in eager and as a pipeline, and holds one to the other.

Two steps of SGD on different batches, so that what is left of the first call shows in the second, then an evaluation
without gradients on a batch of another size. After each the output with its types, loss, every gradient by name, the
gradients of the inputs, the inputs themselves, buffers, and all else that stands on the modules are compared.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.lazy import is_lazy

import pipecompile
from idioms.declare import ROWS, Draw, Idiom, Inputs
from pipecompile import PipecompileError

REMEDY = re.compile(
    r"microbatches=1|leaf_modules=|allow_mixing|register_buffer|_dims=|batch_norm=|loss_output=|loss_fn=|schedule=|;"
    r"|\b(use|pass|call|make|move|name|register|keep|write|return|give|turn|add|run|compile|put|set|take|compute)\b"
)
RATE = 0.05
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
TABLES = {name for name in nn.Module().__dict__ if name != "training"}


@dataclass(frozen=True)
class Seen:
    """All that a step may leave behind, by name."""

    tensors: dict[str, Any]


class Refused(Exception):
    """The pipeline was refused, with a reason that it gave."""


def outcome(idiom: Idiom, stages: int, microbatches: int, schedule: str, evaluate: bool = True) -> str:
    """ "exact", or "refused: ..." with the message; anything else raises."""
    try:
        with warned(idiom):
            if schedule == "pipedream":
                check_stream(idiom, stages, microbatches)
            else:
                check_steps(idiom, stages, microbatches, schedule, evaluate)
    except PipecompileError as error:
        return f"refused: {type(error).__name__}: {error}"
    return "exact"


@contextmanager
def warned(idiom: Idiom) -> Iterator[None]:
    """Turns warnings of the pipeline that the idiom does not declare into errors."""
    with warnings.catch_warnings():
        if idiom.warns:
            warnings.filterwarnings("ignore", message=f"(?s).*({idiom.warns})")
        yield


def check_steps(idiom: Idiom, stages: int, microbatches: int, schedule: str, evaluate: bool) -> None:
    expected = [] if idiom.draws else in_eager(idiom, microbatches, evaluate)
    model = idiom.build()
    pipe = compiled(idiom, model, stages, microbatches, schedule)
    drawn: list[Mapping[str, Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        output = pipe(*args, **kwargs)
        drawn.append({name: output[name].detach().clone() for name in idiom.draws})
        return output

    actual = steps(idiom, model, call, pipe, evaluate)
    check_drawn(drawn)
    expected = expected or in_eager(idiom, microbatches, evaluate, drawn)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        left_out = ("num_batches_tracked",) if idiom.parts else ()  # counts batches, not microbatches
        same_trees(
            f"call {number}: ",
            *({n: t for n, t in seen.tensors.items() if not n.endswith(left_out)} for seen in (a, b)),
            idiom.rounding,
        )
    if idiom.stages:
        assert len(pipe.pipeline.stages) == stages, f"{len(pipe.pipeline.stages)} stages instead of {stages}"


def in_eager(idiom: Idiom, microbatches: int, evaluate: bool, drawn: Iterable[Mapping[str, Any]] = ()) -> list[Seen]:
    """The unsplit model's numbers; what the pipeline has drawn is given to it."""
    model = idiom.build()
    forward = model if not idiom.parts else in_parts(idiom, model, microbatches)
    remaining = chain(drawn, repeat({}))
    return steps(idiom, model, lambda *a, **k: forward(*a, **k, **next(remaining)), model, evaluate)


def check_drawn(drawn: list[Mapping[str, Any]]) -> None:
    """What is drawn differs from call to call, and from row to row."""
    for one, other in pairwise(drawn):
        for name, value in one.items():
            assert value.shape != other[name].shape or not torch.equal(value, other[name]), f"{name} is drawn once"
    for name, value in drawn[0].items() if drawn else ():
        if value.ndim > 1 and value.shape[0] == ROWS and value.is_floating_point():
            assert len(torch.unique(value, dim=0)) > 1, f"{name} is the same for all rows"


def compiled(idiom: Idiom, model: nn.Module, stages: int, microbatches: int, schedule: str, **options: Any) -> Any:
    return pipecompile.compile(
        model,
        devices=["cpu"] * stages,
        schedule=schedule,
        microbatches=microbatches,
        costs="count",
        plan=pipecompile.PlanOptions(recompute="never", search_seconds=0.02),
        **options,
    )


def steps(idiom: Idiom, model: nn.Module, call: Callable[..., Any], mode: nn.Module, evaluate: bool) -> list[Seen]:
    """What is seen after two steps and an evaluation; ``call`` runs the model, whose mode is set through ``mode``."""
    seed_all()
    seen = []
    model.zero_grad()
    with idiom_between(idiom, model) as between:
        for number in range(2):
            args, kwargs = idiom.sample(Draw.of(number))
            output = call(*args, **kwargs)
            loss = idiom.loss(model, output)
            loss.backward()
            seen.append(look(model, output, loss, (args, kwargs)))
            del output, loss  # so that no graph of this step outlives it
            update(model)
            if number == 0:
                between()
        if evaluate:
            mode.eval()
            inputs = idiom.sample(Draw.of(2, ROWS - 1))
            with torch.no_grad():
                output = call(*inputs[0], **inputs[1])
            seen.append(look(model, output, None, inputs))
    return seen


@contextmanager
def idiom_between(idiom: Idiom, model: nn.Module) -> Iterator[Callable[[], None]]:
    context = idiom.between(model)
    entered = []

    def enter() -> None:
        context.__enter__()
        entered.append(True)

    try:
        yield enter
    finally:
        if entered:
            context.__exit__(None, None, None)


def update(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
                parameter.grad = None


def seed_all() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def look(model: nn.Module, output: Any, loss: Tensor | None, inputs: Inputs) -> Seen:
    tensors: dict[str, Any] = {"output": output, "loss": loss}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_lazy(parameter):
            tensors[f"parameter {name}"] = parameter
            tensors[f"gradient {name}"] = parameter.grad
    tensors.update((f"buffer {name}", b) for name, b in model.named_buffers(remove_duplicate=False) if not is_lazy(b))
    for path, module in model.named_modules():
        for name, value in [*module.__dict__.items(), *watched(module)]:
            if name not in TABLES and not name.startswith("_torchdynamo"):
                tensors[f"attribute {path}.{name}"] = plain(value)
    tensors["inputs"] = inputs
    tensors["input gradients"] = [leaf.grad for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_leaf]
    return Seen({name: frozen(value) for name, value in tensors.items()})


def watched(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a model shows of state that stands elsewhere: its ``outside()``."""
    if hasattr(type(module), "outside"):
        yield "outside()", module.outside()


def plain(value: Any, depth: int = 0) -> Any:
    """Numbers, strings and tensors in lists, tuples, sets and dicts; the type alone of all else."""
    assert not isinstance(value, FakeTensor), "a fake tensor was left behind"
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and depth < 4:
        return [type(value).__name__, *(plain(item, depth + 1) for item in value)]
    if isinstance(value, set | frozenset) and depth < 4:
        return [type(value).__name__, *sorted(map(repr, value))]
    if isinstance(value, Mapping) and depth < 4:
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    return type(value).__name__


def frozen(value: Any) -> Any:
    """A copy without history; whether a tensor had one is kept."""
    items = items_of(value)
    if isinstance(value, Tensor):
        assert not isinstance(value, FakeTensor), "a fake tensor was left behind"
        copy = value.detach().clone()
        return (copy, value.requires_grad)
    if items is None:
        return value
    return [type(value).__name__, *((str(key), frozen(item)) for key, item in items)]


def items_of(tree: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    if isinstance(tree, torch.Size):
        return None
    if isinstance(tree, torch.nn.utils.rnn.PackedSequence):
        return [(name, getattr(tree, name)) for name in tree._fields]
    if hasattr(tree, "shown"):  # an object that holds tensors, and says so
        return list(tree.shown().items())
    return list(enumerate(tree)) if isinstance(tree, list | tuple) else None


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = items_of(tree)
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}[{key}]")


def same_trees(what: str, actual: Any, expected: Any, rounding: float = 0.0) -> None:
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        same_tensors(what, actual, expected, rounding)
        return
    assert type(actual) is type(expected), f"{what}: {actual!r:.200} instead of {expected!r:.200}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{what}: {sorted(set(actual) ^ set(expected))} in one alone"
        for key in expected:
            same_trees(f"{what}{key}", actual[key], expected[key], rounding)
    elif isinstance(expected, list | tuple) and not isinstance(expected, torch.Size):
        assert len(actual) == len(expected), f"{what}: {actual!r:.200} instead of {expected!r:.200}"
        for a, b in zip(actual, expected, strict=True):
            same_trees(f"{what}.", a, b, rounding)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(actual, expected, err_msg=what)
    elif isinstance(expected, float):
        assert actual == expected or abs(actual - expected) <= 1e-9 * abs(expected), f"{what}: {actual!r} {expected!r}"
    else:
        assert actual == expected, f"{what}: {actual!r:.200} instead of {expected!r:.200}"


def same_tensors(what: str, actual: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    """Equal to rounding: in float64 to 1e-9, which a missing row is far from."""
    assert actual.layout == expected.layout, f"{what}: {actual.layout} instead of {expected.layout}"
    double = expected.dtype in (torch.float64, torch.complex128)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if double else {}
    tolerance = {"rtol": rounding, "atol": rounding} if rounding else tolerance
    torch.testing.assert_close(actual, expected, **tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}")


# Over microbatches


def cut(inputs: Inputs, microbatches: int) -> list[tuple[Inputs, float]]:
    """The microbatches' arguments, each with its share of the rows."""
    rows = next(leaf.shape[0] for _, leaf in leaves(inputs) if isinstance(leaf, Tensor))
    counts = [rows // microbatches + (i < rows % microbatches) for i in range(microbatches)]
    parts, low = [], 0
    for count in counts:
        parts.append((cut_tree(inputs, rows, low, low + count), count / rows))
        low += count
    return parts


def cut_tree(tree: Any, rows: int, low: int, high: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[low:high] if tree.ndim and tree.shape[0] == rows else tree
    if isinstance(tree, dict):
        return {key: cut_tree(value, rows, low, high) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(cut_tree(value, rows, low, high) for value in tree)
    return tree


def in_parts(idiom: Idiom, model: nn.Module, microbatches: int) -> Callable[..., Any]:
    """The unsplit model over the microbatches in order; scalars are averaged by rows, other tensors joined."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return model(*args, **kwargs)
        parts = cut((args, kwargs), microbatches)
        outputs = [model(*a, **k) for (a, k), _ in parts]
        shares = [share for _, share in parts]
        if isinstance(outputs[0], dict):
            return {key: joined([output[key] for output in outputs], shares) for key in outputs[0]}
        return joined(outputs, shares)

    return forward


def joined(values: list[Tensor], shares: list[float]) -> Tensor:
    if values[0].ndim:
        return torch.cat(values)
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()


def check_stream(idiom: Idiom, stages: int, microbatches: int) -> None:
    """The loss of the first call of an asynchronous pipeline that does not learn is that of each microbatch alone."""
    if not idiom.stream:
        return
    model, other = idiom.build(), idiom.build()
    seed_all()
    args, kwargs = idiom.sample(Draw.of(0))
    inside = is_loss(other, deepcopy((args, kwargs)))
    seed_all()
    other = idiom.build()
    options = {} if inside else {"loss_fn": lambda output, target: idiom.loss(model, output)}
    pipe = compiled(idiom, model, stages, microbatches, "pipedream", optimizer=no_steps, **options)
    target = {} if inside else {"target": torch.zeros(ROWS, dtype=torch.float64)}
    copied = deepcopy((args, kwargs))
    try:
        output = pipe(*args, **kwargs, **target)
    finally:
        pipe.pipeline.flush()
    expected = []
    for (a, k), share in cut(copied, microbatches):
        seed_all()  # numbers of Python and numpy are drawn once a call
        expected.append(idiom.loss(other, other(*a, **k)) * share)
    actual = idiom.loss(model, output) if inside else output
    if not idiom.draws:
        same_tensors("loss", actual.detach(), torch.stack(expected).sum().detach(), idiom.rounding)
    assert bool(torch.isfinite(actual))


def no_steps(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def is_loss(model: nn.Module, inputs: Inputs) -> bool:
    output = model(*inputs[0], **inputs[1])
    return (
        (isinstance(output, Tensor) and output.ndim == 0)
        or (isinstance(output, Mapping) and "loss" in output)
        or hasattr(output, "loss")
    )
