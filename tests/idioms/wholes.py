"""What needs the whole batch, and only that: margins with weights of their own, values that the first batch sets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.criteria import Encodes, labelled
from idioms.declare import D, Wrapped, idiom, takes


class Margin(nn.Module):
    """ArcFace as pytorch-metric-learning writes it: the cosines of the right classes, picked by a mask, are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.randn(D, 3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        cosine = F.normalize(z) @ F.normalize(self.classes, dim=0)
        mask = torch.zeros(len(z), 3, dtype=z.dtype)
        mask[torch.arange(len(z)), y] = 1
        right = cosine[mask == 1]
        moved = (right.clamp(-0.99, 0.99).acos() + 0.3).cos()
        return F.cross_entropy(16 * (cosine + mask * (moved - right)[:, None]), y)


@idiom(labelled)
class MarginOfItsOwnClasses(Encodes):
    """A loss with few weights of its own that can only be computed from the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Margin()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.body(x), y)


@idiom(labelled)
class TiedBehindTheBatch(Encodes):
    """Prototypes that look samples up at the front, and are compared with the whole batch behind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.body(x + self.words[y])
        centred = z - z.mean(0)
        return F.cross_entropy(F.linear(centred / centred.norm(), self.words), y)


@idiom(takes(5, D))
class BothWaysByTheBatch(Wrapped):
    """A light GRU of speechbrain: the batch, and behind it the batch turned round, from one first state of zeros."""

    normalises = False

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.states = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D, bias=False)
        self.register_buffer("start", torch.zeros(1, D))
        self.norm = nn.BatchNorm1d(2 * D) if self.normalises else nn.Identity()

    def middle(self, x: Tensor) -> Tensor:
        gates = self.inputs(torch.cat([x, x.flip(1)], dim=0))
        gates = self.norm(gates.reshape(-1, gates.shape[2])).reshape(gates.shape)
        state, states = self.start.broadcast_to(gates.shape[0], D), []
        for step in gates.unbind(1):
            candidate, gate = (step + self.states(state)).chunk(2, 1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1 - gate) * torch.relu(candidate)
            states.append(state)
        ahead, back = torch.stack(states, 1).chunk(2, dim=0)
        return ahead + back.flip(1)


@idiom(takes(5, D), parts=True)
class BothWaysNormalized(BothWaysByTheBatch):
    """The same with statistics over both directions, which in each microbatch are those of its own samples."""

    normalises = True


@idiom(takes(5, D), warns="as one microbatch", stream=False)
class FirstBatchSetsData(Wrapped):
    """Activation normalisation as normflows writes it: ``.data`` of both parameters, and a flag that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("done", torch.tensor(0.0))
        self.after = nn.Sequential(nn.Linear(D, D), nn.Tanh())

    def middle(self, x: Tensor) -> Any:
        if not self.done > 0.0:
            self.scale.data = -torch.log(x.std(dim=(0, 1), keepdim=True) + 1e-6).data
            self.shift.data = (-x.mean(dim=(0, 1), keepdim=True) * torch.exp(self.scale)).data
            self.done = torch.tensor(1.0)
        return self.after(x * self.scale.exp() + self.shift)
