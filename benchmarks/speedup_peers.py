"""The eight models of ``speedup.py``, each with its loss outside, by torch's own pipeline and by ours.

    python benchmarks/speedup_peers.py --models gpt2 resnet50 --rounds 9

    unsplit      the batch at once, on one thread
    pipecompile  ``compile(model, ["cpu", "cpu"], loss_fn=...)``, with the schedule and the number that it finds
    torch        ``torch.distributed.pipelining.pipeline(model, ..., split_spec)``, cut before the middle layer, 1F1B
                 with as many microbatches, but at least 4, in two gloo processes, which sleep on a pipe between steps
    torchgpipe   the model as ``nn.Sequential``, where one is at hand, cut in the middle, with as many

All ways of a model run in turn in every round; medians are shown. A way that raises shows the error. "First" is what
the first step takes with all that goes before it: capture, plan and comparison, or export and split.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from peers import TwoProcesses
from rich.console import Console
from rich.table import Table
from speedup import MODELS, ROWS
from step_time import Way, environment, take_turns
from torch import Tensor, distributed, nn

import pipecompile

console = Console(width=140)


@dataclass(frozen=True)
class Bare:
    """A model without its loss.

    Attributes:
        inputs, target: of the whole batch.
        middle: the path of the module before which the second stage begins.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    middle: str


class Scores(nn.Module):
    """A model of transformers that returns its scores."""

    def __init__(self, body: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.names = body, names

    def forward(self, *inputs: Tensor) -> Tensor:
        scores: Tensor = self.body(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits
        return scores


class Pictures(Scores):
    """The same, of pictures."""

    def forward(self, *inputs: Tensor) -> Tensor:
        scores: Tensor = self.body(*inputs).logits
        return scores


def next_word(scores: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def itself(loss: Tensor, target: Tensor) -> Tensor:
    return loss


def each_word(scores: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())


MIDDLES = {
    "gpt2": "body.transformer.h.6", "llama": "body.model.layers.6", "bert": "body.bert.encoder.layer.6",
    "t5": "body.decoder.block.0", "vit": "body.vit.layers.6", "unet": "up.0", "resnet50": "layer3",
    "mixtral": "body.model.layers.3",
}  # fmt: skip


def bare(name: str) -> Bare:
    """The model by its name, always with the same weights and the same batch."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    middle = MIDDLES[name]
    if name == "resnet50":
        return Bare(model.body, (inputs["x"],), inputs["y"], nn.functional.cross_entropy, middle)  # type: ignore[arg-type]
    if name == "unet":
        return Bare(model, (inputs["images"], inputs["noise"]), inputs["noise"], itself, middle)
    if name == "vit":
        names, loss, kind = ("pixel_values",), nn.functional.cross_entropy, Pictures
    else:
        names, loss, kind = ("input_ids",), each_word if name in ("bert", "t5") else next_word, Scores
    given = tuple(inputs[each] for each in names)
    if name == "t5":
        names, given = ("input_ids", "decoder_input_ids"), (inputs["input_ids"], inputs["labels"])
    return Bare(kind(model, names), given, inputs["labels"], loss, middle)


def _serve(rank: int, store: str, name: str, microbatches: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    step: Callable[[], tuple[float, float]] | None = None
    try:
        while pipe.recv() == "step":
            try:
                step = step or _stepping(rank, name, microbatches)
                pipe.send(step())
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
    except EOFError:
        pass


def _stepping(rank: int, name: str, microbatches: int) -> Callable[[], tuple[float, float]]:
    from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline

    case = bare(name)
    rows = tuple(tensor[: ROWS // microbatches] for tensor in case.inputs)
    pipe = pipeline(case.model, mb_args=rows, split_spec={case.middle: SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=case.loss)

    def step() -> tuple[float, float]:
        losses: list[Tensor] = []
        stage.submod.zero_grad()
        distributed.barrier()
        start = time.perf_counter()
        if rank == 0:
            schedule.step(*case.inputs)
        else:
            schedule.step(target=case.target, losses=losses)
        seconds = time.perf_counter() - start
        return seconds, sum(loss.item() for loss in losses) / max(1, len(losses))

    return step


def torchgpipe_step(case: Bare, microbatches: int) -> Callable[[], tuple[float, float]]:
    """A step of torchgpipe, of the one of these models that is a sequence of modules."""
    from torchgpipe import GPipe

    body: Any = case.model
    layers = nn.Sequential(
        body.conv1, body.bn1, body.relu, body.maxpool, *body.layer1, *body.layer2, *body.layer3, *body.layer4,
        body.avgpool, nn.Flatten(1), body.fc,
    )  # fmt: skip
    cut = 4 + len(body.layer1) + len(body.layer2)
    pipe = GPipe(layers, [cut, len(layers) - cut], devices=["cpu", "cpu:0"], chunks=microbatches, checkpoint="never")

    def step() -> tuple[float, float]:
        layers.zero_grad()
        start = time.perf_counter()
        loss = case.loss(pipe(*case.inputs), case.target)
        loss.backward()
        return time.perf_counter() - start, loss.item()

    return step


def stepping(model: Any, case: Bare, piped: bool) -> Callable[[], tuple[float, float]]:
    def step() -> tuple[float, float]:
        model.zero_grad()
        start = time.perf_counter()
        loss = model(*case.inputs, target=case.target) if piped else case.loss(model(*case.inputs), case.target)
        loss.backward()
        return time.perf_counter() - start, loss.item()

    return step


def first(step: Callable[[], tuple[float, float]]) -> float:
    """The seconds until the first step has ended."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(name: str, options: argparse.Namespace) -> list[str]:
    case = bare(name)
    pipe = pipecompile.compile(copy.deepcopy(case.model), ["cpu", "cpu"], loss_fn=case.loss)
    ours = stepping(pipe, case, True)
    begins = {"pipecompile": first(ours)}
    for _ in range(options.settle):  # the first steps may move the cut
        ours()
    number = pipe.pipeline.microbatches
    usual = max(number, 4)  # 1F1B and GPipe want two for each stage
    ways = [Way("unsplit", stepping(case.model, case, False)), Way("pipecompile", ours)]
    theirs, said = TwoProcesses(_serve, name, usual), {}
    makers: dict[str, Callable[[], Callable[[], tuple[float, float]]]] = {"torch": lambda: theirs}
    if name == "resnet50":
        again = copy.deepcopy(case.model)
        makers["torchgpipe"] = partial(torchgpipe_step, Bare(again, case.inputs, case.target, case.loss, ""), usual)
    for peer, make in makers.items():
        try:
            step = make()
            begins[peer] = first(step)
            ways.append(Way(peer, step))
        except Exception as error:
            said[peer] = f"{type(error).__name__}: {error}"
    take_turns(name, ways, options.rounds, lambda: None)
    theirs.close()
    for peer, why in said.items():
        console.print(f"{name}: {peer}: {why}", markup=False)
    medians = {way.name: way.median for way in ways}
    losses = {way.name: way.losses[-1] for way in ways}
    apart = [f"{peer} {loss:.4f}" for peer, loss in losses.items() if abs(loss - losses["unsplit"]) > 1e-3]
    if apart:
        console.print(f"{name}: the loss is {losses['unsplit']:.4f}, but {', '.join(apart)}", markup=False)

    def shown(peer: str) -> str:
        return f"{medians['unsplit'] / medians[peer]:.2f}" if peer in medians else "raises" if peer in said else ""

    return [
        f"{pipe.pipeline.schedule}, {number}", f"{medians['unsplit']:.3f}", shown("pipecompile"), shown("torch"),
        shown("torchgpipe"), f"{begins['pipecompile']:.1f}", f"{begins['torch']:.1f}" if "torch" in begins else "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--settle", type=int, default=9, help="steps before the first round, which may move the cut")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console.print(environment(), "")
    table = Table("model", "ours", "unsplit, s", "pipecompile", "torch", "torchgpipe", "first, s", "torch's first, s")
    for name in options.models:
        table.add_row(name, *compare(name, options))
    console.print(table)


if __name__ == "__main__":
    main()
