"""One step of a split model, and the same step of the unsplit model, each as numbers by name.

The unsplit model is the model's own forward on its own parameters, run on the whole batch. Gradients gather in
``.grad``, which is as before at the end. What a pipeline does otherwise on purpose is done to the unsplit model too, so
that both can be compared on the whole batch: batch normalisation takes the statistics of each microbatch,
and random functions draw the same numbers for every row. Where a pipeline still differs by nature from the unsplit
model on the whole batch (``apart``), the unsplit model runs the microbatches one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from pipecompile import steps
from pipecompile.batching import SHARED, Batched, Kind, Rows, by_shape, gather, scatter
from pipecompile.capture import Call, Captured, Output
from pipecompile.capture.attributes import NOT_PLAIN, TORCHS_OWN, frozen
from pipecompile.capture.containers import contents, is_same, kind_of
from pipecompile.capture.origin import origin_of
from pipecompile.capture.owners import names_of
from pipecompile.capture.purity import is_random
from pipecompile.capture.reach import Reach, reach_of
from pipecompile.capture.state import named_tensors, without_caches
from pipecompile.capture.trees import flatten
from pipecompile.capture.undo import left_as_before
from pipecompile.comparison import Run
from pipecompile.compiled import find_loss
from pipecompile.functions import add_moments, moments
from pipecompile.plan import Plan
from pipecompile.program import Program
from pipecompile.row_draws import draws_by_row
from pipecompile.session import Session

SEED = 0  # of the gradients that outputs are given


@dataclass(frozen=True)
class Trial:
    """A call that both models are to make.

    Attributes:
        loss_fn: what the model's output and ``target=`` are given to, where the user has said it.
        loss: the name of the output that is the loss, where the user has said it.
        trains: whether gradients are wanted.
        deferred: whether running statistics are moved by the whole batch (``batch_norm="deferred"``).
        mixes: whether the user lets modules mix the samples of each microbatch.
        out_dims: along which dimension outputs are joined, where the user has said it.
        reach: what the model may read and change besides its arguments, where it has been found before.
    """

    model: nn.Module
    batch: steps.Batch
    schedule: Callable[[Plan, int], Program]
    devices: tuple[torch.device, ...]
    loss_fn: Callable[..., Any] | None = None
    loss: str | None = None
    trains: bool = True
    deferred: bool = False
    mixes: bool = False
    out_dims: Mapping[str, int | None] = field(default_factory=dict)
    reach: Reach | None = None

    @property
    def captured(self) -> Captured:
        return self.batch.compiled.captured

    @property
    def rows(self) -> Rows:
        return self.batch.rows

    @property
    def tensors(self) -> list[Tensor]:
        """What gradients are asked for: trainable parameters, then inputs that want one."""
        inputs = [tensor for tensor in self.batch.call.tensors.values() if tensor.requires_grad]
        return [*(p for p in self.model.parameters() if p.requires_grad), *inputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The unsplit model, and the loss function."""
        if self.loss_fn is None:
            return self.model(*args, **kwargs)
        target = kwargs.pop("target")
        return self.loss_fn(self.model(*args, **kwargs), target)

    @property
    def loss_output(self) -> int | None:
        """The position of the loss among the outputs' tensors."""
        return find_loss(self.captured, self.loss) if self.trains else None

    def fresh(self) -> Trial:
        """The same on copies of the inputs, which a run may write to."""
        return replace(self, batch=replace(self.batch, call=copied(self.batch.call), tensors={}))


def copied(call: Call, rows: int | None = None) -> Call:
    """A call on copies of its tensors, or of their first rows; those that want a gradient are leaves."""

    def copy(name: str, tensor: Tensor) -> Tensor:
        part = tensor if rows is None or name not in call.batched else tensor[:rows]
        return part.detach().clone().requires_grad_(tensor.requires_grad)

    with torch.inference_mode(False):
        tensors = {name: copy(name, tensor) for name, tensor in call.tensors.items()}
    return replace(call, tensors=tensors, batch=call.batch if rows is None or call.batch is None else rows)


def apart(trial: Trial) -> str:
    """What of a model comes out otherwise on microbatches by its nature; empty if nothing does."""
    if len(trial.rows) == 1:
        return ""
    if trial.mixes:
        return "modules mix the samples of each microbatch, as asked"
    nodes = list(trial.batch.division.body.graph.nodes)
    if any(is_random(node) and not draws_by_row(node.target) for node in nodes):
        return "it draws random numbers"
    written = sorted({name for node in nodes for name in origin_of(node).writes if not _is_normalisation(node)})
    if written:
        return f"it writes buffer {written[0]!r}"
    leaves = trial.captured.leaves
    return f"module {next(iter(leaves))!r} is kept whole" if leaves and trial.model.training else ""


def incomparable(trial: Trial) -> str:
    """Why no run of the unsplit model draws the random numbers that a pipeline draws; empty if one does."""
    for node in trial.captured.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and is_random(node):
            return f"{origin_of(node)}: it draws random numbers inside torch.vmap or a custom operator"
    return ""


def _is_normalisation(node: torch.fx.Node) -> bool:
    return node.target in (F.batch_norm, torch.batch_norm, add_moments, moments)


def split_step(trial: Trial) -> tuple[Run, dict[int, Tensor]]:
    """The pipeline's step, on a session of its own, and the gradients that its outputs were given, by position.

    The model is left as it was.
    """
    batch, tensors = trial.batch, trial.tensors
    drawn = batch.division.whole.attributes.tried()
    with drawn, _observed(trial) as seen, closing(Session(trial.devices, None)) as session:
        with torch.set_grad_enabled(trial.trains):
            out = steps.run(session, batch, trial.loss_output, trial.schedule)
            leaves = leaves_of(out)
            seeds = _seeds(trial, leaves)
            found = _gradients(tensors, leaves, seeds)
        batch.leave()
    return _run(trial, out, leaves, found, seen), seeds


def unsplit_step(
    trial: Trial, rows: Rows, seeds: Mapping[int, Tensor] | None, device: torch.device | None = None
) -> Run:
    """The model's own step on the parts of a batch, one after the other. The model is left as it was.

    Args:
        rows: of each part; a single one is the whole batch.
        seeds: gradients of the outputs, by position; None: those that a split step would give.
        device: where to run it; by default where the first of its tensors is.
    """
    batch, outputs, tensors = trial.batch, trial.captured.outputs, trial.tensors
    starts = {i: _spread(_kind(trial, outputs[i]), seed, rows) for i, seed in (seeds or {}).items()}
    gathered: list[list[Any]] = []
    found: list[Tensor | None] = [None] * len(tensors)
    with _observed(trial) as seen, without_caches(trial.model), torch.set_grad_enabled(trial.trains):
        forward = on_one_device(trial.model, trial.forward, device)
        for k, part in enumerate(scatter(batch.call, rows) if len(rows) > 1 else [batch.call.tensors]):
            args, kwargs = batch.call.rebuild(part if device is None else {n: t.to(device) for n, t in part.items()})
            with statistics_of(trial.rows if len(rows) == 1 else rows, trial.deferred):
                out = forward(*args, **kwargs)  # and the backward, where checkpoints run again
                leaves = leaves_of(out)
                given = {i: parts[k].to(leaves[i].device) for i, parts in starts.items()}
                new = _gradients(tensors, leaves, _seeds(trial, leaves) if seeds is None else given)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, new, strict=True)]
            gathered.append([leaf.detach() if isinstance(leaf, Tensor) and len(rows) > 1 else leaf for leaf in leaves])
    joined = gathered[0]
    if len(rows) > 1:
        pairs = zip(outputs, zip(*gathered, strict=True), strict=True)
        joined = [_joined(_kind(trial, output), parts, rows) for output, parts in pairs]
    return _run(trial, out, joined, found, seen)


def on_one_device(
    model: nn.Module, forward: Callable[..., Any], device: torch.device | None = None
) -> Callable[..., Any]:
    """The unsplit model on one device, by default that of its first tensor; those on others are copied there."""
    tensors = dict(named_tensors(model))
    if device is None:
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    moved = {f"model.{name}": t.to(device) for name, t in tensors.items() if t.device != device}
    if not moved:
        return forward
    whole = _Whole(model, forward)
    return lambda *args, **kwargs: functional_call(whole, moved, args, kwargs)


class _Whole(nn.Module):
    """A model, and what is called to run it."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def leaves_of(out: Any) -> list[Any]:
    """The leaves of an output."""
    return [leaf for _, leaf in flatten(out)[0]]


def _seeds(trial: Trial, leaves: Sequence[Any]) -> dict[int, Tensor]:
    """The gradients to give to outputs, by position: one to the loss, else drawn ones to all that take any."""
    if not trial.trains:
        return {}
    captured, loss = trial.captured, trial.loss_output
    positions = [i for i, output in enumerate(captured.outputs) if output.node is not None]
    if loss is not None:
        return {positions[loss]: torch.ones_like(leaves[positions[loss]])}
    generator = torch.Generator().manual_seed(SEED)
    wanted = [i for i in positions if captured.outputs[i].requires_grad]
    return {i: torch.randn(leaves[i].shape, generator=generator).to(leaves[i]) for i in wanted}


def _gradients(tensors: Sequence[Tensor], leaves: Sequence[Any], seeds: Mapping[int, Tensor]) -> list[Tensor | None]:
    """The gradient of each of some leaves."""
    starts = {i: seed for i, seed in seeds.items() if leaves[i].requires_grad}
    if not starts or not tensors:
        return [None] * len(tensors)
    with ExitStack() as stack:
        for kind in {tensor.device.type for tensor in tensors}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        roots = [leaves[i] for i in starts]
        # torch.autograd.grad would leave function modes, in which a checkpoint runs its forward once more, and is
        # refused by reentrant checkpoints; so gradients gather in the leaves
        _engine_run_backward(
            tuple(roots), tuple(starts.values()), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def _kind(trial: Trial, output: Output) -> Kind:
    """How the parts of an output are joined: as the user has said, or by their shape."""
    if output.name in trial.out_dims:
        dim = trial.out_dims[output.name]
        return SHARED if dim is None else Batched(dim)
    return by_shape(output)


def _joined(kind: Kind, parts: Sequence[Any], rows: Rows) -> Any:
    return gather(kind, parts, rows) if isinstance(parts[0], Tensor) else parts[0]


def _spread(kind: Kind, gradient: Tensor, rows: Rows) -> list[Tensor]:
    """Each part's share of an output's gradient."""
    if len(rows) == 1:
        return [gradient]
    if not isinstance(kind, Batched):
        return [gradient * weight for weight in rows.weights]
    entries = gradient.shape[kind.dim] // sum(rows.counts)
    return list(torch.split(gradient, [count * entries for count in rows.counts], kind.dim))


# Batch normalisation, as a pipeline does it


def statistics_of(rows: Rows, deferred: bool = False) -> TorchFunctionMode:
    """In which batch normalisation of the whole batch is by the statistics of its microbatches, as GPipe has it.

    Args:
        deferred: running statistics are moved once, by those of all rows.
    """
    return _MicrobatchStatistics(rows.counts, deferred)


class _MicrobatchStatistics(TorchFunctionMode):
    def __init__(self, counts: Sequence[int], deferred: bool) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm or len(self.counts) < 2:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, rows = given.pop("input"), sum(self.counts)
        if not given.get("training", False) or x.shape[0] % rows:
            return func(*args, **kwargs)
        if self.deferred:
            with torch.no_grad():
                func(x.detach(), **given)
            given["running_mean"] = given["running_var"] = None
        parts = torch.split(x, [count * (x.shape[0] // rows) for count in self.counts])
        return torch.cat([func(part, **given) for part in parts])


# What a step leaves behind


@dataclass
class _Seen:
    """What a step has changed of its model, taken before all is put back."""

    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]
    attributes: dict[str, Any]


@contextmanager
def _observed(trial: Trial) -> Iterator[_Seen]:
    """Notes what a step changes of a model and of what the model reaches, then puts everything back."""
    seen, model = _Seen({}, {}, {}), trial.model
    functions = [] if trial.loss_fn is None else [trial.loss_fn]
    reach = trial.reach or reach_of(model, functions)
    before = [(label, owner, names, names_of(owner, names)) for owner, label, names in reach.owners]
    tables = {id(vars(module).get(name)) for module in model.modules() for name in TORCHS_OWN}
    containers = [(holder, label, contents(holder)) for holder, label in reach.containers if id(holder) not in tables]
    weights = {name: (p, p.data, p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with left_as_before(model, functions, reach=reach):
        try:
            for p, *_ in weights.values():
                p.grad = None  # a backward inside the model may add to it
            yield seen
            seen.buffers.update({name: b.detach().clone() for name, b in model.named_buffers()})
            for name, (p, memory, value, _) in weights.items():
                if p.data_ptr() != memory.data_ptr() or not _same(p.detach(), value):
                    seen.parameters[name] = p.detach().clone()
                if p.requires_grad != trained[name]:
                    seen.attributes[f"{name}.requires_grad"] = p.requires_grad
            for label, owner, names, state in before:
                seen.attributes.update(_changes(label, names_of(owner, names), state))
            for holder, label, items in containers:
                if not is_same(contents(holder), items):
                    seen.attributes.update(_comparable(label, holder))
        finally:
            for name, (p, memory, value, gradient) in weights.items():
                p.requires_grad_(trained[name])
                if p.data_ptr() != memory.data_ptr():
                    p.data = memory
                if not _same(p.detach(), value):
                    p.data.copy_(value)
                p.grad = gradient


def _changes(label: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The attributes of one owner that have been set; what torch keeps for itself is compared elsewhere."""
    for name, value in now.items():
        if name not in TORCHS_OWN and (name not in before or not _is_as_before(value, before[name])):
            yield from _comparable(f"{label}.{name}" if label else name, value)
    for name in before.keys() - now.keys():
        yield f"{label}.{name}" if label else name, "deleted"


def _is_as_before(value: Any, before: Any) -> bool:
    """Whether an attribute holds the same object, or a container with the same contents."""
    if value is before:
        return True
    return type(value) is type(before) and kind_of(value) is not None and is_same(contents(value), contents(before))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _comparable(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values and tensors in an attribute, by name; other objects are left out."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        name = label + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield name, leaf.detach().clone()
        elif frozen(leaf) is not NOT_PLAIN:
            yield name, leaf


def _run(trial: Trial, out: Any, leaves: Sequence[Any], found: Sequence[Tensor | None], seen: _Seen) -> Run:
    outputs = trial.captured.outputs
    known = len(outputs) == len(leaves)
    names = [output.name or "output" for output in outputs] if known else [str(i) for i in range(len(leaves))]
    trained = [name for name, p in trial.model.named_parameters() if p.requires_grad]
    wanting = [name for name, tensor in trial.batch.call.tensors.items() if tensor.requires_grad]
    named = dict(zip(names, leaves, strict=True))
    return Run(
        {name: leaf.detach() if isinstance(leaf, Tensor) else leaf for name, leaf in named.items()},
        dict(zip(trained, found, strict=False)),
        dict(zip(wanting, found[len(trained) :], strict=True)),
        seen.buffers,
        seen.parameters,
        seen.attributes,
        structure=flatten(out)[1],
        wanting=frozenset(name for name, leaf in named.items() if isinstance(leaf, Tensor) and leaf.requires_grad),
    )
