"""Runs a model's own initialisers with the memory of one of them at a time.

Each process runs all initialisers in the same order, so that all draw the same numbers. A tensor gets memory when an
initialiser touches it. When the initialiser has ended, the tensor stays if this process keeps it, and is sent away
otherwise. New memory is filled with NaN, which tells afterwards what no initialiser has set, and what was computed from
tensors that are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.errors import InputError
from pipecompile.ops.away import bring, is_away, send_away
from pipecompile.ops.torch_internals import pytree

RESETS = ("reset_parameters", "_reset_parameters")  # methods that initialise a module; torch uses both names
OWN = "initialize_weights"  # of transformers' models: initialises all modules below
OWN_EACH = "_initialize_weights"  # what it calls for each of them
OWN_ONE = "_init_weights"  # what that calls, if the module is not marked as initialised
LOOKS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "requires_grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    ]
)  # functions that do not need values
CPU = torch.device("cpu")


class Touched(TorchFunctionMode):
    """Gives tensors of a model memory when a function touches them.

    Args:
        kept: tensors that keep their memory.
        place: the device of such a tensor, once it has its value.
    """

    def __init__(self, kept: Iterable[Tensor], place: Callable[[Tensor], torch.device]) -> None:
        super().__init__()
        self.kept = set(map(id, kept))
        self.place = place
        self.here: dict[int, Tensor] = {}  # touched by the present initialiser
        self.set: set[int] = set()  # tensors that have had a value

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in LOOKS:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and id(value) not in self.here:
                    self._touch(value)
        return function(*args, **kwargs)

    def _touch(self, tensor: Tensor) -> None:
        if is_away(tensor):
            bring(tensor, torch.full(tensor.shape, _unset(tensor), dtype=tensor.dtype))
        elif id(tensor) in self.kept:
            tensor.data = tensor.data.to(CPU)  # on which the unsplit model is initialised
        else:
            return
        self.here[id(tensor)] = tensor

    def end(self) -> None:
        """Ends an initialiser."""
        self.set |= {key for key, tensor in self.here.items() if is_set(tensor)}
        for key, tensor in self.here.items():
            if key in self.kept:
                tensor.data = tensor.data.to(self.place(tensor))
        send_away(tensor for key, tensor in self.here.items() if key not in self.kept)
        self.here.clear()


def initialize(model: nn.Module, kept: Iterable[Tensor], place: Callable[[Tensor], torch.device]) -> None:
    """Initialises a model whose tensors are away, as this initialises the unsplit one.

        model.to_empty(device="cpu")
        model.init_weights()                                      # a transformers model, or else
        model.apply(lambda module: module.reset_parameters())     # where a module has that method

    A tied tensor gets the value that it has there under its first name. Draws from torch's default generator.

    Args:
        model: the model.
        kept: the tensors that this process keeps.
        place: the device of such a tensor.

    Raises:
        InputError: no initialiser sets a tensor, or one fails.
    """
    kept = list(kept)
    wanted = [(name, tensor) for name, tensor in named_tensors(model) if is_away(tensor)]
    with untied(model), torch.no_grad(), Touched(kept, place) as touched:
        _initialize(model, "", touched)
    here = set(map(id, kept))
    for name, tensor in wanted:
        if id(tensor) not in touched.set or (id(tensor) in here and not is_set(tensor)):
            owner, _, last = name.rpartition(".")
            kind = type(model.get_submodule(owner)).__name__
            raise InputError(
                f"no initialiser sets {name!r} to a value that this process can compute: {kind} has no "
                f"reset_parameters() that sets {last!r}, or it reads parameters of other modules; add that method, or "
                f"pass from_checkpoint="
            )


def initialize_buffers(model: nn.Module, names: Iterable[str]) -> None:
    """Gives buffers that are away the values that their modules' initialisers set, or those of a module around.

    Draws from torch's default generator.

    Raises:
        InputError: no initialiser sets a buffer.
    """
    buffers, modules = dict(model.named_buffers(remove_duplicate=False)), dict(model.named_modules())
    owners = _transformers(model)
    with torch.no_grad():
        for name in names:
            buffer, path = buffers[name], name.rpartition(".")[0]
            while is_away(buffer):
                _initialize_around(modules, path, owners, buffer)
                if is_away(buffer) and not path:
                    raise InputError(
                        f"buffer {name!r} is on the meta device and has no known value: it is not in a checkpoint, and "
                        f"no initialiser sets it; set it in reset_parameters(), or create it with device='cpu'"
                    )
                path = path.rpartition(".")[0]


def _initialize_around(
    modules: Mapping[str, nn.Module], path: str, owners: Mapping[int, nn.Module], buffer: Tensor
) -> None:
    """Runs the initialiser of one module; the buffer gets a value or stays away."""
    module = modules[path]
    with Touched([buffer], lambda tensor: CPU) as touched:
        if (owner := owners.get(id(module))) is not None:
            _run(f"{type(owner).__name__}.{OWN_ONE}()", path, lambda: getattr(owner, OWN_ONE)(module))
        elif (reset := _reset_of(module)) is not None:
            _run(f"{type(module).__name__}.{reset.__name__}()", path, reset)
        touched.end()
    if id(buffer) not in touched.set and not is_away(buffer):
        send_away([buffer])


def _initialize(module: nn.Module, path: str, touched: Touched) -> None:
    """Initialises the modules below, then the module."""
    if _is_transformers(module):
        with ending_each(module, touched):
            _run(f"{type(module).__name__}.{OWN}()", path, getattr(module, OWN))
        return
    for name, child in module.named_children():
        _initialize(child, f"{path}.{name}".lstrip("."), touched)
    if (reset := _reset_of(module)) is not None:
        _run(f"{type(module).__name__}.{reset.__name__}()", path, reset)
        touched.end()


@contextmanager
def ending_each(model: nn.Module, touched: Touched) -> Iterator[None]:
    """A context in which a transformers model ends the initialiser of each module."""
    parts: list[Any] = [module for module in model.modules() if _is_transformers(module)]

    def ending(each: Callable[..., None]) -> Callable[..., None]:
        def initialize_one(*args: Any) -> None:
            each(*args)
            touched.end()

        return initialize_one

    for part in parts:
        setattr(part, OWN_EACH, ending(getattr(part, OWN_EACH)))
    try:
        yield
    finally:
        for part in parts:
            delattr(part, OWN_EACH)


@contextmanager
def untied(model: nn.Module) -> Iterator[None]:
    """A context in which a tied tensor has its first name alone; under the others are tensors of the same kind."""
    seen: set[int] = set()
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in seen and is_away(tensor):
                    replaced.append((table, name, tensor))
                    other = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    table[name] = nn.Parameter(other, False) if isinstance(tensor, nn.Parameter) else other
                    send_away([table[name]])
                seen.add(id(tensor))
    try:
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def _transformers(model: nn.Module) -> dict[int, nn.Module]:
    """For each module of a transformers model, the innermost one that it is part of, by ``id``."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():  # those around come first
        if _is_transformers(module):
            found |= {id(part): module for part in module.modules()}
    return found


def _is_transformers(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in (OWN, OWN_EACH, OWN_ONE))


def _reset_of(module: nn.Module) -> Any:
    """The method that initialises a module; None if it has none."""
    return next(filter(callable, (getattr(module, name, None) for name in RESETS)), None)


def _run(what: str, path: str, initialiser: Callable[[], None]) -> None:
    try:
        initialiser()
    except Exception as error:
        raise InputError(
            f"module {path!r}: {what}, which initialises it, raised {type(error).__name__}: {error}; it must set the "
            f"module's parameters on the CPU, or pass from_checkpoint="
        ) from error


def _unset(tensor: Tensor) -> float | int:
    """What fills the memory of a tensor that has no value yet."""
    if tensor.is_floating_point() or tensor.is_complex():
        return math.nan
    return False if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min


def is_set(tensor: Tensor) -> bool:
    """Whether all entries of a tensor have been set; True for types of which no value is set apart."""
    is_float = tensor.is_floating_point() or tensor.is_complex()
    if tensor.numel() == 0 or (tensor.itemsize == 1 if is_float else not tensor.dtype.is_signed):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    least = tensor.min()  # NaN if there is one
    return not bool(least.isnan()) if tensor.is_floating_point() else bool(least != _unset(tensor))
