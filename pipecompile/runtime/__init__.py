"""Runs the stages of a split model: executes programs, keeps weights, moves values and gradients."""

from pipecompile.runtime.ambient import Ambient
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.lane import Lane
from pipecompile.runtime.runner import Microbatch, Runner
from pipecompile.runtime.transport import LocalTransport, Transport
from pipecompile.runtime.weights import MakeOptimizer, Weights

__all__ = [
    "Ambient",
    "Executor",
    "Lane",
    "LocalTransport",
    "MakeOptimizer",
    "Microbatch",
    "Runner",
    "Transport",
    "Weights",
]
