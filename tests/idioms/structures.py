"""How modules are put together, and what Python a forward is written in."""

from __future__ import annotations

import enum
import functools
import logging
import operator
import os
import time
import types
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.declare import D, Draw, Inputs, Wrapped, idiom, takes

log = logging.getLogger(__name__)


class Feed(nn.Sequential):
    """A subclass of Sequential with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(OrderedDict(up=nn.Linear(width, 2 * width), act=nn.GELU(), down=nn.Linear(2 * width, width)))


class Residual(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(x, **kwargs) + x


@idiom()
class SequentialSubclasses(nn.Module):
    """Subclasses of Sequential, and residual wrappers around callables."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Residual(nn.Sequential(nn.LayerNorm(D), Feed(D))) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Context(nn.Sequential):
    """Sequential whose forward passes a second argument to those that take it (diffusion U-Nets)."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, context) if isinstance(layer, FiLM) else layer(x)
        return x


class FiLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Linear(4, 2 * D)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.affine(context).chunk(2, dim=-1)
        return x * (1 + scale) + shift


@idiom(lambda draw: ((draw.floats(D), draw.floats(4)), {}))
class SequentialWithContext(nn.Module):
    """A Sequential that hands a condition to the layers that take one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Context(nn.Linear(D, D), FiLM(), nn.SiLU(), nn.Linear(D, D), FiLM())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(x, context)


@idiom()
class ListWithSkips(nn.Module):
    """ModuleLists up and down with a list of skips that is popped."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x).relu()
            skips.append(x)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=-1)).relu()
        assert not skips
        return x


@idiom()
class DenseConnections(nn.Module):
    """Each layer reads all layers before it (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D * (i + 1), D) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).tanh())
        return torch.cat(features, 1)


@idiom(lambda draw: ((draw.floats(D), "tanh"), {"heads": ["b", "a"]}))
class DispatchByName(nn.Module):
    """ModuleDict and ParameterDict chosen by strings that are arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "tanh": nn.Tanh()})
        self.heads = nn.ModuleDict({name: nn.Linear(D, 3) for name in "abc"})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in "abc"})

    def forward(self, x: Tensor, act: str, heads: list[str]) -> dict[str, Tensor]:
        h = self.acts[act](self.enter(x))
        return {name: self.heads[name](h) * self.scales[name] for name in heads}


@idiom()
class SharedLayer(nn.Module):
    """One layer called several times, and one registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.again = self.layer
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return self.head(self.again(x))


@idiom(lambda draw: ((draw.ids(11, 5),), {}))
class TiedEmbedding(nn.Module):
    """The output layer is the embedding's weight, through ``F.linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, D)
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.head = nn.Linear(D, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.body(self.embedding(ids))) + F.linear(self.embedding(ids), self.embedding.weight)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])


class Tree(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.here = nn.Linear(D, D)
        self.children_ = nn.ModuleList(Tree(depth - 1) for _ in range(2)) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.here(x).tanh()
        return h if self.children_ is None else h + sum(child(h) for child in self.children_)  # type: ignore


@idiom()
class Recursion(nn.Module):
    """A recursive module: a tree of depth two."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tree(x)


@idiom()
class RecursiveFunction(Wrapped):
    """A method that calls itself."""

    def fold(self, h: Tensor, depth: int) -> Tensor:
        return h if depth == 0 else self.fold(h.sin(), depth - 1) + h

    def middle(self, h: Tensor) -> Tensor:
        return self.fold(h, 3)


@idiom()
class FunctionsInGlobals(Wrapped):
    """An activation chosen from a module-level dict of lambdas and partials."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "leaky"

    def middle(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](ACTIVATIONS["swish"](h))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky": functools.partial(F.leaky_relu, negative_slope=0.3),
    "swish": lambda x: x * x.sigmoid(),
}


@idiom()
class CallablesOnTheModule(Wrapped):
    """Lambdas, partials and functions of torch kept as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch.tanh
        self.norm = functools.partial(F.layer_norm, normalized_shape=(D,))
        self.post = lambda x: x * 2
        self.reduce = operator.add

    def middle(self, h: Tensor) -> Tensor:
        return self.reduce(self.post(self.norm(self.act(h))), h)


@idiom()
class Properties(Wrapped):
    """Properties that give modules and computed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(D, D))

    @property
    def weight(self) -> Tensor:
        return self.raw.softmax(-1)

    @property
    def first(self) -> nn.Module:
        return self.enter

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters())).dtype

    def middle(self, h: Tensor) -> Tensor:
        bias = torch.arange(D, device=self.device, dtype=self.dtype)
        return self.first(h) @ self.weight + bias / D


class Delegates(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(x, self.weight).mean(-1, keepdim=True)


@idiom()
class GetattrDelegation(Wrapped):
    """A wrapper that hands what it lacks to the module inside (``__getattr__``)."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = Delegates(nn.Linear(D, D))

    def middle(self, h: Tensor) -> Tensor:
        return self.wrapped(h) * self.wrapped.in_features / D


@idiom()
class GetattrNumbered(nn.Module):
    """``getattr(self, f"layer{i}")`` and ``setattr`` in the constructor; ``hasattr`` in forward."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"layer{i}", nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while hasattr(self, f"layer{i}"):
            x = getattr(self, f"layer{i}")(x).tanh()
            i += 1
        return x


@idiom()
class WalksItself(nn.Module):
    """Forwards over ``self.children()``, ``self._modules.items()`` and ``named_children``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, module in self._modules.items():
            x = module(x)
            if name in {"b", "c"}:
                out[name] = x
        for _ in self.children():
            x = x + sum(p.sum() for p in self.a.parameters())
        return {**out, "end": x}


class Mode(enum.Enum):
    SUM = "sum"
    MAX = "max"


@idiom(lambda draw: ((draw.floats(4, D),), {"mode": Mode.MAX, "dims": (1,), "scale": 0.5, "flag": None}))
class PlainArgumentsOfAllKinds(Wrapped):
    """Enums, tuples, numbers and None as arguments."""

    def forward(self, x: Tensor, mode: Mode = Mode.SUM, dims: tuple[int, ...] = (), *, scale: float, flag: Any) -> Any:
        h = self.enter(x)
        h = h.sum(dims) if mode is Mode.SUM else h.amax(dims)
        return self.leave(h * scale) if flag is None else h


@idiom(lambda draw: ((draw.floats(D),), {"mask": draw.mask(D)}))
class OptionalInputs(Wrapped):
    """Arguments that may be None, one given by name and one not."""

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        h = self.enter(x)
        if mask is not None:
            h = h.masked_fill(~mask, 0.0)
        if bias is not None:
            h = h + bias
        return self.leave(h.tanh())


@idiom(lambda draw: ((draw.floats(D), draw.floats(D)), {"extra": draw.floats(D), "other": draw.floats(D)}))
class StarArguments(Wrapped):
    """``*args`` and ``**kwargs`` summed up."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        h = sum(self.enter(x) for x in args) + sum(self.enter(kwargs[name]).tanh() for name in sorted(kwargs))
        return self.leave(h.tanh())


def nested(draw: Draw) -> Inputs:
    pictures = [{"image": draw.floats(3), "size": (4, 5)}, {"image": draw.floats(3), "size": (2, 3)}]
    return ({"views": pictures, "text": (draw.ids(5, 4), draw.mask(4))},), {}


@idiom(nested)
class NestedInputs(nn.Module):
    """A dict of lists of dicts with tensors and plain sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, D)
        self.look = nn.Linear(3, D)
        self.head = nn.Linear(D, D)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["text"]
        text = (self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        views = [self.look(view["image"]) / view["size"][0] for view in batch["views"]]
        return self.head(torch.stack(views).mean(0) + text)


@idiom(lambda draw: (([draw.floats(D), draw.floats(D), draw.floats(D)],), {}))
class ListOfTensors(Wrapped):
    """A list of tensors, zipped with layers."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        layers = [self.enter, self.leave, self.enter]
        return [layer(x).tanh() for layer, x in zip(layers, xs, strict=True)]


Pair = namedtuple("Pair", ["hidden", "pooled"])


@idiom(takes(4, D))
class NamedTupleOutput(Wrapped):
    """A namedtuple made inside, and one returned."""

    def forward(self, x: Tensor) -> Pair:
        h = self.enter(x)
        return Pair(hidden=self.leave(h), pooled=h.tanh().mean(1))


@idiom(takes(4, D))
class PlainOutputs(Wrapped):
    """Sizes, numbers, strings and None among the outputs."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.leave(self.enter(x).tanh())
        return {"h": h, "length": x.shape[1], "name": "encoder", "nothing": None, "scale": 0.5, "dims": [h.ndim]}


@idiom(takes(4, D))
class SizesOfTheBatch(Wrapped):
    """``x.shape`` and ``len(x)`` among the outputs."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.leave(self.enter(x).tanh())
        return {"h": h, "shape": h.shape, "rows": len(x), "numel": x.numel()}


class Attributes(dict):  # type: ignore[type-arg]
    """A dict that is read by attributes, as configs are."""

    __getattr__ = dict.__getitem__


@idiom()
class ConfigOfAttributes(Wrapped):
    """Settings in a dict subclass and in a SimpleNamespace."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Attributes(scale=0.5, act="tanh", layers=[1, 2])
        self.space = types.SimpleNamespace(eps=1e-3, norm=True)

    def middle(self, h: Tensor) -> Tensor:
        for power in self.config.layers:
            h = h * self.config.scale**power
        if self.space.norm:
            h = h / (h.norm(dim=-1, keepdim=True) + self.space.eps)
        return getattr(torch, self.config.act)(h)


@idiom()
class TriesAndFallsBack(Wrapped):
    """``try: layer(x, mask=...) except TypeError: layer(x)``, as speechbrain's Sequential does."""

    def middle(self, h: Tensor) -> Tensor:
        try:
            return self.enter(h, mask=None)
        except TypeError:
            return self.enter(h)


@idiom()
class TriesAnImport(Wrapped):
    """An optional fast kernel that is not installed."""

    def middle(self, h: Tensor) -> Tensor:
        try:
            from kernel_that_nobody_has import fast
        except ImportError:
            fast = F.silu
        return fast(h)


@idiom(refused="differ")
class ChecksItsTypes(Wrapped):
    """``isinstance`` on tensors, ``type(x) is``, ``torch.is_tensor``, and a float in place of a tensor."""

    def middle(self, h: Tensor) -> Tensor:
        for part in (h, 0.5, None, [h]):
            if isinstance(part, Tensor):
                h = h + part
            elif torch.is_tensor(part) or isinstance(part, list):
                h = h * part[0]
            elif type(part) is float:
                h = h * part
        if type(h) is not Tensor:
            h = h * 1000
        return h


@idiom()
class AssertsAndFormats(Wrapped):
    """Assertions on shapes and dtypes, messages with shapes, a warning turned off."""

    def middle(self, h: Tensor) -> Tensor:
        assert h.ndim == 2, f"{h.shape}"
        assert h.dtype == self.enter.weight.dtype, f"{h.dtype}"
        assert h.is_floating_point()
        assert h.device == self.enter.weight.device
        if h.shape[-1] % 2:
            raise ValueError(f"width {h.shape[-1]} is odd")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.warn("never seen", stacklevel=1)
        log.debug("shape %s of %s", h.shape, str(tuple(h.shape)))
        return h.sin()


@idiom()
class TimesItself(Wrapped):
    """Clocks, environment variables and a logger in forward."""

    def middle(self, h: Tensor) -> Tensor:
        start = time.perf_counter()
        h = h * (2 if os.environ.get("A_VARIABLE_THAT_IS_NOT_SET") else 3)
        log.debug("took %f", time.perf_counter() - start)
        return h


@idiom()
class TrainingBranches(Wrapped):
    """Other computations in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.enter(x)
        if not self.training:
            return self.leave(h.tanh())
        return self.leave(h.tanh()), h.square().mean()


@idiom()
class CallsForwardDirectly(Wrapped):
    """``self.layer.forward(x)`` and ``super().forward(x)``, around the hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.enter.forward(x)

    def middle(self, h: Tensor) -> Tensor:
        return nn.Linear.forward(self.enter, h)


@idiom()
class ForwardHooks(Wrapped):
    """Forward hooks and pre-hooks that change inputs and outputs, with and without keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.enter.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.enter.register_forward_hook(lambda module, args, out: out + args[0])
        self.leave.register_forward_hook(lambda module, args, kwargs, out: out.sin(), with_kwargs=True)

    def middle(self, h: Tensor) -> Tensor:
        return h


@idiom()
class BackwardHooks(Wrapped):
    """A full backward hook that scales the gradient of a layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.inner.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


@idiom()
class MonkeyPatchedForward(Wrapped):
    """A forward replaced on the instance with ``types.MethodType``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

        def patched(self: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

        self.inner.forward = types.MethodType(patched, self.inner)  # type: ignore[method-assign]

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


def gated(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that multiplies by a gate."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return method(self, *args, **kwargs) * self.gate.sigmoid()

    return wrapper


@idiom()
class DecoratedForward(Wrapped):
    """A forward under a decorator that reads the module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(D))

    @gated
    def middle(self, h: Tensor) -> Tensor:
        return h.cos()


@idiom()
class ClassAttributes(Wrapped):
    """Numbers and tensors on the class."""

    scale = 0.25
    table = torch.linspace(0, 1, D, dtype=torch.float64)

    def middle(self, h: Tensor) -> Tensor:
        return h * type(self).scale + self.table * ClassAttributes.scale


class Rules:
    """A strategy that is no module."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, h: Tensor, **kwargs: Any) -> Tensor:
        return h * self.scale


@idiom()
class StrategyObjects(Wrapped):
    """An attention processor of diffusers' kind: a plain object that is called with the module."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Rules(0.3)

    def middle(self, h: Tensor) -> Tensor:
        return self.processor(h, module=self)


@idiom(stream=False)
class OneExpertPerCall(Wrapped):
    """Layers taken in turn by a counter on the module, of which only one runs in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.turn = 0

    def middle(self, h: Tensor) -> Tensor:
        layer = self.layers[self.turn % 2]
        self.turn += 1
        return layer(h)


@idiom()
class GeneratorsAndComprehensions(Wrapped):
    """``sum`` over generators, ``map``, ``zip``, ``functools.reduce``, walrus, dict comprehensions."""

    def middle(self, h: Tensor) -> Tensor:
        parts = h.chunk(4, dim=-1)
        named = {f"p{i}": part for i, part in enumerate(parts)}
        total = functools.reduce(torch.maximum, map(torch.sin, named.values()))
        if (width := total.shape[-1]) == 2:
            total = total * width
        return torch.cat([a * b + total for a, b in zip(parts, reversed(parts), strict=True)], dim=-1)


@idiom()
class TensorMethodsByName(Wrapped):
    """``getattr(torch, name)`` and operators as functions."""

    def middle(self, h: Tensor) -> Tensor:
        for name in ("sin", "cos"):
            h = getattr(torch, name)(h) + getattr(h, name)()
        return operator.matmul(h, operator.neg(self.enter.weight)) + (-h) ** 2 / (1 + abs(h)) + 1.0 - h % 0.3


@functools.lru_cache(maxsize=32)
def parsed(pattern: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    left, right = pattern.split("->")
    return tuple(left.split()), tuple(right.split())


def rearrange(x: Tensor, pattern: str) -> Tensor:
    """A transposition by names, from a recipe that is cached."""
    left, right = parsed(pattern)
    return x.permute([left.index(name) for name in right])


@idiom(takes(4, D))
class EinopsStyle(Wrapped):
    """Axes by name: a cached recipe of a pattern, and einsum."""

    def middle(self, h: Tensor) -> Tensor:
        heads = rearrange(h.unflatten(-1, (2, D // 2)), "b n h d -> b h n d")
        scores = torch.einsum("bhid,bhjd->bhij", heads, heads).softmax(-1)
        return rearrange(torch.einsum("b h i j, b h j d -> b h i d", scores, heads), "b h n d -> b n h d").flatten(-2)


@idiom(takes(4, D))
class Checkpoints(Wrapped):
    """Activation checkpointing of a function, a lambda, a module and a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def middle(self, h: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint, checkpoint_sequential

        h = checkpoint(lambda x, s: x.sin() * s, h, 0.5, use_reentrant=False)
        h = checkpoint(self.layers[0], h, use_reentrant=False)
        return checkpoint_sequential(self.layers, 2, h, use_reentrant=False)


@idiom(takes(4, D))
class ReentrantCheckpoint(Wrapped):
    """The older form of checkpointing, with a closure over parameters."""

    def middle(self, h: Tensor) -> Tensor:
        def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.enter(x) * y, y.sin()

        if not self.training:
            return sum(run(h, h * 2))  # type: ignore[return-value]
        a, b = torch.utils.checkpoint.checkpoint(run, h, h * 2, use_reentrant=True)
        return a + b


class Registry:
    """Hidden states collected by whoever asks."""

    def __init__(self) -> None:
        self.items: list[Any] = []


@idiom()
class CollectsInALocalObject(Wrapped):
    """Hidden states appended to an object made in forward."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        registry = Registry()
        for _ in range(2):
            x = self.enter(x).tanh()
            registry.items.append(x)
        return self.leave(x), tuple(registry.items)


@idiom()
class StateDictInForward(Wrapped):
    """``self.state_dict()``, ``dict(self.named_parameters())`` and an L2 penalty over ``self.parameters()``."""

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        h = F.linear(x, weights["enter.weight"]).tanh()
        penalty = sum(p.pow(2).sum() for p in self.parameters())
        return self.leave(h).square().mean() + 1e-2 * penalty


@idiom()
class CopiesAModule(Wrapped):
    """A layer built in forward: ``nn.Softmax(dim=-1)(h)``."""

    def middle(self, h: Tensor) -> Tensor:
        return nn.Softmax(dim=-1)(nn.LeakyReLU(0.1)(h)) * nn.Flatten()(h)
