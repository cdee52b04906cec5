"""What is predicted of a 1F1B step on two CPU devices, beside what is measured: stage times and balance.

    python benchmarks/predicted.py --layers 8 --width 256

Each device computes with one thread. Profile and steps are measured in turn; a busy machine disturbs both.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from gpt import Setting, WithLoss, hugging_face, sequential
from rich.console import Console
from rich.table import Table
from torch import nn

import pipecompile
from pipecompile.calibrate import Times
from pipecompile.graph import Cost


def main() -> None:
    options = _options()
    setting = Setting(options.layers, options.width, options.vocabulary, options.length, options.batch, 4)
    torch.set_num_threads(1)
    it = Table("model", "stage", "predicted ms", "measured ms", "measured / predicted", "busiest / mean")
    for name, model in (("nn.Sequential", WithLoss(sequential(setting))), ("GPT-2", hugging_face(setting))):
        times = measured(model, setting, options.rounds)
        mean = sum(t.measured.seconds for t in times) / len(times)
        balance = max(t.measured.seconds for t in times) / mean
        for stage, t in enumerate(times):
            numbers = f"{1e3 * t.predicted.seconds:.1f}", f"{1e3 * t.measured.seconds:.1f}", f"{t.ratio:.3f}"
            it.add_row(name, str(stage), *numbers, f"{balance:.3f}" if stage == 0 else "")
    Console().print(it)


def measured(model: nn.Module, setting: Setting, rounds: int) -> list[Times]:
    """The times of each stage, the median of the steps' medians."""
    call = dict(zip(("input_ids", "labels"), setting.tokens(), strict=True))
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=setting.microbatches, example_inputs=call)
    steps = []
    for _ in range(rounds):
        out = pipe(**call)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()
        pipe.zero_grad(set_to_none=True)
        assert pipe.timeline is not None
        steps.append(pipe._capture_in_use.times(pipe.timeline))
    stages = zip(*steps[1:], strict=True)  # the first step warms up
    return [Times(many[0].predicted, _median([t.measured for t in many])) for many in stages]


def _median(costs: list[Cost]) -> Cost:
    return Cost(median(c.forward for c in costs), median(c.backward for c in costs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 256), ("vocabulary", 2000), ("length", 128), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
