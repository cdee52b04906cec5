"""Random functions that give the same numbers on any schedule, with any number of stages, and when run again.

A generator that several stages draw from gives each what is left when its turn comes, and on the CPU all stages share
one. So each random call draws from its device's generator seeded for itself: by the step, the microbatch and the call's
name in the whole model. The generator's own state is put back.

Two runs of a model that are to be compared are made under ``alike``: there every random call draws from one seed, the
same numbers for every row (``row_draws``).
"""

from __future__ import annotations

import functools
import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipecompile.ops.operators import function_of, is_opaque, named
from pipecompile.ops.row_draws import drawn_by_row, draws_by_row

_DROPOUT = named(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout"
)
_ATTENTION = named("scaled_dot_product_attention")
_HEADS = named("multi_head_attention_forward")
_RECURRENT = named("lstm gru rnn_tanh rnn_relu")
_ALWAYS = named("""
    rrelu gumbel_softmax rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal
    uniform exponential geometric cauchy log_normal random poisson binomial _standard_gamma _sample_dirichlet
    fractional_max_pool2d fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices
""")

_DRAWING = threading.RLock()  # one call at a time has a generator seeded; what it calls may draw in turn
_current = threading.local()
_LIMIT = 2**63
_ALIKE = 20_240_229  # the seed of every call under ``alike``


def draws(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers: of a function of torch's, or of an operator that says so by its tag."""

    def argument(position: int, keyword: str, default: Any) -> Any:
        return kwargs.get(keyword, args[position] if len(args) > position else default)

    key = function_of(function)
    if key in _ATTENTION:
        return bool(argument(4, "dropout_p", 0.0))
    if key in _HEADS:
        return bool(argument(10, "dropout_p", 0.0)) and bool(argument(13, "training", True))
    if key in _RECURRENT:
        return bool(argument(5, "dropout", 0.0)) and bool(argument(6, "train", False))
    if key in _DROPOUT:
        return bool(argument(2, "training", True)) and argument(1, "p", 0.5) != 0.0
    if key in _ALWAYS:
        return True
    return is_opaque(key) and torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())


def passes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is dropout that drops nothing: torch gives back its first argument, the very same tensor."""
    key = function_of(function)
    return key in _DROPOUT and _DROPOUT[key] != "native_dropout" and not draws(function, args, kwargs)


def seed_microbatch(seed: int | None) -> None:
    """Says which microbatch the calling thread runs from now on; None: random calls draw as they come."""
    _current.seed = seed


def microbatch_seed() -> int | None:
    """The seed of the microbatch that the calling thread runs."""
    return getattr(_current, "seed", None)


def seeded(function: Callable[..., Any], key: str, device: torch.device) -> Callable[..., Any]:
    """A function that draws random numbers, drawing those of the microbatch being run and of ``key``."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        seed = microbatch_seed()
        if is_alike():
            return _draw_alike(function, args, kwargs, device)
        if seed is None:
            return function(*args, **kwargs)
        return _draw(function, args, kwargs, (seed + zlib.crc32(key.encode())) % _LIMIT, device)

    draw.__name__ = f"seeded_{getattr(function, '__name__', 'call')}"
    draw.__module__ = __name__
    return draw


def seeds(count: int) -> list[int]:
    """A seed for each microbatch of a step, drawn from the caller's generator."""
    step = int(torch.randint(_LIMIT - 1, ()).item())
    return [(step + i * 0x9E3779B97F4A7C15) % _LIMIT for i in range(count)]


@dataclass(frozen=True)
class Generators:
    """The states of the generators of torch, and of Python and numpy where they are wanted."""

    of_torch: Sequence[tuple[torch.Generator, Tensor]]
    python: Any
    numpy: Any

    @staticmethod
    def of(devices: Iterable[torch.device], all_of_them: bool = True) -> Generators:
        """The present states; of torch's generators those of the CPU and of the devices.

        Args:
            all_of_them: Python's and numpy's too; numpy takes 0.2 ms to tell its state.
        """
        cuda = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        generators = [torch.default_generator, *map(_generator, cuda)]
        states = [(generator, generator.get_state()) for generator in generators]
        if not all_of_them:
            return Generators(states, None, None)
        return Generators(states, random.getstate(), np.random.get_state())

    @staticmethod
    @contextmanager
    def kept_on_failure(devices: Iterable[torch.device], all_of_them: bool = True) -> Iterator[None]:
        """If what runs in it raises, the generators are as before."""
        before = Generators.of(devices, all_of_them)
        try:
            yield
        except BaseException:
            before.put_back()
            raise

    def put_back(self) -> None:
        for generator, state in self.of_torch:
            generator.set_state(state)
        if self.python is not None:
            random.setstate(self.python)
            np.random.set_state(self.numpy)


@contextmanager
def undrawn(devices: Iterable[torch.device]) -> Iterator[None]:
    """Whatever draws random numbers in it, the generators of torch, Python and numpy are as before at the end."""
    before = Generators.of(devices)
    try:
        yield
    finally:
        before.put_back()


def is_alike() -> bool:
    """Whether the calling thread runs one of two runs that are to be compared."""
    return getattr(_current, "alike", False)


@contextmanager
def drawing_alike(on: bool) -> Iterator[None]:
    """In which the random calls of a stage, in this thread, draw as under ``alike``, or do not."""
    before = is_alike()
    _current.alike = on
    try:
        yield
    finally:
        _current.alike = before


@contextmanager
def alike(generators: Iterable[Any]) -> Iterator[None]:
    """Every random call of this thread, and of the stages that it runs, draws from one seed, alike for every row.

    So calls of one function with equal arguments draw equal numbers, whoever makes them, and a microbatch draws its
    part of the whole batch's.

    Args:
        generators: the model's own. One that a forward makes gives the same numbers in every call, and does here.
    """
    with drawing_alike(True), _Alike(generators):
        yield


def drawn_alike(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a function as under ``alike``, also where torch's function modes are off."""
    if not draws(function, args, kwargs):
        return function(*args, **kwargs)
    devices = [a.device for a in args if isinstance(a, Tensor)]
    return _draw_alike(function, args, kwargs, devices[0] if devices else torch.device(kwargs.get("device") or "cpu"))


def undropped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a function; dropout lets everything pass."""
    if is_dropout(function) and draws(function, args, kwargs):
        return _quiet(function, args, kwargs)
    return function(*args, **kwargs)


def is_dropout(function: Any) -> bool:
    """Whether a function is dropout, or attention with dropout inside."""
    key = function_of(function)
    return key in _DROPOUT or key in _ATTENTION


def compared() -> Any:
    """In a thread that runs a part of a model as Python: a context in which ``alike`` holds there too."""
    return _Alike() if is_alike() else nullcontext()


class _Alike(TorchFunctionMode):
    """Draws from one seed, but for generators that are not known, if any are."""

    def __init__(self, generators: Iterable[Any] | None = None) -> None:
        super().__init__()
        self._known = None if generators is None else {id(it) for it in (torch.default_generator, *generators)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is not None and self._known is not None and id(generator) not in self._known:
            return func(*args, **kwargs)
        return drawn_alike(func, *args, **(kwargs or {}))


def _draw_alike(function: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
    if draws_by_row(function):
        return drawn_by_row(function, args, kwargs, _ALIKE)
    if is_opaque(function):  # what it calls draws alike
        with _Alike():
            return function(*args, **kwargs)
    return _draw(function, args, kwargs, _ALIKE, device)


def _quiet(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call of dropout, or of attention with dropout inside, without it."""
    if function_of(function) not in _ATTENTION:
        return args[0] if args else kwargs["input"]
    args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
    kwargs = {**kwargs, "dropout_p": 0.0} if len(args) <= 4 else kwargs
    return function(*args, **kwargs)


def _draw(function: Callable[..., Any], args: Any, kwargs: Any, seed: int, device: torch.device) -> Any:
    """The call with its device's generator seeded, whose own state is put back."""
    generator = _generator(device)
    with _DRAWING:
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return function(*args, **kwargs)
        finally:
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def state_of(generator: Any) -> Any:
    """The state of a generator of torch, Python or numpy."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Puts a generator into a state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
