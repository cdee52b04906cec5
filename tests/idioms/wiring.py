"""How classes, parameters and submodules are put together: descriptors, mixins, parameters that are not registered."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import typing
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Wrapped, idiom, takes


class Plain(Wrapped):
    """One layer more."""

    def middle(self, h: Tensor) -> Tensor:
        return h


class Computed:
    """A descriptor that makes its value from two parameters."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else module._v * module._g[:, None]


@idiom()
class WeightByDescriptor(Wrapped):
    """A weight that a descriptor computes each time that it is read."""

    weight = Computed()

    def __init__(self) -> None:
        super().__init__()
        self._v = nn.Parameter(torch.randn(D, D))
        self._g = nn.Parameter(torch.rand(D))

    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight) + F.linear(h, self.weight.T)


class Norms:
    """A mixin with a method over what the class beside it has."""

    def normed(self, h: Tensor) -> Tensor:
        return getattr(self, "norm")(h)  # noqa: B009


class Scales:
    scale: Tensor

    def scaled(self, h: Tensor) -> Tensor:
        return h * self.scale


@idiom()
class Mixins(Norms, Scales, Wrapped):
    """Mixins before the module in the order of classes, with ``super()`` all along."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.scale = nn.Parameter(torch.ones(D))

    def middle(self, h: Tensor) -> Tensor:
        return self.scaled(self.normed(h))


class Template(nn.Module, ABC):
    @abstractmethod
    def step(self, h: Tensor, i: int) -> Tensor: ...

    def forward(self, h: Tensor) -> Tensor:
        return functools.reduce(self.step, range(3), h)


@idiom()
class TemplateMethod(Template):
    """An abstract base whose forward calls what the subclass defines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def step(self, h: Tensor, i: int) -> Tensor:
        return h + torch.tanh(self.layers[i](h))


@idiom()
class ParametersInAPlainDict(nn.Module):
    """A functional model: named tensors in a ParameterDict, a pure function over ``dict(params)``."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterDict({f"w{i}": torch.randn(D, D) / 3 for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(dict(self.params), x)

    @staticmethod
    def apply_with(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for name in sorted(params):
            x = torch.tanh(x @ params[name])
        return x


@idiom(refused="register it as an nn.Parameter")
class RawTensorsInAList(Wrapped):
    """Leaf tensors with gradients in a plain list, that are no parameters and that an optimizer of one's own has."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = [torch.randn(D, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def middle(self, h: Tensor) -> Tensor:
        for w in self.raw:
            h = torch.tanh(h @ w)
        return h

    def outside(self) -> list[Any]:
        return [w.grad for w in self.raw]


@idiom()
class ClosureOverParameters(Wrapped):
    """A function made in the constructor that closes over parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.bias = nn.Parameter(torch.zeros(D))

        def apply(h: Tensor) -> Tensor:
            return torch.tanh(h @ self.weight + self.bias)

        self.fn = apply

    def middle(self, h: Tensor) -> Tensor:
        return self.fn(h)


@idiom()
class HiddenModule(Wrapped):
    """A submodule in a tuple, so that it is not registered; its parameters are those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.hidden = (self.layer, lambda h: torch.relu(h))

    def middle(self, h: Tensor) -> Tensor:
        layer, act = self.hidden
        return act(layer(h)) + self.layer(h)


@idiom()
class UnregisteredModule(Wrapped):
    """A teacher in a list, so that ``parameters()`` and ``state_dict`` do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [nn.Linear(D, D).double().requires_grad_(False)]

    def middle(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher[0](h)
        return h + target


@idiom()
class ParentByWeakReference(nn.Module):
    """A child that reads a parameter of its parent through a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))
        self.child = ReadsParent(self)
        self.leave = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.child(x)))


class ReadsParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        parent = self.parent()
        assert parent is not None
        return self.inner(x) * typing.cast(Any, parent).scale


@idiom()
class TransposedTie(nn.Module):
    """An autoencoder whose decoder uses the encoder's weight transposed, three layers deep."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.biases = nn.ParameterList(torch.zeros(D) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x
        for layer in self.encoder:
            h = torch.tanh(layer(h))
        for layer, bias in zip(reversed(self.encoder), reversed(list(self.biases)), strict=True):
            h = torch.tanh(F.linear(h, layer.weight.t(), bias))
        return {"loss": F.mse_loss(h, x), "out": h}


@idiom()
class ParameterThatIsAView(nn.Module):
    """Two parameters whose ``.data`` are halves of one flat buffer, as flat optimizers lay them out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)

    def double(self) -> ParameterThatIsAView:
        super().double()
        flat = torch.cat([self.one.weight.data.flatten(), self.two.weight.data.flatten()])
        self.one.weight.data = flat[: D * D].view(D, D)
        self.two.weight.data = flat[D * D :].view(D, D)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


@idiom()
class SlicesOfOneWeight(nn.Module):
    """One large parameter cut into the weights of four layers (a slimmable network)."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(4 * D * D + 4 * D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [D * D, D] * 4
        pieces = self.flat.split(sizes)
        for weight, bias in itertools.batched(pieces, 2) if hasattr(itertools, "batched") else _pairs(pieces):
            x = torch.tanh(F.linear(x, weight.view(D, D), bias))
        return x


def _pairs(pieces: Any) -> Iterator[Any]:
    return iter(zip(pieces[::2], pieces[1::2], strict=True))


@idiom(lambda draw: ((draw.ids(11, 5), draw.ids(11, 5)), {}))
class TiedInThreePlaces(nn.Module):
    """One table as the embedding of two towers and as the head, by assignment after construction."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(11, D), nn.Embedding(11, D)
        self.middle = nn.Linear(D, D)
        self.head = nn.Linear(D, 11, bias=False)
        self.right.weight = self.left.weight
        self.head.weight = self.left.weight

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.middle(self.left(a) + self.right(b)))
        logits = self.head(h)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), b.flatten()), "logits": logits}


class Config(NamedTuple):
    width: int = D
    depth: int = 2
    act: str = "tanh"


@dataclass(frozen=True)
class Settings:
    rates: tuple[float, ...] = (0.5, 0.25)
    options: dict[str, Any] = field(default_factory=lambda: {"bias": True})


@idiom()
class SettingsInDataclasses(Wrapped):
    """A NamedTuple and a frozen dataclass as configs, ``replace`` in forward, ``match`` over them."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.settings = Config(), Settings()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(self.config.depth))

    def middle(self, h: Tensor) -> Tensor:
        settings = replace(self.settings, rates=self.settings.rates[::-1])
        for layer, rate in zip(self.layers, settings.rates, strict=True):
            match self.config:
                case Config(act="tanh"):
                    h = h + rate * torch.tanh(layer(h))
                case _:
                    h = layer(h)
        return h


@dataclass
class Batch:
    """A batch as its own class, registered with torch's trees."""

    x: Tensor
    y: Tensor
    name: str = "train"

    def shown(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}


torch.utils._pytree.register_dataclass(Batch)


@idiom(lambda draw: ((Batch(draw.floats(D), draw.floats(D)),), {}))
class DataclassBatch(Plain):
    """A batch in a dataclass that is a tree of torch's."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = super().forward(batch.x)
        return {"loss": F.mse_loss(out, batch.y), "out": out}


Point = namedtuple("Point", ["here", "there"])


@idiom(lambda draw: ((Point(draw.floats(D), {"deep": [draw.floats(D), (draw.floats(D), None, 3)]}),), {}))
class NamedTupleBatch(Plain):
    """A batch in a namedtuple of dicts of lists of tuples with None and numbers."""

    def forward(self, point: Any) -> Any:
        first, (second, nothing, number) = point.there["deep"]
        assert nothing is None
        out = super().forward(point.here + first / number)
        return Point(here=out, there=OrderedDict(a=super().forward(second), b=[out * 2]))


@idiom(lambda draw: ((), {"x": draw.floats(D), "mask": draw.floats(D) > 0}))
class KeywordsOnly(Plain):
    """Arguments that may be given by name alone, some with defaults that are tensors."""

    def forward(self, *, x: Tensor, mask: Tensor, bias: Tensor | float = 0.5, **options: Any) -> Tensor:
        assert not options
        return super().forward(x.masked_fill(mask, 0.0) + bias)


@idiom()
class GeneratorsOfLayers(Wrapped):
    """A generator method that yields activations, consumed by ``enumerate``, ``next`` and ``zip``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(D, D) for name in "abc"})

    def states(self, h: Tensor) -> Iterator[Tensor]:
        for name, layer in self.layers.items():
            h = torch.tanh(layer(h)) if name != "b" else h + layer(h)
            yield h

    def middle(self, h: Tensor) -> Tensor:
        states = self.states(h)
        first = next(states)
        return first + sum(weight * state for weight, state in zip((0.5, 2.0), states, strict=True))


class Amplified:
    """A context that changes the module for its extent."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> Amplified:
        self.before, self.module.gain = self.module.gain, 2.0
        return self

    def __exit__(self, *error: Any) -> None:
        self.module.gain = self.before


@idiom()
class ContextsInForward(Wrapped):
    """Contexts of one's own: a class, a generator and an exit stack."""

    gain = 1.0

    @contextlib.contextmanager
    def doubled(self) -> Iterator[float]:
        before, self.gain = self.gain, self.gain * 2
        try:
            yield self.gain
        finally:
            self.gain = before

    def middle(self, h: Tensor) -> Tensor:
        with Amplified(self), contextlib.ExitStack() as stack:
            factor = stack.enter_context(self.doubled())
            h = torch.tanh(h * self.gain) / factor
        return h * self.gain


def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = fn(self, *args, **kwargs)
        return result + self.offset

    return wrapper


@idiom()
class DecoratedMethods(Wrapped):
    """Decorators with ``wraps``, ``singledispatchmethod``, ``partialmethod``, static and class methods."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(D))

    @logged
    def shifted(self, h: Tensor, by: float) -> Tensor:
        return torch.tanh(h) * by

    half = functools.partialmethod(shifted, by=0.5)

    @functools.singledispatchmethod
    def join(self, other: Any, h: Tensor) -> Tensor:
        return h

    @join.register
    def _(self, other: int, h: Tensor) -> Tensor:
        return h * other

    @classmethod
    def make(cls, h: Tensor) -> Tensor:
        return cls.squeeze(h) + 1

    @staticmethod
    def squeeze(h: Tensor) -> Tensor:
        return torch.sigmoid(h)

    def middle(self, h: Tensor) -> Tensor:
        return self.join(3, self.half(h)) + self.make(h)


@idiom()
class OperatorsOnModules(nn.Module):
    """Modules with ``__getitem__``, ``__len__``, ``__iter__``, ``__contains__`` and ``__or__``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)])

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> nn.Module:
        return self.steps[i]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.steps)

    def __or__(self, other: nn.Module) -> nn.Sequential:
        return nn.Sequential(self, other)

    def forward(self, x: Tensor) -> Tensor:
        for step in self:
            x = step(x)
        return x + self[len(self) - 1](x)


@idiom()
class AttributesByDict(Wrapped):
    """Modules put into ``__dict__`` and ``_modules`` by hand, and attributes by ``object.__setattr__``."""

    def __init__(self) -> None:
        super().__init__()
        self._modules["by hand"] = nn.Linear(D, D)
        self.register_module("none", None)
        self.register_parameter("bias", None)
        object.__setattr__(self, "past", 0.25)

    def middle(self, h: Tensor) -> Tensor:
        assert self.none is None
        assert self.bias is None
        return self._modules["by hand"](h) * self.__dict__["past"]  # type: ignore[misc]


@idiom()
class HeadsByDefaultDict(Wrapped):
    """Results collected by task in a ``defaultdict(list)`` and a deque, then stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})

    def middle(self, h: Tensor) -> Tensor:
        found: defaultdict[str, list[Tensor]] = defaultdict(list)
        recent: deque[Tensor] = deque(maxlen=2)
        for (name, head), power in itertools.product(self.heads.items(), (1, 2)):
            found[name].append(head(h) ** power)
            recent.append(found[name][-1])
        return torch.stack([operator.add(*pair) for pair in found.values()]).prod(0) + recent[0]


@idiom(takes(4, D))
class CallsAnotherForward(Wrapped):
    """``forward`` chosen at run time: a dict of methods by the number of dimensions."""

    def middle(self, h: Tensor) -> Tensor:
        return {2: self.flat, 3: self.deep}[h.dim()](h)

    def flat(self, h: Tensor) -> Tensor:
        return h

    def deep(self, h: Tensor) -> Tensor:
        return h.mean(1, keepdim=True) + h


@idiom(refused="no shape yet")
class UninitializedScale(Wrapped):
    """A parameter without a shape until the first call: ``UninitializedParameter.materialize``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.UninitializedParameter()

    def middle(self, h: Tensor) -> Tensor:
        if isinstance(self.scale, nn.UninitializedParameter):
            self.scale.materialize(h.shape[-1:])
            with torch.no_grad():
                self.scale.fill_(1.0)
        return h * self.scale


@idiom(refused_stream="tied|asynchronous|stages|which")
class FrozenByProperty(Wrapped):
    """``requires_grad_`` switched in forward for a part (alternating training)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        weight = self.part.weight.detach() if self.training else self.part.weight
        return F.linear(h, weight, self.part.bias)
