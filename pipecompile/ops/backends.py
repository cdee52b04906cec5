"""The backends of ``torch.compile`` that may compile a stage, and what they need of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from pipecompile.errors import InputError
from pipecompile.ops import torch_internals

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]  # what torch.compile(backend=) accepts

INDUCTOR = "inductor"
# Names of backends and modes of torch that replay CUDA graphs.
_REPLAYED = ("cudagraphs", "reduce-overhead", "max-autotune")


def name_of(given: Literal[True] | str | Backend) -> str:
    """The name of the backend that ``stage_compile=`` asks for."""
    if given is True:
        return INDUCTOR
    return given if isinstance(given, str) else str(getattr(given, "__name__", type(given).__name__))


def backend_of(given: Literal[True] | str | Backend) -> Backend:
    """The backend that ``stage_compile=`` asks for, which ``check_backend`` has accepted.

    Inductor never records CUDA graphs here, whatever its configuration says.
    """
    if given is True or given == INDUCTOR:
        return torch_internals.inductor_without_cuda_graphs
    if isinstance(given, str):
        found: Backend = torch_internals.dynamo().lookup_backend(given)
        return found
    return given


def check_backend(given: Any, devices: Iterable[torch.device]) -> None:
    """Checks that ``stage_compile=`` names a backend that can compile for these devices on this machine.

    Raises:
        InputError: it does not; the message says what is missing.
    """
    if given is False:
        return
    if not (given is True or isinstance(given, str) or callable(given)):
        raise InputError(
            f"stage_compile={given!r:.80}; it must be True, False, the name of a backend of torch.compile, or a backend"
        )
    if isinstance(given, str) and given in _REPLAYED:
        raise InputError(
            f"stage_compile={given!r} replays CUDA graphs, and a replay overwrites the results of the one before, but "
            f"a stage keeps the results of several microbatches for their backwards; use stage_compile=True"
        )
    try:
        torch_internals.dynamo_supported()
    except RuntimeError as error:
        raise InputError(
            f"stage_compile={given!r}: torch.compile does not work here ({error}); use stage_compile=False"
        ) from None
    if isinstance(given, str):
        known = torch_internals.dynamo().list_backends(exclude_tags=())
        if given not in known:
            raise InputError(f"stage_compile={given!r} is not a backend of torch.compile; it must be one of {known}")
    if given is True or given == INDUCTOR:
        for kind in sorted({device.type for device in devices}):
            _check_inductor(kind)


def _check_inductor(kind: str) -> None:
    """Checks that Inductor has what it needs to compile for a type of device.

    Raises:
        InputError: it has not.
    """
    otherwise = "or stage_compile='aot_eager', which needs no compiler, or stage_compile=False"
    if kind == "cpu":
        if why := torch_internals.no_cpp_compiler():
            raise InputError(
                f"stage_compile=True compiles stages on the CPU with a C++ compiler, but none was found ({why}); "
                f"install g++ (Debian, Ubuntu: apt install g++), name one in the variable CXX, {otherwise}"
            )
    elif kind not in ("cuda", "xpu"):
        raise InputError(
            f"stage_compile=True compiles with Inductor, which is not known to compile for {kind!r} devices; use a "
            f"backend that does, by its name, {otherwise}"
        )
    elif not torch_internals.has_triton():
        raise InputError(
            f"stage_compile=True compiles stages on {kind} devices with triton, which is missing or does not know "
            f"them; pip install triton, {otherwise}"
        )
