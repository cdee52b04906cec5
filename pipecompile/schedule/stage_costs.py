"""What one microbatch costs in each stage of a schedule: seconds, transfers, and memory.

    f, b, w         seconds of Forward, of the gradient of inputs, and of the gradient of weights
    transfer        seconds from a stage to the next, on another rank
    mem_f           what a Forward adds to its rank's memory, in any unit
    mem_b, mem_w    what the two gradients add; what they free is negative, and mem_f + mem_b + mem_w = 0

Source: the model of Zero Bubble (Qi et al., ICLR 2024), sections 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

from pipecompile.errors import InputError
from pipecompile.schedule.shape import Shape

OVERHEAD = 1e-4  # seconds of a computation of the runtime beside its operations (benchmarks/overhead.py)


@dataclass(frozen=True)
class StageCosts:
    """The costs of each stage, one entry per stage, and of each edge of the shape.

    Raises:
        InputError: a time is negative or not finite, or memory does not return to what it was.
    """

    f: tuple[float, ...]
    b: tuple[float, ...]
    w: tuple[float, ...]
    transfer: tuple[float, ...] = ()  # per edge of the shape; empty: transfers take no time
    mem_f: tuple[float, ...] = ()  # empty: 1 per Forward, freed by the gradient of weights
    mem_b: tuple[float, ...] = ()
    mem_w: tuple[float, ...] = ()
    queued: float = 1.0  # the part of a transfer during which its rank sends nothing else

    def __post_init__(self) -> None:
        for name in ("mem_f", "mem_b", "mem_w"):
            if not getattr(self, name):
                default = {"mem_f": 1.0, "mem_b": 0.0, "mem_w": -1.0}[name]
                object.__setattr__(self, name, (default,) * len(self.f))
        for name in ("f", "b", "w", "transfer"):
            for seconds in getattr(self, name):
                if not (isfinite(seconds) and seconds >= 0):
                    raise InputError(f"{name}={seconds} is not a time; give a finite number of 0 or more")
        if not 0 <= self.queued <= 1:
            raise InputError(f"queued={self.queued} must be a part of a transfer, from 0 to 1")
        for stage, (f, w) in enumerate(zip(self.mem_f, self.mem_w, strict=False)):
            if f < 0 or w > 0:
                raise InputError(f"F of stage {stage} adds mem_f={f} and W mem_w={w}; F must not free, and W not add")
        lengths = {name: len(getattr(self, name)) for name in ("f", "b", "w", "mem_f", "mem_b", "mem_w")}
        if len(set(lengths.values())) > 1:
            raise InputError(f"all costs need one entry per stage; got {lengths}")
        for stage, (f, b, w) in enumerate(zip(self.mem_f, self.mem_b, self.mem_w, strict=True)):
            if not (isfinite(f) and isfinite(b) and isfinite(w)) or abs(f + b + w) > 1e-6 * max(abs(f), abs(b), abs(w)):
                raise InputError(
                    f"the memory of stage {stage} does not return to what it was: F adds {f}, B {b} and W {w}; "
                    f"give three numbers with the sum 0"
                )

    @staticmethod
    def uniform(
        shape: Shape,
        f: float,
        b: float,
        w: float,
        transfer: float = 0.0,
        memory: tuple[float, float, float] = (1.0, 0.0, -1.0),
        queued: float = 1.0,
    ) -> StageCosts:
        """The costs of ranks that are all alike: the times and memory of a rank, divided among its stages."""
        parts = [len(shape.stages_of[rank]) for rank in shape.rank_of]
        f_, b_, w_ = (tuple(seconds / part for part in parts) for seconds in (f, b, w))
        mem_f, mem_b, mem_w = (tuple(amount / part for part in parts) for amount in memory)
        return StageCosts(
            f=f_,
            b=b_,
            w=w_,
            transfer=(transfer,) * len(shape.edges),
            mem_f=mem_f,
            mem_b=mem_b,
            mem_w=mem_w,
            queued=queued,
        )


def busy(shape: Shape, costs: StageCosts, num_microbatches: int) -> tuple[float, ...]:
    """The seconds that each rank computes in a step."""
    return tuple(
        num_microbatches * sum(costs.f[s] + costs.b[s] + costs.w[s] for s in stages) for stages in shape.stages_of
    )


def no_cap(shape: Shape) -> tuple[float, ...]:
    """Memory without a limit, for each rank."""
    return (inf,) * shape.num_ranks
