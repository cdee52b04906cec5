"""The kinds of fault: each does something to a model that is called, and gives numbers to compare.

``kind(call, model, x, rng)``: ``call`` is the model itself or a pipeline of it, ``x`` a batch. What a kind changes it
changes back, and it does the same whichever of the two it is given.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fault_scene import Trap, UserError, loss_of
from torch import Tensor, nn
from toys import D

Kind = Callable[[Any, nn.Module, Tensor, random.Random], Any]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def train(call: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A step: loss and every gradient."""
    loss = loss_of(call(*args, **kwargs))
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def fresh(rng: random.Random, rows: int = 4, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randn(rows, width, dtype=torch.float64, generator=generator)


def fail() -> None:
    """Raises the user's error, after it has drawn random numbers."""
    torch.rand(2), random.random(), np.random.rand()
    raise UserError("the user's own")


@contextmanager
def registered(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# Inputs


def _input(name: str, make: Callable[[Tensor, nn.Module, random.Random], Any]) -> None:
    def run(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        given = make(x, model, rng)
        got = train(call, model, given)
        leaf = isinstance(given, Tensor) and given.is_leaf and given.requires_grad
        return (*got, given.grad) if leaf and not isinstance(given, nn.Parameter) else got

    run.__name__ = f"input_{name}"
    kind(run)


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 2] = value
    return x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


INPUTS: dict[str, Callable[[Tensor, nn.Module, random.Random], Any]] = {
    "nan": lambda x, m, r: _with(x, float("nan")),
    "inf": lambda x, m, r: _with(x, float("inf")),
    "huge": lambda x, m, r: x * 1e200,
    "empty": lambda x, m, r: x[:0],
    "one_row": lambda x, m, r: x[:1],
    "other_rows": lambda x, m, r: fresh(r, r.choice([2, 3, 5, 6, 7])),
    "float32": lambda x, m, r: x.float(),
    "half": lambda x, m, r: x.half(),
    "integers": lambda x, m, r: x.long(),
    "complex": lambda x, m, r: x.to(torch.complex128),
    "other_width": lambda x, m, r: fresh(r, 4, D + r.choice([-1, 1])),
    "more_dims": lambda x, m, r: x.unsqueeze(1),
    "no_dims": lambda x, m, r: x.sum(),
    "one_dim": lambda x, m, r: x[0],
    "numpy": lambda x, m, r: x.numpy(),
    "nested_list": lambda x, m, r: x.tolist(),
    "list_of_tensors": lambda x, m, r: list(x),
    "none": lambda x, m, r: None,
    "string": lambda x, m, r: "x",
    "number": lambda x, m, r: 1.5,
    "module": lambda x, m, r: m,
    "sparse": lambda x, m, r: x.to_sparse(),
    "meta": lambda x, m, r: x.to("meta"),
    "wants_gradient": lambda x, m, r: x.clone().requires_grad_(),
    "not_a_leaf": lambda x, m, r: x.clone().requires_grad_() * 2,
    "inference": lambda x, m, r: _inference(x),
    "transposed": lambda x, m, r: x.t().contiguous().t(),
    "strided": lambda x, m, r: torch.cat([x, x], 1)[:, ::2],
    "flipped": lambda x, m, r: x.flip(0),
    "expanded": lambda x, m, r: x[:1].expand(4, D),
    "overlapping": lambda x, m, r: torch.as_strided(x, (4, D), (3, 1)),
    "conjugated": lambda x, m, r: torch.view_as_real(x.to(torch.complex128).conj())[..., 0],
    "a_parameter": lambda x, m, r: next(p for p in m.parameters() if p.ndim == 2),
    "rows_of_a_parameter": lambda x, m, r: next(p for p in m.parameters() if p.ndim == 2)[:4],
    "of_a_parameter_detached": lambda x, m, r: next(p for p in m.parameters() if p.ndim == 2).detach()[:4],
    "is_an_nn_parameter": lambda x, m, r: nn.Parameter(x),
}
for _name, _make in INPUTS.items():
    _input(_name, _make)


@kind
def argument_missing(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(call, model)


@kind
def argument_too_many(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(call, model, x, x)


@kind
def argument_unknown(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(call, model, x, mask=x)


@kind
def argument_twice(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(call, model, x, **{"x": x})


@kind
def argument_by_keyword(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(call, model, x=x)


# Code of the user's that raises


def _raising(name: str, where: str, error: Callable[[], BaseException | None]) -> None:
    def run(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        def spring() -> None:
            torch.rand(2), random.random(), np.random.rand()
            if (made := error()) is not None:
                raise made

        Trap.set(where, spring, lasting=True)
        return train(call, model, x)

    run.__name__ = f"raises_{name}_in_{where}"
    kind(run)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: UserError("the user's own"),
    "interrupt": KeyboardInterrupt,
    "exit": lambda: SystemExit(3),
    "stop": StopIteration,
    "memory": lambda: MemoryError("out of it"),
    "recursion": lambda: RecursionError("too deep"),
    "key": lambda: KeyError("k"),
    "assertion": AssertionError,
    "oom": lambda: torch.OutOfMemoryError("out of memory"),
}
for _where in ("forward", "backward", "kept"):
    for _name, _error in ERRORS.items():
        _raising(_name, _where, _error)


def _hook(name: str, register: Callable[[nn.Module, Callable[..., Any]], Any]) -> None:
    def run(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        modules = [m for m in model.modules() if isinstance(m, nn.Linear)]
        with registered(register(rng.choice(modules), lambda *_: fail())):
            return train(call, model, x)

    run.__name__ = f"hook_{name}_raises"
    kind(run)


HOOKS: dict[str, Callable[[nn.Module, Callable[..., Any]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(f),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward_pre": lambda m, f: m.register_full_backward_pre_hook(f),
    "parameter": lambda m, f: m.weight.register_hook(f),
    "parameter_post": lambda m, f: m.weight.register_post_accumulate_grad_hook(f),
}
for _name, _register in HOOKS.items():
    _hook(_name, _register)


@kind
def hook_on_the_input_raises(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    x.requires_grad_().register_hook(lambda _: fail())
    return train(call, model, x)


@kind
def hook_on_the_output_raises(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    loss = loss_of(call(x))
    loss.register_hook(lambda _: fail())
    loss.backward()


@kind
def hook_on_the_whole_raises(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with registered(call.register_forward_hook(lambda *_: fail())):
        return train(call, model, x)


@kind
def hook_on_the_whole_changes(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with registered(call.register_forward_pre_hook(lambda m, args: (args[0] * 2,))):
        return train(call, model, x)


@kind
def loss_function_raises(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call(x)
    fail()


@kind
def interrupted_by_a_signal(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    import signal

    Trap.set("forward", lambda: signal.raise_signal(signal.SIGINT))
    train(call, model, x)
    raise KeyboardInterrupt  # the signal came too late


# The pipeline within itself, other threads, other processes


def _within(where: str) -> None:
    def run(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        Trap.set(where, lambda: call(x.detach()))
        try:
            return train(call, model, x)
        finally:
            Trap.clear()

    run.__name__ = f"called_in_{where}"
    kind(run)


for _where in ("forward", "backward", "kept"):
    _within(_where)


@kind
def called_in_a_hook(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    again: list[Any] = [lambda: call(x.detach())]
    module = rng.choice([m for m in model.modules() if isinstance(m, nn.Linear)])
    with registered(module.register_forward_hook(lambda *_: again and again.pop()() and None)):
        return train(call, model, x)


@kind
def called_in_a_parameter_hook(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    again: list[Any] = [lambda: call(x.detach())]
    with registered(next(model.parameters()).register_hook(lambda _: again and again.pop()() and None)):
        return train(call, model, x)


@kind
def trained_in_a_parameter_hook(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    def again(_: Tensor) -> None:
        handle.remove()
        with torch.enable_grad():
            loss_of(call(x.detach())).backward()

    handle = next(model.parameters()).register_hook(again)
    with registered(handle):
        return train(call, model, x)


def _at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@kind
def called_by_threads(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return _at_once([lambda k=k: call(x + k) for k in range(3)])


@kind
def eager_beside_a_capture(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    """The model runs eagerly in one thread while another makes a call that is captured anew."""
    rows = rng.choice([2, 3, 5, 6])
    flag = rng.random()
    model.flag = flag
    try:
        kept = next(model.children())
        return _at_once(
            [lambda: [loss_of(model(x)).item() for _ in range(5)], lambda: loss_of(call(x[:rows])), lambda: kept(x)]
        )
    finally:
        del model.flag


@kind
def backward_by_another_thread(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    loss = loss_of(call(x))
    _at_once([loss.backward])
    return loss.detach(), gradients(model)


@kind
def forked(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = repr(round(float(train(call, model, x)[0]), 9))
        except BaseException as error:
            told = repr(error)
        os.write(send, told.encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive) as file:
        return file.read()
