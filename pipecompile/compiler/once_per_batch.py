"""What a forward does once for a batch, so that its microbatches cannot do it: such a batch runs as one microbatch."""

from __future__ import annotations

from pipecompile.capture import Captured
from pipecompile.capture.ancestors import ancestors
from pipecompile.capture.origin import origin_of


def repeated_effect(captured: Captured) -> str:
    """Which effect of a part kept whole would be repeated by each microbatch; empty if there is no such effect."""
    if captured.draws_whole:
        return "a part kept whole draws random numbers of Python or numpy, and each microbatch would draw its own"
    for path, name in captured.leaf_writes.items():
        return (
            f"module {path!r} is kept whole and its forward writes to its parameter {name!r}, which each microbatch "
            f"would repeat (if only the first batch writes it, run the model once before compile)"
        )
    return ""


def set_parameters(captured: Captured) -> str:
    """Where forward sets a parameter to what it computes from the batch; empty if it does not."""
    parameters = dict(captured.model.named_parameters(remove_duplicate=False))
    for node in captured.graph.nodes:
        names = [name for name in origin_of(node).writes if name in parameters]
        if names and any(n.name in captured.call.batched for n in ancestors([node])):
            return (
                f"{origin_of(node)}: forward sets its parameter {names[0]!r} from the values of the whole batch (if "
                f"only the first batch sets it, run the model once before compile)"
            )
    return ""
