"""Trainings that use each feature of a pipeline, on any machine. Nothing is read from a device before the end.

A scene trains for a few steps and returns all that a user could then read, by name, on the CPU. On the CPU it does the
same with the unsplit model, or, where there is no such model (PipeDream), with a pipeline of CPU devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from machines import CPU, Machine
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toys import VOCABULARY, D, Tied, UNet

import pipecompile
from pipecompile import Batching, PlanOptions

ROWS, STEPS = 8, 3
Figures = dict[str, Tensor]
Scene = Callable[[Machine], Figures]
SCENES: dict[str, Scene] = {}
OWN_NUMBERS: set[str] = set()  # random numbers of a device are not the CPU's


def scene(function: Scene) -> Scene:
    SCENES[function.__name__] = function
    return function


class Net(nn.Module):
    """Four layers; the loss inside if there is a target."""

    def __init__(self, *between: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers = [[nn.Linear(D, D), nn.Tanh(), *(make() for make in between)] for _ in range(4)]
        self.layers = nn.Sequential(*(layer for group in layers for layer in group))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.head(self.layers(x))
        return out if y is None else F.mse_loss(out, y)


class WithLogits(Net):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.head(self.layers(x))
        return F.mse_loss(out, y), out


def floats(step: int, rows: int = ROWS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (D, 3))


def ids(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(VOCABULARY, (ROWS, 6), generator=generator) for _ in range(2))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def piped(model: nn.Module, machine: Machine, where: Sequence[int | str] = (0, 1), **options: Any) -> nn.Module:
    """The pipeline of a model on devices of a machine, by number or name; on the CPU, the model itself."""
    if machine is CPU and "optimizer" not in options:
        return model
    devices = [machine[place] if isinstance(place, int) else torch.device(place) for place in where]
    options = {"microbatches": 4, "costs": "count", **options}
    return pipecompile.compile(model, devices, **options)


def inside(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = pipe(x, y)
    loss.backward()
    return loss.detach()


def trained(
    model: nn.Module,
    pipe: nn.Module,
    step: Callable[..., Tensor] = inside,
    batches: Callable[[int], tuple[Tensor, ...]] = floats,
    optimizer: Callable[..., torch.optim.Optimizer] | None = torch.optim.Adam,
) -> Figures:
    """Trains a pipeline; returns losses, parameters, buffers and the last gradients."""
    stepper = None if optimizer is None else optimizer(pipe.parameters(), lr=1e-2)
    losses = []
    for number in range(STEPS):
        if stepper is not None:
            stepper.zero_grad()
        losses.append(step(pipe, *batches(number)))
        if stepper is not None:
            stepper.step()
    return figures(model, losses)


def figures(model: nn.Module, losses: Sequence[Tensor]) -> Figures:
    found: dict[str, Tensor | None] = {f"loss {number}": loss for number, loss in enumerate(losses)}
    for name, parameter in model.named_parameters():
        found |= {name: parameter, f"gradient of {name}": parameter.grad}
    found |= dict(model.named_buffers())
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def simple(name: str, make: Callable[[], nn.Module] = Net, random: bool = False, **options: Any) -> None:
    """A scene of a pipeline with options."""

    def run(machine: Machine) -> Figures:
        model = built(make)
        return trained(model, piped(model, machine, **options))

    SCENES[name] = run
    if random:
        OWN_NUMBERS.add(name)


simple("one_f_one_b")
simple("gpipe", schedule="gpipe")
simple("sequential", schedule="sequential")
simple("zero_bubble", schedule="zb-h1", where=(0, 1, 0))
simple("zero_bubble_on_the_cpu_too", schedule="zb-h2", where=(0, "cpu", 1))
simple("two_stages_on_each_device", schedule="zb-v", where=(0, 1))
simple("two_stages_on_each_device_and_the_cpu", schedule="interleaved-1f1b", where=(0, "cpu"))
simple("three_stages", where=(0, 1, 2))
simple("a_device_twice", where=(0, 1, 0))
simple("one_device", where=(0, 0))
simple("from_cpu_to_device", where=("cpu", 0))
simple("from_device_to_cpu", where=(0, "cpu"))
simple("cpu_in_the_middle", where=(0, "cpu", 1))
simple("measured", costs="measure")
simple("recomputed", plan=PlanOptions(recompute="always"))
simple("offloaded", where=(0, 1), schedule="gpipe", microbatches=8, plan=PlanOptions(offload="always"))
simple("offloaded_1f1b", where=(0, 1, 2, 3), microbatches=8, plan=PlanOptions(offload="always"))
simple(
    "offloaded_zero_bubble",
    where=(0, 1, 0, "cpu"),
    schedule="zb-h1",
    microbatches=8,
    plan=PlanOptions(offload="always"),
)
simple("replicas", where=(0, 1, 2), plan=PlanOptions(replicas=[1, 2]))
simple("replicas_first", where=(0, 1, 2), plan=PlanOptions(replicas=[2, 1]))
simple("kept_whole", leaf_modules=["layers.2", "head"])
simple("dropout", lambda: Net(lambda: nn.Dropout(0.3)), random=True)
simple("batch_norm_once", lambda: Net(lambda: nn.BatchNorm1d(D)), microbatches=1)


@scene
def mapped(machine: Machine) -> Figures:
    """A loader's batches, one behind the other; the last is smaller."""
    model = built(Net)
    batches = [floats(number, ROWS if number < 6 else 3)[0] for number in range(7)]
    if machine is CPU:
        outputs = [model(batch) for batch in batches]
    else:
        outputs = list(piped(model, machine, (0, 1, 0)).pipeline.map(batches))
    return {f"output {number}": output.detach().cpu() for number, output in enumerate(outputs)}


def _loss_outside(machine: Machine, **options: Any) -> Figures:
    model = built(Net)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = pipe(x)
        loss = F.mse_loss(out, y.to(out.device))
        loss.backward()
        return loss.detach()

    return trained(model, piped(model, machine, **options), step)


@scene
def loss_outside(machine: Machine) -> Figures:
    """Backwards wait for gradients, which come in autograd's thread of the device."""
    return _loss_outside(machine)


@scene
def offloaded_with_the_loss_outside(machine: Machine) -> Figures:
    """Activations leave in one program and come back in another."""
    return _loss_outside(machine, plan=PlanOptions(offload="always"))


@scene
def output_beside_the_loss(machine: Machine) -> Figures:
    """A gradient of the logits: the first call is rerun, later ones are deferred."""
    model = built(WithLogits)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss, out = pipe(x, y)
        (loss + out.pow(2).sum().to(loss.device)).backward()
        return loss.detach()

    return trained(model, piped(model, machine), step)


@scene
def outputs_on_both_devices(machine: Machine) -> Figures:
    model = built(Towers)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = pipe(x)
        loss = a.pow(2).mean() + b.to(a.device).pow(2).mean()
        loss.backward()
        return loss.detach()

    return trained(model, piped(model, machine, plan=PlanOptions(pins={"one": 0, "two": 1})), step)


@scene
def towers(machine: Machine) -> Figures:
    model = built(Towers)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = pipe(x, y)
        out.backward()
        return out.detach()

    return trained(model, piped(model, machine, plan=PlanOptions(pins={"one": 1, "two": 0})), step)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        if y is None:
            return self.one(x), self.two(x)
        return F.mse_loss(self.one(x), y) + F.mse_loss(self.two(-x), y)


def _inputs_on(index: int, where: Sequence[int | str] = (0, 1)) -> Scene:
    def run(machine: Machine) -> Figures:
        model = built(Net)
        pipe = piped(model, machine, where)
        return trained(model, pipe, batches=lambda number: tuple(t.to(machine[index]) for t in floats(number)))

    return run


SCENES |= {f"inputs_on_device_{index}": _inputs_on(index) for index in range(2)}
SCENES |= {f"inputs_on_device_{index}_stages_on_cpu_too": _inputs_on(index, ("cpu", 1, "cpu")) for index in range(2)}


@scene
def inputs_written_after_the_call(machine: Machine) -> Figures:
    """The pipeline has read a batch when the call returns, in pinned memory as well."""
    model = built(Net)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if machine is not CPU:
            x, y = x.pin_memory(), y.pin_memory()
        loss = pipe(x, y)
        x.zero_()
        y.zero_()
        loss.backward()
        return loss.detach()

    if machine is CPU:
        return trained(model, model)
    return trained(model, piped(model, machine), step)


@scene
def inputs_freed_before_the_backward(machine: Machine) -> Figures:
    model = built(Net)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = pipe(x.to(machine[0]).clone())
        loss = F.mse_loss(out, y.to(out.device))
        loss.backward()
        return loss.detach()

    return trained(model, piped(model, machine), step)


@scene
def gradients_of_inputs(machine: Machine) -> Figures:
    model = built(Net)
    gradients: list[Tensor] = []

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(machine[0]).requires_grad_()
        loss = pipe(x, y)
        loss.backward()
        assert x.grad is not None
        gradients.append(x.grad)
        return loss.detach()

    found = trained(model, piped(model, machine), step)
    return found | {f"gradient of input {number}": gradient.cpu() for number, gradient in enumerate(gradients)}


@scene
def tail_on_the_cpu(machine: Machine) -> Figures:
    """The joined outputs and the inputs come from devices to a loss on the CPU, in the caller's thread."""
    model = built(Contrastive)
    pipe = piped(model, machine, (0, 1, "cpu"))
    return trained(model, pipe, batches=lambda number: tuple(t.to(machine[0]) for t in floats(number)))


@scene
def tied_weights(machine: Machine) -> Figures:
    model = built(Tied)

    def step(pipe: nn.Module, *batch: Tensor) -> Tensor:
        loss, _ = pipe(*batch)
        loss.backward()
        return loss.detach()

    plan = PlanOptions(pins={"embedding": 0, "head": 1})
    return trained(model, piped(model, machine, plan=plan), step, ids)


@scene
def skips(machine: Machine) -> Figures:
    model = built(UNet)

    def step(pipe: nn.Module, image: Tensor) -> Tensor:
        loss = pipe(image).square().mean()
        loss.backward()
        return loss.detach()

    def images(number: int) -> tuple[Tensor, ...]:
        return (torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64),)

    return trained(model, piped(model, machine, (0, 1, 2), microbatches=2), step, images)


class Part(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h[:, : D // 2]


class WithView(Net):
    """An output that is a view of what the last stage has received."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.layers(x)
        return F.mse_loss(self.head(h), y), self.part(h)


def _view(where: Sequence[int | str]) -> Scene:
    """The caller reads it late, after it has dropped the tensor, whose memory then belongs to the stage again."""

    def run(machine: Machine) -> Figures:
        model = built(WithView)
        pipe = piped(model, machine, where, plan=PlanOptions(pins={"layers": 0, "head": 1, "part": 1}))
        seen: list[Tensor] = []

        def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            loss, view = pipe(x, y)
            seen.append(view.detach().square().sum())
            loss.backward()
            return loss.detach()

        found = trained(model, pipe, step)
        return found | {f"view {number}": value.cpu() for number, value in enumerate(seen)}

    return run


SCENES["a_view_of_a_received_value"] = _view((0, 1))
SCENES["a_view_of_a_value_from_the_cpu"] = _view(("cpu", 1))


class Contrastive(Net):
    """A loss that mixes the rows of the batch: it is computed by a tail, on the joined outputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        out = F.normalize(self.head(self.layers(x)), dim=-1)
        return F.cross_entropy(out @ out.T * 3, torch.arange(len(x), device=x.device))


simple("tail", Contrastive)


class Checkpointed(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.mse_loss(self.head(checkpoint(self.layers, x, use_reentrant=False)), y)


simple("checkpoint", Checkpointed)


def _batch_norm(how: str) -> Scene:
    """The same on the CPU in a pipeline: with several microbatches it is not the unsplit model's batch norm."""

    def run(machine: Machine) -> Figures:
        model = built(lambda: Net(lambda: nn.BatchNorm1d(D)))
        pipe = pipecompile.compile(
            model, [machine[0], machine[1]], microbatches=4, costs="count", batching=Batching(batch_norm=how)
        )
        return trained(model, pipe)

    return run


SCENES |= {f"batch_norm_{how}": _batch_norm(how) for how in ("microbatch", "deferred")}


def _pipedream(
    make: Callable[..., torch.optim.Optimizer], where: Sequence[int | str], schedule: str = "pipedream"
) -> Scene:
    def run(machine: Machine) -> Figures:
        model = built(Net)
        options = {"schedule": schedule, "optimizer": lambda parameters: make(parameters, lr=1e-2)}
        pipe = piped(model, machine, where, **options)
        found = trained(model, pipe, lambda pipe, x, y: pipe(x, y).detach(), optimizer=None)
        pipe.pipeline.flush()
        return found | figures(model, ())

    return run


SCENES["pipedream"] = _pipedream(torch.optim.SGD, (0, 1))
SCENES["pipedream_adam"] = _pipedream(torch.optim.Adam, (0, 1, 2))
SCENES["pipedream_vertical_sync"] = _pipedream(torch.optim.Adam, (0, 1, 0), "pipedream-vertical-sync")
SCENES["pipedream_2bw"] = _pipedream(torch.optim.Adam, (0, "cpu", 1), "pipedream-2bw")


def _evaluated(where: Sequence[int | str]) -> Scene:
    """An evaluation between the steps: a second capture, on the same weights, which keeps no value for a backward."""

    def run(machine: Machine) -> Figures:
        model = built(Net)
        seen: list[Tensor] = []

        def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            loss = inside(pipe, x, y)
            pipe.eval()
            with torch.no_grad():
                seen.append(pipe(torch.cat([x, -x, x + 1])))
            pipe.train()
            return loss

        found = trained(model, piped(model, machine, where, microbatches=8), step)
        return found | {f"evaluation {number}": out.cpu() for number, out in enumerate(seen)}

    return run


SCENES["evaluated"] = _evaluated((0, 1))
SCENES["evaluated_on_one_device"] = _evaluated((0, 0, 0))


@scene
def other_sizes(machine: Machine) -> Figures:
    model = built(Net)
    return trained(model, piped(model, machine), batches=lambda number: floats(number, (8, 6, 4)[number]))


@scene
def verified(machine: Machine) -> Figures:
    model, steps = built(Net), count()

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if next(steps) == 1 and machine is not CPU:  # after a step and before another
            pipe.pipeline.verify(x, y)
        return inside(pipe, x, y)

    return trained(model, piped(model, machine), step)


def _autocast(dtype: torch.dtype, scaled: bool) -> Scene:
    """In lower precision: the same pipeline on the machine when it runs nothing late is the reference."""

    def run(machine: Machine) -> Figures:
        model = built(Net).float()
        scaler = torch.amp.GradScaler(machine.type, init_scale=64.0, enabled=scaled)

        def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(machine.type, dtype) if machine is not CPU else nullcontext():
                loss = pipe(x, y)
            scaler.scale(loss).backward()
            return loss.detach()

        return trained(model, piped(model, machine), step, lambda number: tuple(t.float() for t in floats(number)))

    return run


for _name, _dtype, _scaled in (("autocast", torch.bfloat16, False), ("grad_scaler", torch.float16, True)):
    SCENES[_name] = _autocast(_dtype, _scaled)
    OWN_NUMBERS.add(_name)


@scene
def backward_twice(machine: Machine) -> Figures:
    model = built(Net)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = pipe(x)
        loss = F.mse_loss(out, y.to(out.device))
        loss.backward(retain_graph=True)
        (loss / 2).backward()
        return loss.detach()

    return trained(model, piped(model, machine), step)


@scene
def accumulated_and_clipped(machine: Machine) -> Figures:
    model = built(Net)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        (pipe(x, y) / 2).backward()
        loss = pipe(-x, y) / 2
        loss.backward()
        for parameter in pipe.parameters():
            nn.utils.clip_grad_value_(parameter, 0.01)
        return loss.detach()

    return trained(model, piped(model, machine), step)


@scene
def copied_and_loaded(machine: Machine) -> Figures:
    """A pipeline that is copied and gets the weights of the other by ``state_dict``."""
    model = built(Net)
    pipe = piped(model, machine)
    inside(pipe, *floats(7))
    torch.manual_seed(1)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.load_state_dict(pipe.state_dict())
    return trained(other, other)


def _optimizer(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Scene:
    def run(machine: Machine) -> Figures:
        model = built(Net)
        return trained(model, piped(model, machine), optimizer=lambda p, lr: make(p, lr=lr, **options))

    return run


SCENES["optimizer_fused"] = _optimizer(torch.optim.AdamW, fused=True)
SCENES["optimizer_foreach"] = _optimizer(torch.optim.SGD, foreach=True, momentum=0.9)


def _from_streams(where: Sequence[int | str]) -> Scene:
    """Steps are queued on streams of the caller's own, others each time, which wait for one another."""

    def run(machine: Machine) -> Figures:
        model = built(Net)
        if machine is CPU:
            return trained(model, model)
        pipe = piped(model, machine, where)
        optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-2)
        losses, before = [], []
        for number in range(STEPS):
            streams = [torch.Stream(machine[index]) for index in range(2)]
            with streams[0], streams[1]:
                for stream in streams:
                    for event in before:
                        stream.wait_event(event)
                optimizer.zero_grad()
                losses.append(inside(pipe, *(t.to(machine[0]) * 1.0 for t in floats(number))))
                optimizer.step()
                before = [stream.record_event() for stream in streams]
        for index in range(2):
            for event in before:
                torch.accelerator.current_stream(machine[index]).wait_event(event)
        return figures(model, losses)

    return run


@scene
def backward_on_another_stream(machine: Machine) -> Figures:
    """The loss is scaled, and its backward called, on streams that have not waited for those of the call."""
    model = built(Net)
    if machine is CPU:
        return trained(model, model)
    pipe = piped(model, machine)
    optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-2)
    calling, backing = ([torch.Stream(machine[index]) for index in range(2)] for _ in range(2))
    losses = []
    for number in range(STEPS):
        with calling[0], calling[1]:
            loss = pipe(*floats(number))
        with backing[0], backing[1]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for one, two in zip(calling, backing, strict=True):
            one.wait_stream(two)
        losses.append(loss.detach())
    for index in range(2):
        torch.accelerator.current_stream(machine[index]).wait_stream(calling[index])
    return figures(model, losses)


@scene
def inputs_loaded_on_another_stream(machine: Machine) -> Figures:
    """Batches come from the default stream, which takes memory for the next one while the pipeline still reads."""
    model = built(Net)
    if machine is CPU:
        return trained(model, model)
    pipe = piped(model, machine)
    inside(pipe, *floats(0))
    pipe.zero_grad()
    optimizer = torch.optim.Adam(pipe.parameters(), lr=1e-2)
    streams = [torch.Stream(machine[index]) for index in range(2)]
    for index, stream in enumerate(streams):
        stream.wait_stream(torch.accelerator.current_stream(machine[index]))
    losses = []
    for number in range(STEPS):
        batch = [tensor.to(machine[0], non_blocking=True) * 1.0 for tensor in floats(number)]
        for stream in streams:
            stream.wait_stream(torch.accelerator.current_stream(machine[0]))
        with streams[0], streams[1]:
            optimizer.zero_grad()
            losses.append(inside(pipe, *batch))
            optimizer.step()
        del batch
    for index, stream in enumerate(streams):
        torch.accelerator.current_stream(machine[index]).wait_stream(stream)
    return figures(model, losses)


SCENES["from_other_streams"] = _from_streams((0, 1))
SCENES["from_other_streams_to_the_cpu"] = _from_streams(("cpu", 1))


@scene
def other_weights(machine: Machine) -> Figures:
    """``functional_call`` with weights that are not the model's own, once the parameters are on their devices."""
    model = built(Net)
    pipe = piped(model, machine)
    inside(pipe, *floats(0))

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        doubled = {name: 2 * parameter for name, parameter in pipe.named_parameters()}
        loss = functional_call(pipe, doubled, (x, y))
        loss.backward()
        return loss.detach()

    return trained(model, pipe, step)


class Places(nn.Module):
    """Makes tensors without ``device=``, as many models do; each call has an option of its own, and so a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(D, D), nn.Linear(D, 3)
        self.factor = 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.enter(x) + self.factor * torch.arange(D) / D
        return F.mse_loss(self.leave(torch.tanh(h)) * torch.ones(3), y)


@scene
def captured_again_on_the_devices(machine: Machine) -> Figures:
    model = built(Places)

    def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.factor += 1
        return inside(pipe, x, y)

    return trained(model, piped(model, machine), step)


class Watching(TorchDispatchMode):
    """Looks on: its thread runs all ranks, and backwards wait for ``backward()``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _observed(where: Sequence[int | str]) -> Scene:
    """Observed by a dispatch mode, and by hooks on saved tensors in the second half of the steps."""

    def run(machine: Machine) -> Figures:
        steps = iter(range(STEPS))

        def step(pipe: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            hooks = saved_tensors_hooks(torch.clone, lambda tensor: tensor)
            with Watching() if next(steps) < STEPS // 2 else hooks:
                return inside(pipe, x, y)

        model = built(Net)
        return trained(model, piped(model, machine, where), step)

    return run


SCENES["observed"] = _observed((0, 1, 0))
SCENES["observed_cpu_in_the_middle"] = _observed((0, "cpu", 1))


def without_peers(name: str) -> Scene:
    def run(machine: Machine) -> Figures:
        if machine.is_virtual:
            import virtual_device as vd

            vd.peers(False)
        return SCENES[name](machine)

    return run


SCENES |= {f"{name}_without_peers": without_peers(name) for name in ("one_f_one_b", "loss_outside", "pipedream")}


def expected(name: str) -> Mapping[str, Tensor]:
    """The figures of a scene on the CPU, or, where a device has numbers of its own, on one that runs nothing late."""
    if name not in _KNOWN:
        machine = Machine("virt", "sync") if name in OWN_NUMBERS else CPU
        machine.start()
        _KNOWN[name] = SCENES[name](machine)
    return _KNOWN[name]


_KNOWN: dict[str, Mapping[str, Tensor]] = {}
