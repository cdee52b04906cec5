"""The exceptions of pipecompile.

    PipecompileError
    ├── CaptureError         the model cannot be traced as it stands
    │   └── DependsOnData    unless a part of it is kept whole
    ├── PlanError            no valid assignment of nodes to stages, or of stages to devices
    │   └── InfeasibleError  a bound (memory, number of stages) cannot be met
    ├── ProgramError         the instructions do not form a valid program
    │   └── DeadlockError    some rank would wait for ever
    ├── InputError           the call's arguments do not fit the model or the pipeline
    ├── ReentryError         the pipeline is called by what it runs itself
    ├── ExecutionError       a stage raised while the program ran
    └── ExactnessError       the split model does not compute what the unsplit one does

A message says what was seen, why it cannot be, and what to do.
"""


class PipecompileError(Exception):
    """Base of every error that pipecompile raises on purpose."""


class CaptureError(PipecompileError):
    """The model cannot be traced as it stands; names the module path and the user's source line."""


class DependsOnData(CaptureError):
    """The model's Python depends on values that only a running step knows; a part kept whole around it may help."""


class PlanError(PipecompileError):
    """There is no valid assignment of nodes to stages, or of stages to devices."""


class InfeasibleError(PlanError):
    """A bound (memory, number of stages) cannot be met by any plan."""


class ProgramError(PipecompileError):
    """The instructions do not form a valid program."""


class DeadlockError(ProgramError):
    """Some rank would wait for ever."""


class InputError(PipecompileError, ValueError):
    """The arguments of a call do not fit the model, the pipeline or the devices."""


class ReentryError(PipecompileError):
    """The pipeline is called by code that it runs itself, and would wait for its own call to end."""


class ExecutionError(PipecompileError):
    """A stage raised while the program ran; the original exception is the ``__cause__``."""


class ExactnessError(PipecompileError):
    """The split model does not compute what the unsplit one does; says what differs, and in which module."""
