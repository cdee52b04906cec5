"""Finds out what a leaf returns, by one run on the real tensors that the graph computes from a sample microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pipecompile.capture.effects import Effects
from pipecompile.capture.evaluate import Evaluator
from pipecompile.capture.functionalize import storage_key
from pipecompile.capture.opaque_calls import LeafCall, copy_of
from pipecompile.capture.state.guards import MISSING, NOT_PLAIN, TORCHS_OWN, frozen
from pipecompile.capture.state.model_state import first_tensor
from pipecompile.errors import CaptureError, DependsOnData
from pipecompile.ops.torch_internals import DisableTorchFunction, _disable_current_modes

OF_RECURRENT = frozenset({"_flat_weights"})  # where a recurrent module lists its parameters


def learn(
    call: LeafCall, nodes: Sequence[fx.Node | float], evaluator: Evaluator, tensors: Mapping[str, Tensor]
) -> tuple[LeafCall, Any]:
    """Runs a leaf on real tensors. Returns the call with its output shapes and written parameters, and its outputs.

    Args:
        call: The call of the leaf.
        nodes: Nodes that compute the tensors and sizes among the arguments; a number for a known size.
        evaluator: Computes the values of nodes.
        tensors: Parameters and buffers of a module by full name, which the run may write to.

    Raises:
        DependsOnData: The leaf writes to its arguments, or returns something other than tensors.
        CaptureError: The forward of the module sets an attribute on itself.
    """
    values = [evaluator.value(node) if isinstance(node, fx.Node) else node for node in nodes]
    with DisableTorchFunction(), _disable_current_modes(), torch.enable_grad():
        values = [_wanting(value, node) for value, node in zip(values, nodes, strict=True)]
        before = _versions(values)
        args, kwargs = call.rebuild(tuple(values))
        kept = copy_of(call.kept, call.path, tensors) if isinstance(call.kept, nn.Module) else call.kept
        with watched(kept, [value for value in values if isinstance(value, Tensor)]) as (written, parameters):
            out = kept(*args, **kwargs)
    if isinstance(call.kept, nn.Module):
        _refuse_settings(call, kept)
    if written or before != _versions(values):
        raise DependsOnData(f"{call.name} is kept whole but writes to its arguments")
    call = replace(call, writes=tuple(parameters))
    return replace(call, shapes=tuple(tuple(t.shape) for t in call.tensors_of(out))), out


def _refuse_settings(call: LeafCall, copy: Any) -> None:
    """Raises ``CaptureError`` if the forward set an attribute: it was set on a copy, and would be lost."""
    for module, inner in zip(call.kept.modules(), copy.modules(), strict=False):  # type: ignore[attr-defined]
        born = [n for n, t in inner._buffers.items() if t is not None and module._buffers.get(n) is None]
        if born:
            raise first_tensor(call.name, born[0])
        own = TORCHS_OWN | (OF_RECURRENT if isinstance(inner, nn.RNNBase) else frozenset())
        names = [n for n, v in vars(inner).items() if n not in own and v is not vars(module).get(n, MISSING)]
        changed = [n for n in names if frozen(vars(inner)[n]) is NOT_PLAIN or vars(inner)[n] != vars(module).get(n)]
        if changed:
            raise CaptureError(
                f"{call.name} is kept whole and its forward sets self.{changed[0]}, which every microbatch would set "
                f"again; return the value instead, make it a buffer: self.register_buffer({changed[0]!r}, ...), or, if "
                f"it is a metric's, call the metric outside of the model, with what forward returns"
            )


@contextmanager
def watched(kept: Any, arguments: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[str]]]:
    """Yields the arguments, and the names of the module's parameters, that are written inside; complete at the end."""
    named = list(kept.named_parameters()) if isinstance(kept, nn.Module) else []
    memory = [storage_key(parameter) for _, parameter in named]
    tensors: list[Tensor] = []
    parameters: list[str] = []
    with Effects() as effects:
        yield tensors, parameters
    tensors += effects.among(arguments)
    for (name, parameter), key in zip(named, memory, strict=True):
        if key in effects.written - {None} or storage_key(parameter) != key:
            parameters.append(name)


def fake_result(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a fake of a real tensor; if it requires grad, it has a ``grad_fn`` like the result of an operation."""
    with DisableTorchFunction():
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return fake.requires_grad_().view_as(fake) if tensor.requires_grad else fake


def _versions(values: Sequence[Any]) -> list[int]:
    return [value._version for value in values if isinstance(value, Tensor)]


def _wanting(value: Any, node: fx.Node | float) -> Any:
    like = node.meta["val"] if isinstance(node, fx.Node) else None
    wants = isinstance(value, Tensor) and isinstance(like, Tensor) and like.requires_grad
    return value.detach().requires_grad_().view_as(value) if wants else value
