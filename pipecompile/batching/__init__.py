"""Divides a batch into microbatches: how values depend on the batch, and which of them need the whole batch."""

from pipecompile.batching.batch_norm import defer_running, norms, norms_kept_whole
from pipecompile.batching.divide import divide, twins_differ
from pipecompile.batching.division import Division, by_shape, undivided
from pipecompile.batching.gather_spread import gather, spread
from pipecompile.batching.rows import Rows, scatter
from pipecompile.batching.rules.batch_types import SHARED, Batched, Kind, Mixed, Partial, Shared
from pipecompile.ir.batching_options import Batching

__all__ = [
    "SHARED", "Batched", "Batching", "Division", "Kind", "Mixed", "Partial", "Rows", "Shared", "by_shape",
    "defer_running", "divide", "gather", "norms", "norms_kept_whole", "scatter", "spread", "twins_differ", "undivided",
]  # fmt: skip
