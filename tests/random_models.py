"""Random models: a chain of random operations, each on two random earlier values, many of them in place.

A value is (batch, length, ``D``). What an operation writes, later ones may read through any alias of it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from effects import Blend, StraightThrough
from torch import Tensor, nn
from torch.nn import functional as F

D = 6
Operation = Callable[["RandomModel", nn.Module, Tensor, Tensor], Tensor]


class RandomModel(nn.Module):
    """The model of a seed; its loss, the mean square of its last values, is inside or outside as the seed will."""

    count: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = Random(seed)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(draw.randint(3, 6)))
        if draw.random() < 0.3:
            self.layers[0].weight = self.layers[-1].weight
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, D))
        layer = draw.choices(["layer"], k=len(OPERATIONS) // 3)
        names = draw.choices([*OPERATIONS, *layer], k=draw.randint(6, 16))
        self.steps = [(name, draw.random(), draw.random(), draw.randrange(len(self.layers))) for name in names]
        self.inside = draw.random() < 0.5
        self.num_outputs = draw.randint(1, 3)

    def forward(self, x: Tensor, late: Tensor) -> dict[str, Tensor] | tuple[Tensor, ...]:
        values = [torch.tanh(self.layers[0](x)), self.layers[1](x), late]
        for name, first, second, layer in self.steps:
            a, b = (values[int(share**0.5 * len(values))] for share in (first, second))
            values.append(OPERATIONS[name](self, self.layers[layer], a, b))
        outputs = tuple(values[-self.num_outputs :])
        return {"loss": mean_squares(outputs), "last": outputs[-1]} if self.inside else outputs

    def loss(self, output: dict[str, Tensor] | tuple[Tensor, ...]) -> Tensor:
        return output["loss"] if isinstance(output, dict) else mean_squares(output)


def mean_squares(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum(output.pow(2).mean() / i for i, output in enumerate(outputs, 1))  # type: ignore[return-value]


def _gate(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        gate = layer(b).sigmoid()
        with torch.enable_grad():
            value = layer(a)
    return value * gate


def _add_in_place(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    a.add_(b)
    return 2 * a


def _halve_a_view(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    a[..., 1:3].mul_(0.5)
    return layer(a + 0)


def _augment_a_view(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    view = a[:, 1:]
    view += 1
    return a * 1


def _write_a_transpose(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    fresh = a + b
    fresh.transpose(0, 1)[0].add_(1)
    return fresh


def _assign_slices(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    fresh = torch.zeros_like(a)
    fresh[..., ::2] = b[..., ::2]
    fresh[:, 0] = a[:, -1]
    fresh += a
    return fresh


def _copy_over(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    fresh = torch.empty_like(a)
    fresh.copy_(b).masked_fill_(b > 0.2, 0.7)
    return fresh + a


def _count_in_place(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    m.count += 1
    return 1.5 * a


def _rebind_the_mean(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * b.detach().mean(dim=(0, 1))
    return a - 0.5


def _swap_halves(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    left, right = a.chunk(2, dim=-1)
    return torch.cat([right, 2 * left], dim=-1)


def _choose(m: RandomModel, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return b + F.one_hot(a.argmax(dim=-1), D).to(b.dtype)


OPERATIONS: dict[str, Operation] = {
    "layer": lambda m, layer, a, b: torch.tanh(layer(a)),
    "add": lambda m, layer, a, b: a + b,
    "power": lambda m, layer, a, b: (1 - a) ** 2,
    "gated product": lambda m, layer, a, b: a * torch.sigmoid(b),
    "select": lambda m, layer, a, b: torch.where(a > 0, a, 0.3 * b),
    "detached": lambda m, layer, a, b: a + b.detach(),
    "joined columns": lambda m, layer, a, b: torch.cat([a[..., :3], b[..., 3:]], dim=-1),
    "one layer over flat rows": lambda m, layer, a, b: layer(a.reshape(-1, D)).view(a.shape[0], -1, D),
    "centred": lambda m, layer, a, b: a - a.mean(dim=1, keepdim=True),
    "attention": lambda m, layer, a, b: torch.softmax(a @ b.mT, dim=-1) @ b,
    "positions": lambda m, layer, a, b: a + torch.arange(a.shape[1]).view(-1, 1),
    "relu in place": lambda m, layer, a, b: (a + 0.1).relu_(),
    "scaled by a buffer": lambda m, layer, a, b: a * m.scale,
    "scaled by the count": lambda m, layer, a, b: a / (1 + m.count),
    "less the mean": lambda m, layer, a, b: a - m.mean,
    "straight-through": lambda m, layer, a, b: StraightThrough.apply(a),
    "blend": lambda m, layer, a, b: sum(Blend.apply(a, b, 0.25)),
    "gate": _gate,
    "add in place": _add_in_place,
    "halve a view": _halve_a_view,
    "augment a view": _augment_a_view,
    "write a transpose": _write_a_transpose,
    "assign slices": _assign_slices,
    "copy over": _copy_over,
    "count in place": _count_in_place,
    "rebind the mean": _rebind_the_mean,
    "swap halves": _swap_halves,
    "choose": _choose,
}
