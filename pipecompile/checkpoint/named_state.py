"""A training state as tensors and plain values by the names of the model, whatever the stages.

    model.<name>                 parameters and persistent buffers
    optimizer.<name>.<key>       tensors of an optimizer's state, such as exp_avg
    gradient.<name>              gradients that have not been used

An optimizer numbers its parameters, and each process has other ones. By name they fit any split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import InputError

MODEL, OPTIMIZER, GRADIENT = "model.", "optimizer.", "gradient."
NOT_HYPERPARAMETERS = ("params", "param_names")


@dataclass(frozen=True)
class Kept:
    """What an optimizer has for one parameter, except for tensors.

    Attributes:
        hyperparameters: of its group.
        tensors: the keys of the tensors of its state.
        values: the rest of its state, such as a step that is a number.
    """

    hyperparameters: Mapping[str, Any]
    tensors: tuple[str, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class NamedState:
    """A state, or the part of one process.

    Attributes:
        tensors: by key.
        kept: by parameter; empty without optimizer.
        optimizer: the class of the optimizer; empty if there is none.
    """

    tensors: Mapping[str, Tensor]
    kept: Mapping[str, Kept]
    optimizer: str


def named_state(written: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> NamedState:
    """The state of the tensors that this process writes.

    Raises:
        InputError: there is a sparse gradient.
    """
    names = {id(tensor): name for name, tensor in written.items()}
    tensors = {f"{MODEL}{name}": tensor.detach() for name, tensor in written.items()}
    kept: dict[str, Kept] = {}
    for optimizer in optimizers:
        for parameter, group in parameters_of(optimizer):
            state = optimizer.state.get(parameter, {})
            if (name := names.get(id(parameter))) is None:
                continue
            own = {key: value for key, value in state.items() if _is_dense(value)}
            tensors |= {f"{OPTIMIZER}{name}.{key}": value.detach() for key, value in own.items()}
            rest = {key: value for key, value in state.items() if key not in own}
            kept[name] = Kept(hyperparameters(group), tuple(own), rest)
            if (gradient := parameter.grad) is not None:
                tensors[f"{GRADIENT}{name}"] = _dense(name, gradient)
    return NamedState(tensors, kept, class_of(optimizers))


def refuse_strangers(all_of_model: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises ``InputError`` if an optimizer has a state for a parameter that is not the model's."""
    own = set(map(id, all_of_model.values()))
    for optimizer in optimizers:
        for parameter, _ in parameters_of(optimizer):
            if id(parameter) not in own and optimizer.state.get(parameter):
                raise InputError(
                    f"the optimizer has a state for a parameter of shape {list(parameter.shape)} that is not the "
                    f"model's, so it has no name; make the optimizer from the parameters of what is saved"
                )


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters of an optimizer, each with its group."""
    return ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group sets for its parameters."""
    return {key: value for key, value in group.items() if key not in NOT_HYPERPARAMETERS}


def class_of(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """The class of optimizers, which all stages share."""
    kinds = {f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" for optimizer in optimizers}
    return " and ".join(sorted(kinds))


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _dense(name: str, gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise InputError(f"the gradient of {name!r} is sparse, which checkpoints do not keep; call zero_grad() first")
    return gradient.detach()
