"""Models by solvers and operators: torchdiffeq, neuraloperator, spiking networks of snntorch."""

# ruff: noqa: E501 - a table, one model a line

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Draw, Inputs
from torch import Tensor, nn

from wild.entry import Wild, alternating, wild


class Field(nn.Module):
    """The derivative of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        return self.net(torch.cat([state, time.expand(len(state), 1)], 1))  # type: ignore[no-any-return]


class Solver(nn.Module):
    """A state after some time."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.field, self.options = Field(), options

    def forward(self, state: Tensor) -> Tensor:
        from torchdiffeq import odeint

        times = torch.linspace(0, 1, 4, dtype=state.dtype)
        return odeint(self.field, state, times, **self.options)[-1]  # type: ignore[no-any-return]


class Spiking(nn.Module):
    """A spiking network over some steps of time; the spikes of all of them are summed."""

    def __init__(self, make: Callable[[Any], nn.Module], states: int) -> None:
        super().__init__()
        import snntorch

        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.first, self.second = make(snntorch), snntorch.Leaky(beta=0.8, reset_mechanism="none")
        self.states = states

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.start(), self.second.init_leaky()
        total: Any = 0
        for step in x.unbind(1):
            spikes, *states = self.first(self.enter(step), *states)
            out, last = self.second(self.leave(spikes), last)
            total = total + out
        return total, last

    def start(self) -> list[Tensor]:
        found = next(
            getattr(self.first, name)()
            for name in ("init_rleaky", "init_alpha", "init_synaptic", "init_leaky")
            if hasattr(self.first, name)
        )
        return [*found] if isinstance(found, tuple) else [found]


def entries() -> tuple[Wild, ...]:
    return alternating([*_solvers(), *_operators(), *_spiking()])


def _solvers() -> list[Wild]:
    def solved(name: str, **options: Any) -> Wild:
        return wild(
            "dynamics",
            f"torchdiffeq {name}",
            lambda: nn.Sequential(nn.Linear(6, 4), Solver(**options), nn.Linear(4, 3)),
            lambda draw: ((draw.floats(6),), {}),
            lengths=(8,),
        )

    return [
        solved("euler", method="euler"), solved("midpoint", method="midpoint"), solved("rk4", method="rk4"), solved("Adams", method="explicit_adams"),
        solved("dopri5", method="dopri5"),
    ]  # fmt: skip


def _operators() -> list[Wild]:
    def operator(name: str, kind: str, shape: tuple[int, ...], **config: Any) -> Wild:
        def make() -> nn.Module:
            from neuralop import models

            return getattr(models, kind)(**config)  # type: ignore[no-any-return]

        return wild("dynamics", f"neuraloperator {name}", make, lambda draw: ((draw.floats(*shape),), {}), lengths=(8,))

    size = {"in_channels": 2, "out_channels": 1, "hidden_channels": 6, "n_layers": 2}
    return [
        operator("FNO", "FNO", (2, 8, 8), n_modes=(4, 4), **size),
        operator("FNO (1D)", "FNO", (2, 16), n_modes=(6,), **size),
        operator("FNO (norm, tanh)", "FNO", (2, 8, 8), n_modes=(4, 4), norm="group_norm", stabilizer="tanh", **size),
        operator("FNO (separable)", "FNO", (2, 8, 8), n_modes=(4, 4), separable=True, use_channel_mlp=False, **size),
        operator("TFNO", "TFNO", (2, 8, 8), n_modes=(4, 4), factorization="tucker", rank=0.5, **size),
        operator("UNO", "UNO", (2, 8, 8), in_channels=2, out_channels=1, hidden_channels=6, lifting_channels=8, projection_channels=8, n_layers=3, uno_out_channels=[6, 6, 6], uno_n_modes=[[4, 4], [4, 4], [4, 4]], uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]], channel_mlp_skip="linear"),
    ]  # fmt: skip


def _spiking() -> list[Wild]:
    def spiking(name: str, make: Callable[[Any], nn.Module]) -> Wild:
        return wild("dynamics", f"snntorch {name}", lambda: Spiking(make, 1), _series)

    return [
        spiking("Leaky", lambda s: s.Leaky(beta=0.9, threshold=0.3)),
        spiking("Leaky (learnt)", lambda s: s.Leaky(beta=0.9, threshold=0.3, learn_beta=True, learn_threshold=True, reset_mechanism="zero")),
        spiking("Synaptic", lambda s: s.Synaptic(alpha=0.9, beta=0.8, threshold=0.3)),
        spiking("Alpha", lambda s: s.Alpha(alpha=0.9, beta=0.8, threshold=0.2)),
    ]  # fmt: skip


def _series(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, 6),), {}
