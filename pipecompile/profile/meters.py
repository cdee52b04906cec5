"""Two ways to determine the seconds of a call: measuring, and counting operations and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipecompile.ir.device_specs import Roofline
from pipecompile.ops.accelerators import seconds_between, time_mark
from pipecompile.ops.away import is_away, stand_in
from pipecompile.ops.torch_internals import DisableTorchFunction, FakeTensorMode, _disable_current_modes
from pipecompile.profile.call import Call

CPU = torch.device("cpu")
_LSTM_LAYER = torch.ops.aten.mkldnn_rnn_layer.default
How = Literal["measure", "count"]
REPEATS = (3, 7)  # minimum and maximum number of timed runs of an operation
LONG = 0.01  # seconds; a single run of this length is long enough, since an interruption of it is short
UNKNOWN_BACKWARD = 2.0  # cost of a backward that cannot run alone, in forwards
ENOUGH = 0.05  # seconds; by default, an operation is not repeated after being timed for this long
Share = Callable[[float], float]  # seconds of one run -> seconds after which it is not repeated


class Clock:
    """Measures seconds; on an accelerator, by its own clock.

    Attributes:
        in_turn: whether operations are timed as a stage runs them (``in_turn.py``) rather than alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fake: Any = nullcontext()
        self.in_turn = device.type == "cpu"

    def tensor(self, tensor: Tensor) -> Tensor:
        return stand_in(tensor).detach().to(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def seconds(self, call: Call, share: Share = lambda seconds: ENOUGH) -> tuple[float, float]:
        """The medians of forward and backward, of a call that has run before: a first run is slower."""
        if not call.differentiable:
            return self.repeated(call.forward, share=share, warm=True), 0.0
        runs: list[tuple[float, float]] = []
        seeds: list[Tensor] = []
        while not _enough([sum(run) for run in runs], share):
            marks = [time_mark(self.device)]
            outputs = call.forward()
            marks.append(time_mark(self.device))
            seeds = seeds or call.seeds(outputs)
            marks.append(time_mark(self.device))
            try:
                call.backward(outputs, seeds)
            except RuntimeError:
                forward = self.repeated(call.forward, share=share, warm=True)
                return forward, UNKNOWN_BACKWARD * forward
            marks.append(time_mark(self.device))
            runs.append((seconds_between(*marks[:2]), seconds_between(*marks[2:])))
        forward, backward = (median(times) for times in zip(*runs, strict=True))
        return forward, max(0.0, backward - self.start)

    @cached_property
    def start(self) -> float:
        """Seconds of an empty backward, which a stage pays only once for all its operations."""
        leaf = torch.zeros((), device=self.device, requires_grad=True)
        out, seed = leaf.view_as(leaf), torch.ones((), device=self.device)
        return self.repeated(lambda: torch.autograd.grad(out, leaf, seed, retain_graph=True))

    def repeated(
        self,
        run: Callable[[], Any],
        before: Callable[[], Any] = lambda: None,
        share: Share = lambda seconds: ENOUGH,
        warm: bool = False,
    ) -> float:
        """The median of several runs.

        Args:
            run: what is timed.
            before: runs before each, untimed; keeps an accelerator busy until the host has queued all of ``run``.
            share: how long it is repeated.
            warm: whether it has run before; otherwise it first runs untimed.
        """
        if not warm:
            run()
        times: list[float] = []
        while not _enough(times, share):
            before()
            begin = time_mark(self.device)
            run()
            times.append(seconds_between(begin, time_mark(self.device)))
        return median(times)


def _enough(times: Sequence[float], share: Share) -> bool:
    least, most = REPEATS
    if not times or len(times) >= most:
        return bool(times)
    return (len(times) >= least or min(times) >= LONG) and sum(times) >= share(median(times))


class _Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """torch's fakes, and the workspace of oneDNN's LSTM, which torch's own fake kernel makes without bytes.

    In float32, oneDNN keeps for each step and sample the four gates, and states and their gradients: five arrays of
    the hidden size, and six of the larger of both sizes. Fitted to what oneDNN asks for: a few percent more, for
    padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if func is not _LSTM_LAYER or out[3].numel():
            return out
        length, batch, width = args[0].shape
        hidden = args[10]
        numbers = length * batch * (9 * hidden + 6 * max(width, hidden))
        return (*out[:3], out[3].new_empty(4 * numbers))


class Counter:
    """Counts operations and bytes on fake tensors."""

    in_turn = False

    def __init__(self, roofline: Roofline, device: torch.device = CPU) -> None:
        self.roofline = roofline
        self.device = device
        self.tensor_float = torch.get_float32_matmul_precision() != "highest"
        self.fake = _Fakes(allow_non_fake_inputs=True)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a count depends on beside the call."""
        return self.roofline, self.tensor_float, torch.get_default_dtype()

    def tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if is_away(tensor):
            return self.empty(tensor.shape, tensor.dtype)
        made = self.fake.from_tensor(_plain(tensor), static_shapes=True)
        if made.device == self.device or self.device.type == "meta":
            return made
        with self.fake:  # a model, or its inputs, may be on another device
            return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu" if self.device.type == "meta" else self.device)

    def seconds(self, call: Call, share: Share | None = None) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counter:
            outputs = call.forward()
            nbytes = call.traffic(outputs)
            half = call.is_half
            forward = self.roofline.seconds(counter.get_total_flops(), nbytes, half, self.tensor_float)
            if not call.differentiable:
                return forward, 0.0
            try:
                call.backward(outputs)
            except RuntimeError:
                return forward, UNKNOWN_BACKWARD * forward
            both = self.roofline.seconds(counter.get_total_flops(), 3 * nbytes, half, self.tensor_float)
        return forward, max(0.0, both - forward)


def _plain(tensor: Tensor) -> Tensor:
    """Detached, and without a class that only watches functions (``__torch_function__``): a fake mode knows none."""
    if type(tensor) in (Tensor, nn.Parameter) or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor.detach()
    with DisableTorchFunction(), _disable_current_modes():
        return tensor.detach().as_subclass(Tensor)


Meter = Clock | Counter
