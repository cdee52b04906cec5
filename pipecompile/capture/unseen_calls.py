"""Refuses a trace in which a tensor shows that the tracer did not see a call.

The gradient history of a tensor shows it (``autograd_history.py``), or that a module returns a tensor without a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from pipecompile.capture.node_table import NodeTable
from pipecompile.capture.origin import origin_of
from pipecompile.errors import DependsOnData
from pipecompile.ops.tensor_args import is_real, tensors_in
from pipecompile.ops.torch_internals import DisableTorchFunction, _is_torch_function_mode_enabled


def check_tensors(table: NodeTable, tensors: Iterable[Tensor]) -> None:
    """Raises ``DependsOnData`` if a call that was not recorded changed one of the tensors."""
    if table.scopes.inside_transform:
        return  # there, operations are recorded below autograd
    for tensor in tensors:
        if table.is_known(tensor) and (node := table.histories.stranger(tensor)) is not None:
            raise DependsOnData(
                f"{origin_of(table.node_of(tensor))}: a tensor of shape {tuple(tensor.shape)} created here gets "
                f"its gradient from {node.name()}, which ran before {table.scopes.here} and which the tracer did not "
                f"see; name the module around it in leaf_modules="
            )


def check_results(table: NodeTable, results: Iterable[Tensor], func: Callable[..., Any]) -> None:
    """Raises ``DependsOnData`` if what a call returned was computed from a tensor that is not in the graph."""
    if not table.scopes.inside_transform and (lost := table.histories.lost(results)) is not None:
        raise DependsOnData(
            f"{table.scopes.here}: {getattr(func, '__name__', func)} reads a tensor of shape {tuple(lost.shape)} that "
            f"is not among its arguments, so its gradient would be lost; name the module around it in leaf_modules="
        )


def check_module(table: NodeTable, out: Any) -> None:
    """Checks what a module returns, also for tensors that were not recorded: here the module to keep is known."""
    if table.scopes.inside_leaf or not _is_torch_function_mode_enabled():
        return
    with DisableTorchFunction():
        for tensor in tensors_in(out):
            if not table.scopes.inside_transform and not is_real(tensor) and not table.is_known(tensor):
                raise table.out_of_sight(tensor)
            check_tensors(table, [tensor])
