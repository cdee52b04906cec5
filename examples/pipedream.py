"""PipeDream against GPipe: the loss against time, as a picture.

    python examples/pipedream.py --output out/pipedream.png

Both train the model of schedules.py on the same rows for the same number of batches. GPipe waits at the end of every
batch, and steps once for it. PipeDream never waits: each microbatch is a minibatch with a step of its own, taken with
weights that are some steps old in the early stages. So its curve differs, in time and in loss: which is ahead depends
on the model and on the learning rate. Times are this machine's, and mean something only if each stage has a core.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from pathlib import Path

import torch
from schedules import Letters, draw
from torch import Tensor, nn

import pipecompile

Course = list[tuple[float, float]]  # seconds since the first step, loss


def train(model: nn.Module, schedule: str, batches: list[Tensor], options: argparse.Namespace) -> Course:
    """The loss of each batch, and when it was known, without the first two calls, which compile the model."""
    settings = {"lr": options.learning_rate, "momentum": 0.9}
    inside = (
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, **settings)} if schedule == "pipedream" else {}
    )
    pipe = pipecompile.compile(
        model, devices=["cpu"] * options.stages, schedule=schedule, microbatches=options.microbatches, **inside
    )
    outer = None if inside else torch.optim.SGD(pipe.parameters(), **settings)
    course: Course = []
    start = 0.0
    with pipe.pipeline:
        for step, batch in enumerate(batches):
            if step == 2:
                start = time.perf_counter()
            loss = pipe(batch)
            if outer is not None:
                outer.zero_grad()
                loss.backward()
                outer.step()
            if step >= 2:
                course.append((time.perf_counter() - start, loss.item()))
        pipe.pipeline.flush()
    return course


def plot(courses: dict[str, Course], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for schedule, course in courses.items():
        axes.plot(*zip(*course, strict=True), label=schedule)
    axes.set(xlabel="seconds", ylabel="loss (nats a byte)", title="The same batches under two schedules")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = Letters(width=128), list(draw(options.steps + 2, options.batch))
    courses = {name: train(deepcopy(model), name, batches, options) for name in ("gpipe", "pipedream")}
    for name, course in courses.items():
        seconds, loss = course[-1]
        print(f"{name:9s}   {len(course)} batches in {seconds:.2f} s   loss {course[0][1]:.3f} to {loss:.3f}")
    plot(courses, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"stages": 2, "microbatches": 4, "batch": 32, "steps": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--output", type=Path, default=Path("out/pipedream.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
