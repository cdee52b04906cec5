"""The error of a stage that does not fit, which is torch's too. Errors of the other layers know no torch."""

import torch

from pipecompile.errors import ExecutionError


class OutOfMemoryError(ExecutionError, torch.OutOfMemoryError):
    """A stage does not fit into the memory of its device; also torch's error, for code that handles that."""
