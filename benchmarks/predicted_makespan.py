"""The predicted makespan of a step on two CPU stages beside the measured one, and predicted peak memory beside counted.

    python benchmarks/predicted_makespan.py
    python benchmarks/predicted_makespan.py --only "GPT-2" --rounds 20 --json

Ten configurations: models, cuts, schedules and numbers of microbatches. Each stage is a thread of one core. All
configurations take a step in turn in every round, so that what disturbs the machine disturbs all; the share of the
CPU seconds that other processes took is printed. Times are medians over rounds, without the first two.

    measured     the makespan of the program that ran: from the first start to the last end of an instruction
    predicted    the simulation of the same program with the profile, made before the first step; optimizer steps inside
                 the pipeline take what those of the program before took
    from stages  the simulation with the times of stages that every second round has measured, against the makespans of
                 the rounds between: the error of the simulator alone
    memory       the peak of each rank in bytes, ``pipe.pipeline.memory`` beside what is counted in one more step: every
                 storage that an operation of the rank makes, with Adam's state (``tests/counted.py``)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ["PIPECOMPILE_CACHE"] = "off"  # costs of this run, not of one on a busy machine

import torch
from counted import peaks
from gpt import Setting
from predicted import MODELS, Others
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pipecompile
from pipecompile import PlanOptions
from pipecompile.ir.graph import Cost
from pipecompile.ir.instruction import Backward, BackwardWeight, Forward, Step, Update
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.schedule import SCHEDULES
from pipecompile.schedule.simulator import simulate

WARM_UP = 2  # rounds
SETTING = Setting(layers=6, width=256, vocabulary=2000, length=64, batch=16, microbatches=4)


@dataclass(frozen=True)
class Configuration:
    """A model, cut where the planner cuts it or where ``pins`` say, under a schedule."""

    model: str
    schedule: str
    microbatches: int
    pins: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        cut = ", cut by hand" if self.pins else ""
        return f"{self.model}, {self.schedule}, {self.microbatches} microbatches{cut}"


EARLY, LATE = ({f"body.{1 + block}": int(block >= first) for block in range(6)} for first in (2, 4))
CONFIGURATIONS = (
    Configuration("nn.Sequential", "1f1b", 4),
    Configuration("nn.Sequential", "1f1b", 8, EARLY),
    Configuration("nn.Sequential", "gpipe", 4, LATE),
    Configuration("nn.Sequential", "zb-h1", 8),
    Configuration("nn.Sequential", "pipedream-2bw", 4),
    Configuration("GPT-2", "gpipe", 8),
    Configuration("GPT-2", "sequential", 2),
    Configuration("BERT", "1f1b", 2),
    Configuration("ViT", "1f1b", 8),
    Configuration("ResNet-18", "1f1b", 4),
)


@dataclass(frozen=True)
class Stages:
    """Measured seconds of the stages: of a whole backward, of its part for weights, and of an update."""

    costs: tuple[Cost, ...]
    weight_part: float
    update: float


@dataclass
class Run:
    """A configuration on its way through the rounds."""

    configuration: Configuration
    pipe: Any
    step: Callable[[], None]
    optimizer: torch.optim.Optimizer | None
    timelines: list[Timeline] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)

    def round(self) -> None:
        before = self.timelines[-1] if self.timelines else None
        self.step()
        self.timelines.append(self.pipe.pipeline.timeline)
        compiled, program = self.pipe.pipeline._capture_in_use, self.pipe.pipeline.program
        self.predicted.append(compiled.predict(program, before).makespan)


@dataclass(frozen=True)
class Result:
    """Seconds and bytes of a configuration."""

    configuration: str
    measured: float
    predicted: float
    measured_between: float
    from_stages: float
    predicted_bytes: tuple[int, ...]
    counted_bytes: tuple[int, ...]

    @property
    def errors(self) -> tuple[float, float, float]:
        """Relative errors: of the prediction, of the simulator alone, and the largest of a rank's memory."""
        bytes_of = zip(self.predicted_bytes, self.counted_bytes, strict=True)
        return (
            abs(self.predicted / self.measured - 1),
            abs(self.from_stages / self.measured_between - 1),
            max(abs(predicted / counted - 1) for predicted, counted in bytes_of),
        )


def measured_stages(timelines: Sequence[Timeline], num_stages: int) -> Stages:
    """The medians over all instructions of these timelines."""
    seconds: dict[tuple[type, int], list[float]] = {}
    for timeline in timelines:
        for span in timeline.spans:
            seconds.setdefault((type(span.instruction), span.instruction.stage), []).append(span.seconds)

    def of(kind: type, stage: int) -> float:
        return median(seconds.get((kind, stage), [0.0]))

    stages = range(num_stages)
    weights = [of(BackwardWeight, stage) for stage in stages]
    costs = tuple(Cost(of(Forward, stage), of(Backward, stage) + weights[stage]) for stage in stages)
    backward = sum(cost.backward for cost in costs)
    update = max(max(of(Step, stage), of(Update, stage)) for stage in stages)
    return Stages(costs, sum(weights) / backward if backward else 0.0, update)


def simulated(pipe: Any, program: Program, stages: Stages) -> float:
    """The makespan with measured stages, and with the links of the plan."""
    cluster = pipe.pipeline._capture_in_use.planned.cluster
    return simulate(program, stages.costs, cluster, stages.update, stages.weight_part).makespan


def begun(configuration: Configuration) -> Run:
    """Compiles a configuration."""
    torch.manual_seed(0)
    model, call = MODELS[configuration.model](SETTING)
    inside = SCHEDULES[configuration.schedule].is_asynchronous
    options: dict[str, Any] = {"optimizer": torch.optim.Adam} if inside else {}
    pipe = pipecompile.compile(
        model,
        ["cpu", "cpu"],
        schedule=configuration.schedule,
        microbatches=configuration.microbatches,
        plan=PlanOptions(pins=configuration.pins, tune="never", recompute="never"),
        verify="never",
        example_inputs=call,
        **options,
    )
    optimizer = None if inside else torch.optim.Adam(pipe.parameters())

    def step() -> None:
        out: Any = pipe(**call)
        if optimizer is not None:
            (out if isinstance(out, Tensor) else out.loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Run(configuration, pipe, step, optimizer)


def result(run: Run) -> Result:
    """What the rounds have measured; counts memory in further steps."""
    timelines, pipeline = run.timelines[WARM_UP:], run.pipe.pipeline
    stages = measured_stages(timelines[::2], pipeline.plan.num_stages)
    between = timelines[1::2]
    program = pipeline.program
    assert program is not None
    counted = peaks(run.pipe, run.step, run.optimizer)
    return Result(
        configuration=str(run.configuration),
        measured=median(timeline.makespan for timeline in timelines),
        predicted=median(run.predicted[WARM_UP:]),
        measured_between=median(timeline.makespan for timeline in between),
        from_stages=simulated(run.pipe, program, stages),
        predicted_bytes=tuple(pipeline.memory.ranks),
        counted_bytes=tuple(counted),
    )


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    chosen = [c for c in CONFIGURATIONS if options.only in str(c)]
    runs = [begun(configuration) for configuration in chosen]
    others = Others()
    for _ in range(WARM_UP + options.rounds):
        for run in runs:
            run.round()
        gc.collect()
    share = others.share()
    results = []
    while runs:
        run = runs.pop(0)
        results.append(result(run))
        run.pipe.pipeline.close()
        gc.collect()
    if options.json:
        print(json.dumps([asdict(each) | {"errors": each.errors} for each in results], indent=1))
    else:
        _show(results, share)


def _show(results: Sequence[Result], share: float | None) -> None:
    ms = ("measured, ms", "predicted, ms", "error", "from stages, ms", "error")
    table = Table("configuration", *ms, "predicted, MiB", "counted, MiB", "error")
    for each in results:
        times = [f"{1e3 * s:.1f}" for s in (each.measured, each.predicted, each.from_stages)]
        whole, simulator, memory = (f"{error:.1%}" for error in each.errors)
        mib = [", ".join(f"{n / 2**20:.1f}" for n in ranks) for ranks in (each.predicted_bytes, each.counted_bytes)]
        table.add_row(each.configuration, times[0], times[1], whole, times[2], simulator, *mib, memory)
    middle = [f"{median(errors):.1%}" for errors in zip(*(each.errors for each in results), strict=True)]
    table.add_row("median", "", "", middle[0], "", middle[1], "", "", middle[2])
    console = Console(width=160)
    console.print(table)
    console.print(f"{torch.__version__}; other processes took {'?' if share is None else f'{share:.0%}'} of the CPUs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name has this text")
    return with_rounds(parser, 12)


def with_rounds(parser: argparse.ArgumentParser, rounds: int) -> argparse.Namespace:
    """The options, with those that benchmarks in rounds share."""
    parser.add_argument("--rounds", type=int, default=rounds, help="steps that are measured of each row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: every second one measures stages, the others makespans")
    return options


if __name__ == "__main__":
    main()
