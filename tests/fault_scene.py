"""What faults are injected into: small models, a pipeline of each, and an eager twin that suffers the same.

``Scene.suffer`` does the same to both and gives a verdict:

    fine      the pipeline gives the twin's numbers, or raises an error of ours, the user's own, or the twin's
    stale     it gives other numbers
    foreign   it raises something else
    state     it fails and leaves model, gradients, generators or attributes otherwise than it found them
    after     the next step, without any fault, is not the twin's
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from oracle import leaves
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from toys import D, blocks, mean_square

import pipecompile


class UserError(Exception):
    """Raised by what stands for the user's code."""


class Trap:
    """Points in the models' own code where something can be made to happen; a capture sees nothing of what and when."""

    _set: SimpleQueue[tuple[str, Callable[[], Any], bool]] = SimpleQueue()

    @classmethod
    def set(cls, where: str, action: Callable[[], Any], lasting: bool = False) -> None:
        """At the point ``where``, the next time, or each time until ``clear``."""
        cls._set.put((where, action, lasting))

    @classmethod
    def clear(cls) -> None:
        while not cls._set.empty():
            cls._set.get()

    @classmethod
    def spring(cls, where: str) -> None:
        if cls._set.empty():
            return
        point, action, lasting = cls._set.get()
        if lasting or point != where:
            cls._set.put((point, action, lasting))
        if point == where:
            action()


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Trap.spring("forward")
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Trap.spring("backward")
        return gradient


class Kept(nn.Module):
    """Branches on data, so it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        Trap.spring("kept")
        return x if x.detach().sum() == 12345.0 else self.linear(x)


class Plain(nn.Module):
    """The loss is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2:](Through.apply(self.body[:2](x)))


class Inside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return mean_square(super().forward(x))


class Counting(Inside):
    """Writes a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        return super().forward(x)


class Keeping(Inside):
    def __init__(self) -> None:
        super().__init__()
        self.body[3] = Kept()


class Tied(Plain):
    """One block at the start and at the end, a skip between."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.body[0](x)
        return self.body[0](super().forward(first)) + first


class Twice(Plain):
    """The loss and what it is of: the caller may use either."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = super().forward(x)
        return {"loss": mean_square(output), "output": output}


class Normed(Inside):
    """Batch norm, in eval mode: its statistics are read and not written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def train(self, mode: bool = True) -> Normed:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


MODELS: dict[str, type[nn.Module]] = {
    "plain": Plain, "inside": Inside, "counting": Counting, "keeping": Keeping, "tied": Tied, "twice": Twice,
    "normed": Normed,
}  # fmt: skip


def loss_of(output: Any) -> Tensor:
    output = output["loss"] if isinstance(output, dict) else output
    return output if output.ndim == 0 else mean_square(output)


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """Attributes with plain values, and the names of all."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            found[f"{path}.{name}"] = value if isinstance(value, bool | int | float | str) else type(value).__name__
    return found


@dataclass(frozen=True)
class State:
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    identities: dict[str, int]
    attributes: dict[str, Any]
    generators: dict[str, Any]

    @staticmethod
    def of(model: nn.Module) -> State:
        named = [*model.named_parameters(), *model.named_buffers()]
        return State(
            {name: tensor.detach().clone() for name, tensor in named},
            {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
            {name: id(tensor) for name, tensor in named},
            attributes_of(model),
            {
                "torch": torch.get_rng_state(),
                "python": repr(random.getstate()),
                "numpy": np.random.get_state()[1].tolist(),
            },
        )

    def left_by(self, *others: State) -> str:
        """What about it is as in none of the others; empty if there is no such thing."""
        for what in ("tensors", "gradients", "identities", "attributes", "generators"):
            mine = getattr(self, what)
            for name, value in mine.items():
                seen = [getattr(other, what) for other in others]
                if not any(name in each and not differ(value, each[name]) for each in seen):
                    return f"{what}: {name}"
            if not any(mine.keys() == getattr(other, what).keys() for other in others):
                return f"{what}: other names"
        return ""

    def without(self, *parts: str) -> State:
        return replace(self, **{part: {} for part in parts})


def differ(a: Any, b: Any, exact: bool = False) -> str:
    """Where two trees of numbers differ; empty if they do not."""
    got, wanted = dict(leaves(a)), dict(leaves(b))
    if got.keys() != wanted.keys():
        return f"{sorted(got)} instead of {sorted(wanted)}"
    for path, value in wanted.items():
        mine = got[path]
        if isinstance(value, Tensor) and isinstance(mine, Tensor):
            if mine.dtype != value.dtype or mine.shape != value.shape or mine.requires_grad != value.requires_grad:
                return f"{path or 'result'} is {mine.dtype} {tuple(mine.shape)}, {mine.requires_grad}"
            tolerance = 0.0 if exact else {torch.float64: 1e-9, torch.float32: 1e-4}.get(value.dtype, 2e-2)
            if not torch.allclose(mine.detach(), value.detach(), rtol=tolerance, atol=tolerance, equal_nan=True):
                return f"{path or 'result'} differs"
        elif type(value) is float and type(mine) is float and not exact:
            if not math.isclose(mine, value, rel_tol=1e-9) and not math.isnan(mine + value):
                return f"{path or 'result'} is {mine!r:.60} instead of {value!r:.60}"
        elif type(mine) is not type(value) or mine != value:
            return f"{path or 'result'} is {mine!r:.60} instead of {value!r:.60}"
    return ""


@dataclass
class Scene:
    """One model, its twin and its pipeline."""

    model_name: str
    schedule: str
    stages: int
    microbatches: int
    model: nn.Module = field(init=False)
    twin: nn.Module = field(init=False)
    pipe: Any = field(init=False)
    whole: State = field(init=False)
    worn: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(list(MODELS).index(self.model_name))
        self.model = MODELS[self.model_name]().double().train()
        self.twin = copy.deepcopy(self.model)
        self.pipe = pipecompile.compile(
            self.model, devices=["cpu"] * self.stages, schedule=self.schedule, microbatches=self.microbatches,
            costs="count",
        )  # fmt: skip

    def reset(self) -> None:
        """The twin's values become the model's, and no gradients are left."""
        Trap.clear()
        values = self.model.state_dict()
        self.twin.load_state_dict(values)
        for module, twin in zip(self.model.modules(), self.twin.modules(), strict=True):
            for name, value in module.__dict__.items():
                if type(value) in (bool, int, float):
                    twin.__dict__[name] = value
        for tensor in (*self.model.parameters(), *self.twin.parameters()):
            tensor.grad = None

    def suffer(self, kind: Callable[..., Any], seed: int, warm: bool) -> tuple[str, str]:
        """Does the same to the twin and to the pipeline; gives the verdict, and what was seen."""
        self.reset()
        if warm and (why := self.step_differs(seed)):
            return "after", f"before any fault: {why}"
        self.reset()
        wanted, expected = _outcome(kind, self.twin, self.twin, _seeded(seed), seed)
        after_twin = State.of(self.twin)
        self.whole = self._whole(after_twin, seed)
        x = _seeded(seed)
        before = State.of(self.model)
        got, actual = _outcome(kind, self.pipe, self.model, x, seed)
        after = State.of(self.model)
        Trap.clear()
        if any(isinstance(value, FakeTensor) for m in self.model.modules() for value in _held(m)):
            return "state", "a fake tensor is left"
        verdict, seen = self._judge(wanted, expected, got, actual, before, after, after_twin)
        if verdict != "fine":
            return verdict, seen
        self.reset()
        why = self.step_differs(seed + 1)
        return ("after", why) if why else ("fine", seen)

    def _judge(
        self, wanted: Any, expected: Any, got: Any, actual: Any, before: State, after: State, after_twin: State
    ) -> tuple[str, str]:
        if got is None:
            if wanted is not None and "modified by an inplace operation" not in str(wanted):
                return "stale", f"works where eager raises {type(wanted).__name__}: {wanted!s:.80}"
            if wanted is not None:  # the gradients were there already, of the values before
                return "fine", "works where autograd refuses"
            loose = ("identities", "generators")
            why = differ(actual, expected) or after.without(*loose).left_by(after_twin.without(*loose))
            return ("stale", why) if why else ("fine", "as eager")
        told = f"{type(got).__name__}: {got!s:.200}"
        ours = isinstance(got, pipecompile.PipecompileError | UserError | KeyboardInterrupt | SystemExit)
        if not ours and type(got) is not type(wanted):
            return "foreign", f"{told} (eager: {type(wanted).__name__ if wanted else 'works'})"
        if why := after.left_by(before, after_twin, self.whole):
            return "state", f"{why}; {told}"
        return "fine", f"{'refused' if wanted is None else 'raised as eager'}: {told}"

    def _whole(self, after: State, seed: int) -> State:
        """The twin's state with the gradients of a backward that ends: hooks may raise before, and after some."""
        Trap.clear()
        values = {name: tensor.detach().clone() for name, tensor in self.twin.state_dict().items()}
        try:
            _plain_step(self.twin, self.twin, _seeded(seed))
            return replace(after, gradients=State.of(self.twin).gradients)
        finally:
            self.twin.load_state_dict(values)

    def step_differs(self, seed: int) -> str:
        """Whether a plain step of the pipeline is another than the twin's."""
        torch.manual_seed(seed)
        x = torch.randn(4, D, dtype=torch.float64)
        try:
            pair = [_plain_step(call, model, x) for call, model in ((self.twin, self.twin), (self.pipe, self.model))]
        except Exception as error:
            return f"the next step raises {type(error).__name__}: {error!s:.200}"
        return differ(pair[1], pair[0])


def _held(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]


def _plain_step(call: Any, model: nn.Module, x: Tensor) -> Any:
    model.zero_grad()
    loss = loss_of(call(x))
    loss.backward()
    return (
        loss.detach(),
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def _seeded(seed: int) -> Tensor:
    """Seeds all generators; a batch."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return torch.randn(4, D, dtype=torch.float64)


def _outcome(
    kind: Callable[..., Any], call: Any, model: nn.Module, x: Tensor, seed: int
) -> tuple[BaseException | None, Any]:
    try:
        return None, kind(call, model, x, random.Random(seed))
    except BaseException as error:
        return error, None
