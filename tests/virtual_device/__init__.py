"""Virtual accelerators ``virt:0`` to ``virt:7``: the CPU's memory and kernels behind what CUDA has.

Streams, events, copies between devices, pinned memory, a caching allocator and late errors behave as CUDA's do, so that
code for accelerators runs on any machine, and a synchronization that is missing in it gives wrong numbers. It is a
backend of torch (PrivateUse1), in C++.

Importing this module makes ``torch.device("virt", 0)`` the accelerator of the process, for good: its tests run in
processes of their own. ``torch.virt`` has what ``torch.cuda`` has and a library may ask for.

What it does not model: the numbers of CUDA's kernels (they are the CPU's), streams that wait for one another for lack
of room, priorities, fragmentation, graphs, several processes. Operators that the CPU has no kernel
for fail: fused LSTM and GRU cells, ``histc`` of integers, sparse tensors.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from virtual_device.build import built

DEVICES = 8
MODES = ("threads", "late", "early", "random", "sync")

torch.utils.rename_privateuse1_backend("virt")
_library = ctypes.CDLL(str(built()))
_library.virt_limit.argtypes = (ctypes.c_int, ctypes.c_int64)
_library.virt_slowness.argtypes = (ctypes.c_int, ctypes.c_double)
_library.virt_waits.argtypes = (ctypes.c_char_p, ctypes.c_int64)
_library.virt_waits.restype = ctypes.c_int64
_library.virt_fail_after.argtypes = (ctypes.c_int64,)
_library.virt_fail_after.restype = ctypes.c_int64
_library.virt_fail_kernel.argtypes = (ctypes.c_int, ctypes.c_int64)
_library.virt_fail_kernel.restype = ctypes.c_int64


def run(mode: str = "threads", seed: int = 0, jitter: int = 0) -> None:
    """Sets when queued work runs. What is queued runs first. Devices that have failed work again, as in a new process.

    Args:
        mode: One of ``MODES``. ``threads``: each stream has a thread. ``late``: when a thread waits for it, and nothing
            else runs; finds missing waits. ``early``: when a thread waits, all other streams run first; finds memory
            that is reused too early. ``random``: streams in an order drawn from ``seed``. ``sync``: at once.
        jitter: With ``threads``, each task starts up to so many microseconds later.
    """
    _library.virt_mode(MODES.index(mode), seed, jitter)


def strict(yes: bool) -> None:
    """Sets whether memory is overwritten when it is freed; else it is when it is handed out again."""
    _library.virt_strict(int(yes))


def limit(device: int, nbytes: int) -> None:
    """Sets the memory of a device; 1 GiB by default."""
    _library.virt_limit(device, nbytes)


def slowness(device: int, factor: float) -> None:
    """Sets the time that kernels of a device take by its own clock, relative to the CPU's time for them."""
    _library.virt_slowness(device, factor)


def peers(yes: bool) -> None:
    """Sets whether devices can reach each other's memory; if not, copies go through the CPU's."""
    _library.virt_peers(int(yes))
    torch.virt._peers = yes


def fail_after(count: int) -> int:
    """Lets ``count`` more allocations succeed and the next one fail; returns the number since the last call.

    Args:
        count: -1 for no failure.
    """
    return int(_library.virt_fail_after(count))


def fail_kernel(device: int, count: int) -> int:
    """Makes a kernel, or a copy, fail when it runs; returns the number queued on the device since the last call.

    As with CUDA, the device then stops: the rest of its work does not run, and whatever asks it for something, be it to
    queue, to wait, or whether an event has passed, raises ``torch.AcceleratorError``. ``run`` ends that.

    Args:
        count: How many more are queued before the one that fails; -1 for no failure.
    """
    return int(_library.virt_fail_kernel(device, count))


def waits() -> dict[str, int]:
    """What has made the host wait since the last call of this function, and how often."""
    room = _library.virt_waits(None, 0) + 1024
    text = ctypes.create_string_buffer(room)
    _library.virt_waits(text, room)
    rows = [row.split("\t") for row in text.value.decode().splitlines()]
    return {why: int(count) for why, count in rows}


def _index(device: object = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index  # type: ignore[call-overload]
    return int(torch.accelerator.current_device_index() if index is None else index)


@contextmanager
def _device(device: object) -> Iterator[None]:
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(_index(device))
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


def _properties(device: object = None) -> SimpleNamespace:
    total = torch.accelerator.get_memory_info(_index(device))[1]
    return SimpleNamespace(name="virtual", multi_processor_count=1, major=0, minor=0, total_memory=total)


_generators = [torch.ops.virt.default_generator(device) for device in range(DEVICES)]


def _seed_all(seed: int) -> None:
    for generator in _generators:
        generator.manual_seed(seed)


_module = SimpleNamespace(
    __name__="torch.virt",
    _is_in_bad_fork=lambda: False,
    _lazy_init=lambda: None,
    _peers=True,
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: DEVICES,
    current_device=torch.accelerator.current_device_index,
    set_device=lambda device: torch.accelerator.set_device_index(_index(device)),
    device=_device,
    stream=lambda stream: stream,
    synchronize=lambda device=None: torch.accelerator.synchronize(_index(device)),
    can_device_access_peer=lambda one, two: torch.virt._peers and one != two,
    get_device_properties=_properties,
    mem_get_info=lambda device=None: torch.accelerator.get_memory_info(_index(device)),
    default_generators=_generators,
    manual_seed_all=_seed_all,
    get_rng_state=lambda device=None: _generators[_index(device)].get_state(),
    set_rng_state=lambda state, device=None: _generators[_index(device)].set_state(state),
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
)
torch._register_device_module("virt", _module)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
atexit.register(run, "sync")
