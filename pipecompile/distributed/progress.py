"""What a process alone does with its gradients between two calls: it steps, and clears them, or not.

    rank 0:  call  backward  step  clear  call
    rank 1:  call  backward        clear  call      got gradients, and has not stepped

Each process has other parameters, so no process sees what another one does to its own. Each says it with the agreement
on a call, as one number. A process that has got no gradients, since its stages are frozen or not used by the loss, may
do either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

STEPPED, WAITS, CLEARED, KEEPS = 1, 2, 4, 8
WORDS = (
    (
        STEPPED,
        WAITS,
        "has stepped parameters since the last call, but rank {} has not, though it has got gradients; let all ranks "
        "decide alike whether to step, by the loss or by the norm that pipe.pipeline.clip_grad_norm_ returns",
    ),
    (
        CLEARED,
        KEEPS,
        "has cleared its gradients since the last call, but rank {} has kept its own; call zero_grad() on all ranks "
        "alike",
    ),
)


class Progress:
    """Of one process."""

    def __init__(self) -> None:
        self._stepped = False  # since the last call
        self._waits = False  # gradients for the next step
        self._got: Tensor | None = None  # a parameter that has got a gradient, and was not seen without one since

    def receives(self, parameter: Tensor) -> None:
        """Takes note that gradients come, one of them to this parameter."""
        self._waits, self._got = True, parameter

    def steps(self) -> None:
        """Takes note that an optimizer of the process's parameters is about to step."""
        self._stepped, self._waits = True, False

    def moves(self) -> None:
        """Takes note that parameters have moved to other processes."""
        self._got = None

    def told(self) -> int:
        """What is said at a call."""
        found = STEPPED if self._stepped else WAITS if self._waits else 0
        self._stepped = False
        if self._got is not None:
            found |= KEEPS if self._got.grad is not None else CLEARED
            if found & CLEARED:
                self._got = None
        return found


def differences(told: Sequence[int]) -> Iterator[str]:
    """What is said of processes that did something else than others, by what each has told."""
    for one, other, words in WORDS:
        did, did_not = ([rank for rank, each in enumerate(told) if each & bit] for bit in (one, other))
        if did and did_not:
            yield f"rank {did[0]} {words.format(did_not[0])}"
