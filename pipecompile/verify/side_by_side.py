"""One step of a split model, and the same step of the unsplit model, each as values by name.

The unsplit model is the model's own forward on its own parameters, run on the whole batch. Gradients accumulate in
``.grad``, which is restored at the end. Where a pipeline differs on purpose, the unsplit model is changed in the same
way, so that both can be compared on the whole batch: batch normalization uses the statistics of each microbatch, and
random functions draw the same numbers for every row. Where a pipeline still differs by nature (``apart``), the unsplit
model runs the microbatches one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipecompile.batching import Kind, Rows, gather, scatter
from pipecompile.capture import Call, Captured
from pipecompile.capture.loss import find_loss
from pipecompile.capture.origin import origin_of
from pipecompile.capture.purity import is_random
from pipecompile.capture.pytrees import flatten
from pipecompile.capture.state.model_state import without_caches
from pipecompile.capture.state.reachable import Generator, Reach, reach_of
from pipecompile.ir.batching_options import DEFAULT_BATCHING, Batching
from pipecompile.ops.functional import add_moments, moments
from pipecompile.ops.module_tree import called_bare
from pipecompile.ops.row_draws import draws_by_row
from pipecompile.ops.torch_internals import (
    DisableTorchFunction,
    OpOverload,
    _engine_run_backward,
)
from pipecompile.runtime import steps
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.session import Session
from pipecompile.schedule import MakeProgram
from pipecompile.verify.comparison import Run
from pipecompile.verify.joined_parts import Seed, kind_of, unjoinable
from pipecompile.verify.microbatch_statistics import statistics_of
from pipecompile.verify.observed import Seen, observed
from pipecompile.verify.one_device import on_one_device

SEED = 0  # for the grad_outputs

Name = (
    int | str
)  # of a tensor that is given a gradient: the position of an output, or the place of a tensor left in the model
Seeds = dict[Name, Tensor]


@dataclass(frozen=True)
class Trial:
    """A call for both models.

    Attributes:
        loss_fn: the user's loss function of the model's output and ``target=``, if any.
        loss: the name of the output that is the loss, if the user named it.
        trains: whether to compute gradients.
        batching: what the user says about the batch dimension.
        reach: what the model may read and change besides its arguments, if already known.
    """

    model: nn.Module
    batch: Batch
    schedule: MakeProgram
    devices: tuple[torch.device, ...]
    loss_fn: Callable[..., Any] | None = None
    loss: str | None = None
    trains: bool = True
    batching: Batching = DEFAULT_BATCHING
    reach: Reach | None = None

    @property
    def captured(self) -> Captured:
        return self.batch.compiled.captured

    @property
    def rows(self) -> Rows:
        return self.batch.rows

    @property
    def generators(self) -> Sequence[Generator]:
        """The model's own random number generators."""
        return () if self.reach is None else self.reach.generators

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors whose gradients are compared: trainable parameters, then inputs that require a gradient."""
        inputs = [tensor for tensor in self.batch.call.tensors.values() if tensor.requires_grad]
        return [*(p for p in self.model.parameters() if p.requires_grad), *inputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the unsplit model, then the loss function, if any; what torch.compile has compiled runs as Python."""
        with torch.compiler.set_stance("force_eager"):
            if self.loss_fn is None:
                return called_bare(self.model, *args, **kwargs)
            target = kwargs.pop("target")
            return self.loss_fn(self.model(*args, **kwargs), target)

    @property
    def loss_output(self) -> int | None:
        """The position of the loss among the outputs' tensors, if any."""
        return find_loss(self.captured, self.loss) if self.trains else None

    def fresh(self) -> Trial:
        """The trial on copies of the inputs, which a run may write to."""
        return replace(self, batch=replace(self.batch, call=copied(self.batch.call)))


def copied(call: Call, rows: int | None = None) -> Call:
    """A call on copies of its tensors, or of their first rows; copies that require a gradient are leaves."""

    def copy(name: str, tensor: Tensor) -> Tensor:
        part = tensor if rows is None or name not in call.batched else tensor[:rows]
        return part.detach().clone().requires_grad_(tensor.requires_grad)

    with torch.inference_mode(False):
        tensors = {name: copy(name, tensor) for name, tensor in call.tensors.items()}
    return replace(call, tensors=tensors, batch=call.batch if rows is None or call.batch is None else rows)


def apart(trial: Trial) -> str:
    """Why a model gives other results on microbatches by its nature; empty if it does not."""
    if len(trial.rows) == 1:
        return ""
    if trial.batching.may_mix:
        return "modules mix the samples of each microbatch, as its options allow"
    nodes = list(trial.batch.division.body.graph.nodes)
    if any(is_random(node) and not draws_by_row(node.target) for node in nodes):
        return "the model draws random numbers"
    written = sorted({name for node in nodes for name in origin_of(node).writes if not _is_normalisation(node)})
    if written:
        return f"the model writes buffer {written[0]!r}"
    if trial.batch.division.norms_apart:  # in the whole batch, a microbatch's entries are not next to each other
        return "it normalizes several views of each sample together"
    leaves = [origin_of(node).path for node in nodes if node.op == "call_module"]
    return f"module {leaves[0]!r} is kept whole as a leaf" if leaves and trial.model.training else ""


def only_together(trial: Trial) -> str:
    """Why the unsplit model cannot run the microbatches one by one; empty if it can."""
    if trial.batch.sees_the_whole:
        return "the loss needs the whole batch"
    return unjoinable(trial.batch, trial.captured.outputs, trial.batching)


def incomparable(trial: Trial) -> str:
    """Why the unsplit model cannot draw the same random numbers as a pipeline; empty if it can."""
    for node in trial.captured.graph.nodes:
        if isinstance(node.target, OpOverload) and is_random(node):
            return f"{origin_of(node)}: random numbers are drawn inside torch.vmap or a custom operator"
    return ""


def _is_normalisation(node: torch.fx.Node) -> bool:
    return node.target in (F.batch_norm, torch.batch_norm, add_moments, moments)


def split_step(trial: Trial, left_too: bool = True) -> tuple[Run, Seeds]:
    """Runs the pipeline's step in a session of its own; returns it with the gradients given to its outputs.

    The model is restored.

    Args:
        left_too: whether tensors that the forward stores in the model are given gradients too.
    """
    batch, tensors = trial.batch, trial.tensors
    drawn = batch.division.whole.attributes.tried()
    with (
        drawn,
        _observed(trial) as seen,
        closing(Session(trial.devices, None)) as session,
        torch.set_grad_enabled(trial.trains),
    ):
        given = steps.run(session, batch, trial.loss_output, trial.schedule)
        out = trial.captured.rebuild_output(given, batch.call.tensors, dropped=torch.empty(0))
        leaves = leaves_of(out)
        batch.leave(given)
        own = set(map(id, given.values()))
        left = {name: tensor for name, tensor in seen.left().items() if left_too and id(tensor) in own}
        seeds = _seeds(trial, leaves, left)
        found = _gradients(tensors, _named(leaves, left), seeds)
    return _run(trial, tensors, out, leaves, found, seen, left), seeds


def unsplit_step(
    trial: Trial, rows: Rows, seeds: Seeds | None, device: torch.device | None = None, left_too: bool = True
) -> Run:
    """Runs the model's own step on the parts of a batch, one by one. The model is restored.

    Args:
        rows: the rows of each part; a single part is the whole batch.
        seeds: gradients of its outputs; None: those that a split step would give. Tensors stored in the model are
            given theirs on the whole batch only.
        device: the device to run on; by default that of its first tensor.
        left_too: whether tensors stored in the model are given gradients too.
    """
    batch, outputs, tensors = trial.batch, trial.captured.outputs, trial.tensors
    kinds = [kind_of(batch, output, trial.batching) for output in outputs]
    starts = {i: Seed(kinds[i], seed) for i, seed in (seeds or {}).items() if isinstance(i, int)}
    of_left = {name: seed for name, seed in (seeds or {}).items() if isinstance(name, str)}
    left: dict[str, Tensor] = {}
    gathered: list[list[Any]] = []
    found: list[Tensor | None] = [None] * len(tensors)
    with (
        _observed(trial) as seen,
        without_caches(trial.model, batch.call.has_cache),
        on_one_device(trial.model, device) as near,
        torch.set_grad_enabled(trial.trains),
    ):
        for k, part in enumerate(scatter(batch.call, rows) if len(rows) > 1 else [batch.call.tensors]):
            args, kwargs = batch.call.rebuild(near(part))
            counted = trial.rows if len(rows) == 1 else Rows(rows.counts[k : k + 1])
            with statistics_of(counted, trial.batching.batch_norm == "deferred"):
                out = trial.forward(
                    *args, **kwargs
                )  # the context also covers the backward, where checkpoints recompute
                leaves = leaves_of(out)
                left = seen.left() if left_too and len(rows) == 1 else {}
                given: Seeds = {i: seed.part(k, rows, leaves[i]) for i, seed in starts.items()}
                given |= {name: seed.to(left[name].device) for name, seed in of_left.items() if name in left}
                wanted = _seeds(trial, leaves, left) if seeds is None else given
                new = _gradients(tensors, _named(leaves, left), wanted)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, new, strict=True)]
            gathered.append([leaf.detach() if isinstance(leaf, Tensor) and len(rows) > 1 else leaf for leaf in leaves])
    joined = gathered[0]
    if len(rows) > 1:
        joined = [_joined(kind, parts, rows) for kind, parts in zip(kinds, zip(*gathered, strict=True), strict=True)]
    return _run(trial, tensors, out, joined, found, seen, left)


def _observed(trial: Trial) -> AbstractContextManager[Seen]:
    functions = [] if trial.loss_fn is None else [trial.loss_fn]
    return observed(trial.model, functions, trial.reach or reach_of(trial.model, functions))


def leaves_of(out: Any) -> list[Any]:
    """The leaves of an output's tree."""
    return [leaf for _, leaf in flatten(out)[0]]


def _named(leaves: Sequence[Any], left: Mapping[str, Tensor]) -> dict[Name, Any]:
    """The values that may be given a gradient: leaves of an output by position, tensors left in the model by place."""
    pairs: list[tuple[Name, Any]] = [*enumerate(leaves), *left.items()]
    return dict(pairs)


def _seeds(trial: Trial, leaves: Sequence[Any], left: Mapping[str, Tensor]) -> Seeds:
    """The gradients to give: of the loss, else random ones of all outputs that require one; and of tensors left.

    The loss is given 0.5, which is exact, so that a gradient which is not passed on shows; with float16 it is given 1,
    since another scale costs a rerun.
    """
    if not trial.trains:
        return {}
    captured, loss = trial.captured, trial.loss_output
    positions = [i for i, output in enumerate(captured.outputs) if output.node is not None]
    seeds: Seeds = {}
    wanted: dict[Name, Tensor] = {name: tensor for name, tensor in left.items() if tensor.requires_grad}
    if loss is not None:
        scale = 1.0 if trial.batch.compiled.in_float16 else 0.5
        seeds[positions[loss]] = torch.full_like(leaves[positions[loss]], scale)
    else:
        wanted |= {i: leaves[i] for i in positions if captured.outputs[i].requires_grad}
    generator = torch.Generator().manual_seed(SEED)
    with DisableTorchFunction():  # each row draws its own numbers, even if random functions draw alike
        drawn = {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in wanted.items()}
    return {**seeds, **drawn}


def _gradients(tensors: Sequence[Tensor], values: Mapping[Name, Any], seeds: Seeds) -> list[Tensor | None]:
    """The gradients of ``tensors``, from the gradients ``seeds`` of ``values``."""
    starts = {i: seed for i, seed in seeds.items() if values[i].requires_grad}
    if not starts or not tensors:
        return [None] * len(tensors)
    with ExitStack() as stack:
        for kind in {tensor.device.type for tensor in tensors}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        roots = [values[i] for i in starts]
        # torch.autograd.grad would leave the function modes that a checkpoint needs to recompute, and reentrant
        # checkpoints refuse it; so gradients accumulate in the leaves
        _engine_run_backward(
            tuple(roots), tuple(starts.values()), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def _joined(kind: Kind, parts: Sequence[Any], rows: Rows) -> Any:
    return gather(kind, parts, rows) if isinstance(parts[0], Tensor) else parts[0]


# The results of a step


def _run(
    trial: Trial,
    tensors: Sequence[Tensor],
    out: Any,
    leaves: Sequence[Any],
    found: Sequence[Tensor | None],
    seen: Seen,
    left: Mapping[str, Tensor],
) -> Run:
    outputs = trial.captured.outputs
    known = len(outputs) == len(leaves)
    names = [output.name or "output" for output in outputs] if known else [str(i) for i in range(len(leaves))]
    asked = set(map(id, tensors))  # taken before the run, which may set requires_grad
    trained = [name for name, p in trial.model.named_parameters() if id(p) in asked]
    wanting = [name for name, tensor in trial.batch.call.tensors.items() if id(tensor) in asked]
    dropped = {i for i, output in enumerate(outputs) if output.is_dropped and known}
    named = {name: leaf for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)) if i not in dropped}
    return Run(
        outputs={name: leaf.detach() if isinstance(leaf, Tensor) else leaf for name, leaf in named.items()},
        gradients=dict(zip(trained, found, strict=False)),
        input_gradients=dict(zip(wanting, found[len(trained) :], strict=True)),
        buffers=seen.buffers,
        parameters=seen.parameters,
        attributes=seen.attributes,
        structure=flatten(out)[1],
        wanting=frozenset(name for name, leaf in named.items() if isinstance(leaf, Tensor) and leaf.requires_grad),
        weights=dict(trial.model.named_parameters()),
        left={name: tensor.requires_grad for name, tensor in left.items()},
    )
