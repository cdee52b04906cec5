"""The real tensors that a graph reads by name: parameters, buffers, and constants.

A constant is any other real tensor that forward uses. It gets a name when the trace first meets it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipecompile.capture.scopes import Scopes
from pipecompile.capture.state.model_state import fake_of, named_tensors
from pipecompile.errors import CaptureError
from pipecompile.ops.away import is_away
from pipecompile.ops.torch_internals import DisableTorchFunction, FakeTensorMode, _disable_current_modes


class RealTensors:
    """The real tensors of one trace.

    Args:
        model: The model to trace.
        scopes: What is around each call.
        mode: Makes the fakes of constants.
        device: Of the fakes.
    """

    def __init__(self, model: nn.Module, scopes: Scopes, mode: FakeTensorMode, device: torch.device) -> None:
        self.scopes = scopes
        self.mode = mode
        self.device = device
        self.of_model = dict(named_tensors(model))
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.buffers = set(self.of_model) - self.parameters
        self.constants: dict[str, Tensor] = {}
        self.taken = {name.partition(".")[0] for name in self.of_model}

    def named(self, name: str) -> Tensor:
        """Returns the tensor that a ``get_attr`` node of this name reads."""
        return self.constants[name] if name in self.constants else self.of_model[name]

    def valued(self, name: str) -> Tensor:
        """As ``named``, for a tensor whose values are needed."""
        if is_away(tensor := self.named(name)):
            raise CaptureError(
                f"{self.scopes.here}: Python reads a value that is computed from {name!r}, which has no values in this "
                f"process; build or load the model before compile(), and make such a call first"
            )
        return tensor

    def constant(self, tensor: Tensor) -> tuple[str, Tensor]:
        """Returns the name in the graph and a fake for a real tensor that is not a parameter or buffer of the model."""
        if tensor.grad_fn is not None:
            raise CaptureError(
                f"{self.scopes.here}: forward uses a tensor of shape {tuple(tensor.shape)} that was computed before "
                f"this call and has a grad_fn, so gradients would flow out of this call; call detach() on it where it "
                f"is stored"
            )
        if tensor.requires_grad:
            raise CaptureError(
                f"{self.scopes.here}: forward uses a tensor of shape {tuple(tensor.shape)} that requires grad but is "
                f"not a parameter of the model, so it would get no gradient; register it as an nn.Parameter"
            )
        name = f"_constant{len(self.constants)}"
        while name in self.taken:
            name += "_"
        self.constants[name] = tensor
        return name, fake_of(tensor, self.mode, self.device)

    def copies(self, prefix: str) -> dict[str, Tensor]:
        """Returns copies of the parameters and buffers whose names begin so, which a run may write to."""
        mine = {name: tensor for name, tensor in self.of_model.items() if name.startswith(prefix)}
        with DisableTorchFunction(), _disable_current_modes():
            return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in mine.items()}
