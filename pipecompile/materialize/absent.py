"""A model that has no values yet: all its tensors are away, and get values when the plan says which are kept where."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipecompile.capture.state.model_state import named_tensors
from pipecompile.capture.state.restore import generators_kept
from pipecompile.errors import InputError
from pipecompile.materialize.checkpoint import Checkpoint, Entry, load
from pipecompile.materialize.initialize import initialize, initialize_buffers
from pipecompile.ops.away import bring, is_away, send_away
from pipecompile.ops.freed_memory import give_back

NO_VALUES = (
    "the model is on the meta device and has no values before its first call; call the pipeline first, pass "
    "from_checkpoint= with example_inputs= to compile(), or build the model on a real device"
)

T = TypeVar("T")
Gathered = Callable[[str], Sequence[str]]  # what each process has said, in their order
Entries = Mapping[str, Sequence[Entry]]
Place = Callable[[Tensor], torch.device]
PAGES = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")


class Absent:
    """A model on the meta device whose tensors have been sent away, except buffers, which have their values.

    Its parameters keep their identity from now on. If initialisers draw buffers, ``fill`` sets them once more.

    Args:
        model: has tensors on the meta device.
        entries: of a checkpoint, by key; None for the model's own initialisers.
        keys: the keys in the checkpoint of the model's tensors, by ``id``.

    Raises:
        InputError: a buffer has no known value; or parameters without a checkpoint are partly on the meta device.
    """

    def __init__(self, model: nn.Module, entries: Entries | None, keys: Mapping[int, str]) -> None:
        self.model = model
        self.entries = entries
        self.keys = keys
        self.state = torch.get_rng_state()
        parameters = list(model.named_parameters())
        real = next((name for name, p in parameters if not _has_no_value(p)), None)
        unreal = next((name for name, p in parameters if _has_no_value(p)), None)
        if entries is None and real is not None and unreal is not None:
            raise InputError(
                f"parameter {unreal!r} has no value (it is on the meta device, or in another process), but {real!r} "
                f"has one, and would be initialised anew; build the whole model on the meta device, or pass "
                f"from_checkpoint="
            )
        send_away(t for _, t in named_tensors(model) if t.is_meta)
        if entries is not None:
            self._load(t for _, t in named_tensors(model) if not isinstance(t, nn.Parameter))
        with generators_kept():
            buffers = model.named_buffers(remove_duplicate=False)
            initialize_buffers(model, [name for name, buffer in buffers if is_away(buffer)])
        self._refusals = [
            model.register_state_dict_pre_hook(_refuse),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(_refuse),  # type: ignore[no-untyped-call]
        ]

    def fill(self, kept: Container[str], place: Place) -> None:
        """Gives the tensors that this process keeps their values. Draws nothing from the caller's generators.

        Args:
            kept: their names.
            place: the device of each of them.

        Raises:
            InputError: they do not fit into the memory of the machine, the checkpoint does not have their values, or no
                initialiser sets one of them.
        """
        mine = {id(tensor): tensor for name, tensor in named_tensors(self.model) if name in kept}.values()
        _refuse_too_large(mine, place)
        if self.entries is not None:
            self._load(mine, place)
        else:
            with generators_kept():
                torch.set_rng_state(self.state)
                initialize(self.model, mine, place)
        give_back()
        for refusal in self._refusals:
            refusal.remove()

    def _load(self, tensors: Iterable[Tensor], place: Place = lambda tensor: torch.device("cpu")) -> None:
        assert self.entries is not None
        wanted = {self.keys[id(t)]: t for t in tensors if id(t) in self.keys}
        for tensor, value in load(self.entries, wanted):
            if is_away(tensor):
                bring(tensor, value.to(place(tensor)))
            else:
                with torch.no_grad():
                    tensor.copy_(value)


def absent(model: nn.Module, path: str | Path | None, gathered: Gathered) -> Absent | None:
    """What a model without values is to be filled with; None if it has values.

    A model that has values gets those of the checkpoint, if there is one.

    Args:
        model: the model.
        path: of a checkpoint; None for the model's own initialisers.
        gathered: brings together what each process says.

    Raises:
        InputError: the same in all processes: the checkpoint does not fit the model, the processes have other
            checkpoints or seeds, or as ``Absent``.
    """
    lacks = any(_has_no_value(tensor) for _, tensor in named_tensors(model))
    if not lacks and path is None:
        return None

    def read() -> Absent | None:
        if path is None:
            return Absent(model, None, {})
        checkpoint = Checkpoint.at(path)
        entries = checkpoint.for_model(model)
        named = model.state_dict(keep_vars=True)
        tensors = {key: named[key] for key in entries}
        if lacks:
            return Absent(model, entries, {id(tensor): key for key, tensor in tensors.items()})
        with torch.no_grad():
            for tensor, value in load(entries, tensors):
                tensor.copy_(value)
        return None

    found = in_all(read, gathered)
    _refuse_others(found, gathered)
    return found


def _has_no_value(tensor: Tensor) -> bool:
    return tensor.is_meta or is_away(tensor)


def _refuse(*_: object) -> None:
    """A hook on the states of a model without values."""
    raise InputError(NO_VALUES)


def in_all(work: Callable[[], T], gathered: Gathered) -> T:
    """What a function returns, if it does in all processes.

    Raises:
        InputError: that of the first process in which it raises one, in all of them.
    """
    found, raised = None, None
    try:
        found = work()
    except InputError as error:
        raised = error
    said = next(filter(None, gathered("" if raised is None else str(raised))), None)
    if said is not None:
        raise InputError(said) from raised
    return found  # type: ignore[return-value]


def _refuse_others(found: Absent | None, gathered: Gathered) -> None:
    """Raises ``InputError`` in all processes if they would fill the model with other values."""
    if found is None:
        return
    if found.entries is None:
        said, what = bytes(found.state.tolist()).hex(), "seed"
    else:
        headers = ((key, entry.shape, entry.dtype) for key, there in found.entries.items() for entry in there)
        said, what = "\n".join(map(str, headers)), "checkpoint"
    texts = gathered(said)
    odd = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if odd:
        raise InputError(
            f"rank {odd[0]} has another {what} than rank 0, but every process must make the same model; call "
            f"torch.manual_seed() with the same number before compile(), or pass the same from_checkpoint="
        )


def _refuse_too_large(tensors: Iterable[Tensor], place: Place) -> None:
    """Raises ``InputError`` if tensors on the CPU do not fit into this machine's memory."""
    needed = sum(tensor.nbytes for tensor in tensors if place(tensor).type == "cpu")
    page, pages = map(os.sysconf, PAGES)
    if needed > page * pages:
        raise InputError(
            f"the model is on the meta device, and its values would take {needed / 2**30:.0f} GiB of this machine's "
            f"{page * pages / 2**30:.0f} GiB of memory; use more processes (mesh=), or accelerators"
        )
