"""Random models on random devices that run their work in random orders: the figures of the unsplit model on the CPU.

    python tests/devices/random_devices.py --count 500 --seed 20261127

Draws model, schedule, stages, microbatches, devices (one twice, the CPU among them, without peer access), the order in
which devices run, and where the inputs are. A program that hangs is ended after a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import virtual_device as vd
from machines import Machine
from oracle import Inputs, Run, assert_same, step, tree_map
from random_models import Program, drawn
from random_splits import choices, loss_of, shapes_of, trains
from torch import Tensor, nn

import pipecompile
from pipecompile.errors import InfeasibleError

SLOW = 60  # seconds after which a program hangs
PLACES = ("virt:0", "virt:1", "virt:2", "cpu")


@dataclass(frozen=True)
class Setting:
    """Where and how a program runs."""

    devices: list[str]
    microbatches: int
    schedule: str
    machine: Machine
    peers: bool
    inputs: str  # their device

    @staticmethod
    def of(program: Program) -> Setting:
        draw, options = Random(program.seed + 2), choices(program)
        modes = [Machine("virt", "late"), Machine("virt", "early"), Machine("virt", "random", program.seed)]
        return Setting(
            draw.choices(PLACES, weights=(4, 4, 2, 1), k=len(options["devices"])),
            options["microbatches"],
            options["schedule"],
            draw.choice([*modes, Machine("virt", "threads")]),
            draw.random() < 0.8,
            draw.choice(["cpu", "cpu", *PLACES[:2]]),
        )


def program_of(seed: int) -> Program:
    """The first program from a seed that trains in eager mode, without a GRU, whose kernel there the CPU lacks."""
    programs = (program for program in map(drawn, count(seed * 1000)) if "self.recurrent(" not in program.source)
    return next(filter(trains, programs))


def check(program: Program) -> None:
    """Raises ``AssertionError`` if a figure differs from the unsplit model's on the CPU."""
    setting = Setting.of(program)
    setting.machine.start()
    vd.peers(setting.peers)
    model, loss = program.build(), loss_of(program)
    pipe = _compiled(model, program, setting)
    normed = "self.batch_norm(" in program.source and setting.microbatches > 1
    for shape in shapes_of(program):
        eager = program.build()
        expected = _numbers(program.inputs(*shape), lambda given, own=eager: step(own, own, loss, given))
        given = tree_map(lambda t: _at(t, setting.inputs), program.inputs(*shape))
        actual = _numbers(given, lambda given: step(pipe, model, lambda out: loss(_near(out)), given))
        if not normed:
            assert_same(actual, expected)


def _compiled(model: nn.Module, program: Program, setting: Setting) -> nn.Module:
    devices, schedule = list(setting.devices), setting.schedule
    while True:
        try:
            return pipecompile.compile(
                model, devices, schedule=schedule, microbatches=setting.microbatches, costs="count",
                example_inputs=program.inputs(*shapes_of(program)[0]),
            )  # fmt: skip
        except InfeasibleError:  # the model, which may be one piece, has fewer stages
            devices, schedule = (devices[1:], schedule) if len(devices) > 1 else (devices, "gpipe")


def _at(tensor: Tensor, device: str) -> Tensor:
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def _near(output: Any) -> Any:
    return tree_map(lambda t: t.cpu(), output)


def _numbers(inputs: Inputs, run: Any) -> Run:
    found = run(inputs)
    gradients: Mapping[str, Any] = {**found.gradients, "x": inputs[0][0].grad}
    return replace(
        found,
        loss=found.loss.cpu(),
        output=_near(found.output),
        gradients={name: None if g is None else g.cpu() for name, g in gradients.items()},
        buffers={name: buffer.cpu() for name, buffer in found.buffers.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for seed in range(given.seed * given.count, (given.seed + 1) * given.count):
        program = program_of(seed)
        faulthandler.dump_traceback_later(SLOW, exit=True)
        try:
            check(program)
        except Exception as error:
            wrong += 1
            print(
                f"seed {seed}, {Setting.of(program)}:\n{program.source}\n{type(error).__name__}: {error}\n", flush=True
            )
        faulthandler.cancel_dump_traceback_later()
    print(f"{given.count - wrong} of {given.count} programs as on the CPU")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
