"""How results of the unsplit model on the microbatches of a batch are joined, where it runs them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from pipecompile.batching import SHARED, Batched, Division, Kind, Mixed, Partial, Rows, Shared, by_shape
from pipecompile.capture import Output
from pipecompile.capture.call import SHARE
from pipecompile.ir.batching_options import Batching
from pipecompile.ops.functional import part_of
from pipecompile.ops.operators import named
from pipecompile.runtime.batch import Batch

SUMS, MEANS, OTHERWISE = "sums", "means times their share of the rows", "otherwise"
DIVISIONS = named("div divide true_divide truediv")


def kind_of(batch: Batch, output: Output, options: Batching) -> Kind:
    """The kind of an output of the unsplit model on microbatches: what the user says, or what the stages know.

    In the stages a mean is a sum of parts, each times its share of the rows. The unsplit model returns the mean of a
    microbatch, without its share. What is neither a sum nor a mean, or is both, cannot be joined.
    """
    if output.name in options.out_dims:
        dim = options.out_dims[output.name]
        return SHARED if dim is None else Batched(dim)
    place = batch.division.places.get(str(output.node), "")
    kind = batch.joins.get(place)
    if isinstance(kind, Batched | Shared):
        return kind
    if not isinstance(kind, Partial) or not batch.division.is_divided:
        return by_shape(output)
    parts = _parts(batch.division, place)
    if len(parts) > 1 or OTHERWISE in parts:
        return Mixed(f"output {output.name or 'output'!r} is no plain sum or mean over the rows")
    return Partial(mean=MEANS in parts)


def _parts(division: Division, place: str) -> set[str]:
    """What the stages sum into an output, compared with what the model would compute of a microbatch alone."""
    alone = {node.name: node for node in division.captured.graph.nodes}
    stack = [node for node in division.body.graph.nodes if node.name == place]
    seen, found = set(stack), set[str]()
    rows = division.whole.microbatch / division.captured.microbatch
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            found.update([SUMS] if node.name in division.body.call.batched else [])
        elif _is_mean(node, alone.get(node.name), rows):
            found.add(MEANS)
        elif node.target is not torch.clone and (node.name not in alone or not _alike(node, alone[node.name])):
            found.add(OTHERWISE)
        else:
            new = [it for it in node.all_input_nodes if it not in seen and not _is_number(it)]
            seen.update(new)
            stack += new
    return found


def _is_mean(node: fx.Node, alone: fx.Node | None, rows: float) -> bool:
    """Whether a call takes a microbatch's share of what it would return of the microbatch alone.

    Args:
        rows: of the whole batch, for one of the microbatch.
    """
    if node.target is part_of:
        return getattr(node.args[1], "target", None) == SHARE
    if alone is None or node.target not in DIVISIONS or len(node.args) < 2:
        return False
    divisors = [it.args[1] for it in (node, alone)]
    whole, part = (it if isinstance(it, int | float) else 0 for it in divisors)
    return whole == part * rows and 0 < part < whole


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two calls are of the same function, with the same arguments where these are no nodes."""
    args = [fx.map_arg((it.args, it.kwargs), lambda _: None) for it in (node, other)]
    return node.target == other.target and args[0] == args[1]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


@dataclass
class Seed:
    """A gradient of an output on the whole batch, of which each microbatch takes its part, in their order."""

    kind: Kind
    whole: Tensor
    taken: int = 0  # entries of the batch dimension

    def part(self, k: int, rows: Rows, output: Tensor) -> Tensor:
        """The gradient of the output of microbatch k, which follows the one that was asked for before."""
        part = self.whole
        match self.kind:
            case Batched(dim, outer) if len(rows) > 1:
                size, start = output.shape[dim] // outer, self.taken
                self.taken += size
                part = torch.unflatten(part, dim, (outer, -1)).narrow(dim + 1, start, size).flatten(dim, dim + 1)
            case Partial(mean=True) | Shared():
                part = part * rows.weights[k]
        return part.to(output.device)


def unjoinable(batch: Batch, outputs: Sequence[Output], options: Batching) -> str:
    """Why results of microbatches that were run one by one cannot be joined; empty if they can."""
    computed = (output for output in outputs if output.node is not None and not output.is_dropped)
    kinds = (kind_of(batch, output, options) for output in computed)
    return next((kind.why for kind in kinds if isinstance(kind, Mixed)), "")
