"""What processes say of their steps and of their gradients, and which of it differs."""

from __future__ import annotations

import pytest
import torch

from pipecompile.distributed.progress import Progress, differences


def told(*acts: str) -> list[int]:
    """What a process says at each call."""
    found, parameter, progress = [], torch.zeros(1), Progress()
    for act in acts:
        if act == "call":
            found.append(progress.told())
        elif act == "backward":
            progress.receives(parameter)
            parameter.grad = torch.ones(1)
        elif act == "step":
            progress.steps()
        elif act == "clear":
            parameter.grad = None
        elif act == "move":
            parameter.grad = None
            progress.moves()
    return found


WHOLE = ("call", "backward", "step", "clear", "call", "backward", "step", "clear", "call")


def difference(*acts: str) -> list[str]:
    return [text for pair in zip(told(*WHOLE), told(*acts), strict=True) for text in differences(pair)]


def test_a_step_that_one_process_leaves_out_is_told_once_and_by_name() -> None:
    (text,) = difference("call", "backward", "clear", "call", "backward", "step", "clear", "call")
    assert text.startswith("rank 0 has stepped parameters since the last call, but rank 1 has not, though it has got")


def test_gradients_that_one_process_does_not_clear_are_told() -> None:
    (text,) = difference("call", "backward", "step", "call", "backward", "step", "clear", "call")
    assert text.startswith("rank 0 has cleared its gradients since the last call, but rank 1 has kept its own; call")


@pytest.mark.parametrize(
    "acts",
    [
        WHOLE,
        ("call", "call", "call"),
        ("call", "step", "call", "step", "call"),
        ("call", "backward", "step", "clear", "call", "call"),
        ("call", "backward", "step", "move", "call", "backward", "step", "move", "call"),
    ],
    ids=["alike", "trains nothing", "has no gradients", "has none in a call", "moves"],
)
def test_nothing_is_told_of_a_process_that_does_as_others_or_has_nothing_to_do(acts: tuple[str, ...]) -> None:
    assert difference(*acts) == []


def test_accumulated_gradients_are_no_difference() -> None:
    acts = ("call", "backward", "call", "backward", "step", "clear", "call")
    assert [text for pair in zip(told(*acts), told(*acts), strict=True) for text in differences(pair)] == []
