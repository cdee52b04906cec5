"""A buffer that an early stage reads and the end of a step sets: training moves it to the device of the last stage."""

from __future__ import annotations

import pytest
import torch
from machines import EARLY, LATE, Machine
from scenes import piped
from torch import Tensor, nn

WIDTH, ROWS = 4, 6


class Averaged(nn.Module):
    """Scales by a running mean of its outputs, which only training moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("mean", torch.ones(WIDTH))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x) * self.mean).tanh())
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out.square().mean()


def runs(module: nn.Module, model: nn.Module, calls: str, x: Tensor) -> dict[str, Tensor]:
    """The losses of evaluations ("e") and steps ("t"), and what the model holds at the end."""
    found, optimizer = {}, torch.optim.SGD(model.parameters(), 0.1)
    for number, call in enumerate(calls):
        module.train(call == "t")
        loss = module(x)
        found[f"loss {number}"] = loss.detach().cpu()
        if call == "t":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found | {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("calls", ["etette", "tet"])
@pytest.mark.parametrize("machine", [LATE, EARLY], ids=str)
def test_evaluations_before_and_between_steps_read_the_buffer(machine: Machine, calls: str) -> None:
    machine.start()
    torch.manual_seed(0)
    x, eager = torch.randn(ROWS, WIDTH), Averaged()
    model = Averaged()
    model.load_state_dict(eager.state_dict())
    pipe = piped(model, machine, where=("cpu", 0, 1), microbatches=2)
    actual, expected = runs(pipe, model, calls, x), runs(eager, eager, calls, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
