"""Every capture is compared with the unsplit model at its first call: what differs is refused, and nothing is left."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from broken import calls, captured
from mutants_batching import BATCHING
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.capture import Captured
from pipecompile.errors import ExactnessError, InputError
from pipecompile.runtime import steps
from pipecompile.verify import prove, rounding
from pipecompile.verify.results import Difference, Proof
from pipecompile.verify.side_by_side import Trial

CPU = ["cpu", "cpu"]


def pipe_of(model: nn.Module, devices: list[str] = CPU, **options: Any) -> Any:
    return pipecompile.compile(model.double(), devices, **{"microbatches": 2, "costs": "count", **options})


def x(rows: int = 8) -> Tensor:
    return torch.randn(rows, 5, D, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def corrupt(pipe: Any, parameter: str, function: Callable[[Tensor], Tensor]) -> None:
    """Lets every stage that reads a parameter read a function of it instead."""
    changed = 0
    for stage in pipe.pipeline.stages:
        for node in [n for n in stage.graph.nodes if n.op == "get_attr" and n.target == parameter]:
            with stage.graph.inserting_after(node):
                wrong = stage.graph.call_function(function, (node,))
            node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
            stage.recompile()
            changed += 1
    assert changed


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused call must leave as it was."""
    return {
        **{name: t.detach().clone() for name, t in model.state_dict().items()},
        **{f"grad {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, other[name]) if isinstance(a, Tensor) else a == other[name] for name, a in one.items()
    )


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("inside", [True, False])
def test_a_wrong_gradient_is_refused_and_leaves_no_mark(inside: bool, microbatches: int) -> None:
    model = Residual()
    call = (x(), x()) if inside else (x(),)
    options = {"loss_fn": F.mse_loss} if inside else {}
    pipe = pipe_of(model, microbatches=microbatches, **options)
    named = {"x": call[0], **({"target": call[1]} if inside else {})}
    pipe.pipeline.prepare(**named)
    corrupt(pipe, "layers.2.weight", lambda t: t.detach() + 1.001 * (t - t.detach()))
    before = state(model)
    for _ in range(2):  # a refused capture is refused again
        with pytest.raises(ExactnessError, match=r"gradient 'layers\.2\.weight' differs by") as found:
            pipe(**named)
        assert same(state(model), before)
    assert "in module 'layers.2'" in str(found.value)
    assert pipe.pipeline.timeline is None


class Leaks(nn.Module):
    """What its second layer adds is drawn where no capture looks: in a table that a function makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = blocks(1), Shifts(), blocks(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Counted:
    """An object whose C-level state no capture compares."""

    def __init__(self) -> None:
        self.numbers: SimpleQueue[int] = SimpleQueue()  # in C, so its state is not seen
        for number in range(1, 1000):
            self.numbers.put(number)


COUNTED = Counted()


class Shifts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * COUNTED.numbers.get_nowait()


def test_the_first_module_whose_output_differs_is_named() -> None:
    with pytest.raises(ExactnessError, match=r"first module whose output differs is 'second' \(Shifts\)"):
        pipe_of(Leaks())(x())


def _reverse(it: Captured) -> None:
    """Exchanges the operands of the only subtraction."""
    (node,) = calls(it.graph, "sub")
    node.args = node.args[::-1]


class Casts(nn.Module):
    """The first layer runs under an autocast of the model's own, which the caller's may be the opposite of."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        self.first, self.second, self.last = nn.Linear(D, D), Differs(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            h = self.first(x)
        return self.last(self.second(h.float()))


class Differs(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.sub(h, 1)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_module_under_autocast_is_not_blamed_for_a_later_one(enabled: bool, microbatches: int) -> None:
    outside = nullcontext() if enabled else torch.autocast("cpu", dtype=torch.bfloat16)
    named = pytest.raises(ExactnessError, match=r"first module whose output differs is 'second' \(Differs\)")
    with captured(_reverse)(), outside, named:
        pipecompile.compile(Casts(enabled), CPU, microbatches=microbatches, costs="count")(x().float())


class Subtracts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.last(self.first(x)), 1)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    ("model", "loss_fn", "blamed"),
    [
        (Subtracts, None, r"'the model itself' \(Subtracts\)"),
        (Subtracts, F.mse_loss, r"'the model itself' \(Subtracts\)"),
        (lambda: blocks(2), lambda out, target: torch.sub(out, target).exp().mean(), "the loss function"),
    ],
)
def test_what_the_model_computes_after_its_last_module_is_blamed(
    model: Callable[[], nn.Module], loss_fn: Any, blamed: str, microbatches: int
) -> None:
    arguments = {} if loss_fn is None else {"target": x()}
    with (
        captured(_reverse)(),
        pytest.raises(ExactnessError, match=f"first module whose output differs is {blamed}, by"),
    ):
        pipe_of(model(), microbatches=microbatches, loss_fn=loss_fn)(x(), **arguments)


def test_a_loss_with_wrong_shares_of_microbatches_is_blamed_on_the_model_itself() -> None:
    mutant = next(mutant for mutant in BATCHING if mutant.name == "equal weights")
    blamed = r"first module whose output differs is 'the model itself' \(Ends\), by .* on microbatches"
    with mutant.breaks(), pytest.raises(ExactnessError, match=blamed):
        mutant.split("first")


@pytest.mark.parametrize("microbatches", [3, 5])
def test_a_slice_of_three_microbatches_is_compared_and_reported(microbatches: int) -> None:
    pipe = pipe_of(Residual(), microbatches=microbatches)
    mean_square(pipe(x(64))).backward()
    (line,) = pipe.pipeline.report.verified
    assert line.startswith("training: 7 of 64 rows in microbatches of 3, 2, 2: ")
    assert "8 gradients" in line
    assert "1 buffer" in line


def test_a_schedule_for_one_number_of_microbatches_is_compared_with_all_of_them() -> None:
    def of_four(ranks: int, microbatches: int) -> str:
        assert (ranks, microbatches) == (2, 4)
        return "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"

    pipe = pipe_of(Residual(), microbatches=4, schedule=of_four, loss_fn=F.mse_loss)
    pipe(x(64), target=x(64)).backward()
    (line,) = pipe.pipeline.report.verified
    assert line.startswith("training: 9 of 64 rows in microbatches of 3, 2, 2, 2: ")


def test_a_pipeline_with_replicas_is_compared_with_all_microbatches() -> None:
    pipe = pipe_of(Residual(), ["cpu"] * 3, microbatches=4, plan=pipecompile.PlanOptions(replicas=[2, 1]))
    mean_square(pipe(x(64))).backward()
    (line,) = pipe.pipeline.report.verified
    assert line.startswith("training: 9 of 64 rows in microbatches of 3, 2, 2, 2: ")


def test_a_report_tells_what_the_compared_calls_were_for() -> None:
    pipe = pipe_of(Residual())
    pipe(x())
    pipe.eval()
    pipe(x())
    with torch.no_grad():
        pipe(x())
    told = [line.partition(":")[0] for line in pipe.pipeline.report.verified]
    assert told == ["training", "evaluation with gradients", "evaluation"]


def test_evaluation_and_training_are_proven_apart() -> None:
    pipe = pipe_of(Residual())
    with torch.no_grad():
        pipe(x())
    assert len(pipe.pipeline.report.verified) == 1
    corrupt(pipe, "layers.0.weight", lambda t: t.detach() + 2 * (t - t.detach()))
    with torch.no_grad():
        pipe(x())
    with pytest.raises(ExactnessError, match="gradient"):
        pipe(x())


def test_never_and_every() -> None:
    for verify, refused in (("never", [False] * 4), ("every", [False, True]), (3, [False, False, False, True])):
        pipe = pipe_of(Residual(), verify=verify)
        pipe(x())
        corrupt(pipe, "layers.1.bias", lambda t: t + 1)
        for expected in refused[1:]:
            if expected:
                with pytest.raises(ExactnessError):
                    pipe(x())
            else:
                pipe(x())
        assert bool(pipe.pipeline.report.verified) == (verify != "never")


@pytest.mark.parametrize("verify", ["always", 0, -1, True, None, 1.5])
def test_other_words_are_refused(verify: Any) -> None:
    with pytest.raises(InputError, match="verify="):
        pipe_of(Residual(), verify=verify)


def test_a_lost_microbatch_shows_in_every_floating_type() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = blocks(4).to(dtype)
        pipe = pipecompile.compile(model, CPU, microbatches=4, costs="count", loss_fn=F.mse_loss)
        data = torch.randn(12, D, dtype=dtype)
        pipe(data, target=torch.randn(12, D, dtype=dtype))
        (line,) = pipe.pipeline.report.verified
        assert "gradients" in line
        pipe = pipecompile.compile(model, CPU, microbatches=4, costs="count", loss_fn=F.mse_loss)
        pipe.pipeline.prepare(data, target=data)
        losing = pipe.pipeline._batches.first
        assert losing is not None
        body = losing.stages[-1].module
        share = next(n for n in body.graph.nodes if n.op == "placeholder" and "share" in n.name)
        with body.graph.inserting_after(share):
            lost = body.graph.call_function(_without_the_third, (share,))
        share.replace_all_uses_with(lost, delete_user_cb=lambda user, lost=lost: user is not lost)
        body.recompile()
        _CALLS.clear()
        with pytest.raises(ExactnessError):
            pipe(data, target=torch.randn(12, D, dtype=dtype))


_CALLS: list[int] = []


def _without_the_third(share: Tensor) -> Tensor:
    _CALLS.append(1)
    return share * (len(_CALLS) % 4 != 3)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last, self.drop = blocks(2), blocks(2), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.body(x))
        keep = hidden.new_empty(len(hidden), 1, 1).bernoulli_(0.8)
        noise = 0.1 * torch.randn_like(hidden)
        return self.last(F.dropout(hidden + noise, 0.2, self.training)) * keep


def test_random_models_are_proven_and_draw_as_they_would_without() -> None:
    model = Noisy()
    data = x()
    outputs = []
    for verify in ("first", "never"):
        pipe = pipe_of(model, verify=verify, microbatches=3)
        torch.manual_seed(3)
        outputs.append(pipe(data))
    assert torch.equal(*outputs)
    torch.manual_seed(4)
    assert not torch.equal(pipe(data), outputs[0])


def test_an_asynchronous_pipeline_proves_its_first_microbatch() -> None:
    model = blocks(4).double()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    pipe = pipe_of(model, schedule="pipedream", loss_fn=F.mse_loss, **optimizer)
    pipe(x(), target=x())
    assert pipe.pipeline.report.verified[0].startswith("training: 3 of 4 rows: ")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_model_that_takes_its_own_batch_alone_is_proven_on_all_of_it() -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(3)

        def forward(self, x: Tensor, rows: int) -> Tensor:
            return self.body(x).reshape(rows, -1)

    pipe = pipe_of(Eight(), microbatches=1)
    pipe(x(8), 8)
    assert pipe.pipeline.report.verified[0].startswith("training: 8 of 8 rows: ")


def test_what_a_slice_alone_has_raised_is_told() -> None:
    split_step, raised = prove.split_step, []

    def once(*args: Any) -> Any:
        if not raised:
            raised.append(True)
            raise RuntimeError("a fault that does not come again")
        return split_step(*args)

    pipe = pipe_of(Residual(), microbatches=3)
    with mock.patch.object(prove, "split_step", once):
        pipe(x(64))
    (line,) = pipe.pipeline.report.verified
    assert line.startswith("training: 64 of 64 rows ")
    assert "raised RuntimeError on 7 rows, the unsplit model did not: a fault that does not come again" in line


def test_what_the_unsplit_model_raises_is_raised() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(2)
            self.captured = False

        def forward(self, x: Tensor) -> Tensor:
            if next(REFUSALS):
                raise ZeroDivisionError("the model's own")
            return self.body(x)

    with pytest.raises(ZeroDivisionError, match="the model's own"):
        pipe_of(Refuses(), microbatches=1)(x(2))


class _Later:
    """Tells a capture nothing; true from the unsplit model's own run on."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> bool:
        return not torch.overrides._get_current_function_mode_stack() or _is_comparing()


def _is_comparing() -> bool:
    from pipecompile.ops.randomness import is_alike

    return is_alike()


REFUSALS = _Later()


def test_gradients_that_cancel_are_no_false_alarm() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False), nn.Linear(D, D, bias=False))
    pipe = pipe_of(model, microbatches=2)
    pipe(torch.randn(8, D, dtype=torch.float64)).sum().backward()  # the mean of normalised values: no gradient at all
    assert pipe.pipeline.report.verified


class SumOfNormalised(nn.Module):
    """Returns a loss that is zero up to rounding: what layer normalization gives has a mean of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.enter(x))).mean()


def test_a_number_that_cancels_is_no_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, tried = rounding._shaken, set()

    def shaken(number: int, tensor: Tensor) -> Tensor:  # now and then the first changed run rounds to the same number
        tried.add(number)
        return changed(number, tensor) if number else tensor

    monkeypatch.setattr(rounding, "_shaken", shaken)
    torch.manual_seed(0)
    pipe = pipe_of(SumOfNormalised(), verify="every")
    for _ in range(8):
        assert abs(pipe(x(5)).item()) < 1e-15
    assert len(tried) > 1


def test_a_gradient_that_is_nothing_but_rounding_is_named_apart() -> None:
    nothing = Difference("gradient", "key.bias", largest=2e-13, scale=1e-13, allowed=1e-8)
    small = Difference("gradient", "key.weight", largest=1e-8, scale=1.0, allowed=1e-5)
    said = str(Proof(2, (2,), (small, nothing), of=2))
    assert "2 gradients equal within 1.0e-08 of their largest value, but for key.bias, zero up to rounding" in said
    assert "but for" not in str(Proof(2, (2,), (small,), of=2))
    assert str(Proof(2, (2,), (nothing,), of=2)).startswith(
        "2 of 2 rows: 1 gradient equal bit for bit, but for key.bias"
    )


def test_hooks_on_parameters_are_for_real_steps() -> None:
    model, calls = Residual(), []
    for p in model.parameters():
        p.register_hook(lambda gradient: calls.append(1))
    pipe = pipe_of(model)
    mean_square(pipe(x())).backward()
    assert len(calls) == 8
    mean_square(pipe(x())).backward()
    assert len(calls) == 16


class Collector:
    calls = 0


def note_collection(phase: str, info: dict[str, int]) -> None:
    Collector.calls += 1


def collections() -> int:
    return Collector.calls


class MayAsk(nn.Module):
    """Names what the collector's callback sets, and does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.asks = blocks(4), False

    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.body(x) * (collections() if self.asks else 1))


def test_what_a_callback_of_the_garbage_collector_sets_is_not_the_models() -> None:
    thresholds = gc.get_threshold()
    gc.callbacks.append(note_collection)
    gc.set_threshold(10)
    try:
        pipe = pipecompile.compile(MayAsk(), ["cpu", "cpu"], microbatches=2, costs="count")
        pipe(torch.randn(4, D)).backward()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note_collection)
    assert pipe.pipeline.proofs
    assert Collector.calls > 10
    assert gc.isenabled()


class NormedThrice(nn.Module):
    """One batch norm, used in several places of one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(nn.Linear(D, D) for _ in range(3)), nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(self.norm(x)))
        return mean_square(x)


def test_running_statistics_of_a_norm_that_is_used_thrice_are_no_false_alarm() -> None:
    pipe = pipecompile.compile(NormedThrice().double(), ["cpu", "cpu"], microbatches=4, costs="count")
    pipe(torch.randn(24, D, dtype=torch.float64)).backward()
    assert pipe.pipeline.proofs


class Clock:
    ticks = 0


class MayLook(nn.Module):
    """Names what another thread counts, and does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.looks = blocks(4), False

    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.body(x) * (Clock.ticks if self.looks else 1))


def test_what_another_thread_sets_once_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    run, compared = prove.split_step, []

    def while_a_clock_ticks(trial: Trial, left_too: bool = True) -> Any:
        with a_tick(lambda: setattr(Clock, "ticks", 1)) if not compared else nullcontext():
            compared.append(trial)
            return run(trial, left_too)

    monkeypatch.setattr(prove, "split_step", while_a_clock_ticks)
    pipe = pipecompile.compile(MayLook(), ["cpu", "cpu"], microbatches=2, costs="count")
    pipe(torch.randn(4, D)).backward()
    assert len(compared) == 2
    assert pipe.pipeline.proofs


@contextmanager
def a_tick(tick: Callable[[], None]) -> Iterator[None]:
    """In which ``tick`` is called by another thread as soon as the model's first stage runs."""
    original = steps.run

    def ticking(*args: Any) -> Any:
        thread = threading.Thread(target=tick)
        thread.start()
        thread.join()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "run", ticking)
        yield


class StoresWhatCannotBackward(nn.Module):
    """Stores a penalty that no loss uses. A later write makes its backward illegal, but not that of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.penalty = h.square().mean()
        return self.last(h.add_(1)).square().mean()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_stored_value_without_a_legal_backward_is_left_out_alone(microbatches: int) -> None:
    model, x = StoresWhatCannotBackward(), torch.randn(8, D)
    loss = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.penalty.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, costs="count")
    pipe(x).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    (proof,) = pipe.pipeline.proofs
    assert "what the forward stores has no gradient: RuntimeError" in proof.note
    compared = {it.name for it in proof.differences}
    assert {*expected, "penalty"} <= compared
