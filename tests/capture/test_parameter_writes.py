"""Parameters and buffers that a forward writes to, however it does it: once a batch, as in the unsplit model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pipe_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D, blocks, mean_square
from trained import WAYS, assert_trains_alike, floats

from pipecompile.errors import CaptureError, ExecutionError


class Scaled(nn.Module):
    """``write(scale)`` between two layers; the second reads the result."""

    def __init__(self, write: Callable[[Tensor], Any], buffer: bool) -> None:
        super().__init__()
        self.body = blocks(4)
        self.write = write
        scale = torch.linspace(0.5, 1.5, D)
        if buffer:
            self.register_buffer("scale", scale)
        else:
            self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x) * self.scale
        with torch.no_grad():
            self.write(self.scale)
        return self.body[2:](h * self.scale)


def assign(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def foreach(tensor: Tensor) -> None:
    torch._foreach_mul_([tensor.data], 0.9)
    torch._foreach_add_([tensor.data], [torch.ones(D, dtype=tensor.dtype)])


def views(tensor: Tensor) -> None:
    tensor.data.view(2, 5)[0].mul_(0.9)
    tensor[2:4] *= 0.5
    tensor[0] = 0.3


def assigned_then_written(tensor: Tensor) -> None:
    old, value = tensor.data, tensor.data * 0.9
    tensor.data = value
    value.add_(0.5)  # they share memory
    tensor.data.mul_(old)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    ".data = new": lambda t: assign(t, t.data / t.data.norm()),
    ".data *= ": lambda t: assign(t, t.data.mul_(0.9)),
    ".data.mul_": lambda t: t.data.mul_(0.9),
    ".data.copy_": lambda t: t.data.copy_(t.data.flip(0)),
    ".data.clamp_, then .data = ": lambda t: (t.data.clamp_(0.6, 1.4), assign(t, t.data.clamp(0.7, 1.3))),
    "detach().mul_": lambda t: t.detach().data.mul_(0.9),
    "set_ of data": lambda t: t.data.set_(t * 0.9),
    "foreach": foreach,
    "views": lambda t: views(t.data),
    "memory shared with another tensor": assigned_then_written,
}


@WAYS
@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_writes_past_autograds_counters(write: str, buffer: bool, way: dict[str, Any]) -> None:
    assert_trains_alike(Scaled(WRITES[write], buffer), way, steps=2)


class Normalized(nn.Module):
    """A layer of EDM2 (Karras et al. 2024): its weight is normalised in place in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.normalize(weight))
        return torch.tanh(F.linear(x, self.normalize(weight)))

    @staticmethod
    def normalize(weight: Tensor) -> Tensor:
        return weight / (weight.norm(dim=1, keepdim=True) + 1e-4)


class Renormed(nn.Module):
    """Rows of an embedding are renormalised by the function itself (``max_norm``)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(9, D, max_norm=1.0), blocks(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.words((x[..., 0] * 3).abs().long() % 9) + x)


class WrittenLate(nn.Module):
    """The weights are written when all has read them: what autograd has saved is written along."""

    def __init__(self, assigned: bool) -> None:
        super().__init__()
        self.body, self.assigned = blocks(4), assigned

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        weight = self.body[1][0].weight
        weight.data.div_(weight.data.norm(dim=1, keepdim=True))
        return out


class Codebook(nn.Module):
    """Vector quantisation whose codes follow the batch's mean (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, assigned: bool) -> None:
        super().__init__()
        self.body, self.codes, self.assigned = blocks(4), nn.Embedding(7, D), assigned
        self.codes.weight.requires_grad_(assigned)
        self.register_buffer("counts", torch.ones(7))
        self.register_buffer("sums", self.codes.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        flat = h.reshape(-1, D)
        codes = self.codes.weight
        distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        chosen = F.one_hot(distances.argmin(1), 7).to(flat.dtype)
        quantized = (chosen @ self.codes.weight).view_as(h)
        if self.training:
            (self._assign if self.assigned else self._write)(flat, chosen)
        loss = F.mse_loss(quantized.detach(), h) * 0.25
        return mean_square(self.body[2:](h + (quantized - h).detach())) + loss

    @torch.no_grad()
    def _write(self, flat: Tensor, chosen: Tensor) -> None:
        self.counts.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
        self.sums.data.mul_(0.9).add_(chosen.T @ flat, alpha=0.1)
        self.codes.weight.data.copy_(self.sums / self.counts.unsqueeze(1))

    def _assign(self, flat: Tensor, chosen: Tensor) -> None:
        self.counts = self.counts * 0.9 + 0.1 * chosen.sum(0)
        self.sums = self.sums * 0.9 + 0.1 * (chosen.T @ flat).detach()
        self.codes.weight.data = self.sums / self.counts.unsqueeze(1)


class MeanTeacher(nn.Module):
    """A frozen copy that follows the weights, as in BYOL and MoCo."""

    def __init__(self, follow: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.follow = blocks(4), follow
        self.teacher = deepcopy(self.body).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
                self.follow(mine, other)
            target = self.teacher(x)
        return F.mse_loss(out, target)


class Counting(nn.Module):
    """A number in a parameter that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = blocks(4), nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) * (1 + self.calls)
        self.calls.data += 1
        return out


class Reset(nn.Module):
    """``set_``, which autograd's counters do see: nothing has read the parameter before."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = blocks(4), nn.Parameter(torch.linspace(0.5, 1.5, D))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.set_(self.scale * 0.9)
        return self.body[2:](self.body[:2](x) * self.scale)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "set_": Reset,
    "normalised weights": lambda: nn.Sequential(*(Normalized() for _ in range(4))),
    "max_norm": Renormed,
    "written late": lambda: WrittenLate(False),
    "codebook, in place": lambda: Codebook(False),
    "codebook, assigned": lambda: Codebook(True),
    "mean teacher, .data =": lambda: MeanTeacher(lambda t, s: assign(t, t.data * 0.9 + s.data * 0.1)),
    "mean teacher, in place": lambda: MeanTeacher(lambda t, s: t.mul_(0.9).add_(s, alpha=0.1)),
    "counter": Counting,
}


@WAYS
@pytest.mark.parametrize("name", MODELS)
def test_models_that_write_to_their_parameters(name: str, way: dict[str, Any]) -> None:
    loss = (lambda out: out) if "codebook" in name or "teacher" in name else mean_square
    assert_trains_alike(MODELS[name](), way, loss=loss)


@WAYS
def test_a_measured_profile_writes_nothing(way: dict[str, Any]) -> None:
    assert_trains_alike(MODELS["normalised weights"](), {**way, "costs": "measure"}, steps=1)
    assert_trains_alike(Scaled(WRITES[".data.mul_"], False), {**way, "costs": "measure"}, steps=1)


def test_gradients_accumulate_over_calls_that_write() -> None:
    eager = MODELS["normalised weights"]().double()
    copy = deepcopy(eager)
    pipe = pipe_of(copy, microbatches=2)
    for module in (eager, pipe):
        for step in range(3):
            mean_square(module(*floats(step))).backward()
    for (name, expected), got in zip(eager.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.parametrize("retain", [False, True])
def test_a_call_that_is_run_again_writes_once(retain: bool) -> None:
    eager = MODELS["normalised weights"]().double()
    copy = deepcopy(eager)
    pipe = pipe_of(copy, microbatches=2)
    for module in (eager, pipe):
        loss = mean_square(module(*floats(0)))
        loss.backward(retain_graph=True)
        if retain:
            loss.backward()
    for (name, expected), got in zip(eager.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


# What depends on the data


class ActNorm(nn.Module):
    """Shift and scale are set from the first batch (Kingma and Dhariwal 2018, section 3.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.ones(D))
        self.register_buffer("done", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.done.item() == 0:
            with torch.no_grad():
                self.shift.data.copy_(-x.mean((0, 1)))
                self.scale.copy_(1 / x.std((0, 1)))
                self.done.fill_(1)
        return (x + self.shift) * self.scale


class ActNormByFlag(nn.Module):
    """The same with a flag of Python's, in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4)
        self.shift, self.scale, self.done = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.ones(D)), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        if not self.done:
            self.shift.data = -h.mean((0, 1)).detach()
            self.scale.data = 1 / h.detach().std((0, 1))
            self.done = True
        return self.body[2:]((h + self.shift) * self.scale)


def in_blocks() -> nn.Module:
    return nn.Sequential(blocks(2), ActNorm(), blocks(2))


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("build", [in_blocks, ActNormByFlag])
def test_parameters_are_set_from_the_first_batch(build: Callable[[], nn.Module], schedule: str, stages: int) -> None:
    assert_trains_alike(build(), {"stages": stages, "schedule": schedule, "microbatches": 1})


def test_a_batch_that_sets_parameters_is_not_cut() -> None:
    with pytest.warns(UserWarning, match=r"sets its parameter 'shift' from the values of the whole.*one microbatch"):
        assert_trains_alike(ActNormByFlag(), {"microbatches": 4})
    model = ActNormByFlag().double()
    model(*floats(0))  # now they are set
    pipe = pipe_of(model, microbatches=4)
    pipe(*floats(0))
    assert any("in microbatches of 3, 2, 2" in line for line in pipe.pipeline.report.verified)


def test_a_module_kept_whole_that_writes_to_its_parameters_is_run_on_the_whole_batch() -> None:
    with pytest.warns(UserWarning, match=r"module '1' is kept whole.*'shift'.*run as one microbatch"):
        assert_trains_alike(in_blocks(), {"microbatches": 4})


def test_a_module_kept_whole_that_begins_to_write_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 1e3:
                with torch.no_grad():
                    self.scale.mul_(0.5)
            return x * self.scale

    pipe = pipe_of(nn.Sequential(nn.Linear(D, D), Late(), nn.Linear(D, D)).double(), microbatches=2)
    (x,) = floats(0)
    pipe(x)
    with pytest.raises(ExecutionError, match=r"module '1' is kept whole and wrote to its parameter"):
        pipe(x * 1e6)


# What is refused


class Does(nn.Module):
    def __init__(self, what: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.body, self.what = blocks(4), what
        self.scale, self.other = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x) * self.scale * self.other
        self.what(self)
        return self.body[2:](h * self.scale)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "swap_tensors": (lambda m: torch.utils.swap_tensors(m.scale, m.other), "torch.utils.swap_tensors"),
    "storage": (lambda m: m.scale.untyped_storage().fill_(0), "accesses the storage of a tensor"),
    "a new parameter": (lambda m: setattr(m, "scale", nn.Parameter(m.scale.detach() * 2)), "new parameter 'scale'"),
    "memory of another": (lambda m: assign(m.scale, m.other.data), "'scale' the memory of another tensor"),
    "another shape": (lambda m: assign(m.scale, m.scale.data[:1]), "must keep its shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str) -> None:
    what, said = REFUSED[name]
    model = Does(what).double()
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(CaptureError, match=said):
        pipe_of(model)(*floats(0))
    for n, parameter in model.named_parameters():
        assert parameter is before[n][0]
        assert torch.equal(parameter, before[n][1]), n


def test_an_asynchronous_schedule_does_not_write_to_weights_of_several_versions() -> None:
    pipe = pipe_of(
        MODELS["normalised weights"]().double(),
        schedule="pipedream",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss_fn=lambda out, target: F.mse_loss(out, target),
    )
    with pytest.raises(CaptureError, match=r"writes to parameter '\d.weight', of which schedule='pipedream'"):
        pipe(*floats(0), target=floats(1)[0])


def test_an_error_about_a_write_names_the_line_and_the_module_that_computed_the_value(tmp_path: Path) -> None:
    helper = tmp_path / "helper.py"
    helper.write_text("def halve(module):\n    module.scale.data = module.scale.data / 2\n")
    scope = runpy.run_path(str(helper))
    model = nn.Sequential(nn.Linear(D, D), Does(scope["halve"]), nn.Linear(D, D)).double()
    pipe = pipe_of(model, schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss_fn=F.mse_loss)
    with pytest.raises(CaptureError, match=r"^module '1', .*helper\.py:2: forward writes to parameter '1\.scale'"):
        pipe(*floats(0), target=floats(1)[0])
