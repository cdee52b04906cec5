"""``Flow``: batches without gradients that follow one another through the stages, each as one microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pipecompile.errors import ExecutionError, PipecompileError
from pipecompile.ir.instruction import Instruction
from pipecompile.runtime.batch import Batch
from pipecompile.runtime.compiled import Compiled
from pipecompile.runtime.microbatches import microbatches_of
from pipecompile.runtime.runner import Microbatch
from pipecompile.runtime.session import Session
from pipecompile.schedule.inflow import inflow, lifetime, period


@dataclass
class Flowing:
    """A batch on its way.

    Attributes:
        number: of the batch among all.
        drawn: the seed of its random functions.
        slot: its number as a microbatch.
        age: ticks since it entered.
        done: what has run.
    """

    number: int
    batch: Batch
    drawn: Sequence[int | None]
    microbatch: Microbatch
    slot: int
    age: int = 0
    done: set[Instruction] = field(default_factory=set)


Left = tuple[Batch, dict[str, Tensor]]  # a batch and its outputs by node


class Flow:
    """Batches in flight over the stages of one capture.

    Args:
        session: runs nothing else.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.compiled: Compiled | None = None
        self.in_flight: list[Flowing] = []
        self.entered = 0
        self.state: tuple[object, ...] = ()  # of the model's tensors, while batches are in flight

    def enter(self, number: int, batch: Batch) -> Iterator[Left]:
        """Lets a batch enter, and runs one tick. Yields the batches that leave, in order.

        A batch of another capture waits until all others have left.

        Args:
            number: of the batch, for errors.
            batch: of one microbatch.

        Raises:
            ExecutionError: a stage raised, or a tensor of the model was changed while batches are in flight.
        """
        if batch.compiled is not self.compiled:
            yield from self.drain()
            self.compiled, self.entered = batch.compiled, 0
        self._look()
        drawn = batch.draw()
        (microbatch,) = microbatches_of(batch, drawn)
        slot = self.entered % period(batch.compiled.plan)
        self.in_flight.append(Flowing(number=number, batch=batch, drawn=drawn, microbatch=microbatch, slot=slot))
        self.entered += 1
        yield from self._tick()

    def drain(self) -> Iterator[Left]:
        """Runs ticks until all batches have left. Yields them in order."""
        while self.in_flight:
            self._look()
            yield from self._tick()
        self.entered = 0

    def _look(self) -> None:
        """Takes the present weights if nothing is in flight, else makes sure that they are the same.

        Raises:
            ExecutionError: a tensor of the model has been changed.
        """
        assert self.compiled is not None
        model = self.compiled.captured.model
        now = tuple(map(_state, (*model.parameters(), *model.buffers())))
        if not self.in_flight:
            self.state = now
            self.session.begin(self.compiled)
        elif now != self.state:
            raise ExecutionError(
                f"the model was changed with {self._numbers} in the pipeline, which would be computed with weights of "
                f"both; do not train or move the model before map() has ended (list(map(...)) ends it)"
            )

    def _tick(self) -> list[Left]:
        assert self.compiled is not None
        plan, flying = self.compiled.plan, self.in_flight
        ages = tuple((each.slot, each.age) for each in flying)
        done = frozenset[Instruction]().union(*(each.done for each in flying))
        program = self.compiled.program(lambda plan: inflow(plan, ages, done), ("inflow", ages))
        try:
            with self.session.watched():
                self.session.run(self.compiled, program, {each.slot: each.microbatch for each in flying})
        except PipecompileError as error:
            raise self._named(error) from error.__cause__
        for each in flying:
            each.age += 1
            each.done |= {i for i in program.instructions if _microbatch(i) == each.slot}
        left = [each for each in flying if each.age == lifetime(plan)]
        self.in_flight = [each for each in flying if each.age < lifetime(plan)]
        return [(each.batch, self._outputs(each)) for each in left]

    def _outputs(self, each: Flowing) -> dict[str, Tensor]:
        values = each.batch.join({0: each.microbatch})
        joined = {name: values[name] for name in each.batch.joins}
        return each.batch.given(each.batch.finish(joined, each.drawn))

    def _named(self, error: PipecompileError) -> PipecompileError:
        """An error with the batch that a stage was at, or those in flight."""
        slot = None if error.instruction is None else _microbatch(error.instruction)
        at = next((f"batch {each.number}" for each in self.in_flight if each.slot == slot), self._numbers)
        return type(error)(f"{at} of the loader: {error}")

    @property
    def _numbers(self) -> str:
        numbers = [each.number for each in self.in_flight]
        return f"batch {numbers[0]}" if len(numbers) == 1 else f"batches {numbers[0]} to {numbers[-1]}"


def _microbatch(i: Instruction) -> int:
    return i.result.microbatch if hasattr(i, "result") else i.microbatch


def _state(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return (id(tensor), tensor.device, tensor.data_ptr(), version)
