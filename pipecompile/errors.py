"""The exceptions of pipecompile.

    PipecompileError
    ├── CaptureError         the model cannot be traced
    │   └── DependsOnData    its Python depends on data, unless a part of it is kept whole
    ├── PlanError            there is not a valid assignment of nodes to stages, or of stages to devices
    │   └── InfeasibleError  no plan meets a bound (memory, number of stages)
    ├── ProgramError         the instructions are not a valid program
    │   └── DeadlockError    a rank would wait forever
    ├── CheckpointError      a checkpoint cannot be written, or its files cannot be read
    ├── InputError           arguments do not fit the model, the pipeline or the devices
    ├── ReentryError         the pipeline is called by code that it runs itself
    ├── ExecutionError       a stage raised while a program ran
    │   ├── OutOfMemoryError a stage does not fit into the memory of its device (in ``runtime/out_of_memory.py``)
    │   └── RankError        a rank in another process failed, or this one; all ranks raise the same
    └── ExactnessError       the split model does not compute what the unsplit model computes

A message says what was seen, why it is not possible, and what to do.
"""

from typing import Any


class PipecompileError(Exception):
    """Base class of the errors that pipecompile raises.

    Attributes:
        instruction: what a stage was running, where the error comes from there.
    """

    instruction: Any = None


class CaptureError(PipecompileError):
    """The model cannot be traced; the message names the module path and the user's source line."""


class DependsOnData(CaptureError):
    """The model's Python depends on values that are known only in a running step; keeping a part whole may help."""


class PlanError(PipecompileError):
    """A valid assignment of nodes to stages, or of stages to devices, does not exist or was not found."""


class InfeasibleError(PlanError):
    """No plan meets a bound (memory, number of stages)."""


class ProgramError(PipecompileError):
    """The instructions are not a valid program."""


class DeadlockError(ProgramError):
    """A rank would wait forever."""


class CheckpointError(PipecompileError):
    """A checkpoint cannot be written, or its files cannot be read."""


class InputError(PipecompileError, ValueError):
    """Arguments do not fit the model, the pipeline or the devices."""


class ReentryError(PipecompileError):
    """The pipeline is called by code that it runs itself, and would wait for its own call to end."""


class ExecutionError(PipecompileError):
    """A stage raised while a program ran; the original exception is the ``__cause__``."""


class RankError(ExecutionError):
    """A rank failed, in whichever process; the message, the same on all ranks, says which one and why."""


class ExactnessError(PipecompileError):
    """The split model does not compute what the unsplit model computes; the message says what differs, and where."""
