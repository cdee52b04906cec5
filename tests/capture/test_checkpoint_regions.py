"""What a model checkpoints is computed again in the backward: the same numbers, without keeping the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from effects import TimesTwo
from oracle import assert_same, pipedream, split, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import CaptureError, ExactnessError, ExecutionError
from pipecompile.ops.checkpoint import Recomputed

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


class Checkpointed(nn.Module):
    """Blocks whose middle is checkpointed unless ``keep`` says otherwise."""

    def __init__(self, reentrant: bool, middle: Callable[..., Any] | None = None, *, keep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = blocks(2), blocks(4), blocks(2)
        self.norm = nn.BatchNorm1d(3)
        self.middle = middle or (lambda self, h: self.inner(h))
        self.reentrant, self.keep = reentrant, keep
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.keep:
            return self.after(self.middle(self, h))
        return self.after(checkpoint(lambda t: self.middle(self, t), h, use_reentrant=self.reentrant))


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, 3, D, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def pipe_of(model: nn.Module, stages: int = 2, microbatches: int = 2, **options: Any) -> Any:
    return pipecompile.compile(model, ["cpu"] * stages, microbatches=microbatches, costs="count", **options)


def same(model: nn.Module, stages: int = 2, microbatches: int = 2, **options: Any) -> Any:
    """A step of a pipeline against the unsplit model, loss inside, so that 1F1B interleaves the microbatches."""
    pipe = pipe_of(model, stages, microbatches, loss_fn=F.mse_loss, **options)
    target = rows().flip(0)
    actual = step(pipe, model, lambda loss: loss, ((rows(),), {"target": target}))
    expected = step(lambda x: F.mse_loss(model(x), target), model, lambda loss: loss, ((rows(),), {}))
    assert_same(actual, expected)
    return pipe


def stretches(pipe: Any) -> int:
    return sum(isinstance(node.target, Recomputed) for stage in pipe.pipeline.stages for node in stage.graph.nodes)


def kept_bytes(pipe: Any) -> int:
    """Bytes that one forward of all stages keeps for the backward, parameters and inputs aside."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    values: dict[str, Any] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for stage in pipe.pipeline._batches.first.stages:
            arguments = [rows() for _ in stage.inputs]
            arguments += [values[name] for names in stage.receives.values() for name in names]
            values |= dict(zip(stage.returns, stage.module(*arguments), strict=True))
    parameters = {p.untyped_storage()._cdata for p in pipe.pipeline.model.parameters()}
    return sum(t.nbytes for storage, t in kept.items() if storage not in parameters)


@REENTRANT
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_checkpoint_gives_the_same_numbers(reentrant: bool, stages: int, microbatches: int) -> None:
    pipe = same(Checkpointed(reentrant), stages, microbatches)
    assert stretches(pipe) >= 1
    assert any("which the model checkpoints" in line for line in pipe.pipeline.report.recomputed)


@REENTRANT
def test_activations_inside_are_not_kept(reentrant: bool) -> None:
    pipes = [pipe_of(Checkpointed(reentrant, keep=keep)) for keep in (True, False)]
    kept, recomputed = (kept_bytes(pipe) for pipe in pipes if pipe.pipeline.prepare(rows()) is None)
    one = rows().nbytes
    assert kept - recomputed >= 2 * one
    assert stretches(pipes[0]) == 0


@REENTRANT
def test_a_checkpoint_that_a_cut_divides_is_one_in_each_stage(reentrant: bool) -> None:
    class Whole(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x * self.scale, use_reentrant=self.reentrant)

    model = Whole(reentrant)
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    pipe = same(model, 3)
    assert stretches(pipe) == 3


def test_a_dropout_inside_draws_the_same_mask_twice() -> None:
    def dropped(self: Any, h: Tensor) -> Tensor:
        return self.inner(F.dropout(h, 0.5, True)) * F.dropout(h, 0.3, True)

    runs = []
    for keep in (True, False):
        model = Checkpointed(False, dropped, keep=keep)
        pipe = pipe_of(model, 3, 4, loss_fn=F.mse_loss)
        torch.manual_seed(3)
        runs.append(step(pipe, model, lambda loss: loss, ((rows(),), {"target": rows().flip(0)})))
    assert_same(runs[1], runs[0], exact=True)


@REENTRANT
def test_an_autocast_around_the_call_or_inside_is_entered_again(reentrant: bool) -> None:
    def lower(self: Any, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.inner(h)
        return h.float() * 2

    model = Checkpointed(reentrant, lower).float()
    inputs = ((rows().float(),), {})
    pipe = pipe_of(model, microbatches=1)
    assert_same(step(pipe, model, mean_square, inputs), step(model, model, mean_square, inputs))
    runs = []
    for call in (pipe, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs.append(step(call, model, lambda y: y.float().pow(2).mean(), inputs))
    assert_same(*runs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@REENTRANT
def test_without_gradients_nothing_is_computed_again(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    with torch.no_grad():
        torch.testing.assert_close(pipe_of(model)(rows()), model(rows()))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_of_what_wants_no_gradient_gives_none() -> None:
    class First(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(checkpoint(self.inner, x, use_reentrant=True) + self.before(x))

    model = First(True)
    same(model)
    mean_square(model(rows())).backward()
    assert all(p.grad is None for p in model.inner.parameters())


def test_batch_statistics_inside_are_written_as_often_as_without_a_pipeline() -> None:
    model = Checkpointed(False, lambda self, h: self.inner(self.norm(h)))
    same(model, microbatches=1)
    model(rows()).sum().backward()
    assert model.norm.num_batches_tracked == 2


def _custom(self: Any, h: Tensor) -> Tensor:
    return self.inner(TimesTwo.apply(self.inner(h)))


def _nested(self: Any, h: Tensor) -> Tensor:
    return self.inner(checkpoint(self.inner, h, use_reentrant=False))


def _sequential(self: Any, h: Tensor) -> Tensor:
    return checkpoint_sequential(self.inner, 2, h, use_reentrant=False)


def _no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = self.inner(h)
    return self.inner(h) * scale


def _writing(self: Any, h: Tensor) -> Tensor:
    h = self.inner(h)
    h = h.clone()
    h[:, 0] += 1
    return torch.relu_(self.inner(h)) * h


def _two_outputs(self: Any, h: Tensor) -> Tensor:
    low, high = checkpoint(lambda t: self.inner(t).chunk(2, dim=-1), h, use_reentrant=False)
    return torch.cat([high, low], dim=-1)


def _sizes(self: Any, h: Tensor) -> Tensor:
    return self.inner(h).reshape(h.shape[0], -1).view(h.shape) + torch.arange(h.shape[1]).unsqueeze(1)


def _branching(self: Any, h: Tensor) -> Tensor:
    return self.inner(self.gate(h))


class Gate(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if h.abs().sum() > 0 else h


MIDDLES = [_custom, _nested, _sequential, _no_grad, _writing, _two_outputs, _sizes, _branching]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("middle", MIDDLES, ids=lambda body: body.__name__[1:])
def test_whatever_stands_in_a_checkpoint_gives_the_same_numbers(middle: Callable[..., Any], stages: int) -> None:
    model = Checkpointed(False, middle)
    model.gate = Gate()
    assert stretches(same(model, stages)) >= 1


def test_a_write_to_what_came_from_outside_happens_once() -> None:
    """Without a pipeline the second run writes once more, which torch cannot see, and the gradient is another."""

    def writing(self: Any, h: Tensor) -> Tensor:
        return self.inner(h.mul_(2))

    class Writing(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.keep else self.after(self.checkpointed(self.before(x) + 0))

        def checkpointed(self, h: Tensor) -> Tensor:
            return checkpoint(lambda t: self.middle(self, t), h, use_reentrant=False)

    model, copying = Writing(False, writing), Checkpointed(False, lambda self, h: self.inner(h * 2), keep=True)
    inputs = ((rows(),), {})
    with pytest.raises((ExactnessError, RuntimeError)):
        step(pipe_of(model), model, mean_square, inputs)
    pipe = pipe_of(model, verify="never")
    assert_same(step(pipe, model, mean_square, inputs), step(copying, copying, mean_square, inputs))


def test_stashed_weights_are_those_of_the_forward() -> None:
    class Inside(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return mean_square(super().forward(x))

    optimizer = partial(torch.optim.SGD, lr=0.5)
    pipe = pipe_of(Inside(False), 3, 4, schedule="pipedream", optimizer=optimizer)
    losses = [pipe(rows()).item() for _ in range(4)]
    pipe.pipeline.flush()
    assert stretches(pipe) >= 1
    names = [[name for name, _ in stage.named_parameters()] for stage in pipe.pipeline.stages]
    model = Inside(False, keep=True)  # a checkpoint within functional_call would run again on other weights
    del model.norm
    minibatches = [part for _ in range(4) for part in split(((rows(),), {}), 4)]
    expected = pipedream(model, lambda loss: loss, minibatches, names, (2, 1, 0), optimizer)
    torch.testing.assert_close(losses, [sum(expected.losses[i : i + 4]) / 4 for i in range(0, 16, 4)])
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(pipe.get_parameter(name).detach(), parameter, msg=name)


def test_an_error_inside_names_its_line() -> None:
    class Words(Checkpointed):
        def forward(self, ids: Tensor) -> Tensor:
            return checkpoint(lambda i: self.inner(F.embedding(i, self.table)), ids, use_reentrant=False)

    model = Words(False)
    model.table = nn.Parameter(torch.ones(5, D, dtype=torch.float64))
    pipe = pipe_of(model)
    pipe(torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(ExecutionError, match=r"test_checkpoint_regions\.py:\d+.*IndexError"):
        pipe(torch.tensor([[1, 2], [3, 7]]))


def test_a_reentrant_checkpoint_inside_a_module_kept_whole_is_refused() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blocks(1)

        def forward(self, h: Tensor) -> Tensor:
            h = checkpoint(self.inner, h, use_reentrant=True)
            return h * 2 if h.sum() > 0 else h

    model = nn.Sequential(blocks(1), Whole(), blocks(1)).double()
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        pipe_of(model)(rows())


@REENTRANT
def test_a_model_of_transformers_that_checkpoints_itself(reentrant: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16, "use_cache": False}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off)).double()
    ids = torch.randint(61, (4, 8))
    inputs = ((), {"input_ids": ids, "labels": ids})
    pipe = pipe_of(model, 3, 2)

    def loss(output: Any) -> Tensor:
        return output.loss

    plain = step(pipe, model, loss, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(pipe, model, loss, inputs), step(model, model, loss, inputs))
    assert_same(plain, step(model, model, loss, inputs))
    assert pipe.pipeline.captures == 2
    assert stretches(pipe) >= 3


class DenseBlock(nn.Module):
    """As timm's DenseNet has them: layers that see all before them, each checkpointed, with batch norm inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.BatchNorm1d(D * (i + 1)) for i in range(4))
        self.layers = nn.ModuleList(nn.Linear(D * (i + 1), D) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [x.requires_grad_()]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(checkpoint(self._bottleneck(norm, layer), *features, use_reentrant=False))
        return mean_square(features[-1])

    @staticmethod
    def _bottleneck(norm: nn.Module, layer: nn.Module) -> Callable[..., Tensor]:
        return lambda *features: layer(F.relu(norm(torch.cat(features, 1))))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_batch_norm_that_is_frozen_within_a_checkpoint_moves_nothing(microbatches: int) -> None:
    model = DenseBlock().double()
    for norm in model.norms:
        norm.eval()  # within a model that trains
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pipe = pipe_of(model, 2, microbatches)
    x = torch.randn(6, D, dtype=torch.float64)
    for _ in range(2):
        expected = step(model, model, lambda loss: loss, ((x.clone(),), {}))
        assert_same(step(pipe, model, lambda loss: loss, ((x.clone(),), {})), expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
