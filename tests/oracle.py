"""What a training step must give: the unsplit model's own numbers.

``step`` runs any callable that shares the model's parameters (the model, or a pipeline of it) on the whole batch.
``microbatched`` runs the unsplit model over the microbatches in order, each weighted by its share of the rows.
``delayed`` is the asynchronous recurrence, one batch after the other on the unsplit model:

    w_s[k+1] = Opt_s( w_s[k], gradient_s of L( w_0[max(0, k - delay_0)], ..., w_p[max(0, k - delay_p)] ; batch k ) )

where the gradient of a batch is the sum of those of its microbatches, in order, each weighted by its share of the rows.
``pipedream`` is the same with one microbatch in each batch.

None of them imports pipecompile. Every run leaves the model as it found it.

Source: Harlap et al., "PipeDream: Fast and Efficient Pipeline Parallel DNN Training", section 3.4 (weight stashing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Run:
    """One step's numbers; a parameter without gradient has ``None``."""

    loss: Tensor
    output: Any
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step(call: Callable[..., Any], model: nn.Module, loss: Loss, inputs: Inputs) -> Run:
    """The numbers of ``call`` on the whole batch; gradients and buffers are read from ``model``."""
    args, kwargs = inputs
    with preserved(model):
        output = call(*args, **kwargs)
        value = loss(output)
        value.backward()
        return _run(model, value, output)


def microbatched(model: nn.Module, loss: Loss, inputs: Inputs, microbatches: int, inside: bool) -> Run:
    """The numbers of the unsplit model over the microbatches in order.

    Args:
        inside: the loss is a part of each microbatch's output; otherwise it is a function of the joined outputs.
    """
    parts = split(inputs, microbatches)
    shares = [rows_of(part) / rows_of(inputs) for part in parts]
    with preserved(model):
        return (_loss_of_each if inside else _loss_of_all)(model, loss, parts, shares)


def _loss_of_each(model: nn.Module, loss: Loss, parts: Sequence[Inputs], shares: Sequence[float]) -> Run:
    outputs = []
    for (args, kwargs), share in zip(parts, shares, strict=True):
        outputs.append(model(*args, **kwargs))
        (loss(outputs[-1]) * share).backward()
    joined = join(outputs, shares)
    return _run(model, loss(joined), joined)


def _loss_of_all(model: nn.Module, loss: Loss, parts: Sequence[Inputs], shares: Sequence[float]) -> Run:
    outputs = [model(*args, **kwargs) for args, kwargs in parts]
    joined = join(outputs, shares)
    value = loss(joined)
    value.backward()
    gradients = split(tree_map(lambda t: t.grad, joined), len(parts))
    for output, gradient in zip(outputs, gradients, strict=True):
        pairs = zip(leaves(output), leaves(gradient), strict=True)
        torch.autograd.backward(*zip(*((t, g) for (_, t), (_, g) in pairs if isinstance(g, Tensor)), strict=True))
    return _run(model, value, joined)


def assert_same(actual: Run, expected: Run, *, exact: bool = False, buffers: bool = True) -> None:
    """Holds loss, output, every gradient and every buffer by name to the expected ones.

    Args:
        exact: bit for bit; otherwise to the default tolerances of ``torch.testing.assert_close``.
        buffers: whether the buffers count; microbatches write other statistics than the whole batch.
    """
    assert any(gradient is not None for gradient in expected.gradients.values()), "no gradient to compare"
    _same("loss", actual.loss, expected.loss, exact)
    _same_trees("output", actual.output, expected.output, exact)
    _same_trees("gradient", actual.gradients, expected.gradients, exact)
    if buffers:
        _same_trees("buffer", actual.buffers, expected.buffers, exact)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """No gradients at the start; parameters, buffers, their identities and the random state as before at the end."""
    model.zero_grad(set_to_none=True)
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    slots = [(module, dict(module._buffers)) for module in model.modules()]
    generator = torch.get_rng_state()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for module, buffers in slots:
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        torch.set_rng_state(generator)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves in order, each with the containers' types and keys on the way to it."""
    items = _items(tree)
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{type(tree).__name__}[{key}]")


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """The tree of ``function(*tensors)``; a leaf that is no tensor is taken from the first tree."""
    first = trees[0]
    items = _items(first)
    if items is None:
        return function(*trees) if isinstance(first, Tensor) else first
    columns = zip(*([value for _, value in _items(tree) or ()] for tree in trees), strict=True)
    values = [tree_map(function, *column) for column in columns]
    if isinstance(first, Mapping) or is_dataclass(first):
        return type(first)(**dict(zip((key for key, _ in items), values, strict=True)))
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)


def rows_of(inputs: Inputs) -> int:
    """The number of rows of the first tensor."""
    return next(leaf.shape[0] for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())


def split(tree: Any, microbatches: int) -> list[Any]:
    """The microbatches' trees: what has as many rows as the batch is cut along them, the rest is shared."""
    rows = rows_of(tree)
    counts = [rows // microbatches + (i < rows % microbatches) for i in range(microbatches)]
    bounds = [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(microbatches)]

    def part(tensor: Tensor, low: int, high: int) -> Tensor:
        return tensor[low:high].clone() if tensor.dim() and tensor.shape[0] == rows else tensor

    return [tree_map(lambda t, low=low, high=high: part(t, low, high), tree) for low, high in bounds]


def join(outputs: Sequence[Any], shares: Sequence[float]) -> Any:
    """The whole batch's output, without history: rows behind one another, scalars averaged by their shares."""

    def joined(*parts: Tensor) -> Tensor:
        if parts[0].dim():
            whole = torch.cat([part.detach() for part in parts])
        else:
            whole = torch.stack([part.detach() * share for part, share in zip(parts, shares, strict=True)]).sum()
        return whole.requires_grad_(parts[0].requires_grad)

    return tree_map(joined, *outputs)


@dataclass(frozen=True)
class Recurrence:
    """What asynchronous training arrives at."""

    losses: list[float]
    parameters: dict[str, Tensor]


def pipedream(
    model: nn.Module,
    loss: Loss,
    minibatches: Iterable[Inputs],
    stages: Sequence[Iterable[str]],
    delay: Sequence[int],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Recurrence:
    """The recurrence above, for batches of one microbatch."""
    return delayed(model, loss, [[minibatch] for minibatch in minibatches], stages, delay, optimizer)


def delayed(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Sequence[Inputs]],
    stages: Sequence[Iterable[str]],
    delay: Sequence[int],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Recurrence:
    """The recurrence above.

    Args:
        batches: the microbatches of each.
        stages: for each stage the names of its trained parameters; no parameter is in two.
        delay: for each stage the steps by which the weights of its forward lag behind.
    """
    values = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    latest = [{name: values[name].detach().clone().requires_grad_() for name in names} for names in stages]
    assert sum(map(len, latest)) == len(values), "each trained parameter belongs to one stage"
    optimizers = [optimizer(list(weights.values())) if weights else None for weights in latest]
    history = [[_copies(weights)] for weights in latest]
    losses = []
    for k, batch in enumerate(batches):
        used = [_copies(versions[max(0, k - d)]) for versions, d in zip(history, delay, strict=True)]
        together = {name: value for weights in used for name, value in weights.items()}
        rows = sum(map(rows_of, batch))
        losses.append(0.0)
        for args, kwargs in batch:
            share = rows_of((args, kwargs)) / rows
            value = loss(functional_call(model, together, args, kwargs))
            value.backward(torch.full_like(value, share))
            losses[-1] += value.item() * share
        for weights, new, stage_optimizer, versions in zip(used, latest, optimizers, history, strict=True):
            for name, tensor in new.items():
                tensor.grad = weights[name].grad
            if stage_optimizer is not None:
                stage_optimizer.step()
            versions.append(_copies(new))
    return Recurrence(losses, {name: t.detach() for weights in latest for name, t in weights.items()})


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in weights.items()}


def _run(model: nn.Module, loss: Tensor, output: Any) -> Run:
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Run(loss.detach().clone(), tree_map(lambda t: t.detach().clone(), output), gradients, buffers)


def _items(tree: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    return list(enumerate(tree)) if isinstance(tree, list | tuple) else None


def _same_trees(what: str, actual: Any, expected: Any, exact: bool) -> None:
    got, wanted = list(leaves(actual)), list(leaves(expected))
    assert [path for path, _ in got] == [path for path, _ in wanted], f"{what}: {got} instead of {wanted}"
    for (path, a), (_, b) in zip(got, wanted, strict=True):
        _same(f"{what}{path}", a, b, exact)


def _same(what: str, actual: Any, expected: Any, exact: bool) -> None:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        assert type(actual) is type(expected), f"{what}: {actual} instead of {expected}"
        assert actual == expected, f"{what}: {actual} instead of {expected}"
        return
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda message: f"{what}: {message}")
