"""pipecompile trains any PyTorch model split over several devices, without a rewrite.

    pipe = pipecompile.compile(model, devices=[0, 1])
    loss = pipe(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()

A model is captured as a ``Graph``, profiled to a ``CostedGraph``, cut along a ``Plan`` for a ``Cluster``, run by a
``Program``, which ``simulate`` predicts and an executor measures as a ``Timeline``.

A public name is imported when it is first used (PEP 562), so ``import pipecompile`` alone imports neither torch nor
what only some programs need.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipecompile.api import compile
    from pipecompile.checkpoint.export_safetensors import export_safetensors
    from pipecompile.checkpoint.latest import latest
    from pipecompile.checkpoint.load import load
    from pipecompile.checkpoint.save import save
    from pipecompile.compiler.report import Report
    from pipecompile.errors import (
        CaptureError,
        CheckpointError,
        ExactnessError,
        ExecutionError,
        InfeasibleError,
        InputError,
        PipecompileError,
        PlanError,
        RankError,
    )
    from pipecompile.ir.batching_options import Batching
    from pipecompile.ir.cluster import Cluster
    from pipecompile.ir.graph import CostedGraph, Graph
    from pipecompile.ir.plan import Plan
    from pipecompile.ir.plan_options import PlanOptions
    from pipecompile.ir.program import Program
    from pipecompile.ir.timeline import Timeline
    from pipecompile.pipeline import Pipeline
    from pipecompile.runtime.out_of_memory import OutOfMemoryError
    from pipecompile.schedule.simulator import simulate

__version__ = "0.1.0"

_HOMES = {
    "api": ("compile",),
    "ir.batching_options": ("Batching",),
    "checkpoint.export_safetensors": ("export_safetensors",),
    "checkpoint.latest": ("latest",),
    "checkpoint.load": ("load",),
    "checkpoint.save": ("save",),
    "compiler.report": ("Report",),
    "errors": (
        "CaptureError", "CheckpointError", "ExactnessError", "ExecutionError", "InfeasibleError", "InputError",
        "PipecompileError", "PlanError", "RankError",
    ),
    "ir.cluster": ("Cluster",),
    "ir.graph": ("CostedGraph", "Graph"),
    "ir.plan": ("Plan",),
    "ir.plan_options": ("PlanOptions",),
    "ir.program": ("Program",),
    "ir.timeline": ("Timeline",),
    "pipeline": ("Pipeline",),
    "runtime.out_of_memory": ("OutOfMemoryError",),
    "schedule.simulator": ("simulate",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batching",
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "CostedGraph",
    "ExactnessError",
    "ExecutionError",
    "Graph",
    "InfeasibleError",
    "InputError",
    "OutOfMemoryError",
    "PipecompileError",
    "Pipeline",
    "Plan",
    "PlanError",
    "PlanOptions",
    "Program",
    "RankError",
    "Report",
    "Timeline",
    "compile",
    "export_safetensors",
    "latest",
    "load",
    "save",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its own file, or a module of the package."""
    if name in _HOME_OF:
        drawn = random.getstate()  # rich draws at its import
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        random.setstate(drawn)
        return found
    missing = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):
        raise AttributeError(missing)
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # the module exists, but imports one that does not
        raise AttributeError(missing) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
