"""Sets the state of an optimizer from values by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipecompile.checkpoint.named_state import OPTIMIZER, parameters_of
from pipecompile.errors import InputError

Kept = Mapping[str, Mapping[str, Any]]  # by parameter: the fields of ``named_state.Kept``


def refuse_other_parameters(
    written: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], kept: Kept
) -> None:
    """Raises ``InputError`` if optimizers have other parameters of this process than those that were saved."""
    own = {id(parameter) for optimizer in optimizers for parameter, _ in parameters_of(optimizer)}
    trained = [name for name, tensor in written.items() if id(tensor) in own]
    new = [name for name in trained if name not in kept]
    left = [name for name in written if name in kept and name not in trained]
    for names, said in ((new, "was not among"), (left, "is not among the parameters now, but was among")):
        if names:
            raise InputError(
                f"{names[0]!r} (one of {len(names)}) {said} those of the saved optimizer; make the optimizer from the "
                f"same parameters"
            )


def refuse_split_groups(names: Mapping[int, str], optimizers: Sequence[torch.optim.Optimizer], kept: Kept) -> None:
    """Raises ``InputError`` if parameters are in one group that had different hyperparameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            own = [names[id(p)] for p in group["params"] if names.get(id(p)) in kept]
            for name in own:
                first, other = (kept[each]["hyperparameters"] for each in (own[0], name))
                if differing := [key for key in first if key not in other or not _is_same(first[key], other[key])]:
                    raise InputError(
                        f"{own[0]!r} and {name!r} are in one group of parameters, but were saved with another "
                        f"{differing[0]} each; make the same groups"
                    )


def set_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], kept: Kept, tensors: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer the state and the hyperparameters of its parameters.

    Args:
        names: by ``id`` of the parameter; an optimizer may have others, which keep what they have.
        tensors: by key; on the CPU. The optimizer moves them to its parameters, and keeps their types.
    """
    state = optimizer.state_dict()
    found: dict[int, dict[str, Any]] = {}
    for number, (parameter, _) in enumerate(parameters_of(optimizer)):
        if (name := names.get(id(parameter))) in kept:
            assert name is not None
            own = {key: tensors[f"{OPTIMIZER}{name}.{key}"] for key in kept[name]["tensors"]}
            found[number] = {**own, **kept[name]["values"]}
    state["state"] = {number: each for number, each in found.items() if each}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        own_names = [names[id(p)] for p in group["params"] if names.get(id(p)) in kept]
        if own_names:
            saved |= kept[own_names[0]]["hyperparameters"]
    optimizer.load_state_dict(state)
    for number, (parameter, _) in enumerate(parameters_of(optimizer)):  # torch gives them the type of the parameter
        for key, value in found.get(number, {}).items():
            if isinstance(value, Tensor) and (now := optimizer.state[parameter][key]).dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
