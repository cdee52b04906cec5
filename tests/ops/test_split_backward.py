"""Functions whose backward leaves the gradients of weights: together the two parts are the whole backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipecompile.ops.split_backward import SPLIT, Queue, queued


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weight(*shape: int) -> Tensor:
    return floats(*shape).requires_grad_()


Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
CALLS: dict[str, Callable[[], Call]] = {
    "linear": lambda: (F.linear, (floats(2, 3, 4), weight(5, 4), weight(5)), {}),
    "linear of one row": lambda: (F.linear, (floats(4), weight(5, 4)), {}),
    "linear by keyword": lambda: (F.linear, (floats(3, 4),), {"weight": weight(5, 4), "bias": None}),
    "linear of one vector": lambda: (F.linear, (floats(3, 4), weight(4)), {}),
    "linear with one bias for all": lambda: (F.linear, (floats(3, 4), weight(5, 4), weight(1)), {}),
    "addmm with one bias for all": lambda: (torch.addmm, (weight(1), floats(3, 4), weight(4, 5)), {}),
    "addmm of a matrix": lambda: (torch.addmm, (weight(3, 5), floats(3, 4), weight(4, 5)), {}),
    "addmm": lambda: (torch.addmm, (weight(5), floats(3, 4), weight(4, 5)), {}),
    "addmm scaled": lambda: (torch.addmm, (weight(5), floats(3, 4), weight(4, 5)), {"beta": 2, "alpha": 3}),
    "matmul": lambda: (torch.matmul, (floats(2, 3, 4), weight(4, 5)), {}),
    "matmul as an operator": lambda: (torch.Tensor.matmul, (floats(2, 3, 4), weight(4, 5)), {}),
    "addmm as a method": lambda: (torch.Tensor.addmm, (weight(5), floats(3, 4), weight(4, 5)), {}),
    "matmul of a batch of weights": lambda: (torch.matmul, (floats(2, 3, 4), weight(2, 4, 5)), {}),
    "embedding": lambda: (F.embedding, (torch.tensor([[0, 2], [2, 5]]), weight(6, 4)), {}),
    "embedding with padding": lambda: (F.embedding, (torch.tensor([0, 5, 2]), weight(6, 4), -1), {}),
    "embedding scaled": lambda: (
        F.embedding,
        (torch.tensor([0, 2, 2]), weight(6, 4)),
        {"scale_grad_by_freq": True},
    ),
    "conv1d": lambda: (F.conv1d, (floats(2, 4, 9), weight(6, 4, 3), weight(6)), {"stride": 2, "padding": (1,)}),
    "conv2d": lambda: (F.conv2d, (floats(2, 4, 7, 8), weight(6, 2, 3, 2), None, (2, 1), 1, 1, 2), {}),
    "conv2d of the same size": lambda: (F.conv2d, (floats(2, 4, 7, 7), weight(6, 4, 3, 3)), {"padding": "same"}),
    "conv2d of one picture": lambda: (F.conv2d, (floats(4, 7, 7), weight(6, 4, 3, 3), weight(6)), {}),
    "conv3d": lambda: (F.conv3d, (floats(1, 2, 4, 4, 4), weight(3, 2, 2, 2, 2), weight(3)), {"dilation": 2}),
}
WHOLE = {"linear of one vector", "linear with one bias for all", "addmm with one bias for all", "addmm of a matrix"} | {
    "addmm scaled",
    "matmul of a batch of weights",
    "conv2d of the same size",
    "conv2d of one picture",
}


def tensors(call: Call) -> list[Tensor]:
    return [each for each in (*call[1], *call[2].values()) if isinstance(each, Tensor)]


def gradients(call: Call) -> list[Tensor | None]:
    return [None if each.grad is None else each.grad.clone() for each in tensors(call)]


@pytest.mark.parametrize("first", [False, True], ids=["between", "first"])
@pytest.mark.parametrize("name", CALLS)
def test_both_parts_are_the_whole_backward(name: str, first: bool) -> None:
    torch.manual_seed(0)
    call = CALLS[name]()
    function, args, kwargs = call
    split = SPLIT[function]
    x = next(each for each in tensors(call) if not each.requires_grad)
    x.requires_grad_(x.is_floating_point() and not first)
    out = function(*args, **kwargs)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected = gradients(call)
    for each in tensors(call):
        each.grad = None
    queue = Queue()
    with queued(queue):
        again = split(*args, **kwargs)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    again.backward(seed)
    after_input = gradients(call)
    queue.empty()
    assert not queue.waiting
    weights = 0
    for tensor, wanted, early, late in zip(tensors(call), expected, after_input, gradients(call), strict=True):
        if wanted is None:
            assert late is None
            continue
        torch.testing.assert_close(late, wanted)
        if tensor is not x:
            weights += 1
            assert (early is None) == (name not in WHOLE)
        else:
            torch.testing.assert_close(early, wanted)
    assert weights


def test_gradients_of_one_weight_are_summed_and_added_to_what_it_has() -> None:
    w, x = weight(3, 3), floats(2, 3)
    w.grad = torch.ones_like(w)
    queue = Queue()
    split = SPLIT[F.linear]
    with queued(queue):
        split(split(x, w), w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    queue.empty()
    other = w.detach().clone().requires_grad_()
    F.linear(F.linear(x, other), other).sum().backward()
    assert other.grad is not None
    torch.testing.assert_close(w.grad, 1 + other.grad)


class Kernels(TorchDispatchMode):
    """What the backwards of convolutions are asked for: gradients of input, weight and bias."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.convolution_backward.default:
            self.asked.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_a_convolution_computes_the_gradients_of_weight_and_bias_together(frozen: str) -> None:
    queue = Queue()
    own = {"weight": weight(6, 4, 3), "bias": weight(6)}
    for name, tensor in own.items():
        tensor.requires_grad_(name != frozen)
    x = floats(2, 4, 9).requires_grad_()
    with queued(queue):
        out = SPLIT[F.conv1d](x, own["weight"], own["bias"])
    with Kernels() as kernels:
        out.sum().backward()
        queue.empty()
    assert kernels.asked == [[True, False, False], [False, frozen != "weight", frozen != "bias"]]
    expected = {name: tensor.detach().clone().requires_grad_(name != frozen) for name, tensor in own.items()}
    F.conv1d(x.detach(), expected["weight"], expected["bias"]).sum().backward()
    for name, tensor in own.items():
        assert (tensor.grad is None) == (name == frozen)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name].grad, msg=name)


def test_a_frozen_weight_gets_no_gradient() -> None:
    w, b, x = floats(3, 3), weight(3), floats(2, 3)
    queue = Queue()
    with queued(queue):
        SPLIT[F.linear](x, w, b).sum().backward()
    queue.empty()
    assert w.grad is None
    assert torch.equal(b.grad, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("how", ["no queue", "no gradients", "complex"])
def test_elsewhere_it_is_the_function_itself(how: str) -> None:
    w, x = weight(3, 3), floats(2, 3)
    if how == "complex":
        w, x = w.detach().to(torch.complex128).requires_grad_(), x.to(torch.complex128)
    queue = Queue()
    with (
        queued(None if how == "no queue" else queue),
        torch.set_grad_enabled(how != "no gradients"),
    ):
        out = SPLIT[F.linear](x, w)
        torch.testing.assert_close(out, F.linear(x, w), rtol=0, atol=0)
    if how != "no gradients":
        out.abs().sum().backward()
        assert w.grad is not None
    assert not queue.waiting
