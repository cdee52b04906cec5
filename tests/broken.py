"""A pipeline with one thing broken on purpose, beside the unsplit model: what the tests of mutants are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pipecompile
from pipecompile.capture import Captured
from pipecompile.capture.origin import origin_of
from pipecompile.compiler import compile_call

ROWS = 10  # in three microbatches of 4, 3, 3
WIDTH = 6
FAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}  # relative, that no rounding explains


@dataclass(frozen=True)
class Mutant:
    """One thing that is broken.

    Attributes:
        broken: what, in words.
        breaks: a context in which pipelines are broken so.
        model, inputs: on which it matters; made anew for each run, from seed 0.
        blamed: the module that the error is to name, where the mutant breaks one module.
        draws: whether the model draws torch's random numbers, which a pipeline draws otherwise than the unsplit model.
        left: attributes of the model that the caller adds to the loss.
        scale: what the caller multiplies the loss by.
    """

    name: str
    broken: str
    breaks: Callable[[], AbstractContextManager[Any]]
    model: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Tensor]] = lambda: {"x": torch.randn(ROWS, WIDTH)}
    options: Mapping[str, Any] = field(default_factory=dict)
    blamed: str = ""
    draws: bool = False
    left: tuple[str, ...] = ()
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    far: float = 0.0  # relative, that no rounding explains; 0: by the type

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"

    def of(self, dtype: torch.dtype) -> Mutant:
        return replace(self, dtype=dtype)

    def made(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model and the inputs of one run."""
        torch.manual_seed(0)
        model = self.model().to(self.dtype)
        inputs = self.inputs()
        return model, {name: _cast(tensor, self.dtype) for name, tensor in inputs.items()}

    def eager(self) -> dict[str, Any]:
        """The step of the unsplit model."""
        model, inputs = self.made()
        return self._step(model, model, inputs)

    def split(self, verify: str) -> dict[str, Any]:
        """The step of a pipeline."""
        model, inputs = self.made()
        options = {"microbatches": 3, "costs": "count", "devices": ["cpu", "cpu"], **self.options}
        pipe = pipecompile.compile(model, verify=verify, **options)
        return self._step(pipe, model, inputs)

    def _step(self, run: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        before = {id(p): p.detach().clone() for p in model.parameters()}
        outputs = [leaf for leaf in pytree.tree_leaves(run(**inputs)) if isinstance(leaf, Tensor)]
        scalars = [leaf for leaf in outputs if leaf.ndim == 0 and leaf.requires_grad]
        roots = (scalars[:1] or outputs) + [getattr(model, name) for name in self.left]
        (self.scale * sum(_weighed(root) for root in roots if root.requires_grad)).backward()
        tensors = {
            **{f"output {i}": leaf.detach() for i, leaf in enumerate(outputs)},
            **{f"gradient {name}": p.grad for name, p in model.named_parameters()},
            **{f"input gradient {name}": tensor.grad for name, tensor in inputs.items() if tensor.requires_grad},
            **{f"buffer {name}": b.detach() for name, b in model.named_buffers()},
            **{f"parameter {n}": p.detach() for n, p in model.named_parameters() if not p.equal(before[id(p)])},
        }
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if not name.startswith("_") and isinstance(value, int | float | Tensor):
                    tensors[f"attribute {path} {name}"] = value.detach() if isinstance(value, Tensor) else value
        return deepcopy(tensors)

    def apart(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
        """What is not alike in two steps, by more than rounding."""
        names = dict.fromkeys((*one, *other))
        return [name for name in names if not _alike(one.get(name), other.get(name), self.far or FAR[self.dtype])]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _weighed(tensor: Tensor) -> Tensor:
    """A number that tells the elements of a tensor apart."""
    return (tensor * torch.arange(1, tensor.numel() + 1).reshape(tensor.shape).to(tensor).cos()).sum()


def _alike(a: Any, b: Any, far: float) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    gap, size = (a.double() - b.double()).abs(), b.double().abs()
    none = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0  # of what cancels
    return not a.numel() or bool(gap.max() <= far * size.max() + none)


# Ways to break something


def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """One of pipecompile's own functions, replaced by what ``make`` makes of it."""

    @contextmanager
    def broken() -> Iterator[None]:
        with patch.object(owner, name, make(getattr(owner, name))):
            yield

    return broken


def _edited(verb: str, edit: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            changed = edit(result)
            return result if changed is None else changed

        return run

    return patched(compile_call, verb, make)


def captured(edit: Callable[[Captured], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Every captured graph, edited."""
    return _edited("capture", edit)


def divided(edit: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Every division, edited."""
    return _edited("divide", edit)


def cut(edit: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """The stages, edited."""
    return _edited("split", edit)


def calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls of functions of a name."""
    found = [n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "__name__", "") == name]
    assert found, f"the graph does not call {name}:\n{graph}"
    return found


def reads(graph: fx.Graph, target: str) -> list[fx.Node]:
    """The nodes that read a parameter or buffer."""
    found = [n for n in graph.nodes if n.op == "get_attr" and n.target == target]
    assert found, f"the graph does not read {target}:\n{graph}"
    return found


def bypass(node: fx.Node) -> None:
    """Takes a call out of a graph: its first argument in its place."""
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def wrap(node: fx.Node, function: Callable[..., Any], users: Callable[[fx.Node], bool] = lambda user: True) -> fx.Node:
    """A function of a node in the place of the node."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(function, (node,))
    new.meta.update(node.meta, origin=replace(origin_of(node), writes=()))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and users(user))
    return new


def counted(act: Callable[..., Any], of: int = 3, last: int = 2) -> Callable[[Any], Any]:
    """Does ``act(original, *args)`` in place of a method's call number ``last`` of every ``of``, by ``self``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        numbers: dict[int, int] = {}

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            number = numbers.get(id(self), 0)
            numbers[id(self)] = number + 1
            call = original.__get__(self)
            return act(call, self, *args, **kwargs) if number % of == last else call(*args, **kwargs)

        return method

    return make
