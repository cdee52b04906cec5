"""What is changed between two calls, by the user's own hand: the second step must be that of the changed model."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from idioms.declare import D, Wrapped, idiom, takes


class Plain(Wrapped):
    """One layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)


@contextmanager
def another_forward(model: Any) -> Iterator[None]:
    model.inner.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 2), model.inner)
    yield


@idiom(between=another_forward)
class ForwardReplaced(Plain):
    """``module.forward = f`` after the first call."""


@contextmanager
def another_method(model: Any) -> Iterator[None]:
    model.middle = lambda h: model.inner(h.sin())
    yield


@idiom(between=another_method)
class MethodSetOnInstance(Plain):
    """A method set on the model after the first call."""


@contextmanager
def method_of_class(model: Any) -> Iterator[None]:
    before = type(model).middle
    type(model).middle = lambda self, h: self.inner(h).cos()
    yield
    type(model).middle = before


@idiom(between=method_of_class)
class MethodSetOnClass(Plain):
    """A method set on the model's class after the first call."""

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h)


@contextmanager
def linear_exchanged(model: Any) -> Iterator[None]:
    before = F.linear
    F.linear = lambda x, w, b=None: before(x, w * 1.5, b)
    yield
    F.linear = before


@idiom(between=linear_exchanged)
class FunctionalLinearReplaced(Plain):
    """``F.linear`` exchanged for another function."""


@contextmanager
def class_forward_exchanged(model: Any) -> Iterator[None]:
    before = nn.Linear.forward
    nn.Linear.forward = lambda self, x: before(self, x) * 1.5  # type: ignore[method-assign]
    yield
    nn.Linear.forward = before  # type: ignore[method-assign]


@idiom(between=class_forward_exchanged)
class LinearForwardReplaced(Plain):
    """``nn.Linear.forward`` exchanged."""


@contextmanager
def hook_moved(model: Any) -> Iterator[None]:
    model.handle.remove()
    model.leave.register_forward_hook(model.hook)
    yield


@idiom(between=hook_moved)
class HookMoved(Plain):
    """A forward hook taken from one module and given to another."""

    def __init__(self) -> None:
        super().__init__()
        self.hook = lambda module, args, out: out * 1.3
        self.handle = self.enter.register_forward_hook(self.hook)


@contextmanager
def global_forward_hook(model: Any) -> Iterator[None]:
    handle = global_hooks.register_module_forward_hook(lambda module, args, out: out * 1.1)
    yield
    handle.remove()


@idiom(between=global_forward_hook)
class GlobalForwardHook(Plain):
    """A forward hook for all modules."""


@contextmanager
def global_pre_hook(model: Any) -> Iterator[None]:
    handle = global_hooks.register_module_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))
    yield
    handle.remove()


@idiom(between=global_pre_hook)
class GlobalForwardPreHook(Plain):
    """A forward pre-hook for all modules."""


@contextmanager
def backward_hook(model: Any) -> Iterator[None]:
    model.inner.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    yield


@idiom(between=backward_hook)
class BackwardHookAdded(Plain):
    """A full backward hook that changes gradients, added after the first call."""


@contextmanager
def another_shape(model: Any) -> Iterator[None]:
    model.inner.weight.data = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.inner.bias.data = torch.zeros(3, dtype=torch.float64)
    model.leave.weight.data = model.leave.weight.data[:, :3].clone()
    yield


@idiom(between=another_shape)
class ParameterOfAnotherShape(Plain):
    """Parameters that are given another shape through ``.data``."""


@contextmanager
def frozen_layer(model: Any) -> Iterator[None]:
    model.inner.requires_grad_(False)
    yield


@idiom(between=frozen_layer)
class LayerFrozen(Plain):
    """``requires_grad_(False)`` on a layer after the first call."""


@contextmanager
def one_module_in_eval(model: Any) -> Iterator[None]:
    model.norm.eval()
    yield


@idiom(takes(3, D), between=one_module_in_eval, parts=True)
class OneModuleInEval(Wrapped):
    """One batch norm of the model set to eval."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h.mT).mT


SCALE = 1.0


@contextmanager
def another_global(model: Any) -> Iterator[None]:
    global SCALE
    SCALE = 3.0
    yield
    SCALE = 1.0


@idiom(between=another_global)
class GlobalNumber(Plain):
    """A module-level number that forward reads."""

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h) * SCALE


@contextmanager
def another_cell(model: Any) -> Iterator[None]:
    model.set_scale(4.0)
    yield


@idiom(between=another_cell)
class ClosureNumber(Plain):
    """A number in a closure that a function on the module reads."""

    def __init__(self) -> None:
        super().__init__()
        scale = 1.0

        def set_scale(value: float) -> None:
            nonlocal scale
            scale = value

        self.set_scale = set_scale
        self.scaled = lambda h: h * scale

    def middle(self, h: Tensor) -> Tensor:
        return self.scaled(self.inner(h))


@contextmanager
def another_class_attribute(model: Any) -> Iterator[None]:
    type(model).factor = 0.2
    yield
    type(model).factor = 1.0


@idiom(between=another_class_attribute)
class ClassNumber(Plain):
    """A number on the class, read through the class."""

    factor = 1.0

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h) * ClassNumber.factor


@contextmanager
def item_of_a_list(model: Any) -> Iterator[None]:
    model.weights[65] = 7.0
    yield


@idiom(between=item_of_a_list)
class ItemOfALongList(Plain):
    """Item 65 of a list on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [1.0] * 80

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h) * self.weights[65]


@contextmanager
def another_flag(model: Any) -> Iterator[None]:
    model.config["act"] = "relu"
    model.inner = nn.Linear(D, D, dtype=torch.float64)
    nn.init.constant_(model.inner.weight, 0.2)
    nn.init.zeros_(model.inner.bias)
    yield


@idiom(between=another_flag)
class ConfigAndModuleReplaced(Plain):
    """An entry of a config dict and a submodule, both replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"act": "tanh"}

    def middle(self, h: Tensor) -> Tensor:
        return getattr(torch, self.config["act"])(self.inner(h))


@contextmanager
def untied(model: Any) -> Iterator[None]:
    model.leave.weight = nn.Parameter(model.enter.weight.detach().clone())
    yield


@idiom(between=untied)
class TiedWeightUntied(Plain):
    """A tied weight that becomes two."""

    def __init__(self) -> None:
        super().__init__()
        self.leave.weight = self.enter.weight


@contextmanager
def new_default(model: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@idiom(between=new_default)
class DefaultDtypeChanged(Plain):
    """``torch.set_default_dtype`` between calls, where forward makes constants."""

    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h) + torch.linspace(0, 1, D) / 3


@contextmanager
def eval_alone(model: Any) -> Iterator[None]:
    model.eval()
    yield


@idiom(takes(3, D), between=eval_alone, parts=True)
class BatchNormInEval(OneModuleInEval):
    """A model with batch norm trained on in eval mode."""


@contextmanager
def weight_loaded(model: Any) -> Iterator[None]:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    yield


@idiom(between=weight_loaded)
class StateLoaded(Plain):
    """``load_state_dict`` between calls."""
