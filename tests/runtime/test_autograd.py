"""A pipeline and autograd: whatever a caller does with a loss, hooks and gradients gives what it gives unsplit.

What is said of a loss is tried on one inside the model (the schedule has run before ``backward()``) and on the
caller's own (the backwards run in it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import Inputs, split
from pairs import EITHER, INSIDE, OUTSIDE, assert_equal_gradients, both, gradients, loss_of, pipe_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D, Sparse, blocks, mean_square

import pipecompile
from pipecompile.batching import Batching
from pipecompile.errors import ExecutionError, InputError


def pairs(name: str, **options: Any) -> Iterator[tuple[nn.Module, Inputs]]:
    """The pipeline, then the unsplit model, each with the inputs; afterwards their gradients are equal."""
    pipe, model, inputs = both(name, **options)
    yield pipe, inputs
    yield model, inputs
    assert any(gradient is not None for gradient in gradients(model).values())
    assert_equal_gradients(pipe, model)


def repeats(pipe: nn.Module) -> list[str]:
    return list(pipe.pipeline.report.rerun)


# Asking for gradients


@EITHER
@pytest.mark.parametrize("chosen", [slice(None), slice(1, None, 3)])
def test_autograd_grad_gives_the_gradients_and_leaves_none(name: str, chosen: slice) -> None:
    pipe, model, inputs = both(name)
    got, expected = (torch.autograd.grad(loss_of(name, m, inputs), list(m.parameters())[chosen]) for m in (pipe, model))
    for gradient, same in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, same)
    assert set(gradients(pipe).values()) == {None}


@EITHER
def test_autograd_grad_of_a_parameter_without_a_part_needs_allow_unused(name: str) -> None:
    pipe, _, inputs = both(name)
    pipe.register_parameter("unused", nn.Parameter(torch.ones(3)))
    first = pipe.body[0][0].weight
    with pytest.raises(RuntimeError, match="Set allow_unused=True"):
        torch.autograd.grad(loss_of(name, pipe, inputs), [first, pipe.unused])
    gradient, none = torch.autograd.grad(loss_of(name, pipe, inputs), [first, pipe.unused], allow_unused=True)
    assert none is None
    assert gradient.shape == first.shape


@EITHER
def test_a_backward_for_some_parameters_leaves_the_others(name: str) -> None:
    for module, inputs in pairs(name):
        chosen = list(module.parameters())[1::4]
        loss_of(name, module, inputs).backward(inputs=chosen)
        assert sum(p.grad is not None for p in module.parameters()) == len(chosen)


def test_an_output_of_any_shape_takes_a_gradient() -> None:
    weights = torch.randn(4, 6, D, dtype=torch.float64)
    for module, ((x, late), _) in pairs(OUTSIDE):
        output = module(x, late)
        output.backward(gradient=weights.expand_as(output))


@EITHER
def test_backward_may_run_in_another_thread(name: str) -> None:
    for module, inputs in pairs(name):
        thread = Thread(target=loss_of(name, module, inputs).backward)
        thread.start()
        thread.join()


@EITHER
def test_losses_of_a_pipeline_and_of_another_model_share_a_backward(name: str) -> None:
    for module, inputs in pairs(name):
        torch.autograd.backward([loss_of(name, module, inputs), module.body[0][0].weight.square().sum()])


@EITHER
def test_gradients_add_to_zeros_in_place(name: str) -> None:
    for module, inputs in pairs(name):
        loss_of(name, module, inputs).backward()
        kept = [parameter.grad for parameter in module.parameters()]
        module.zero_grad(set_to_none=False)
        loss_of(name, module, inputs).backward()
        assert all(p.grad is gradient for p, gradient in zip(module.parameters(), kept, strict=True))


@EITHER
def test_a_gradient_kept_from_one_step_is_not_changed_by_the_next(name: str) -> None:
    pipe, _, inputs = both(name)
    loss_of(name, pipe, inputs).backward()
    kept = {n: (p.grad, p.grad.clone()) for n, p in pipe.named_parameters()}
    pipe.zero_grad()
    (loss_of(name, pipe, inputs) * 3).backward()
    for parameter, (gradient, value) in kept.items():
        assert torch.equal(gradient, value), parameter


@EITHER
def test_a_loss_that_nobody_differentiates_changes_nothing(name: str) -> None:
    for module, inputs in pairs(name):
        loss_of(name, module, inputs)
        with torch.no_grad():
            assert not loss_of(name, module, inputs).requires_grad
        loss_of(name, module, inputs).backward()


@pytest.mark.parametrize("microbatches", [1, 3])
def test_inputs_of_a_model_with_its_own_loss_get_gradients_beside_the_parameters(microbatches: int) -> None:
    got = []
    for module, ((batch,), _) in pairs(INSIDE, microbatches=microbatches):
        x = batch["x"].clone().requires_grad_()
        (module({**batch, "x": x})["loss"] * 2).backward()
        got.append(x.grad)
    torch.testing.assert_close(*got)


# More than one backward


@EITHER
def test_with_retain_graph_a_second_backward_adds_as_much(name: str) -> None:
    for module, inputs in pairs(name):
        loss = loss_of(name, module, inputs)
        loss.backward(retain_graph=True)
        (loss * 3).backward(retain_graph=True)
        loss.backward()
        again = ["a second backward, with retain_graph=True, after the first had run (times: 2)"]
        assert not hasattr(module, "pipeline") or repeats(module) == (again if name == OUTSIDE else [])


@EITHER
def test_parameters_may_be_differentiated_one_after_the_other(name: str) -> None:
    pipe, model, inputs = both(name)
    got = []
    for module in (pipe, model):
        loss = loss_of(name, module, inputs)
        got.append([torch.autograd.grad(loss, p, retain_graph=True)[0] for p in list(module.parameters())[:3]])
    for gradient, same in zip(*got, strict=True):
        torch.testing.assert_close(gradient, same)


@EITHER
def test_a_second_backward_without_retain_graph_is_torchs_own_error(name: str) -> None:
    pipe, _, inputs = both(name)
    loss = loss_of(name, pipe, inputs)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time.*retain_graph=True"):
        loss.backward()


class Remembers(nn.Module):
    """Writes buffers in training, drops out, and reads a buffer that it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.dropout = blocks(3), nn.BatchNorm1d(D), nn.Dropout(0.5)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        self.calls += 1
        output = self.body[1:](self.dropout(self.norm(self.body[0](x * self.calls))))
        return output if target is None else {"loss": F.mse_loss(output, target), "output": output}


@pytest.mark.parametrize(
    "options", [{"microbatches": 1}, {"microbatches": 2}, {"batching": Batching(batch_norm="deferred")}]
)
def test_a_call_run_again_draws_the_same_numbers_and_writes_no_buffer(options: dict[str, Any]) -> None:
    pipe, x = pipe_of(Remembers().double(), **options), torch.randn(6, D, dtype=torch.float64)
    loss = mean_square(pipe(x))
    loss.backward(retain_graph=True)
    expected = {name: gradient.clone() for name, gradient in gradients(pipe).items()}
    buffers = {name: buffer.clone() for name, buffer in pipe.named_buffers()}
    generator = torch.get_rng_state()
    pipe.zero_grad()
    loss.backward()
    assert len(repeats(pipe)) == 1
    for name, gradient in gradients(pipe).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)
    assert pipe.calls == 2
    for name, buffer in pipe.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("what", ["parameter 'body", "argument 'x'"])
def test_a_call_is_not_run_again_on_other_values(what: str) -> None:
    pipe, _, ((x, late), _) = both(OUTSIDE)
    loss = mean_square(pipe(x, late))
    loss.backward(retain_graph=True)
    changed = x if "argument" in what else pipe.body[0][0].weight
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(ExecutionError, match=rf"{what}.* was changed in place.*before optimizer\.step"):
        loss.backward()


@EITHER
def test_gradients_of_gradients_are_refused(name: str) -> None:
    pipe, _, inputs = both(name)
    loss = loss_of(name, pipe, inputs)
    with pytest.raises(ExecutionError, match=r"create_graph=True.*pipe\.pipeline\.model"):
        torch.autograd.grad(loss, list(pipe.parameters()), create_graph=True)
    with pytest.raises(ExecutionError, match="create_graph=True"):
        loss.backward(create_graph=True)


# Outputs beside the loss


def test_an_output_beside_the_loss_may_take_part_in_the_callers_loss() -> None:
    pipe, model, _ = both(INSIDE)
    for seed in range(3):
        for module in (pipe, model):
            output = module(*MODELS[INSIDE].inputs(4, 6, seed)[0])
            (output["loss"] / 2 + output["logits"].square().mean() + output["hidden"][1].sum()).backward()
    assert_equal_gradients(pipe, model)
    (said,) = repeats(pipe)
    assert said.startswith("an output other than the loss got a gradient")
    assert said.endswith("(times: 1)")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_an_output_beside_the_loss_alone_may_be_differentiated(schedule: str) -> None:
    for module, inputs in pairs(INSIDE, schedule=schedule, stages=3):
        module(*inputs[0])["logits"].square().mean().backward()


class TwoHeads(nn.Module):
    """The second output is computed from the whole batch at once, by a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = blocks(3), nn.Linear(D, 3), nn.Linear(D, 2)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        apart = torch.cdist(self.other(h), self.other(h)).square().mean(1)
        return {"loss": F.cross_entropy(self.head(h), target), "apart": apart}


@pytest.mark.parametrize("used", [("loss",), ("apart",), ("loss", "apart")])
def test_each_output_reaches_the_parameters_that_it_reaches_unsplit(used: tuple[str, ...]) -> None:
    pipe = pipe_of(TwoHeads().double(), microbatches=3)
    model = TwoHeads().double()
    model.load_state_dict(pipe.state_dict())
    x, target = torch.randn(6, D, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 1])
    for _ in range(2):
        for module in (pipe, model):
            output = module(x, target)
            sum(output[name].sum() for name in used).backward()
        assert_equal_gradients(pipe, model)
        assert (pipe.other.weight.grad is None) == ("apart" not in used)


# Hooks


class Branches(nn.Module):
    """One of three heads is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = blocks(3), nn.ModuleList(nn.Linear(D, 2) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        h = self.body(x * self.scale.detach())
        output = self.heads[0](h) + self.heads[1](h)
        return output if target is None else F.mse_loss(output, target)


@pytest.mark.parametrize("inside", [False, True])
def test_hooks_of_parameters_are_called_once_with_the_whole_gradient(inside: bool) -> None:
    pipe, x, target = pipe_of(Branches().double()), *torch.randn(2, 6, D, dtype=torch.float64)
    model = Branches().double()
    model.load_state_dict(pipe.state_dict())
    seen: list[dict[str, list[Tensor]]] = []
    for module in (pipe, model):
        found: dict[str, list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, name=name, found=found: found.setdefault(f"{name} before", []).append(g))
            parameter.register_hook(lambda gradient: gradient * 2)
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name, found=found: found.setdefault(f"{name} after", []).append(p.grad)
            )
        loss = module(x, target[:, :2]) if inside else mean_square(module(x))
        loss.backward()
        seen.append(found)
    got, expected = seen
    assert sorted(got) == sorted(expected)
    assert len(expected) == 2 * 10
    for name, gradients_seen in got.items():
        assert len(gradients_seen) == len(expected[name]) == 1, name
        torch.testing.assert_close(gradients_seen, expected[name], msg=name)
    assert_equal_gradients(pipe, model)
    assert gradients(pipe)["heads.2.weight"] is None
    assert gradients(pipe)["scale"] is None


@EITHER
def test_hooks_of_a_loss_and_of_an_output_see_and_change_its_gradient(name: str) -> None:
    for module, inputs in pairs(name):
        seen: list[float] = []
        output = module(*inputs[0])
        loss = MODELS[name].loss(output)
        loss.register_hook(lambda gradient, seen=seen: seen.append(gradient.item()))
        loss.register_hook(lambda gradient: gradient * 3)
        if isinstance(output, Tensor):
            output.retain_grad()
            output.register_hook(lambda gradient: gradient.clamp(max=0.01))
        (loss / 2).backward()
        assert seen == [0.5]
        assert not isinstance(output, Tensor) or output.grad is not None


def test_an_optimizer_may_step_in_the_hooks_of_its_parameters() -> None:
    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    pipe, model, inputs = both(INSIDE)
    for module in (pipe, model):
        each = {p: torch.optim.Adam([p], foreach=False) for p in module.parameters()}
        for parameter in each:
            parameter.register_post_accumulate_grad_hook(lambda p, each=each: step(each[p]))
        for _ in range(3):
            loss_of(INSIDE, module, inputs).backward()
    for (name, parameter), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, msg=name)


# Frozen parameters


@EITHER
def test_parameters_may_be_frozen_and_freed_between_calls(name: str) -> None:
    pipe, model, inputs = both(name)
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m.body[0].requires_grad_(False),  # before the first call
        lambda m: m.body[2].requires_grad_(False),
        lambda m: m.body[1][0].weight.requires_grad_(False),
        lambda m: m.body.requires_grad_(True),
        lambda m: m.body[2].requires_grad_(False),
    ]
    for change in changes:
        for module in (pipe, model):
            change(module)
            module.zero_grad()
            loss_of(name, module, inputs).backward()
        assert_equal_gradients(pipe, model)
    assert gradients(pipe)["body.2.0.weight"] is None
    assert gradients(pipe)["body.1.0.weight"] is not None


@EITHER
def test_a_model_that_is_frozen_whole_has_nothing_to_differentiate(name: str) -> None:
    pipe, _, inputs = both(name)
    pipe.requires_grad_(False)
    assert not loss_of(name, pipe, inputs).requires_grad


# Sparse gradients


def test_a_sparse_gradient_stays_sparse() -> None:
    pipe, model, ids = pipe_of(Sparse().double()), Sparse().double(), torch.arange(12).reshape(4, 3) % 5
    model.load_state_dict(pipe.state_dict())
    for module in (pipe, model):
        (module(ids) / 3).backward()
        assert module.words.weight.grad.is_sparse
        module.words.weight.grad = module.words.weight.grad.to_dense()
    assert_equal_gradients(pipe, model)


# Autocast and float16


class Precise(nn.Module):
    """A part of it leaves the caller's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.precise, self.last = blocks(2), blocks(2), blocks(2)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            h = self.precise(h.float())
        output = self.last(h)
        return output if target is None else F.mse_loss(output.float(), target)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller_gives_the_unsplit_models_numbers_bit_for_bit(dtype: torch.dtype, inside: bool) -> None:
    pipe, model = pipe_of(Precise(), stages=3, microbatches=4), Precise()
    model.load_state_dict(pipe.state_dict())
    x, target = torch.randn(2, 8, D)
    args = (x, target) if inside else (x,)

    def loss(output: Tensor) -> Tensor:
        return output if inside else output.float().square().sum()

    with torch.autocast("cpu", dtype):
        pipes = loss(pipe(*args))
    (pipes * 64).backward()
    for part in split(args, 4):
        with torch.autocast("cpu", dtype):
            models = loss(model(*part))
        (models * (64 / 4 if inside else 64)).backward()
    expected = gradients(model)
    for name, gradient in gradients(pipe).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)
    model.zero_grad()
    loss(model(*args)).backward()
    assert not torch.equal(gradients(pipe)["first.0.0.weight"], gradients(model)["first.0.0.weight"] * 64)


class Tiny(nn.Module):
    """Its gradients on the way are smaller than float16's least number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.body(x).float(), target) * 1e-6


@pytest.mark.parametrize("half", [False, True])
def test_a_scale_is_there_before_float16_loses_a_gradient(half: bool) -> None:
    pipe, model = pipe_of(Tiny(), stages=3, microbatches=4), Tiny()
    model.load_state_dict(pipe.state_dict())
    x, target = torch.randn(2, 8, D)
    if half:
        pipe.half(), model.half()
        x = x.half()
    for scale in (2.0**15, 2.0**15, 2.0**14):
        for module in (pipe, model):
            module.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=not half):
            loss = pipe(x, target)
        (loss * scale).backward()
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            with torch.autocast("cpu", torch.float16, enabled=not half):
                loss = model(part, wanted)
            (loss * (scale / 4)).backward()
        assert gradients(model)["body.0.0.weight"].abs().max() > 0
        for name, gradient in gradients(pipe).items():
            torch.testing.assert_close(gradient, gradients(model)[name], rtol=0, atol=0, msg=name)
    (said,) = repeats(pipe)
    assert said.startswith("a loss computed with float16 or custom backwards got a gradient of another scale")
    assert said.endswith("(times: 2)")


@EITHER
def test_a_grad_scaler_skips_a_step_with_an_infinite_gradient(name: str) -> None:
    pipe, model, inputs = both(name)
    scales = []
    for module in (pipe, model):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for factor in (1.0, float("inf"), 1.0, 1.0):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in module.parameters()]
            scaler.scale(loss_of(name, module, inputs) * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(b, p) for b, p in zip(before, module.parameters(), strict=True))
            assert same == (factor == float("inf"))
        scales.append(scaler.get_scale())
    assert scales == [1024.0, 1024.0]
    for (parameter, value), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, same, msg=parameter)


@pytest.mark.parametrize("foreach", [False, True])
@EITHER
def test_gradients_are_clipped_over_all_stages(name: str, foreach: bool) -> None:
    norms = []
    for module, inputs in pairs(name, stages=3):
        loss_of(name, module, inputs).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.01, foreach=foreach))
    torch.testing.assert_close(*norms)
    assert norms[0] > 0.01


def test_several_gradients_at_once_are_refused() -> None:
    pipe = pipecompile.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cpu", "cpu"], costs="count")
    output = pipe(torch.randn(4, 2)).sum(0)
    with pytest.raises(ExecutionError, match=r"is_grads_batched=True.*run one backward for each gradient"):
        torch.autograd.grad(output, [*pipe.parameters()], torch.eye(2), is_grads_batched=True)


def test_a_cache_of_parametrized_weights_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    with nn.utils.parametrize.cached(), pytest.raises(InputError, match=r"parametrize\.cached\(\).*call it outside"):
        pipe(torch.randn(4, 2))
    pipe(torch.randn(4, 2)).sum().backward()
