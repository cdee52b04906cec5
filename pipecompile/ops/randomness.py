"""Random functions that draw the same numbers on any schedule, with any number of stages, and when they are rerun.

What a stage draws from a shared generator depends on the order in which stages run, and on the CPU all stages share one
generator. So each random call seeds its device's generator for itself, from the step, the microbatch and the call's
name in the whole model, and then restores the generator's state.

Two runs of a model that are compared run under ``alike``: there, every random call draws from one seed, the same
numbers for every row (``row_draws``).
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

from pipecompile.ops.accelerators import accelerators, default_generator
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

_DRAWING = threading.RLock()  # only one call at a time seeds a generator; functions that it calls may draw too
_current = threading.local()
_LIMIT = 2**63
_ALIKE = 20_240_229  # the seed of every call under ``alike``


def draws(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a torch function, or of an operator with the tag for it, draws random numbers."""

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
    """Whether a call is dropout that drops nothing, so that torch returns the same tensor object."""
    key = function_of(function)
    return key in _DROPOUT and _DROPOUT[key] != "native_dropout" and not draws(function, args, kwargs)


def seed_microbatch(seed: int | None) -> None:
    """Sets the seed of the microbatch that the calling thread runs; None: random calls use the generator's state."""
    _current.seed = seed


def microbatch_seed() -> int | None:
    """Returns the seed of the microbatch that the calling thread runs, or None."""
    return getattr(_current, "seed", None)


def seeded(function: Callable[..., Any], key: str, device: torch.device) -> Callable[..., Any]:
    """Returns a random function that draws the numbers for ``key`` in the microbatch being run."""

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


def is_seeded(function: Any) -> bool:
    """Whether ``seeded`` made a function."""
    name, module = (str(getattr(function, each, "")) for each in ("__name__", "__module__"))
    return module == __name__ and name.startswith("seeded_")


def seeds(count: int) -> list[int]:
    """Returns a seed for each microbatch of a step, drawn from the caller's generator."""
    step = int(torch.randint(_LIMIT - 1, ()).item())
    return [(step + i * 0x9E3779B97F4A7C15) % _LIMIT for i in range(count)]


@dataclass(frozen=True)
class Generators:
    """Saved states of the generators of torch, and optionally of Python and numpy."""

    of_torch: Sequence[tuple[torch.Generator, Tensor]]
    python: Any
    numpy: Any

    @staticmethod
    def of(devices: Iterable[torch.device], all_of_them: bool = True) -> Generators:
        """Returns the present states; for torch, those of the CPU and of the given devices.

        Args:
            devices: The devices.
            all_of_them: Also save the states of Python and numpy; numpy takes 0.2 ms.
        """
        generators = [torch.default_generator, *map(default_generator, accelerators(devices))]
        states = [(generator, generator.get_state()) for generator in generators]
        if not all_of_them:
            return Generators(states, None, None)
        return Generators(states, random.getstate(), np.random.get_state())

    @staticmethod
    @contextmanager
    def kept_on_failure(devices: Iterable[torch.device], all_of_them: bool = True) -> Iterator[None]:
        """A context that restores the generators if an exception is raised inside."""
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
    """A context; at its end, the generators of torch, Python and numpy are restored."""
    before = Generators.of(devices)
    try:
        yield
    finally:
        before.put_back()


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """A context whose random numbers come from a seed, on the CPU and on a device; restores the generators.

    ``torch.manual_seed`` seeds all accelerators too, and formats the caller's stack for each kind that is not in use.
    """
    generators = {id(it): it for it in (torch.default_generator, default_generator(device))}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def is_alike() -> bool:
    """Whether the calling thread is in one of two runs that are compared."""
    return getattr(_current, "alike", False)


@contextmanager
def drawing_alike(on: bool) -> Iterator[None]:
    """A context in which the random calls of a stage in this thread draw as under ``alike``, or do not."""
    before = is_alike()
    _current.alike = on
    try:
        yield
    finally:
        _current.alike = before


@contextmanager
def alike(generators: Iterable[Any]) -> Iterator[None]:
    """A context in which all random calls of this thread, and of the stages it runs, draw from one seed for every row.

    Calls of one function with equal arguments draw equal numbers, and a microbatch draws its part of the numbers of the
    whole batch.

    Args:
        generators: Generators of the model. One that forward creates draws the same numbers in every call anyway, and
            is not affected.
    """
    with drawing_alike(True), _Alike(generators):
        yield


def drawn_alike(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function as under ``alike``, even if torch's function modes are off."""
    if not draws(function, args, kwargs):
        return function(*args, **kwargs)
    devices = [a.device for a in args if isinstance(a, Tensor)]
    return _draw_alike(function, args, kwargs, devices[0] if devices else torch.device(kwargs.get("device") or "cpu"))


def undropped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function without its dropout."""
    if is_dropout(function) and draws(function, args, kwargs):
        return _quiet(function, args, kwargs)
    return function(*args, **kwargs)


def is_dropout(function: Any) -> bool:
    """Whether a function is dropout, or attention with dropout inside."""
    key = function_of(function)
    return key in _DROPOUT or key in _ATTENTION


def compared() -> Any:
    """Returns a context for a part of a model that runs as Python, so that ``alike`` applies inside it too."""
    return _Alike() if is_alike() else nullcontext()


class _Alike(TorchFunctionMode):
    """Draws from one seed, except from unknown generators, if ``generators`` is given."""

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
    if is_opaque(function):  # the functions that it calls draw alike
        with _Alike():
            return function(*args, **kwargs)
    return _draw(function, args, kwargs, _ALIKE, device)


def _quiet(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls dropout, or attention with dropout inside, so that nothing is dropped."""
    if function_of(function) not in _ATTENTION:
        return args[0] if args else kwargs["input"]
    args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
    kwargs = {**kwargs, "dropout_p": 0.0} if len(args) <= 4 else kwargs
    return function(*args, **kwargs)


def _draw(function: Callable[..., Any], args: Any, kwargs: Any, seed: int, device: torch.device) -> Any:
    """Calls a function with its device's generator seeded, and restores the generator's state."""
    generator = default_generator(device)
    with _DRAWING:
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return function(*args, **kwargs)
        finally:
            generator.set_state(state)


def state_of(generator: Any) -> Any:
    """Returns the state of a generator of torch, Python or numpy."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Sets the state of a generator of torch, Python or numpy."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
