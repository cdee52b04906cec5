"""What torch shows to one thread only sees the stages: dispatch modes, hooks on saved tensors, profilers."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pipecompile

MICROBATCHES = 2
Step = Callable[[], Tensor]


class Seen(TorchDispatchMode):
    """Counts what is dispatched, and doubles what some operations return."""

    def __init__(self, doubled: str = "") -> None:
        super().__init__()
        self.doubled = doubled
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[name := func.overloadpacket.__name__] += 1
        out = func(*args, **(kwargs or {}))
        return out * 2 if name == self.doubled else out


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 16, generator=generator).double(), torch.randn(8, 4, generator=generator).double()


def both(warm: bool = True, **options: Any) -> tuple[tuple[nn.Module, Step], tuple[nn.Module, Step]]:
    """The unsplit model and the pipeline, each with its call; the pipeline has been called if ``warm``."""
    x, y = data()
    model, split = net(), net()
    pipe = pipecompile.compile(split, ["cpu"] * 2, microbatches=MICROBATCHES, loss_fn=F.mse_loss, **options)
    if warm:
        pipe(x, target=y).backward()
        split.zero_grad()
    return (model, lambda: F.mse_loss(model(x), y)), (pipe, lambda: pipe(x, target=y))


def assert_same_gradients(model: nn.Module, pipe: nn.Module) -> None:
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert expected
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name), msg=name)
    assert not expected


@pytest.mark.parametrize("warm", [True, False])
def test_flops_are_counted_where_the_unsplit_model_has_them(warm: bool) -> None:
    counted = []
    (model, plain), (pipe, piped) = both(warm)
    for call in (plain, piped):
        with FlopCounterMode(display=False) as forward:
            loss = call()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counted.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counted[0] == counted[1]
    assert min(counted[0]) > 0
    assert_same_gradients(model, pipe)
    assert "FlopCounterMode" in " ".join(pipe.pipeline.report.observed)


def test_a_mode_that_changes_results_changes_those_of_the_stages() -> None:
    (model, plain), (pipe, piped) = both()
    with Seen("tanh"):
        expected, loss = plain(), piped()
    torch.testing.assert_close(loss, expected)
    assert not torch.isclose(plain(), expected)
    expected.backward()
    loss.backward()
    assert_same_gradients(model, pipe)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_profiler_of_the_calling_thread_sees_every_instruction(schedule: str) -> None:
    (model, plain), (pipe, piped) = both(schedule=schedule)
    plain().backward()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        piped().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["aten::addmm"] == 3 * MICROBATCHES
    for text in ("stage 0 0F0", "stage 1 1F1", "stage 1 1B0>0", "stage 0 0B1"):
        assert counts[text] == 1
    assert_same_gradients(model, pipe)
    assert pipe.pipeline.report.observed == ("torch.profiler (programs: 1)",)


def test_the_first_call_shows_a_profiler_the_stages_alone() -> None:
    _, (_, piped) = both(warm=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        piped().backward()
    assert {e.key: e.count for e in seen.key_averages()}["aten::addmm"] == 3 * MICROBATCHES


def test_hooks_on_saved_tensors_get_those_of_the_stages() -> None:
    (model, plain), (pipe, piped) = both()
    packed: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        packed[tuple(tensor.shape)] += 1
        return tensor * 3

    for call in (plain, piped):
        with saved_tensors_hooks(pack, lambda tensor: tensor / 3):
            call().backward()
    assert packed[8 // MICROBATCHES, 32] >= MICROBATCHES
    assert_same_gradients(model, pipe)


def test_saved_tensors_can_wait_on_the_cpu() -> None:
    (model, plain), (pipe, piped) = both()
    for call in (plain, piped):
        with save_on_cpu():
            loss = call()
        loss.backward()
    assert_same_gradients(model, pipe)


def test_a_checkpoint_around_the_pipeline_is_no_observer() -> None:
    (model, plain), (pipe, piped) = both()
    plain().backward()
    checkpoint(piped, use_reentrant=False).backward()
    assert_same_gradients(model, pipe)
    assert not pipe.pipeline.report.observed


def test_an_observed_call_may_fail_and_the_next_one_works() -> None:
    (model, plain), (pipe, piped) = both()
    plain().backward()

    class Fails(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "tanh":
                raise ValueError("as asked")
            return func(*args, **(kwargs or {}))

    with Fails(), pytest.raises(pipecompile.ExecutionError, match=r"stage \d, \dF0: .*ValueError: as asked"):
        piped()
    piped().backward()
    assert_same_gradients(model, pipe)


def test_an_asynchronous_stream_goes_on_under_an_observer() -> None:
    x, y = data()
    weights = []
    for observed in (False, True):
        model = net()
        pipe = pipecompile.compile(
            model,
            ["cpu"] * 2,
            schedule="pipedream",
            costs="count",
            microbatches=4,
            loss_fn=F.mse_loss,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )
        for number in range(3):
            if observed and number == 1:
                with Seen() as seen:
                    pipe(x, target=y)
                assert seen.names["addmm"]
            else:
                pipe(x, target=y)
        pipe.pipeline.flush()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert weights[0].keys() == weights[1].keys() != set()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


def test_the_anomaly_mode_does_not_see_how_the_first_call_is_planned() -> None:
    """Gradients that are made up to time a backward may be NaN, where those of the model are not."""
    model = Classifier()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu"] * 2, microbatches=MICROBATCHES, costs="count")
    x, y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly():
            model(x, y).backward()
            pipe(x, y).backward()
            assert torch.is_anomaly_enabled()
    assert not [str(warning.message) for warning in told if "Error detected" in str(warning.message)]
    assert_same_gradients(model, pipe)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), labels)


def test_where_hooks_on_saved_tensors_are_forbidden_the_first_call_works() -> None:
    (model, step), (pipe, split_step) = both(warm=False, costs="count")
    with torch.autograd.graph.disable_saved_tensors_hooks("none are allowed here"):
        step().backward()
        split_step().backward()
        with pytest.raises(RuntimeError, match="none are allowed here"), save_on_cpu():
            pass
    assert_same_gradients(model, pipe)
