"""Capture: from a model and a sample call to a ``torch.fx`` graph.

The forward runs once on fake tensors (no memory, no arithmetic) while every torch function it calls is appended to a
graph. Python runs as Python. The graph holds:

    placeholder     a tensor of the call, under its argument's name
    get_attr        a parameter, buffer or constant, under its original name
    call_function   a torch function as the model called it, ``getattr`` for a property, ``operator.getitem`` for an
                    item of a tuple, arithmetic on sizes, and the functions of ``pipecompile.ops.functional``
    call_method     ``size`` of a placeholder
    output          the tensors of the model's output, flat

``node.meta`` holds ``val`` (the fake value) and ``origin`` (an ``Origin``: module path, source line, region, writes).
"""

from pipecompile.capture.call import Call, read_call
from pipecompile.capture.capture import capture
from pipecompile.capture.captured import Captured, Output
from pipecompile.capture.summary import summarize

__all__ = ["Call", "Captured", "Output", "capture", "read_call", "summarize"]
