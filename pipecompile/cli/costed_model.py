"""A model of the command line, captured, with its costs."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipecompile.capture import Captured, capture, read_call, summarize
from pipecompile.cli.arguments import DTYPES, check_choice
from pipecompile.cli.model_spec import load
from pipecompile.cli.output import working
from pipecompile.compiler.options import read_costs
from pipecompile.compiler.plan_call import reused
from pipecompile.compiler.report import capture_topics as topics
from pipecompile.errors import InputError
from pipecompile.ir.graph import CostedGraph
from pipecompile.ops.phases import phase
from pipecompile.planning.by_rows import ByRows
from pipecompile.profile import profile

__all__ = ["by_rows", "captured", "costed", "topics"]


def captured(model: str, microbatch: int | None, length: int, dtype: str, meta: bool) -> Captured:
    """A microbatch of a model.

    Args:
        model: its name (see ``model_spec``).
        microbatch: samples; by default all that the model's function returns.
        length: sequence length of the sample inputs of a transformers model.
        dtype: of the weights.
        meta: create a transformers model without memory for its weights.

    Raises:
        InputError, CaptureError: the model is not found, or cannot be captured.
    """
    check_choice("dtype", dtype, DTYPES)
    with working(f"loading {model}"):
        it, args, kwargs = load(model, microbatch or 2, length, meta=meta)
        it = it.to(getattr(torch, dtype))
    call = read_call(it.forward, args, kwargs)
    if microbatch and call.batch and microbatch > call.batch:
        raise InputError(
            f"--microbatch {microbatch} is more than the {call.batch} samples that {model} returns; it must be at most "
            f"{call.batch}"
        )
    with phase("capture"):
        return capture(it, call, microbatch)


def costed(captured: Captured, costs: str, device: torch.device, kind: str) -> CostedGraph:
    """The costs of a capture: measured, counted for a kind of device, or read from a file.

    Raises:
        InputError: the file cannot be read, or is for another model.
    """
    how = read_costs(costs)
    if isinstance(how, CostedGraph):
        return reused(how, summarize(captured))
    return profile(captured, summarize(captured), how, device, kind=kind)


def by_rows(
    captured: Captured, costed: CostedGraph, usual: int, costs: str, device: torch.device, kind: str
) -> ByRows | None:
    """The costs of microbatches of any size, of a batch of ``usual`` microbatches like the captured one.

    Returns None if only one size is known: saved costs, a microbatch of one row, or a trace for one size.
    """
    rows = captured.microbatch
    how = read_costs(costs)
    if isinstance(how, CostedGraph) or rows < 2 or captured.is_fixed or captured.call.batch is None:
        return None

    def at(size: int) -> Captured:
        return replace(captured, microbatch=size)

    half = at(rows // 2)
    other = profile(half, summarize(half), how, device, kind=kind, beside=(captured, costed))
    return ByRows(
        one=costed, other=other, rows=(rows, rows // 2), batch=usual * rows, at=lambda size: summarize(at(size))
    )
