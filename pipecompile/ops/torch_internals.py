"""Everything that is imported from torch's private API; pyproject.toml bounds the versions of torch that have it.

``tests/ops/test_torch_internals.py`` lists what a version of torch lacks.
"""

from __future__ import annotations

import torch.utils._pytree as pytree
from torch._C import (
    DisableTorchFunction,
    ScriptFunction,
    ScriptMethod,
    _current_graph_task_id,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_function_stack,
)
from torch._C._autograd import _get_current_graph_task_keep_graph, _top_saved_tensors_default_hooks
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._C._nn import _parse_to
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch import apis, eager_transforms
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.checkpoint import _StopRecomputationError

__all__ = [
    "ConstantSource",
    "DataDependentOutputException",
    "DeviceContext",
    "DimDynamic",
    "DisableTorchFunction",
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
    "_DropoutNd",
    "_StopRecomputationError",
    "_current_graph_task_id",
    "_disable_current_modes",
    "_engine_run_backward",
    "_get_current_dispatch_mode_stack",
    "_get_current_function_mode_stack",
    "_get_current_graph_task_keep_graph",
    "_get_tracing_state",
    "_is_torch_function_mode_enabled",
    "_len_torch_function_stack",
    "_parse_to",
    "_top_saved_tensors_default_hooks",
    "_unsafe_preserve_version_counter",
    "apis",
    "eager_transforms",
    "enable_python_dispatcher",
    "is_functorch_wrapped_tensor",
    "peek_interpreter_stack",
    "pytree",
    "set_eval_frame",
    "symbol_is_type",
    "tree_leaves",
    "tree_map_only",
]
