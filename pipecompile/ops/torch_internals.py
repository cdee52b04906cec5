"""Everything that is imported from torch's private API; pyproject.toml bounds the versions of torch that have it.

``tests/ops/test_torch_internals.py`` lists what a version of torch lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._C import (
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
    ScriptFunction,
    ScriptMethod,
    _current_graph_task_id,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_function_stack,
    _storage_Use_Count,
    _swap_tensor_impl,
)
from torch._C._autograd import (
    _enable_record_function,
    _get_current_graph_task_keep_graph,
    _profiler_enabled,
    _saved_tensors_hooks_disable,
    _saved_tensors_hooks_enable,
    _saved_tensors_hooks_get_disabled_error_message,
    _top_saved_tensors_default_hooks,
)
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor, peek_interpreter_stack
from torch._C._nn import _parse_to
from torch._C._profiler import _RecordFunctionFast
from torch._compile import _disable_dynamo
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import apis, eager_transforms
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    in_kernel_invocation_manager,
)
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.checkpoint import _StopRecomputationError

__all__ = [
    "DataDependentOutputException",
    "DeviceContext",
    "DimDynamic",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "OpOverload",
    "OpOverloadPacket",
    "ProxyTorchDispatchMode",
    "ScriptFunction",
    "ScriptMethod",
    "ShapeEnv",
    "SymNode",
    "SymT",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "_BatchNorm",
    "_DropoutNd",
    "_RecordFunctionFast",
    "_StopRecomputationError",
    "_current_graph_task_id",
    "_disable_current_modes",
    "_disable_dynamo",
    "_enable_record_function",
    "_engine_run_backward",
    "_get_current_dispatch_mode_stack",
    "_get_current_function_mode_stack",
    "_get_current_graph_task_keep_graph",
    "_get_tracing_state",
    "_is_torch_function_mode_enabled",
    "_len_torch_function_stack",
    "_parse_to",
    "_profiler_enabled",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
    "_saved_tensors_hooks_get_disabled_error_message",
    "_storage_Use_Count",
    "_swap_tensor_impl",
    "_top_saved_tensors_default_hooks",
    "_unsafe_preserve_version_counter",
    "apis",
    "backwards_without_autocast",
    "compile_errors",
    "constant_source",
    "dynamo",
    "dynamo_supported",
    "eager_transforms",
    "enable_python_dispatcher",
    "forward_ad",
    "has_triton",
    "in_kernel_invocation_manager",
    "inductor_without_cuda_graphs",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "mark_dynamic",
    "no_cpp_compiler",
    "num_process_groups",
    "parametrize",
    "peek_interpreter_stack",
    "pytree",
    "symbol_is_type",
    "tree_leaves",
    "tree_map_only",
    "when_backward_ends",
]


def when_backward_ends(act: Callable[[], None]) -> None:
    """Acts when the present backward has ended; not if anything in it raises, such as a hook."""
    torch.autograd.Variable._execution_engine.queue_callback(act)


def num_process_groups() -> int:
    """How many process groups this process has: part of the name of the next one that only its members make."""
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_names)


# torch.compile takes seconds to import, so it is imported by what needs it.


def dynamo() -> Any:
    """Dynamo, the part of ``torch.compile`` that traces Python."""
    import torch._dynamo

    return torch._dynamo


def constant_source(name: str) -> Any:
    """The name under which torch keeps a symbol that is a size of an input."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def dynamo_supported() -> None:
    """Raises ``RuntimeError`` if ``torch.compile`` does not work with this Python on this platform."""
    from torch._dynamo.eval_frame import check_if_dynamo_supported

    check_if_dynamo_supported()


def compile_errors() -> tuple[type[Exception], ...]:
    """The exceptions of ``torch.compile`` itself: what it cannot trace or compile, or will not compile once more."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def mark_dynamic(tensor: torch.Tensor, dims: Sequence[int]) -> None:
    """Tells ``torch.compile`` that the sizes of these dimensions may change; it may still compile for one of them."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, list(dims))


def backwards_without_autocast() -> Any:
    """A context in which backwards are compiled as autograd runs them outside autocast, whatever their forwards use."""
    from torch._functorch import config

    return config.patch(backward_pass_autocast="off")


def inductor_without_cuda_graphs(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compiles a graph with Inductor, which allocates the results of each call anew."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph, inputs, config_patches={"triton.cudagraphs": False})
    return compiled  # type: ignore[no-any-return]


def no_cpp_compiler() -> str:
    """Why Inductor has no C++ compiler; empty if it has one."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def has_triton() -> bool:
    """Whether triton is installed and knows a device of this machine."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
