"""pipecompile trains any PyTorch model split over several devices, without a rewrite.

    pipe = pipecompile.compile(model, devices=[0, 1])
    loss = pipe(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()

A model is captured as a ``Graph``, profiled to a ``CostedGraph``, cut along a ``Plan`` for a ``Cluster``, run by a
``Program``, which ``simulate`` predicts and an executor measures as a ``Timeline``.
"""

from pipecompile.api import compile
from pipecompile.batching.options import Batching
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
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import CostedGraph, Graph
from pipecompile.ir.plan import Plan
from pipecompile.ir.plan_options import PlanOptions
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.pipeline import Pipeline
from pipecompile.schedule.simulator import simulate

__version__ = "0.1.0"
from pipecompile.runtime.out_of_memory import OutOfMemoryError

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
