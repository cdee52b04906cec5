"""Captures a model as a ``torch.fx`` graph, from one sample call.

The forward runs once on fake tensors (no memory, no arithmetic), and every torch function it calls is appended to a
graph. Python runs as Python. The graph contains:

    placeholder     a tensor of the call, named after its argument
    get_attr        a parameter, buffer or constant, under its original name
    call_function   a torch function as the model called it, ``getattr`` for a property, ``operator.getitem`` for an
                    item of a tuple, arithmetic on sizes, the functions of ``pipecompile.ops.functional``, and
                    functions kept whole
    call_method     ``size`` of a placeholder
    call_module     a module kept whole
    output          the tensors of the model's output, flattened

``node.meta`` holds ``val`` (the fake value) and ``origin`` (an ``Origin``: module path, source line, region, writes).
"""

from pipecompile.capture.call import Call, read_call
from pipecompile.capture.capture import capture
from pipecompile.capture.captured import Captured, Output
from pipecompile.capture.summary import summarize

__all__ = ["Call", "Captured", "Output", "capture", "read_call", "summarize"]
