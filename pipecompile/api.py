"""``compile`` and ``Pipeline``: a split model that is called like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.batch import Rows, joined, scatter, spread
from pipecompile.capture import Call, read_call
from pipecompile.compiled import Compiled, compile_call, describe, find_loss, modes, parse_devices
from pipecompile.errors import CaptureError, ExecutionError, InputError, PipecompileError
from pipecompile.plan import Plan
from pipecompile.profile import How
from pipecompile.program import Instruction, Program
from pipecompile.runtime import Ambient, Executor, Lane, LocalTransport, MakeOptimizer, Microbatch, Runner, Weights
from pipecompile.runtime.delivery import Deferred, Delivered, Gradients
from pipecompile.schedule import ASYNCHRONOUS, SCHEDULES, backward_only, carried_after, drain, forward_only, pipedream
from pipecompile.timeline import Timeline


def compile(
    model: nn.Module,
    devices: Sequence[torch.device | str | int],
    *,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | Mapping[str, Any] | Sequence[Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    loss: str | None = None,
    optimizer: MakeOptimizer | None = None,
    profile: How | None = None,
) -> Pipeline:
    """A pipeline that trains ``model`` split over ``devices``, and is called as the model is.

    Args:
        devices: one for each stage: ``["cuda:0", "cuda:1"]``, ``[0, 1]``, ``["cpu", "cpu"]``; a device may stand twice.
        schedule: "sequential", "gpipe", "1f1b" (with a flush) or "pipedream" (asynchronous).
        microbatches: parts of each batch; by default two for each stage. A batch with fewer rows has fewer parts.
        example_inputs: arguments of a call, ``(args, kwargs)`` or either alone; captures now, not at the first call.
        loss_fn: ``loss_fn(output, target)``, run in the last stage; the pipeline is then called with ``target=``
            beside the model's own arguments and returns what ``loss_fn`` returns.
        loss: the name of the output that is the loss, where it is not called "loss" and not the only single number.
        optimizer: for "pipedream", which steps inside the pipeline: makes an optimizer from a stage's parameters.
        profile: "measure" or "count" the costs; by default measured on the first device.

    Raises:
        InputError: a device is not there, or arguments do not fit together.
        CaptureError, PlanError: with ``example_inputs``, as the first call would raise them.
    """
    pipeline = Pipeline(model, devices, schedule, microbatches, loss_fn, loss, optimizer, profile)
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        pipeline.prepare(*args, **kwargs)
    return pipeline


class Pipeline(nn.Module):
    """A model cut into stages; parameters, buffers and their names are the model's own.

    Attributes:
        model: the unsplit model, whose parameters these are.
        program, timeline: what the last call carried out, and when.
    """

    def __init__(
        self,
        model: nn.Module,
        devices: Sequence[torch.device | str | int],
        schedule: str,
        microbatches: int | None,
        loss_fn: Callable[..., Any] | None,
        loss: str | None,
        optimizer: MakeOptimizer | None,
        profile: How | None,
    ) -> None:
        super().__init__()
        _check_options(schedule, microbatches, optimizer)
        self.__dict__["model"] = model  # not a submodule: names would change
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.training = model.training
        self.devices = parse_devices(devices)
        self.schedule = schedule
        self.microbatches = microbatches or 2 * len(self.devices)
        self.loss = loss
        self._profile = profile
        self._loss_fn = loss_fn
        self._forward = None if loss_fn is None else _with_loss(model, loss_fn)
        self._make_optimizer = optimizer
        self._lanes = tuple(Lane(device) for device in self.devices)
        self._weights: list[Weights] = []
        self._compiled: dict[Any, list[Compiled]] = {}
        self._executors: dict[int, Executor] = {}
        self._batched: dict[str, bool] = {}
        self._first: Compiled | None = None
        self._last: Compiled | None = None
        self._stream = _Stream()
        self.program: Program | None = None
        self.timeline: Timeline | None = None

    # What the pipeline is

    @property
    def plan(self) -> Plan:
        """The assignment of nodes to stages; there is one once the model is captured."""
        return self._captured.plan

    @property
    def stages(self) -> tuple[torch.fx.GraphModule, ...]:
        """The stage modules; ``stages[i].code`` is Python, their parameters have the model's own names."""
        return tuple(stage.module for stage in self._captured.stages)

    @property
    def predicted(self) -> Timeline:
        """What the last program, or else the schedule's, takes by the profile."""
        compiled = self._captured
        return compiled.predict(self.program or self._training_program(compiled, self.microbatches))

    @property
    def report(self) -> Mapping[str, Sequence[str]]:
        """What is specialised, recomputed or otherwise worth knowing, by topic."""
        return describe(self._captured)

    @property
    def captures(self) -> int:
        """How many times the model has been captured."""
        return sum(map(len, self._compiled.values()))

    @property
    def versions(self) -> tuple[int, ...]:
        """For each stage the largest number of weight versions that were alive at once."""
        return tuple(weights.peak for weights in self._weights)

    @property
    def _captured(self) -> Compiled:
        compiled = self._last or self._first
        if compiled is None:
            raise PipecompileError(
                "the model is captured at the first call; call it, or pass example_inputs= to compile"
            )
        return compiled

    # Calls

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures, profiles and cuts the model for a call without running it."""
        self._compile(self._read(args, kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._read(args, kwargs)
        compiled, rows = self._compile(call)
        if any(p.is_meta for p in self.model.parameters()):
            raise InputError("the model is on the meta device: it can be planned, but has no values to compute with")
        loss = find_loss(compiled.captured, self.loss)
        if not torch.is_grad_enabled() or not _wants_gradient(compiled):
            return self._evaluate(compiled, call, rows)
        if self.schedule in ASYNCHRONOUS and self.training:
            return self._train_asynchronously(compiled, call, rows, loss)
        if loss is None:
            return self._train_from_outside(compiled, call, rows)
        return self._train(compiled, call, rows, loss)

    def flush(self) -> None:
        """Drains an asynchronous pipeline: every microbatch that is under way ends with its update."""
        stream = self._stream
        if stream.compiled is not None and stream.carried:
            program = stream.compiled.lowered(drain(stream.compiled.plan, stream.carried))
            self._run(stream.compiled, program, stream.microbatches)
        stream.clear()

    def train(self, mode: bool = True) -> Pipeline:
        super().train(mode)
        self.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """What the pipeline lacks is the model's: ``pipe.config``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["model"], name)

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        forward = self.model.forward if self._loss_fn is None else _signature_with_target(self.model.forward)
        call = read_call(forward, args, kwargs, self._batched)
        self._batched.update({name: name in call.batched for name in call.tensors if name not in self._batched})
        return call

    def _compile(self, call: Call) -> tuple[Compiled, Rows]:
        """The capture that a call runs on, made if there is none, and its microbatches."""
        rows = Rows.of(call.batch, self.microbatches)
        known = self._compiled.setdefault((call.key, modes(self.model)), [])
        for candidate in (rows, _equal(rows)):
            for compiled in known:
                if _holds(compiled, call, candidate):
                    self._last = compiled
                    return compiled, candidate
        compiled = self._capture(call, rows)
        if not _holds(compiled, call, rows):  # the trace holds for one size: make all microbatches that size
            rows = _equal(rows)
            compiled = self._capture(call, rows)
            if not _holds(compiled, call, rows):
                raise CaptureError("the trace does not hold for the inputs that it was made with; please report this")
        known.append(compiled)
        self._first = self._first or compiled
        self._last = compiled
        return compiled, rows

    def _capture(self, call: Call, rows: Rows) -> Compiled:
        compiled = compile_call(self.model, call, rows, self.devices, self._forward, self._profile, self._first)
        if not self._weights and not any(p.is_meta for p in self.model.parameters()):
            self._weights = [
                Weights(compiled.tensors(stage.index), stage.device, self._make_optimizer) for stage in compiled.stages
            ]
        return compiled

    def _executor(self, compiled: Compiled) -> Executor:
        if id(compiled) not in self._executors:
            stages = zip(compiled.stages, self._weights, compiled.plan.rank_of, strict=True)
            runners = [Runner(stage, weights, self._lanes[rank]) for stage, weights, rank in stages]
            transport = LocalTransport(self._lanes, compiled.plan.rank_of)
            self._executors[id(compiled)] = Executor(compiled.plan, runners, self._lanes, transport)
        return self._executors[id(compiled)]

    def _run(self, compiled: Compiled, program: Program, microbatches: Mapping[int, Microbatch]) -> None:
        ambient = Ambient.of_caller(frozenset(device.type for device in self.devices))
        self.program = program
        self.timeline = self._executor(compiled).run(program, microbatches, ambient)

    def _begin(self, compiled: Compiled) -> None:
        for stage, weights in enumerate(self._weights):
            weights.begin(compiled.tensors(stage))

    # Kinds of call

    def _evaluate(self, compiled: Compiled, call: Call, rows: Rows) -> Any:
        """Forwards alone."""
        if self.schedule not in ASYNCHRONOUS:
            self._begin(compiled)
        program = compiled.program(lambda plan: forward_only(plan, len(rows)), ("forward", len(rows)))
        microbatches = dict(enumerate(map(Microbatch, scatter(call, rows))))
        self._run(compiled, program, microbatches)
        return compiled.captured.rebuild_output(self._join(compiled, microbatches, rows))

    def _train(self, compiled: Compiled, call: Call, rows: Rows, loss: int) -> Any:
        """The whole schedule; ``loss.backward()`` delivers the gradients."""
        self._begin(compiled)
        outputs = [o for o in compiled.captured.outputs if o.node is not None]
        seed_of = outputs[loss].node
        parts = scatter(call, rows)
        microbatches = {
            i: Microbatch(part, {str(seed_of): weight})
            for i, (part, weight) in enumerate(zip(parts, rows.weights, strict=True))
        }
        self._run(compiled, self._training_program(compiled, len(rows)), microbatches)
        values = self._join(compiled, microbatches, rows)
        gradients = self._gradients(call, microbatches)
        tensors = [values[str(o.node)] for o in outputs]
        delivered = Delivered.apply([gradients], loss, len(tensors), *tensors, *self._leaves(call))  # type: ignore[no-untyped-call]
        return compiled.captured.rebuild_output(
            {str(o.node): tensor for o, tensor in zip(outputs, delivered, strict=True)}
        )

    def _train_from_outside(self, compiled: Compiled, call: Call, rows: Rows) -> Any:
        """Forwards now, backwards when the caller's own loss sends gradients."""
        self._begin(compiled)
        outputs = [o for o in compiled.captured.outputs if o.node is not None]
        microbatches = dict(enumerate(map(Microbatch, scatter(call, rows))))
        program = compiled.program(lambda plan: forward_only(plan, len(rows)), ("forward", len(rows)))
        self._run(compiled, program, microbatches)
        values = self._join(compiled, microbatches, rows)
        leaves = self._leaves(call)

        def backward(incoming: Sequence[Tensor | None]) -> Gradients:
            if not all(m.saved for m in microbatches.values()):
                raise ExecutionError(
                    "backward() was called a second time on one call of the pipeline; call the pipeline again "
                    "(retain_graph= cannot help)"
                )
            for output, gradient in zip(outputs, incoming, strict=True):
                if gradient is not None:
                    for microbatch, part in zip(microbatches.values(), spread(output, gradient, rows), strict=True):
                        microbatch.seeds = {**microbatch.seeds, str(output.node): part}
            with torch.enable_grad():
                halves = compiled.program(lambda plan: backward_only(plan, len(rows)), ("backward", len(rows)))
                self._run(compiled, halves, microbatches)
            return self._gradients(call, microbatches)

        tensors = [values[str(o.node)] for o in outputs]
        deferred = Deferred.apply(backward, len(tensors), *tensors, *leaves)  # type: ignore[no-untyped-call]
        return compiled.captured.rebuild_output(
            {str(o.node): tensor for o, tensor in zip(outputs, deferred, strict=True)}
        )

    def _train_asynchronously(self, compiled: Compiled, call: Call, rows: Rows, loss: int | None) -> Any:
        """The next segment of the stream: each microbatch is a minibatch with its own update."""
        if loss is None:
            raise InputError(f"schedule={self.schedule!r} needs the loss inside: pass labels to the model, or loss_fn=")
        stream = self._stream
        if stream.compiled is not compiled:
            self.flush()
            stream.compiled = compiled
        outputs = [o for o in compiled.captured.outputs if o.node is not None]
        first = stream.next
        new = {
            first + i: Microbatch(part, {str(outputs[loss].node): 1.0}) for i, part in enumerate(scatter(call, rows))
        }
        stream.microbatches.update(new)
        program = compiled.lowered(pipedream(compiled.plan, range(first, first + len(new)), stream.carried))
        try:
            self._run(compiled, program, stream.microbatches)
        except BaseException:
            stream.clear()
            raise
        stream.advance(program, len(new))
        return compiled.captured.rebuild_output(self._join(compiled, new, rows))

    def _training_program(self, compiled: Compiled, count: int) -> Program:
        if self.schedule in ASYNCHRONOUS:
            return compiled.program(lambda plan: pipedream(plan, range(count)), ("train", count))
        return compiled.program(lambda plan: SCHEDULES[self.schedule](plan, count), ("train", count))

    def _join(self, compiled: Compiled, microbatches: Mapping[int, Microbatch], rows: Rows) -> dict[str, Tensor]:
        return joined(compiled.captured.outputs, [m.outputs for m in microbatches.values()], rows)

    # Gradients

    def _leaves(self, call: Call) -> list[Tensor]:
        """What gradients are delivered to: trainable parameters, then inputs that want one."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return [*parameters, *(t for t in call.tensors.values() if t.requires_grad)]

    def _gradients(self, call: Call, microbatches: Mapping[int, Microbatch]) -> Gradients:
        """The gradients of ``_leaves`` after a program has run."""
        found: dict[int, Tensor] = {}
        versions = next(iter(microbatches.values())).versions
        for stage, weights in enumerate(self._weights):
            for name, leaf in versions[stage].leaves.items() if stage in versions else ():
                parameter = weights.tensors[name]
                if leaf.grad is not None:
                    gradient = leaf.grad.to(parameter.device)
                    found[id(parameter)] = found[id(parameter)] + gradient if id(parameter) in found else gradient
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients: Gradients = [found.get(id(parameter)) for parameter in parameters]
        for name, tensor in call.tensors.items():
            if tensor.requires_grad:
                gradients.append(_input_gradient(tensor, name, call, microbatches))
        return gradients


class _Stream:
    """The endless stream of an asynchronous schedule between two calls."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.compiled: Compiled | None = None
        self.next = 0
        self.carried: frozenset[Instruction] = frozenset()
        self.microbatches: dict[int, Microbatch] = {}

    def advance(self, program: Program, count: int) -> None:
        """Notes that a segment has run; microbatches that have ended are forgotten."""
        self.carried = carried_after(program)
        self.next += count
        self.microbatches = {n: m for n, m in self.microbatches.items() if m.saved}


def _input_gradient(tensor: Tensor, name: str, call: Call, microbatches: Mapping[int, Microbatch]) -> Tensor | None:
    parts = [sum(g) if (g := m.input_gradients.get(name)) else None for m in microbatches.values()]
    if all(part is None for part in parts):
        return None
    filled = [
        torch.zeros_like(m.inputs[name]) if p is None else p for m, p in zip(microbatches.values(), parts, strict=True)
    ]
    gradients = [torch.as_tensor(part, device=tensor.device) for part in filled]
    return torch.cat(gradients) if name in call.batched else sum(gradients[1:], gradients[0])


def _holds(compiled: Compiled, call: Call, rows: Rows) -> bool:
    """Whether a capture holds for every microbatch of a call."""
    sizes = dict(zip(rows.counts, scatter(call, rows), strict=True))
    return not any(compiled.captured.broken_guard(part, call.tensors) for part in sizes.values())


def _equal(rows: Rows) -> Rows:
    """As many microbatches as there can be, no more than before, all of one size."""
    batch = sum(rows.counts)
    parts = next(parts for parts in range(len(rows), 0, -1) if batch % parts == 0)
    return Rows((batch // parts,) * parts)


def _wants_gradient(compiled: Compiled) -> bool:
    return any(output.requires_grad for output in compiled.captured.outputs)


def _check_options(schedule: str, microbatches: int | None, optimizer: MakeOptimizer | None) -> None:
    names = [*SCHEDULES, *ASYNCHRONOUS]
    if schedule not in names:
        raise InputError(f"schedule={schedule!r} is not known; there are {', '.join(names)}")
    if microbatches is not None and (not isinstance(microbatches, int) or microbatches < 1):
        raise InputError(f"microbatches={microbatches!r}: a batch is cut into a whole number of parts, at least one")
    if schedule in ASYNCHRONOUS and optimizer is None:
        raise InputError(
            f"schedule={schedule!r} steps inside the pipeline; "
            f"pass optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    if schedule not in ASYNCHRONOUS and optimizer is not None:
        raise InputError(
            f"schedule={schedule!r} leaves stepping to you: make an optimizer of pipe.parameters() instead"
        )


def _arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    if len(example) == 2 and isinstance(example[0], list | tuple) and isinstance(example[1], Mapping):
        return example[0], example[1]
    return (example,) if isinstance(example, Tensor) else example, {}


def _with_loss(model: nn.Module, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, target: Any, **kwargs: Any) -> Any:
        return loss_fn(model(*args, **kwargs), target)

    return forward


def _signature_with_target(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Something with the model's signature and a keyword ``target`` beside it."""
    import inspect

    signature = inspect.signature(forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    target = inspect.Parameter("target", inspect.Parameter.KEYWORD_ONLY)

    def described() -> None: ...

    described.__signature__ = signature.replace(parameters=[*parameters, target, *rest])  # type: ignore[attr-defined]
    return described
