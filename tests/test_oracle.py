"""The oracle on eager models: microbatches equal the whole batch where a model says so, and no fault goes unseen."""

from __future__ import annotations

from collections.abc import Iterator

import effects
import oracle
import pytest
import torch
import toys
from models import MODELS, Model
from oracle import Run, assert_same, microbatched, split, step
from torch import nn

ALL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def whole(model: Model, module: nn.Module, batch: int = 4, length: int = 0) -> Run:
    return step(module, module, model.loss, model.inputs(batch, length or model.lengths[0]))


@ALL
def test_a_model_is_double_and_the_same_for_the_same_seed(model: Model) -> None:
    first, second = model.build(), model.build()
    assert {p.dtype for p in first.parameters()} == {torch.float64}
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@ALL
def test_microbatches_equal_the_whole_batch_where_the_model_says_so(model: Model) -> None:
    module = model.build()
    for length in model.lengths:
        inputs = model.inputs(8, length)
        expected = step(module, module, model.loss, inputs)
        for microbatches in (1, 2, 4):
            actual = microbatched(module, model.loss, inputs, microbatches, model.inside)
            if microbatches == 1 or not model.mixes:
                assert_same(actual, expected, exact=microbatches == 1, buffers=microbatches == 1)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.mixes])
def test_models_said_to_mix_samples_do(name: str) -> None:
    model = MODELS[name]
    module = model.build()
    parts = microbatched(module, model.loss, model.inputs(4, model.lengths[0]), 2, model.inside)
    with pytest.raises(AssertionError):
        assert_same(parts, whole(model, module), buffers=False)


@ALL
def test_a_run_leaves_no_trace(model: Model) -> None:
    module = model.build()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    buffers = [id(buffer) for buffer in module.buffers()]
    assert_same(whole(model, module), whole(model, module), exact=True)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [id(buffer) for buffer in module.buffers()] == buffers
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_changed_number_is_noticed() -> None:
    model = MODELS["buffers_rebound"]
    expected = whole(model, model.build())
    count = 0
    for name, wrong in _faults(expected):
        with pytest.raises(AssertionError, match=name):
            assert_same(wrong, expected)
        count += 1
    assert count == len(expected.gradients) + len(expected.buffers) + 2


def _faults(run: Run) -> Iterator[tuple[str, Run]]:
    yield "loss", Run(run.loss + 1e-6, run.output, run.gradients, run.buffers)
    yield "output", Run(run.loss, run.output.roll(1, 0), run.gradients, run.buffers)
    for name, gradient in run.gradients.items():
        yield name, Run(run.loss, run.output, {**run.gradients, name: gradient.flip(0)}, run.buffers)
    for name, buffer in run.buffers.items():
        yield name, Run(run.loss, run.output, run.gradients, {**run.buffers, name: buffer + 1})


def test_a_zero_gradient_does_not_pass_for_none() -> None:
    model = MODELS["unused"]
    run = whole(model, model.build())
    assert run.gradients["never.weight"] is None
    zero = {**run.gradients, "never.weight": torch.zeros(toys.D, toys.D, dtype=torch.float64)}
    with pytest.raises(AssertionError, match=r"never\.weight"):
        assert_same(Run(run.loss, run.output, zero, run.buffers), run)


def test_a_missing_gradient_and_another_type_of_output_are_noticed() -> None:
    model = MODELS["named_tuple_output"]
    run = whole(model, model.build())
    fewer = dict(list(run.gradients.items())[1:])
    with pytest.raises(AssertionError, match="gradient"):
        assert_same(Run(run.loss, run.output, fewer, run.buffers), run)
    with pytest.raises(AssertionError, match="output"):
        assert_same(Run(run.loss, tuple(run.output), run.gradients, run.buffers), run)


def test_a_comparison_of_nothing_fails() -> None:
    model = MODELS["frozen"]
    run = whole(model, model.build())
    nothing = Run(run.loss, run.output, dict.fromkeys(run.gradients), run.buffers)
    with pytest.raises(AssertionError, match="no gradient to compare"):
        assert_same(nothing, nothing)


def test_dropping_a_custom_backward_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["custom_functions"]
    module = model.build()
    expected = whole(model, module)
    monkeypatch.setattr(effects.StraightThrough, "apply", lambda x: x + (torch.round(4 * x) / 4 - x).detach())
    with pytest.raises(AssertionError, match="gradient"):
        assert_same(whole(model, module), expected)


def test_dropping_no_grad_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["no_grad"]
    module = model.build()
    expected = whole(model, module)
    assert expected.gradients["gate.weight"] is None
    monkeypatch.setattr(effects.NoGrad, "target", effects.NoGrad.target.__wrapped__)
    with pytest.raises(AssertionError, match="gradient"):
        assert_same(whole(model, module), expected)


def test_microbatches_cut_rows_and_share_the_rest() -> None:
    shared = torch.arange(3)
    rows = torch.arange(8).view(4, 2)
    parts = split(((rows, 5), {"more": [shared, None]}), 2)
    assert [part[0][0].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert all(part[0][1] == 5 and part[1]["more"][0] is shared and part[1]["more"][1] is None for part in parts)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_pipedream_without_delay_is_ordinary_training(optimizer: type[torch.optim.Optimizer]) -> None:
    model = MODELS["long_skip"]
    module = model.build()
    batches = [model.inputs(4, 6, seed) for seed in range(6)]
    names = list(dict(module.named_parameters()))
    actual = oracle.pipedream(
        module, model.loss, batches, [names[:4], names[4:]], [0, 0], lambda weights: optimizer(weights, lr=0.01)
    )
    plain = optimizer(module.parameters(), lr=0.01)
    for args, kwargs in batches:
        plain.zero_grad()
        model.loss(module(*args, **kwargs)).backward()
        plain.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(actual.parameters[name], parameter.detach(), rtol=0, atol=0)


def test_pipedream_reads_the_weights_of_delayed_steps() -> None:
    line = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    a = b = 0.5
    with torch.no_grad():
        for parameter in line.parameters():
            parameter.fill_(0.5)
    batches = [((torch.tensor([[x]], dtype=torch.float64),), {}) for x in (1.0, 2.0, 3.0)]
    actual = oracle.pipedream(
        line, torch.sum, batches, [["0.weight"], ["1.weight"]], [1, 0], lambda weights: torch.optim.SGD(weights, lr=0.1)
    )
    olds = [a, a]  # the first stage's weight, as of one step before
    for x in (1.0, 2.0, 3.0):
        old = olds[-2]
        a, b = a - 0.1 * b * x, b - 0.1 * old * x
        olds.append(a)
    torch.testing.assert_close(actual.parameters["0.weight"].item(), a)
    torch.testing.assert_close(actual.parameters["1.weight"].item(), b)
