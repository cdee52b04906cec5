"""What one process has of a pipeline's model.

Until the first call has been compared with the unsplit model, every process has the whole model, the same in all of
them. Then each keeps its share, by the plan of the first capture.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipecompile.capture import Call
from pipecompile.capture.state.model_state import named_tensors
from pipecompile.distributed.clip_grad_norm import clip_grad_norm_
from pipecompile.distributed.moving import Move
from pipecompile.distributed.ownership import (
    dividable,
    foreign,
    held,
    owned,
    refuse_divided,
    refuse_in_two_places,
    refuse_missing,
    written_by_stages,
)
from pipecompile.distributed.processes import Processes
from pipecompile.distributed.shards import Shards
from pipecompile.distributed.watched_optimizers import leave_optimizers, watch_optimizers
from pipecompile.distributed.whole_batch import described, refuse_undivided, whole_batch
from pipecompile.errors import CaptureError, InputError
from pipecompile.ops.away import lacks_values, send_away
from pipecompile.runtime.ambient import Ambient
from pipecompile.runtime.compiled import Compiled

WRAPPER = torch.nn.parallel.DistributedDataParallel.__init__.__code__
NORMS = {inspect.unwrap(f).__code__ for f in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm)}
CONSTANT = "a tensor that forward reads and that is neither a parameter nor a buffer"
LONGEST = 500  # characters of what is said of a call
DEPTH = 6  # frames between a function of torch's and the parameters that it asks for


class Share:
    """The share of one process.

    Args:
        divides: whether the parts of the batch keep a part of each parameter, instead of all.

    Attributes:
        captures: of the pipeline; the first one decides.
        is_settled: whether the rest has been sent away.
    """

    def __init__(self, model: nn.Module, processes: Processes, divides: bool = False) -> None:
        self.model = model
        self.divides = divides and processes.column is not None
        self.processes = processes
        self.captures: list[Compiled] = []
        self.is_settled = False
        self._warned = False
        self._foreign: dict[int, frozenset[int]] = {}  # by rank, of ``captures``
        self._own: set[int] = set()  # what optimizers of this process step
        self._stand_in = nn.Parameter(torch.empty(0))
        self._stand_in.grad = torch.zeros(0)  # without one, torch's GradScaler would raise something else than we do
        watch_optimizers(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Share:
        """A copy of the model has the hooks of ``settle``, which find none of its tensors."""
        return self

    @property
    def part(self) -> int | None:
        """The part of the batch that this process gets; None if it is all of it."""
        return None if self.processes.column is None else self.processes.part

    def read(self, call: Call, again: Callable[[Call, Mapping[str, Tensor]], Call]) -> tuple[Call, tuple[int, ...]]:
        """The call of the whole batch, and the number of rows of each part of it.

        Args:
            again: reads a call again, with other tensors.

        Raises:
            InputError: the call wants what processes do not exchange, or the parts are not of one batch.
        """
        self._check_call(call)
        if self.processes.shards is not None:
            self.processes.shards.follow()
        if self.processes.column is None:
            return call, ()
        refuse_undivided(call)
        self.processes.agree(f"the batch of a call, with {described(call)}")
        whole = whole_batch(call, self.processes.column)
        return again(call, whole.tensors), whole.sizes

    def _check_call(self, call: Call) -> None:
        for name, tensor in call.tensors.items():
            if tensor.requires_grad:
                raise InputError(
                    f"argument {name!r} requires a gradient, which several processes do not compute for inputs: each "
                    f"would have the part of its own stage; pass {name}.detach(), or use devices= instead of mesh="
                )

    def check(self, call: Call, options: Mapping[str, str]) -> None:
        """Makes sure that all processes are about to capture the same call, the first time of the same model.

        Args:
            options: of the pipeline, by name.

        Raises:
            InputError: they are not; raised in all processes.
        """
        inputs = ", ".join(f"{name}: {str(t.dtype)[6:]} {list(t.shape)}" for name, t in call.tensors.items())
        modes = f"{'training' if self.model.training else 'evaluation'} with {Ambient.of_caller(frozenset(['cpu']))}"
        self.processes.agree(f"a call of a new kind, in {modes}, with inputs {inputs}"[:LONGEST])
        if not self.captures:
            self.processes.same_options(options)
            if not lacks_values(self.model):
                self.processes.same_tensors({repr(name): t for name, t in named_tensors(self.model)})

    def add(self, compiled: Compiled) -> None:
        """Takes note of a capture.

        Raises:
            CaptureError: it needs a parameter where the first one does not, or cannot be run in parts.
            InputError: a tensor that is neither parameter nor buffer differs between processes, the first time.
        """
        refuse_in_two_places(compiled)
        if self.processes.column is not None:
            _refuse_parts(compiled)
        if self.processes.shards is not None:
            refuse_divided(compiled, self.processes.shards.divided)
        if self.captures:
            refuse_missing(self.captures[0], compiled)
        else:
            constants = {name: t for name, t in compiled.captured.constants.items() if not t.is_meta}
            self.processes.same_tensors({f"{CONSTANT} ({name}: {list(t.shape)})": t for name, t in constants.items()})
        self.captures.append(compiled)
        self._foreign.clear()

    def settle(self) -> None:
        """Sends away what this process does not need. State dicts leave out what another process has, from now on."""
        if self.is_settled:
            return
        kept = self.held
        tensors = named_tensors(self.model)
        send_away(t for name, t in tensors if name not in kept and isinstance(t, nn.Parameter) and not t.is_meta)
        if self.divides:
            self._divide()
        for module in self.model.modules():
            module.register_state_dict_post_hook(partial(self._leave_out))  # type: ignore[no-untyped-call]
        self.is_settled = True

    def _divide(self) -> None:
        """Divides the parameters of the stages of this process over those that run the same stages."""
        processes, own = self.processes, self.owned
        names = dividable(self.captures[0], processes.rank)
        parameters = {name: p for name, p in self.model.named_parameters() if name in names}
        assert processes.column is not None
        assert processes.grid.parts_mesh is not None
        processes.shards = Shards(
            processes.grid.parts_mesh,
            processes.column,
            processes.part,
            [parameter for name, parameter in parameters.items() if name in own],
            [parameter for name, parameter in parameters.items() if name not in own],
        )
        self._own.clear()

    @property
    def held(self) -> frozenset[str]:
        """The names of the parameters and buffers that this process has, once the first call has been captured."""
        return held(self.captures[0], self.processes.rank)

    @property
    def owned(self) -> frozenset[str]:
        """The names of the parameters that this process trains.

        Raises:
            InputError: the model has not been split.
        """
        self._refuse_early()
        return owned(self.captures[0], self.processes.rank)

    def parameters(self, every: Iterator[tuple[str, nn.Parameter]], prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the named parameters of the model, those that this process trains.

        Args:
            every: with ``prefix`` before their names.
        """
        mine, start = self.owned, f"{prefix}." if prefix else ""
        self._refuse_wrapper()
        self._warn_of_norms()
        found = ((name, self.home(parameter)) for name, parameter in every if name.removeprefix(start) in mine)
        return cast(Iterator[tuple[str, nn.Parameter]], found)

    def home(self, tensor: Tensor) -> Tensor:
        """What this process has of a tensor of the model: the tensor itself, or rows of it as a DTensor."""
        return self.processes.home(tensor)

    def wholes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors, those that are divided gathered. The processes of a rank must call it with the same of those."""
        shards = self.processes.shards
        if shards is None:
            return tensors
        own = {id(divided.kept): divided.own for divided in shards.divided.values()}
        return {**tensors, **shards.gathered({name: own[id(t)] for name, t in tensors.items() if id(t) in own})}

    def stepped(self) -> Iterator[Tensor]:
        """What optimizers of this process may step."""
        yield self._stand_in
        yield from map(self.home, self.model.parameters())

    def divides_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter of the model of which this process keeps rows instead."""
        return self.home(tensor) is not tensor

    def is_stepped(self, parameters: Iterable[Tensor]) -> None:
        """Takes note of the step, and the gradient from the stand-in, so that no optimizer has a state for it."""
        self._stand_in.grad = None
        if self.captures:
            if not self._own:
                own = self.owned
                self._own = {id(self.home(p)) for name, p in self.model.named_parameters() if name in own}
            if any(id(parameter) in self._own for parameter in parameters):
                self.processes.progress.steps()

    @property
    def stand_in(self) -> Sequence[nn.Parameter]:
        """An empty parameter for a process that trains none of those of the model: optimizers refuse an empty list."""
        return [] if next(self.model.parameters(), None) is None else [self._stand_in]

    def clip_grad_norm_(self, max_norm: float, norm_type: float) -> Tensor:
        """As ``Pipeline.clip_grad_norm_``."""
        if not self.captures:
            raise InputError(
                "the pipeline has made no call, so it has no gradients to clip; call it and backward() first"
            )
        return clip_grad_norm_(self.captures[0], self.processes, max_norm, norm_type)

    def refuse_move(self) -> None:
        """Raises ``InputError`` if the parameters of this pipeline cannot move to other processes."""
        if self.divides:
            raise InputError(
                "replan() does not move parameters whose rows are divided over processes (fully_shard=True); save a "
                "checkpoint with pipecompile.save, and load it into a pipeline with the new plan"
            )
        if not self.is_settled:
            raise InputError("replan() over several processes moves weights between calls; call the pipeline first")

    def move(self, captures: Sequence[Compiled], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Moves parameters, gradients, buffers and the state of optimizers to the processes of another cut.

        Args:
            captures: of the pipeline with the new cut, the first one first.
            optimizers: all those of this process's parameters.

        Raises:
            CaptureError, InputError: they cannot move; nothing has moved then, in any process.
        """
        for later in captures[1:]:
            refuse_missing(captures[0], later)
        move = Move(self.model, self.processes, self.captures, captures, optimizers, self._stand_in)
        move.check()
        move.make()
        self.captures[:] = captures
        self._foreign.clear()
        self._own.clear()
        self.processes.progress.moves()

    def close(self) -> None:
        """Closes what this process has with the others, and looks at optimizers no more.

        Raises:
            InputError: another process makes a call instead.
        """
        try:
            self.processes.close()
        finally:
            leave_optimizers(self)

    def _leave_out(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        """A hook of each module: its tensors of which another process has the present values."""
        foreign = self.foreign(self.processes.rank)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = f"{prefix}{name}"
            if id(tensor) in foreign:
                state.pop(key, None)
            elif tensor is not None and (kept := self.home(tensor)) is not tensor and key in state:
                state[key] = kept if state[key] is tensor else kept.detach()

    def foreign(self, rank: int) -> frozenset[int]:
        """The tensors whose present values only other processes than that of a rank have, by ``id``.

        Raises:
            InputError: the model has not been split.
        """
        self._refuse_early()
        if rank not in self._foreign:  # found once: the hook of each module asks
            self._foreign[rank] = foreign(self.captures, rank)
        return self._foreign[rank]

    def has_first(self) -> frozenset[int]:
        """The tensors whose present values this process has, but none of a lower rank or part, by ``id``.

        Of those that are divided, it has its rows.
        """
        rank, shards = self.processes.rank, self.processes.shards
        self._refuse_early()
        below = frozenset.intersection(*(self.foreign(lower) for lower in range(rank))) if rank else None
        here = frozenset(id(tensor) for _, tensor in named_tensors(self.model)) - self.foreign(rank)
        first = here if below is None else here & below
        if self.processes.part:
            first &= frozenset() if shards is None else shards.divided.keys()
        return first

    def _refuse_early(self) -> None:
        if not self.captures:
            raise InputError(
                "the parameters of each process are not known before the model is split; pass example_inputs= to "
                "compile(), or call the pipeline first"
            )

    def _refuse_wrapper(self) -> None:
        """Refuses torch's DistributedDataParallel, which may abort the process where others have other parameters."""
        if any(frame.f_code is WRAPPER for frame in islice(_frames(), DEPTH)):
            raise InputError(
                "DistributedDataParallel copies the parameters of a whole model to all processes, but each process of "
                "this pipeline has those of its own stage; leave it out (transformers' Trainer and accelerate do not), "
                "and give the mesh a dimension 'data' to train on several parts of a batch"
            )

    def _warn_of_norms(self) -> None:
        """Warns once if a function of torch's asks for the parameters to compute the norm of all gradients."""
        if not self._warned and any(frame.f_code in NORMS for frame in islice(_frames(), DEPTH)):
            self._warned = True
            warnings.warn(
                "torch's clip_grad_norm_ sees the gradients of this process only, so each process would clip by "
                "another norm; use pipe.pipeline.clip_grad_norm_, which takes that of the whole model",
                stacklevel=2,
            )


def _refuse_parts(compiled: Compiled) -> None:
    """Raises ``CaptureError`` if the parts of a batch cannot be run by several pipelines."""
    if compiled.division.one_part:
        raise CaptureError(
            "the batch of this model cannot be divided, so no part of it runs alone; use a mesh with the dimension "
            "'stage' only"
        )
    if written := min(written_by_stages(compiled), default=None):
        raise CaptureError(
            f"the stages write buffer {written!r} for each microbatch, so it would differ between the parts of the "
            f"batch; use Batching(batch_norm='deferred') for batch normalization, or a mesh with the dimension 'stage' "
            f"only"
        )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
