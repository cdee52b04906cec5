"""What cannot be saved or loaded is refused, and says what to do; nothing has been changed then."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed import Net, begun, on
from torch import nn

import pipecompile
from pipecompile.checkpoint import files


class Other(nn.Module):
    def __init__(self, sizes: int = 3, more: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, sizes), nn.Linear(2, sizes)
        if more:
            self.three = nn.BatchNorm1d(2)


class Stateful(nn.Module):
    def get_extra_state(self) -> str:
        return "mine"


class Runs:
    """Would create a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def adamw(model: nn.Module, names: str = "") -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for name, p in model.named_parameters() if names in name])


def sparse(model: nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).to_sparse()
    return adamw(model)


def of_a_stranger() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.sum().backward()
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer


MODEL = Other()
SAVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda p: pipecompile.save(p / "file", MODEL), "'.*file' exists, and is not overwritten"),
    "a folder": (lambda p: pipecompile.save(p, MODEL), "exists, and is not overwritten"),
    "no model": (lambda p: pipecompile.save(p / "x", {}), "a dict is not a model; pass the pipe"),
    "no optimizer": (lambda p: pipecompile.save(p / "x", MODEL, MODEL), "optimizer= is a Other; pass the torch.optim"),
    "meta": (lambda p: pipecompile.save(p / "x", nn.Linear(2, 2, device="meta")), "'weight' is on the meta device"),
    "extra state": (lambda p: pipecompile.save(p / "x", Stateful()), "module '' has a state that is not a tensor"),
    "extra": (
        lambda p: pipecompile.save(p / "x", MODEL, extra={"a": Other}),
        r"extra\['a'\] is a builtins.type",
    ),
    "extra in a list": (
        lambda p: pipecompile.save(p / "x", MODEL, extra={"a": [1, MODEL]}),
        r"extra\['a'\]\[1\] is a .*\.Other, which could not be read without running code",
    ),
    "extra in a dict of its own": (
        lambda p: pipecompile.save(p / "x", MODEL, extra={"a": defaultdict(list)}),
        r"extra\['a'\] is a collections.defaultdict, which could not be read",
    ),
    "sparse": (lambda p: pipecompile.save(p / "x", MODEL, sparse(MODEL)), "gradient of 'one.weight' is sparse"),
    "stranger": (lambda p: pipecompile.save(p / "x", MODEL, of_a_stranger()), r"a parameter of shape \[3\] that is"),
    "keep": (lambda p: pipecompile.save(p / "last", MODEL, keep=2), "keep=2 for 'last': older checkpoints are found"),
    "keep none": (lambda p: pipecompile.save(p / "step_1", MODEL, keep=0), "keep=0"),
    "export": (lambda p: pipecompile.export_safetensors(p, MODEL), "exists, and is not overwritten"),
}


@pytest.mark.parametrize("case", SAVES)
def test_a_save_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "file").touch()
    act, said = SAVES[case]
    with pytest.raises(pipecompile.InputError, match=said):
        act(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    for parameter in MODEL.parameters():
        parameter.grad = None


LOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda p: pipecompile.load(p / "no", Other()), "does not exist; pass the folder that save"),
    "no checkpoint": (lambda p: pipecompile.load(p, Other()), "is not a checkpoint; pass the folder"),
    "missing": (
        lambda p: pipecompile.load(p / "step_1", Other(more=True)),
        "'three.weight' and 4 others are in the model and not in the checkpoint; the model has 9 tensors",
    ),
    "unexpected": (
        lambda p: pipecompile.load(p / "step_1", nn.ModuleDict({"one": nn.Linear(2, 3)})),
        "'two.weight' and 1 other are in the checkpoint alone; the model has 2 tensors",
    ),
    "shape": (
        lambda p: pipecompile.load(p / "step_1", Other(sizes=4)),
        r"'one.weight' and 3 others had another shape when saved: \[3, 2\], not \[4, 2\]; build the model",
    ),
    "type": (
        lambda p: pipecompile.load(p / "step_1", Other().double()),
        "'one.weight' and 3 others had another type when saved: torch.float32, not torch.float64",
    ),
    "class": (
        lambda p: pipecompile.load(p / "step_1", o := Other(), torch.optim.SGD(o.parameters(), 0.1)),
        "has the state of torch.optim.adamw.AdamW, which torch.optim.sgd.SGD cannot continue",
    ),
    "fewer parameters": (
        lambda p: pipecompile.load(p / "step_1", o := Other(), adamw(o, "one")),
        r"'two.weight' \(one of 2\) is not among the parameters now, but was among those of the saved optimizer",
    ),
    "more parameters": (
        lambda p: pipecompile.load(p / "part_1", o := Other(), adamw(o)),
        r"'two.weight' \(one of 2\) was not among those of the saved optimizer",
    ),
    "one group": (
        lambda p: pipecompile.load(p / "groups_1", o := Other(), adamw(o)),
        "'one.weight' and 'two.weight' are in one group of parameters, but were saved with another lr each",
    ),
    "without optimizer": (
        lambda p: pipecompile.load(p / "weights_1", o := Other(), adamw(o)),
        "was saved without an optimizer; leave out optimizer=",
    ),
    "without scheduler": (
        lambda p: pipecompile.load(p / "step_1", o := Other(), a := adamw(o), torch.optim.lr_scheduler.ConstantLR(a)),
        "was saved without a scheduler; leave out scheduler=",
    ),
    "newer": (lambda p: pipecompile.load(p / "newer_1", Other()), "has format 99, but this version reads up to 1"),
}


@pytest.mark.parametrize("case", LOADS)
def test_a_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    model = Other()
    pipecompile.save(tmp_path / "step_1", model, adamw(model))
    pipecompile.save(tmp_path / "part_1", model, adamw(model, "one"))
    pipecompile.save(tmp_path / "weights_1", model)
    groups = [{"params": model.one.parameters()}, {"params": model.two.parameters(), "lr": 5e-4}]
    pipecompile.save(tmp_path / "groups_1", model, torch.optim.AdamW(groups))
    with monkeypatch.context() as patched:
        patched.setattr(files, "FORMAT", 99)
        pipecompile.save(tmp_path / "newer_1", model)
    act, said = LOADS[case]
    with pytest.raises(pipecompile.InputError, match=said):
        act(tmp_path)


def test_a_refused_load_changes_nothing(tmp_path: Path) -> None:
    training, other = begun(**on(2)).run(1), begun("momentum", seed=1, **on(2)).run(1)
    training.save(tmp_path / "step_1")
    weights, generator = other.weights, torch.get_rng_state()
    momenta = [value["momentum_buffer"].clone() for value in other.optimizer.state.values()]
    with pytest.raises(pipecompile.InputError, match="cannot continue"):
        other.load(tmp_path / "step_1")
    assert all(torch.equal(value, weights[name]) for name, value in other.weights.items())
    assert torch.equal(torch.get_rng_state(), generator)
    now = [value["momentum_buffer"] for value in other.optimizer.state.values()]
    assert all(torch.equal(one, two) for one, two in zip(momenta, now, strict=True))


@pytest.mark.parametrize("file", [files.METADATA, files.PLAIN])
def test_nothing_that_is_read_runs(tmp_path: Path, file: str) -> None:
    model, ran = Other(), tmp_path / "ran"
    pipecompile.save(tmp_path / "step_1", model)
    path = tmp_path / "step_1" / file
    if file == files.PLAIN:
        torch.save({"format": 1, "extra": Runs(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(pipecompile.CheckpointError, match=r"cannot be read: UnpicklingError"):
        pipecompile.load(tmp_path / "step_1", model)
    assert not ran.exists()


@pytest.mark.parametrize("file", [files.METADATA, files.PLAIN, "__0_0.distcp"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    model = Other()
    pipecompile.save(tmp_path / "step_1", model)
    path = tmp_path / "step_1" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(pipecompile.CheckpointError, match=r"step_1.* cannot be read: .*; load another"):
        pipecompile.load(tmp_path / "step_1", model)


def test_a_scheduler_of_other_groups_is_refused(tmp_path: Path) -> None:
    training = begun(**on(2)).run(1)
    training.save(tmp_path / "step_1")
    net = Net()
    named = net.named_parameters()
    groups = [{"params": [p], "weight_decay": 0.1 if name.endswith("weight") else 0.0} for name, p in named]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(pipecompile.InputError, match="saved for 2 groups of parameters, but the optimizer has 16"):
        pipecompile.load(tmp_path / "step_1", net, optimizer, scheduler)
