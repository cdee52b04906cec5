"""Which of a model's tensors a rank has, trains and counts, by the plan of a capture."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import Tensor

from pipecompile.capture.origin import origin_of
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.distributed.shards import can_be_divided
from pipecompile.errors import CaptureError
from pipecompile.runtime.compiled import Compiled


def held(compiled: Compiled, rank: int) -> frozenset[str]:
    """The parameters and buffers that a rank has, by all of their names.

    Those of its stages, of the tail, which every rank runs, and those that no stage reads.
    """
    mine = {id(tensor) for stage in _stages_of(compiled, rank) for tensor in compiled.tensors(stage).values()}
    mine |= _everywhere(compiled)
    others = {id(tensor) for stage in compiled.stages for tensor in compiled.tensors(stage.index).values()} - mine
    return frozenset(name for name, tensor in named_tensors(compiled.captured.model) if id(tensor) not in others)


def refuse_missing(first: Compiled, later: Compiled) -> None:
    """Raises ``CaptureError`` if a rank needs a parameter in a later capture that it does not have.

    Raises it in all processes alike, since it reads nothing but the plans.
    """
    names = later.captured.first_names
    for rank in range(later.plan.num_ranks):
        present = held(first, rank)
        stages = _stages_of(later, rank)
        needed = {id(t) for stage in stages for t in later.tensors(stage).values()} | _everywhere(later)
        for name in sorted(names[tensor] for tensor in needed if tensor in names):
            if name not in present:
                raise CaptureError(
                    f"this call needs {name!r} in rank {rank}, which has sent it away, because calls like the first do "
                    f"not need it there; make such calls with a pipeline of one process, or make the first call one "
                    f"like this"
                )


def owned(compiled: Compiled, rank: int) -> frozenset[str]:
    """The parameters that a rank trains, by all of their names; a tied one is trained by its owner alone."""
    plan = compiled.plan
    followed = {tied.parameter for tied in plan.tied if plan.rank_of[tied.owner] != rank}
    names = compiled.captured.first_names
    present = held(compiled, rank)
    parameters = compiled.captured.model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in parameters if name in present and names[id(p)] not in followed)


def dividable(compiled: Compiled, rank: int) -> frozenset[str]:
    """The parameters of a rank that the parts of the batch can divide, by their first names.

    Those that its stages alone read, which have rows, and whose gradients are dense as far as modules say.
    """
    names, everywhere = compiled.captured.first_names, _everywhere(compiled)
    read = {id(t): t for stage in _stages_of(compiled, rank) for t in compiled.tensors(stage).values()}
    modules = compiled.captured.model.modules()
    sparse = {id(p) for module in modules if getattr(module, "sparse", False) for p in module._parameters.values()}
    left = everywhere | sparse
    return frozenset(names[key] for key, tensor in read.items() if can_be_divided(tensor) and key not in left)


def refuse_divided(compiled: Compiled, divided: Container[int]) -> None:
    """Raises ``CaptureError`` if what every process computes reads a parameter that is divided."""
    names = compiled.captured.first_names
    if name := next((names[key] for key in sorted(_everywhere(compiled)) if key in divided), None):
        raise CaptureError(
            f"this call needs all of {name!r} after the stages, where samples are mixed, but its rows are divided over "
            f"processes, because calls like the first do not need it there; leave out fully_shard=, or make the first "
            f"call one like this"
        )


def refuse_in_two_places(compiled: Compiled) -> None:
    """Raises ``CaptureError`` if a parameter gets gradients in one process's stage and in the tail of all processes."""
    names = compiled.captured.first_names
    of_stages = {id(t) for stage in compiled.stages for t in compiled.tensors(stage.index).values()}
    behind = () if compiled.tail is None else tuple(compiled.tail.module.parameters())
    found = next((p for p in behind if p.requires_grad and id(p) in of_stages), None)
    if found is not None:
        raise CaptureError(
            f"{names[id(found)]!r} is read by a stage and after the stages, where samples are mixed, so that only the "
            f"process of that stage would have its whole gradient; train with a pipeline of one process"
        )


def counted(compiled: Compiled, rank: int) -> frozenset[str]:
    """The parameters that a rank counts in a sum over all ranks, by their first names: each is counted once."""
    names = compiled.captured.first_names
    everywhere = set.intersection(*(set(owned(compiled, r)) for r in range(compiled.plan.num_ranks)))
    mine = owned(compiled, rank) - (everywhere if rank else set())
    return frozenset(mine & set(names.values()))


def foreign_buffers(compiled: Compiled, rank: int) -> frozenset[str]:
    """The buffers whose present values only another rank has, by all of their names: its stages write them."""
    tensors = compiled.captured.tensors
    foreign = {id(tensors[name]) for name, ranks in written_by_stages(compiled).items() if rank not in ranks}
    return frozenset(name for name, tensor in named_tensors(compiled.captured.model) if id(tensor) in foreign)


def written_by_stages(compiled: Compiled) -> dict[str, set[int]]:
    """The ranks of the stages that write each buffer, by its first name."""
    plan = compiled.plan
    stage_of = dict(zip((node.name for node in compiled.graph.nodes), plan.stage_of, strict=True))
    written: dict[str, set[int]] = {}
    for node in compiled.division.body.graph.nodes:
        if (stage := stage_of.get(node.name)) is not None:
            for name in origin_of(node).writes:
                written.setdefault(name, set()).add(plan.rank_of[stage])
    return written


def foreign(captures: Sequence[Compiled], rank: int) -> frozenset[int]:
    """The tensors whose present values only other ranks have, by ``id``: the parameters that others train, and buffers.

    Args:
        captures: of the pipeline; the first one decides who trains a parameter.
    """
    model, mine = captures[0].captured.model, owned(captures[0], rank)
    buffers = frozenset[str]().union(*(foreign_buffers(compiled, rank) for compiled in captures))
    parameters = set(map(id, model.parameters()))
    tensors = named_tensors(model)
    return frozenset(id(t) for name, t in tensors if name in buffers or (id(t) in parameters and name not in mine))


def _stages_of(compiled: Compiled, rank: int) -> list[int]:
    return [stage for stage, at in enumerate(compiled.plan.rank_of) if at == rank]


def _everywhere(compiled: Compiled) -> set[int]:
    """The tensors of the parts that every process runs, by ``id``."""
    pieces = [piece.module for piece in (compiled.before, compiled.tail) if piece is not None]
    tensors: list[Tensor] = [t for module in pieces for t in (*module.parameters(), *module.buffers())]
    return set(map(id, tensors))
