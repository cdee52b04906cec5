"""The modes of the calling thread, which the ranks' threads must enter too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from pipecompile.ops.randomness import drawing_alike, is_alike


@dataclass(frozen=True, slots=True)
class Ambient:
    """Gradient, inference and autocast modes, which torch keeps per thread, and whether random draws are alike.

    Anomaly detection is a mode of the process, so there is nothing to enter.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    alike: bool = False
    anomaly: bool = False

    def __str__(self) -> str:
        casts = [f"autocast of {kind} to {dtype}" for kind, dtype, _ in self.autocast]
        others = [*["inference mode"] * self.inference, *["anomaly detection"] * self.anomaly]
        return ", ".join([f"gradients {'on' if self.grad else 'off'}", *others, *casts])

    @property
    def in_float16(self) -> bool:
        """Whether an autocast to float16 is on."""
        return any(dtype == torch.float16 for _, dtype, _ in self.autocast)

    @staticmethod
    def of_caller(device_types: frozenset[str]) -> Ambient:
        """The modes of the calling thread."""
        casts = tuple(
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in sorted(device_types)
            if torch.is_autocast_enabled(kind)
        )
        return Ambient(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=casts,
            alike=is_alike(),
            anomaly=torch.is_anomaly_enabled(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enters the modes in the current thread."""
        with ExitStack() as stack:
            stack.enter_context(drawing_alike(self.alike))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype, cache in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
            yield
