"""Names of modules and parameters, and objects among arguments, are data: no text of theirs reaches generated code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, Flag, IntEnum
from typing import Any

import pytest
import torch
from pairs import pipe_of
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.nn import functional as F
from toys import D, blocks
from trained import WAYS, assert_trains_alike, floats

import pipecompile
from pipecompile.capture.opaque_calls import Leaf
from pipecompile.ops.names import in_code

NAMES = [
    "it's", 'a "word"', "back\\slash", "line\nend", "a space", "class", "None", "lambda", "0", "1st", "-", "{x}", "%s",
    "self", "__init", "\ufb01", "\u2024", "é", "\ud800", "#", "",
    "a" * 300, "__import__('os')", "\\", '\\"', "'''", "\t", "\0",
]  # fmt: skip
OWN = [name for name in NAMES if name]  # torch forbids an empty name


class Named(nn.Module):
    """Each name is that of a module, of a parameter and of a buffer; those of every second module are written."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for name in names:
            part = nn.Module()
            part.register_parameter(name, nn.Parameter(torch.randn(D, D) / 3))
            part.register_buffer(name + "b", torch.rand(D))
            self.parts[name] = part

    def forward(self, x: Tensor) -> Tensor:
        for number, (name, part) in enumerate(self.parts.items()):
            buffer = part.get_buffer(name + "b")
            x = torch.tanh(x @ part.get_parameter(name)) + buffer
            if number % 2:
                buffer.data.mul_(0.9)
                part.get_parameter(name).data.mul_(0.9)
        return x


@WAYS
def test_any_name_may_be_that_of_a_module_a_parameter_and_a_buffer(way: dict[str, Any]) -> None:
    assert_trains_alike(Named(OWN), way, steps=2)


TAKEN = ["graph", "graph'", "code", "meta", "_graph", "recompile"]  # attributes of a torch.fx.GraphModule


class Outermost(nn.Module):
    """Names at the top of the model: of modules, of a parameter, and of a buffer that Python reads."""

    def __init__(self) -> None:
        super().__init__()
        for name in TAKEN:
            self.add_module(name, nn.Linear(D, D))
        self.register_parameter("print_readable", nn.Parameter(torch.rand(D)))
        self.register_buffer("to_folder", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for name in TAKEN:
            x = torch.tanh(self.get_submodule(name)(x))
        return x * self.print_readable if self.to_folder > 0 else x


@WAYS
def test_any_name_may_be_at_the_top_of_a_model(way: dict[str, Any]) -> None:
    assert_trains_alike(Outermost(), way, steps=2)


class Whole(nn.Module):
    """Kept whole, since it asks an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


@WAYS
def test_any_name_may_be_that_of_a_module_kept_whole(way: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: Whole() for name in ("it's", "class", "a\nb<c>")})

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts.values():
                x = torch.tanh(part(x))
            return x

    assert_trains_alike(Model(), {**way, "microbatches": 1}, steps=2)


class Parent(nn.Module):
    """Kept whole, with a child of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.own = name
        self.add_module(name, nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.own](x) if x.sum() > 0 else -self._modules[self.own](x)


def test_any_name_may_be_that_of_a_child_of_a_module_kept_whole() -> None:
    names = ["_write_back", "_refuse_new_writes", "inner", "calls", "call", "kept"]
    model = nn.Sequential(*(Parent(name) for name in names))
    assert_trains_alike(model, {"stages": 2, "microbatches": 1}, steps=1)


def test_what_stands_for_a_module_kept_whole_has_no_name_of_its_own() -> None:
    class Empty(nn.Module):
        pass

    assert {*dir(Leaf)} == {*dir(Empty)}


class Keyed(nn.Module):
    """Inputs and outputs in dicts with such keys."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.body(sum(batch.values()))
        return {name: h * (i + 1) for i, name in enumerate(batch)}


@WAYS
def test_any_name_may_be_a_key_of_inputs_and_outputs(way: dict[str, Any]) -> None:
    names = [*OWN, ""]
    assert_trains_alike(
        Keyed(),
        way,
        steps=2,
        inputs=lambda step: ({name: floats(step + i)[0] for i, name in enumerate(names)},),
        loss=lambda out: sum(out.values()).square().mean(),
    )


@pytest.mark.parametrize("name", ["body.0.weight", "h.0.attn.c_attn", "_constant0"])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert type(in_code(name)) is str
    assert in_code(name) == name


class Takes(nn.Module):
    """An item of a tensor and items of a tuple: torch.fx calls both ``getitem``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.body(x)
        return h[:, 0], *(3 * h).unbind(1)[:2]


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(2)

    def forward(self, items: tuple[Tensor, ...]) -> Tensor:
        row, a, b = items
        return self.body(torch.stack([a, b, row - b, a * b], 1))


class Alike(nn.Module):
    """Arguments of which torch.fx gives one the name of another, and a number that Python reads from them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)

    def forward(self, input: Tensor, input_1: Tensor, input_2: Tensor) -> Tensor:
        if input_1.max() > input_2.max() + 5:
            input, input_1 = input_1, input
        return self.body(input + 2 * input_1 - 3 * input_2)


@pytest.mark.parametrize("more", [0.0, 9.0])
def test_arguments_may_be_called_as_torch_fx_renames_others(more: float) -> None:
    one, two, three = (floats(i)[0] for i in range(3))
    pipe = pipe_of(Alike().double())
    expected = pipe.pipeline.model(one, two + more, three)
    torch.testing.assert_close(pipe(one, two + more, three), expected, rtol=1e-9, atol=1e-11)


class AsStages(nn.Module):
    """Arguments called as what stages read besides those of the call: the share of the rows, totals of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = blocks(3), nn.Linear(D, D)

    def forward(self, share_of_rows: Tensor, valid_cross_entropy: Tensor, whole_size: Tensor) -> Tensor:
        h = self.head(self.body(share_of_rows)) + valid_cross_entropy
        loss = F.cross_entropy(h.flatten(0, 1), whole_size.flatten(), ignore_index=0)
        return loss + h.sum() / h.size(0) + h.mean()


def test_arguments_may_be_called_as_what_stages_read_besides_them() -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        one, two = floats(step)[0], floats(step + 1)[0]
        return one, two, one[..., 0].mul(3).long().abs()

    assert_trains_alike(AsStages(), {"microbatches": 3}, steps=1, inputs=inputs, loss=lambda out: out)


TABLES = [torch.arange(D) / D, torch.ones(D) / 3]


class Constants(nn.Module):
    """A buffer and a parameter called as the constants of a capture are, beside constants."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.register_buffer("_constant0", torch.rand(D))
        self._constant1 = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x * TABLES[0]) * self._constant0 + TABLES[1]
        return self.body[2:](h + self._constant1)


def test_parameters_may_be_called_as_constants_of_a_capture_are() -> None:
    assert_trains_alike(Constants(), {}, steps=1)


def test_items_of_tensors_and_of_tuples_cross_a_cut_together() -> None:
    plan = pipecompile.PlanOptions(pins={"0": 0, "1": 1})
    assert_trains_alike(nn.Sequential(Takes(), Gives()), {"plan": plan}, steps=1)


# Objects


@dataclass
class Settings:
    factor: float
    name: str = "it's"


class Word(str):
    """Says three."""

    def __call__(self, x: float) -> float:
        return x


class Plain:
    def __init__(self, factor: float) -> None:
        self.factor = factor


class Mode(Enum):
    TWICE = 2.0
    THRICE = 3.0


class Bits(Flag):
    ONE = 1
    TWO = 2


class Axis(IntEnum):
    LAST = -1


class Reduction(str, Enum):  # noqa: UP042
    NONE = "none"


class Factor(float):
    def __repr__(self) -> str:
        return "<a factor>"


class Times(Function):
    """Multiplies by what an object says, if it is that very object."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, what: Any, *more: Any) -> Tensor:
        ctx.factor = factor_of(what)
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient * ctx.factor * 5, None


def factor_of(what: Any) -> float:
    match what:
        case Settings() | Plain():
            return what.factor
        case Mode():
            return 2.0 if what is Mode.TWICE else 3.0
        case Bits():
            return 1.5 if what == Bits.ONE | Bits.TWO else 7.0
        case Factor():
            return float(what)
        case [inner] | {"inner": inner}:
            return factor_of(inner)
    return float(what(3.0) if callable(what) else what)


OBJECTS: dict[str, Any] = {
    "dataclass": Settings(2.5),
    "object": Plain(1.5),
    "enum": Mode.TWICE,
    "flags": Bits.ONE | Bits.TWO,
    "float of its own": Factor(2.5),
    "function": abs,
    "lambda": lambda x: x / 2,
    "class": float,
    "in a list": [Settings(0.5)],
    "in a dict": {"inner": Settings(0.5)},
    "a word that is taken for one": {"inner": Word("<held 0>")},
}


class Around(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.function = blocks(4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2:](self.function(self.body[:2](x)))


@WAYS
@pytest.mark.parametrize("name", OBJECTS)
def test_any_object_may_be_an_argument_of_a_custom_function(name: str, way: dict[str, Any]) -> None:
    assert_trains_alike(Around(lambda h: Times.apply(h, OBJECTS[name])), way, steps=2)


TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "IntEnum": lambda h: h.softmax(dim=Axis.LAST),
    "str and Enum": lambda h: F.mse_loss(h, h * 2, reduction=Reduction.NONE),
    "float of its own": lambda h: h * Factor(1.5),
    "in a tuple": lambda h: h.sum((Axis.LAST,), keepdim=True) + h,
    "generator": lambda h: h + torch.rand(D, generator=torch.Generator().manual_seed(3), dtype=h.dtype) * 0,
}


@WAYS
@pytest.mark.parametrize("name", TORCHS)
def test_any_object_may_be_an_argument_of_a_function_of_torch(name: str, way: dict[str, Any]) -> None:
    assert_trains_alike(Around(TORCHS[name]), way, steps=2)


# What torch logs meanwhile


class Kept(logging.Handler):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def log() -> Iterator[Kept]:
    kept = Kept()
    loggers = [logging.root, logging.getLogger("torch.fx.experimental.symbolic_shapes")]  # torch's do not pass on
    for logger in loggers:
        logger.addHandler(kept)
    yield kept
    for logger in loggers:
        logger.removeHandler(kept)


def test_torchs_own_log_is_quiet_while_a_model_is_tried_out_and_as_before_afterwards(log: Kept) -> None:
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch")]
    before = {name: (it := logging.getLogger(name), it.level, [*it.handlers], [*it.filters]) for name in names}
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(4)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, FakeTensor):
                logger.error("failed while attempting to run meta")
            logging.getLogger("mine").error("seen")
            return self.body(x)

    pipe_of(Logs().double())(*floats(0))
    assert {record.name for record in log.records} == {"mine"}
    for name, (it, level, handlers, filters) in before.items():
        assert (it.level, it.handlers, it.filters) == (level, handlers, filters), name
    logger.error("heard")
    assert log.records[-1].getMessage() == "heard"
