"""pipecompile trains any PyTorch model split over several devices, without a rewrite.

    pipe = pipecompile.compile(model, devices=[0, 1])
    loss = pipe(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()

A model is captured as a ``Graph``, profiled to a ``CostedGraph``, cut along a ``Plan`` for a ``Cluster``, run by a
``Program``, which ``simulate`` predicts and an executor measures as a ``Timeline``.
"""

from pipecompile.api import compile
from pipecompile.cluster import Cluster
from pipecompile.errors import PipecompileError
from pipecompile.graph import CostedGraph, Graph
from pipecompile.pipeline import Pipeline
from pipecompile.plan import Plan
from pipecompile.program import Program
from pipecompile.simulate import simulate
from pipecompile.timeline import Timeline

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "CostedGraph",
    "Graph",
    "PipecompileError",
    "Pipeline",
    "Plan",
    "Program",
    "Timeline",
    "compile",
    "simulate",
]
