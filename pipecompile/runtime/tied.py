"""Tied parameters: their gradients are summed in the owning stage, and its values copied to the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from pipecompile.ir.between_stages import Tied
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import followers
from pipecompile.runtime.lane import Values


def reduced(stage: int, plan: Plan, leaves: Mapping[str, Tensor], received: Mapping[int, Values]) -> dict[int, Values]:
    """Reduces gradients: an owner adds those of its followers, a follower returns its own for each owner.

    Args:
        leaves: those of the stage; empty if it has run nothing, and has no gradients.
        received: the gradients of each follower.
    """
    results: dict[int, Values] = {}
    trained = [tied for tied in plan.tied if tied.is_trained]
    for tied in trained:
        if stage in tied.followers:
            leaf = leaves.get(tied.parameter)
            results[tied.owner] = (*results.get(tied.owner, ()), None if leaf is None else leaf.grad)
            if leaf is not None:
                leaf.grad = None
    for follower in sorted(followers(stage, plan, trained=True), reverse=True):
        for name, gradient in zip(_shared(stage, follower, trained), received[follower], strict=True):
            leaf = leaves[name]
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return results


def refreshed(
    stage: int, plan: Plan, leaves: Mapping[str, Tensor], received: Mapping[int, Values]
) -> dict[int, Values]:
    """Copies values: an owner returns its own for each of its followers, a follower takes them."""
    for owner, values in received.items():
        for name, value in zip(_shared(owner, stage, plan.tied), values, strict=True):
            if value is not None:
                leaves[name].data.copy_(value)
    return {
        follower: tuple(leaves[name].detach() for name in _shared(stage, follower, plan.tied))
        for follower in followers(stage, plan)
    }


def _shared(owner: int, follower: int, each: Iterable[Tied]) -> list[str]:
    return [tied.parameter for tied in each if tied.owner == owner and follower in tied.followers]
