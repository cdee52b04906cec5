"""What zero-bubble schedules gain over 1F1B on two CPU stages, measured and predicted, and what a split backward costs.

    python benchmarks/zero_bubble.py
    python benchmarks/zero_bubble.py --microbatches 2 --schedules zb-h1,zb-v --rounds 30 --json

A model of equal transformer blocks, so that stages are equal and the bubble is all there is to gain. Each stage is a
thread of one core. All schedules take a step in turn in every round; times are medians over rounds, without the first
two. For each schedule:

    measured     the makespan, from the first start to the last end of an instruction
    predicted    its program in the simulator, with the times of Forwards, Backwards and gradients of weights that every
                 second round has measured; compared with the makespans of the rounds between
    gain         1F1B's makespan over this one, measured and predicted
    B + W        both halves of a split backward, relative to the whole backward of the same stage under 1F1B (V shapes
                 have other stages: of all stages together)
    memory       the peak of each rank in bytes, ``pipe.pipeline.memory`` beside what is counted in one more step, with
                 Adam (``tests/counted.py``)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["PIPECOMPILE_CACHE"] = "off"

import torch
from counted import peaks
from gpt import Block
from predicted import Others
from predicted_makespan import WARM_UP, measured_stages, simulated, with_rounds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pipecompile
from pipecompile import PlanOptions
from pipecompile.ir.instruction import Backward, BackwardWeight
from pipecompile.ir.timeline import Timeline
from pipecompile.schedule import SCHEDULES


class Blocks(nn.Module):
    """Equal blocks, and a loss that costs nothing."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().mean()


@dataclass(frozen=True)
class Result:
    """Seconds and bytes of a schedule; factors relative to 1F1B."""

    schedule: str
    measured: float
    predicted: float
    gain: float
    predicted_gain: float
    backwards: float  # B + W over whole backwards
    predicted_bytes: tuple[int, ...]
    counted_bytes: tuple[int, ...]

    @property
    def errors(self) -> tuple[float, float, float]:
        """Relative errors: of the prediction, of the gain, and the largest of a rank's memory."""
        bytes_of = zip(self.predicted_bytes, self.counted_bytes, strict=True)
        return (
            self.predicted / self.measured - 1,
            self.predicted_gain / self.gain - 1,
            max((predicted / counted - 1 for predicted, counted in bytes_of), key=abs),
        )


def begun(schedule: str, options: argparse.Namespace) -> tuple[Any, Tensor]:
    """The compiled model, and its batch."""
    torch.manual_seed(0)
    model, x = Blocks(options.layers, options.width), torch.randn(options.microbatches, options.tokens, options.width)
    stages = len(SCHEDULES[schedule].placement.rank_of(2))
    pins = {f"body.{layer}": layer * stages // options.layers for layer in range(options.layers)}
    pipe = pipecompile.compile(
        model,
        ["cpu", "cpu"],
        schedule=schedule,
        microbatches=options.microbatches,
        plan=PlanOptions(pins=pins, tune="never", recompute="never"),
        verify="never",
        example_inputs={"x": x},
    )
    return pipe, x


def stepped(pipe: Any, x: Tensor) -> Timeline:
    pipe(x).backward()
    pipe.zero_grad(set_to_none=True)
    timeline: Timeline = pipe.pipeline.timeline
    return timeline


def trained(pipe: Any, x: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step with the optimizer that the planned memory is for."""
    optimizer = torch.optim.Adam(pipe.parameters())

    def step() -> None:
        pipe(x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def backwards(timelines: Sequence[Timeline], stages: int) -> float:
    """The seconds of a Backward and its BackwardWeight, of all stages together."""
    spans = [span for timeline in timelines for span in timeline.spans]

    def of(kind: type, stage: int) -> float:
        found = [span.seconds for span in spans if type(span.instruction) is kind and span.instruction.stage == stage]
        return median(found or [0.0])

    return sum(of(kind, stage) for kind in (Backward, BackwardWeight) for stage in range(stages))


def measured(options: argparse.Namespace) -> list[Result]:
    names = ["1f1b", *(name for name in options.schedules.split(",") if name != "1f1b")]
    runs = {name: begun(name, options) for name in names}
    timelines: dict[str, list[Timeline]] = {name: [] for name in names}
    for _ in range(WARM_UP + options.rounds):
        for name, (pipe, x) in runs.items():
            timelines[name].append(stepped(pipe, x))
        gc.collect()
    results: list[Result] = []
    times: dict[str, tuple[float, float, float]] = {}  # measured, predicted, backwards
    for name, (pipe, x) in runs.items():
        kept, stages = timelines[name][WARM_UP:], pipe.pipeline.plan.num_stages
        predicted = simulated(pipe, pipe.pipeline.program, measured_stages(kept[::2], stages))
        found = median(timeline.makespan for timeline in kept[1::2]), predicted, backwards(kept, stages)
        times[name] = found
        first = times["1f1b"]
        counted = peaks(pipe, *trained(pipe, x))
        results.append(
            Result(
                schedule=name,
                measured=found[0],
                predicted=predicted,
                gain=first[0] / found[0],
                predicted_gain=first[1] / predicted,
                backwards=found[2] / first[2],
                predicted_bytes=tuple(pipe.pipeline.memory.ranks),
                counted_bytes=tuple(counted),
            )
        )
    for pipe, _ in runs.values():
        pipe.pipeline.close()
    return results


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    others = Others()
    results = measured(options)
    share = others.share()
    if options.json:
        print(json.dumps([asdict(each) | {"errors": each.errors} for each in results], indent=1))
        return
    columns = "schedule", "measured, ms", "predicted, ms", "error", "gain", "predicted", "error", "B + W", "memory, MiB"
    table = Table(*columns, "counted, MiB", "error")
    for each in results:
        ms = [f"{1e3 * seconds:.1f}" for seconds in (each.measured, each.predicted)]
        mib = [", ".join(f"{n / 2**20:.1f}" for n in ranks) for ranks in (each.predicted_bytes, each.counted_bytes)]
        time, gain, memory = (f"{error:+.1%}" for error in each.errors)
        gains = f"{each.gain:.3f}", f"{each.predicted_gain:.3f}", gain
        table.add_row(each.schedule, *ms, time, *gains, f"{each.backwards:.3f}", *mib, memory)
    console = Console(width=150)
    console.print(table)
    console.print(f"{torch.__version__}; other processes took {'?' if share is None else f'{share:.0%}'} of the CPUs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default="zb-h1,zb-h2,zb-v", help="to compare with 1f1b, with commas")
    parser.add_argument("--layers", type=int, default=4, help="a multiple of the stages, 4 for V shapes")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    return with_rounds(parser, 16)


if __name__ == "__main__":
    main()
