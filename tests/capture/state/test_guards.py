"""Python attributes: what a forward reads is guarded, what it sets is set once a call, as without a pipeline."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.capture.state.counters import start
from pipecompile.capture.state.guards import MISSING, NOT_PLAIN, State, frozen
from pipecompile.errors import CaptureError

Change = Callable[[Any], None]


class Inner(nn.Module):
    scale_all = 1.0  # on the class, as an option's default

    def __init__(self, forward: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        self.function = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


class Outer(nn.Module):
    """Blocks before and after a module with attributes."""

    def __init__(self, forward: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = blocks(2), Inner(forward, **attributes), blocks(2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 3, D, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def pair(forward: Callable[..., Tensor], make: Callable[[], dict[str, Any]] = dict, **options: Any) -> tuple[Any, Any]:
    """A pipeline and the same model without one, each with attributes of its own."""
    pipe = pipecompile.compile(Outer(forward, **make()), ["cpu", "cpu"], microbatches=2, costs="count", **options)
    return pipe, Outer(forward, **make())


def follow(pipe: Any, model: Any, change: Change = lambda inner: None, count: int = 4) -> None:
    """Changes both in the same way, then holds a step of one to a step of the other."""
    for module in (pipe, model):
        change(module.inner)
    inputs = ((rows(count),), {})
    assert_same(step(pipe, pipe.pipeline.model, mean_square, inputs), step(model, model, mean_square, inputs))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if frozen(value) is not NOT_PLAIN}


# What the forward reads


@dataclass
class Options:
    scale: float = 1.0
    deep: Any = None


@dataclass(slots=True)
class Slots:
    scale: float = 1.0


class Config:
    """Finds what it lacks under another name, as the configs of transformers do."""

    names = {"size": "width"}  # noqa: RUF012

    def __init__(self) -> None:
        self.width = 2

    def __getattribute__(self, name: str) -> Any:
        names = object.__getattribute__(self, "names") if name != "names" else {}
        return super().__getattribute__(names.get(name, name))


class Kind:
    value = 2


def setting(name: str, value: Any) -> Change:
    return lambda inner: setattr(inner, name, value)


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[..., Tensor], Change]] = {
    "bool": (lambda: {"flag": True}, lambda self, h: h * 2 if self.flag else h, setting("flag", False)),
    "int": (lambda: {"count": 2}, lambda self, h: h * self.count, setting("count", 3)),
    "bool for int": (lambda: {"count": 1}, lambda self, h: h * 2 if self.count is True else h, setting("count", True)),
    "float": (lambda: {"scale": 0.5}, lambda self, h: h * self.scale, setting("scale", 0.25)),
    "str": (lambda: {"act": "tanh"}, lambda self, h: getattr(torch, self.act)(h), setting("act", "sin")),
    "none": (lambda: {"scale": None}, lambda self, h: h if self.scale is None else h * self.scale, setting("scale", 3)),
    "tuple": (lambda: {"scales": (1, 2)}, lambda self, h: h * sum(self.scales), setting("scales", (1, 3))),
    "list": (lambda: {"scales": [1, 2]}, lambda self, h: h * sum(self.scales), lambda inner: inner.scales.append(3)),
    "dict": (lambda: {"o": {"k": 2}}, lambda self, h: h * self.o["k"], lambda inner: inner.o.update(k=5)),
    "set": (lambda: {"on": {"a"}}, lambda self, h: h * len(self.on), lambda inner: inner.on.add("b")),
    "function": (lambda: {"act": torch.tanh}, lambda self, h: self.act(h), setting("act", torch.sin)),
    "dtype": (lambda: {"to": torch.float64}, lambda self, h: h.to(self.to).double(), setting("to", torch.float32)),
    "absent": (dict, lambda self, h: h * getattr(self, "scale", 2.0), setting("scale", 4.0)),
    "class": (dict, lambda self, h: h * self.scale_all, setting("scale_all", 4.0)),
    "config": (
        lambda: {"config": Options()},
        lambda self, h: h * self.config.scale,
        lambda inner: setattr(inner.config, "scale", 3.0),
    ),
    "config in config": (
        lambda: {"config": Options(deep=Options())},
        lambda self, h: h * self.config.deep.scale,
        lambda inner: setattr(inner.config.deep, "scale", 3.0),
    ),
    "config in a list": (
        lambda: {"configs": [Options(), Options()]},
        lambda self, h: h * self.configs[1].scale,
        lambda inner: setattr(inner.configs[1], "scale", 3.0),
    ),
    "config with slots": (
        lambda: {"config": Slots()},
        lambda self, h: h * self.config.scale,
        lambda inner: setattr(inner.config, "scale", 3.0),
    ),
    "namespace": (
        lambda: {"config": SimpleNamespace(scale=1.0)},
        lambda self, h: h * self.config.scale,
        lambda inner: setattr(inner.config, "scale", 3.0),
    ),
    "other name": (
        lambda: {"config": Config()},
        lambda self, h: h * self.config.size,
        lambda inner: setattr(inner.config, "width", 3),
    ),
    "child": (
        lambda: {"child": nn.Dropout(0.0)},
        lambda self, h: self.child(h) * (self.child.p + 1),
        lambda inner: setattr(inner.child, "inplace", True),
    ),
    "exchanged child": (
        lambda: {"child": nn.Tanh()},
        lambda self, h: self.child(h),
        lambda inner: setattr(inner, "child", nn.Sigmoid()),
    ),
}


@pytest.mark.parametrize(("make", "forward", "change"), CHANGES.values(), ids=CHANGES)
def test_an_attribute_that_changes_between_calls_is_seen(
    make: Callable[[], dict[str, Any]], forward: Callable[..., Tensor], change: Change
) -> None:
    pipe, model = pair(forward, make)
    follow(pipe, model)
    placement = pipe.pipeline.plan.rank_of
    follow(pipe, model)
    assert pipe.pipeline.captures == 1
    follow(pipe, model, change)
    assert pipe.pipeline.captures == 2
    assert pipe.pipeline.plan.rank_of == placement
    follow(pipe, model)
    assert pipe.pipeline.captures == 2


def test_a_flag_that_changes_back_finds_its_capture() -> None:
    pipe, model = pair(lambda self, h: h * 2 if self.flag else h, lambda: {"flag": True})
    for flag in (True, False, True, False):
        follow(pipe, model, setting("flag", flag))
    assert pipe.pipeline.captures == 2
    assert any("inner.flag is False, captured with True" in reason for reason in pipe.pipeline.report.captures)


def test_an_attribute_that_is_not_read_is_not_guarded() -> None:
    pipe, model = pair(lambda self, h: h, lambda: {"epoch": 0})
    for epoch in range(3):
        follow(pipe, model, setting("epoch", epoch))
    assert pipe.pipeline.captures == 1


def test_watching_ends_with_the_trace() -> None:
    pipe, model = pair(lambda self, h: h * self.config.scale, lambda: {"config": Options()})
    follow(pipe, model)
    assert "__getattribute__" not in vars(Options)
    assert "__getattribute__" not in vars(nn.Module)
    failing, _ = pair(lambda self, h: h @ h @ h @ self.config.scale, lambda: {"config": Config()})
    own = Config.__getattribute__
    with pytest.raises(CaptureError):
        failing(rows())
    assert Config.__getattribute__ is own
    assert "__getattribute__" not in vars(nn.Module)


def test_a_config_of_transformers_is_guarded() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    ids = torch.randint(61, (2, 8))
    pipe(ids)
    assert model.config.use_cache is True
    model.config.use_cache = False
    pipe(ids)
    assert pipe.pipeline.captures == 1
    assert pipe(ids).hidden_states is None
    model.config.output_hidden_states = True
    with torch.no_grad():
        torch.testing.assert_close(pipe(ids).hidden_states, model(ids).hidden_states)
    assert pipe.pipeline.captures == 2


# What the forward sets


def _counted(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h


def _every_second(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h * 2 if self.calls % 2 else h


def _warming_up(self: Any, h: Tensor) -> Tensor:
    self.calls = self.calls + 1
    return h if self.calls < 3 else h * 3


def _annealed(self: Any, h: Tensor) -> Tensor:
    self.calls = max(self.calls * 0.5, 0.2)
    return h if self.calls > 0.3 else h * 2


def _counting_rows(self: Any, h: Tensor) -> Tensor:
    self.calls += h.shape[0]
    return h


def _as_number(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h * self.calls


def _as_index(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h + h[..., self.calls % 2 : self.calls % 2 + 1]


def _repeated(self: Any, h: Tensor) -> Tensor:
    for _ in range(self.calls % 3):
        h = torch.tanh(h)
    self.calls += 1
    return h


COUNTERS: dict[str, tuple[Callable[..., Tensor], int, int]] = {  # forward, first value, captures of six calls
    "counted": (_counted, 0, 1),
    "every second": (_every_second, 0, 2),
    "warming up": (_warming_up, 0, 2),
    "annealed": (_annealed, 1, 3),
    "counting rows": (_counting_rows, 0, 1),
    "as a number": (_as_number, 0, 1),
    "as an index": (_as_index, 0, 2),
    "repeated": (_repeated, 0, 3),
}


@pytest.mark.parametrize(("forward", "first", "captures"), COUNTERS.values(), ids=COUNTERS)
def test_a_number_that_forward_sets_is_set_once_a_call_and_followed(
    forward: Callable[..., Tensor], first: int, captures: int
) -> None:
    pipe, model = pair(forward, lambda: {"calls": first})
    for _ in range(6):
        follow(pipe, model)
        assert pipe.inner.calls == model.inner.calls
        assert type(pipe.inner.calls) is type(model.inner.calls)
    assert pipe.pipeline.captures == captures
    assert pipe.pipeline.report.attributes == ("inner.calls is set once per call",)


def test_two_numbers_that_depend_on_each_other_are_followed() -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        self.first, self.second = self.second, self.first + self.second
        return h * 2 if self.second > 9 else h

    pipe, model = pair(forward, lambda: {"first": 1, "second": 2})
    for _ in range(6):
        follow(pipe, model)
        assert plain_attributes(pipe.inner) == plain_attributes(model.inner)
    assert pipe.pipeline.captures == 2


def _results(pipe: Any) -> list[str]:
    return [line for line in pipe.pipeline.report.guards if line.startswith("the results of")]


def test_the_report_counts_the_operations_on_all_followed_numbers_once() -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        self.first, self.second = self.first + 1, self.second + 1
        return h * 2 if (self.first > 9 and self.second < 99) or self.second > 999 else h

    pipe, model = pair(forward, lambda: {"first": 9, "second": 2})
    follow(pipe, model)
    assert _results(pipe) == ["the results of 2 operations on inner.first, inner.second"]


def test_the_report_leaves_out_numbers_on_which_no_decision_depends() -> None:
    pipe, model = pair(_counted, lambda: {"calls": 1})
    follow(pipe, model)
    assert _results(pipe) == []


def test_a_number_that_forward_sets_may_be_set_by_the_user_as_well() -> None:
    pipe, model = pair(_warming_up, lambda: {"calls": 0})
    for value in (0, 7, 1, None):
        if value is None:
            pipe.inner.calls = "many"
            with pytest.raises((CaptureError, TypeError)):
                pipe(rows())
        else:
            follow(pipe, model, setting("calls", value))
            assert pipe.inner.calls == model.inner.calls


def test_the_state_of_an_object_that_a_module_holds_is_kept_as_well() -> None:
    @dataclass
    class Statistics:
        calls: int = 0
        sizes: list[int] = field(default_factory=list)

    def forward(self: Any, h: Tensor) -> Tensor:
        self.statistics.calls += 1
        return h * 2 if self.statistics.calls % 2 else h

    pipe, model = pair(forward, lambda: {"statistics": Statistics()})
    for _ in range(4):
        follow(pipe, model)
        assert pipe.inner.statistics == model.inner.statistics
    assert pipe.pipeline.captures == 2


def _flipping(self: Any, h: Tensor) -> Tensor:
    self.flag = not self.flag
    return h * 2 if self.flag else h


def _first_call(self: Any, h: Tensor) -> Tensor:
    if not hasattr(self, "ready"):
        self.ready = True
        return h * 2
    return h


def _noting_the_shape(self: Any, h: Tensor) -> Tensor:
    self.seen = h.shape[0]
    return h


def _appending(self: Any, h: Tensor) -> Tensor:
    self.log.append(len(self.log))
    return h * len(self.log)


def _in_a_dict(self: Any, h: Tensor) -> Tensor:
    self.log["n"] = self.log.get("n", 0) + 1
    return h * (self.log["n"] % 2 + 1)


SET = {
    "flipping": (_flipping, lambda: {"flag": False}),
    "first call": (_first_call, dict),
    "shape": (_noting_the_shape, dict),
    "appending": (_appending, lambda: {"log": []}),
    "in a dict": (_in_a_dict, lambda: {"log": {}}),
}


@pytest.mark.parametrize(("forward", "make"), SET.values(), ids=SET)
def test_whatever_forward_sets_is_what_the_unsplit_model_has_after_each_call(
    forward: Callable[..., Tensor], make: Callable[[], dict[str, Any]]
) -> None:
    pipe, model = pair(forward, make)
    for count in (4, 4, 6, 4):
        follow(pipe, model, count=count)
        assert plain_attributes(pipe.inner) == plain_attributes(model.inner)


def test_a_call_that_only_prepares_counts_nothing() -> None:
    pipe, _ = pair(_counted, lambda: {"calls": 0})
    pipe.pipeline.prepare(rows())
    assert pipe.inner.calls == 0
    pipe(rows())
    assert pipe.inner.calls == 1


def test_evaluation_counts_as_well() -> None:
    pipe, model = pair(_every_second, lambda: {"calls": 0})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(pipe(rows()), model(rows()))
    assert pipe.inner.calls == model.inner.calls == 3


def test_a_module_kept_whole_may_not_count() -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        self.calls += 1
        return h * 2 if h.sum() > 0 else h

    pipe, _ = pair(forward, lambda: {"calls": 0})
    with pytest.raises(CaptureError, match=r"'inner' is kept whole .*self\.calls.*register_buffer"):
        pipe(rows())


def test_a_flag_of_a_module_kept_whole_is_guarded() -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        return h.abs() * 2 if h.abs().sum() > 0 and self.flag else h

    pipe, model = pair(forward, lambda: {"flag": True})
    for flag in (True, False, True):
        follow(pipe, model, setting("flag", flag))
    assert pipe.pipeline.captures == 2


# Captures that keep coming


def test_captures_that_keep_coming_are_told_with_what_differed() -> None:
    pipe, _ = pair(lambda self, h: h * self.scale, lambda: {"scale": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(7):
            pipe.inner.scale = float(number)
            pipe(rows())
    pipe.inner.scale = 7.0
    with pytest.warns(UserWarning, match=r"captured 8 times(.|\n)*inner\.scale is 7\.0(.|\n)*buffer"):
        pipe(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.inner.scale = 8.0
        pipe(rows())
    assert len(pipe.pipeline.report.captures) == pipe.pipeline.captures == 9


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop = blocks(4), nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False) -> Tensor:
        h = self.drop(self.body(x))
        h = h if mask is None else h * mask
        return h * 2 if twice else h


def test_each_kind_of_call_is_one_capture_with_its_reason() -> None:
    pipe = pipecompile.compile(Optional(), ["cpu", "cpu"], microbatches=2, costs="count")
    x = rows().float()
    for _ in range(2):
        pipe.train()(x)
        pipe.eval()(x)
        pipe(x, mask=torch.ones_like(x))
        pipe(x, mask=None, twice=True)
        pipe(x.double().float(), mask=None, twice=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pipe(x)
    reasons = pipe.pipeline.report.captures
    assert pipe.pipeline.captures == len(reasons)
    expected = ["first call", "eval()", "with mask", "without mask", "instead of True", "autocast"]
    assert len(reasons) == len(expected), reasons
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason, reasons


# The parts


def test_a_frozen_value_compares_and_does_not_change() -> None:
    value = {"a": [1, (2.0, None)], "b": {3}}
    before = frozen(value)
    assert before == frozen({"a": [1, (2.0, None)], "b": {3}})
    value["a"].append(4)
    assert frozen(value) != before
    assert frozen((1,)) != frozen([1])
    assert frozen([torch.ones(1)]) is NOT_PLAIN
    assert frozen(object()) is NOT_PLAIN
    assert MISSING != NOT_PLAIN


def test_a_number_remembers_how_it_was_computed_and_what_was_asked() -> None:
    questions: list[Any] = []
    number = start(5, (0, "n"), questions)
    derived = -((number + 1) * 2 - 3) // 2 + 10 % number
    assert isinstance(derived, int)
    assert questions == []

    def computed(n: int) -> int:
        return -((n + 1) * 2 - 3) // 2 + 10 % n

    for n in (5, 8, 13):
        assert derived.of(State({(0, "n"): n}, {})) == computed(n)
    assert (number > 3) is True
    assert (number > 7) is False
    assert [*range(number)] == [0, 1, 2, 3, 4]
    answers = [[question(State({(0, "n"): n}, {})) for question, _ in questions] for n in (5, 9)]
    assert answers == [[True, False, 5], [True, True, 9]]


class Frozen(OrderedDict[str, Any]):
    """A configuration that nobody may change, as diffusers has it."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        for name, value in values.items():
            setattr(self, name, value)
        self.closed = True

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a configuration is not changed")

    clear = update = pop = popitem = setdefault = copy = __delitem__ = _refuse

    def __setitem__(self, key: str, value: Any) -> None:
        self._refuse() if hasattr(self, "closed") else super().__setitem__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse() if hasattr(self, "closed") else super().__setattr__(name, value)


class Sealed(list[Any]):
    """A list that nobody may change."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("the list is sealed")

    clear = extend = append = copy = __setitem__ = __delitem__ = _refuse


@pytest.mark.parametrize("config", [Frozen({"scale": 2.0}), Sealed([2.0])], ids=["dict", "list"])
def test_containers_that_refuse_to_be_changed_are_left_alone(config: Any) -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        return h * next(iter(self.config.values() if isinstance(self.config, dict) else self.config))

    pipe, model = pair(forward, lambda: {"config": config})
    for _ in range(2):
        follow(pipe, model)
    assert pipe.pipeline.captures == 1
    assert pipe.inner.config is config


class Log(OrderedDict[str, Any]):
    """A dict with an item setter of its own, which the restoring of its contents must not call."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value * 2)


def test_a_dict_with_a_setter_of_its_own_is_put_back_as_it_was() -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        self.log["n"] = 3
        return h

    pipe, model = pair(forward, lambda: {"log": Log(a=1)})
    for _ in range(2):
        follow(pipe, model)
        assert pipe.inner.log == model.inner.log == {"a": 2, "n": 6}


class Made:
    """What a forward makes, works with by a function of its own, and changes."""

    def __init__(self, h: Tensor) -> None:
        self.h = h

    def total(self) -> Tensor:
        return sum(getattr(self, name) for name in ("h",))  # the generator's variable is this object


class MakesObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        made = Made(self.first(x))
        made.total()
        made.h = made.h.tanh()
        return self.last(made.total()).square().mean()


def test_an_object_that_the_forward_makes_is_not_compared_with_the_next_calls() -> None:
    model = MakesObjects().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    for seed in range(3):
        inputs = ((torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),), {})
        assert_same(step(pipe, model, lambda loss: loss, inputs), step(model, model, lambda loss: loss, inputs))
    assert pipe.pipeline.captures == 1


TYPED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.one(x) * FACTOR)
"""


@pytest.mark.parametrize("file", ["<stdin>", "<ipython-input-3-abc>", "<string>"])
def test_a_model_that_was_typed_at_a_prompt_is_guarded(file: str) -> None:
    cell: dict[str, Any] = {"nn": nn, "FACTOR": 1.0, "__name__": "__main__"}
    exec(compile(TYPED, file, "exec"), cell)
    pipe = pipecompile.compile(cell["Net"](), ["cpu"] * 2, microbatches=1, costs="count")
    x = torch.randn(3, 4)
    pipe(x)
    cell["FACTOR"] = 3.0
    torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))
    assert "__main__.FACTOR is 3.0, captured with 1.0" in pipe.pipeline.report.captures[-1]
