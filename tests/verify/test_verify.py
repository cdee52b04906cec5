"""``pipe.pipeline.verify`` finds what is wrong, names it, passes what is right, and leaves no mark."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import ExactnessError, InputError
from pipecompile.verify.results import Verification


def pipe_of(model: nn.Module, **options: Any) -> Any:
    options = {"microbatches": 2, "costs": "count", **options}
    return pipecompile.compile(model.double(), devices=["cpu", "cpu"], **options)


def x(rows: int = 4, length: int = 5) -> Tensor:
    return torch.randn(rows, length, D, dtype=torch.float64)


def differing(result: Verification, kind: str) -> set[str]:
    return {it.name for check in result.checks for it in check.differing if it.kind == kind}


class Skewed(torch.autograd.Function):
    """Passes a tensor on; its gradient comes out a thousandth too large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


def skewed(tensor: Tensor) -> Tensor:
    return Skewed.apply(tensor)  # type: ignore[no-any-return]


def corrupt(pipe: Any, parameter: str, function: Callable[[Tensor], Tensor]) -> None:
    """Lets every stage that reads a parameter read a function of it instead."""
    found = False
    for stage in pipe.pipeline.stages:
        for node in [n for n in stage.graph.nodes if n.op == "get_attr" and n.target == parameter]:
            with stage.graph.inserting_after(node):
                wrong = stage.graph.call_function(function, (node,))
            node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
            stage.recompile()
            found = True
    assert found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


# What is right


@pytest.mark.parametrize("name", ["dict_in_out", "long_skip", "tied", "two_towers", "used_twice"])
def test_a_model_that_is_split_rightly_is_exact(name: str) -> None:
    model = MODELS[name]
    args, kwargs = model.inputs(4, model.lengths[0])
    pipe = pipe_of(model.build())
    result = pipe.pipeline.verify(*args, **kwargs)
    assert result.exact, result
    result.raise_if_different()
    assert {check.mode for check in result.checks} == {"train", "eval"}
    trained = {name for name, p in pipe.named_parameters() if p.requires_grad}
    compared = {it.name for check in result.checks for it in check.differences if it.kind == "gradient"}
    assert compared == trained != set()


def test_one_microbatch_is_equal_bit_for_bit() -> None:
    result = pipe_of(Residual(), microbatches=1).pipeline.verify(x())
    assert result.bit_equal, result
    assert [row.verdict for row in result.rows] == ["bit-equal"] * 4
    assert "exact: bit for bit" in str(result)


def test_another_shape_is_checked_without_another_capture() -> None:
    pipe = pipe_of(Residual())
    result = pipe.pipeline.verify(x(4, 8))
    assert [check.inputs for check in result.checks if check.mode == "eval"] == [
        "given: x [4, 8, 10]",
        "fresh: x [4, 8, 10]",
        "fresh: x [5, 6, 10]",
    ]
    assert pipe.pipeline.captures == 0  # what a verification captures is not for later calls
    assert result.exact


def test_without_a_call_there_is_nothing_to_compare() -> None:
    pipe = pipe_of(Residual())
    pipe.pipeline.prepare(x(6))
    with pytest.raises(InputError, match="missing a required argument: 'x'"):
        pipe.pipeline.verify()


def test_a_loss_function_and_inputs_that_want_gradients_are_compared() -> None:
    pipe = pipe_of(Residual(), loss_fn=F.mse_loss)
    result = pipe.pipeline.verify(x().requires_grad_(), target=x())
    assert result.exact, result
    assert {it.name for check in result.checks for it in check.differences if it.kind == "input gradient"} == {"x"}


def test_frozen_and_unused_parameters_need_no_gradient() -> None:
    model = Residual()
    model.layers[1].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    result = pipe_of(model).pipeline.verify(x())
    assert result.exact
    assert {row.group for row in result.rows} == {"layers.0", "layers.2", "layers.3"}


# What differs by nature


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.randn_like(x)


def test_random_functions_draw_alike_in_both_and_that_is_said() -> None:
    result = pipe_of(Drops()).pipeline.verify(x())
    assert result.exact, result
    assert [check.against for check in result.checks[:2]] == ["the whole batch", "the whole batch"]
    assert [check.microbatches for check in result.checks[:2]] == [2, 1]
    assert "compared with the same random numbers for every row, in both models" in str(result)


def test_batch_statistics_are_those_of_the_microbatches_in_both() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(inplace=True), nn.Linear(D, D))
    result = pipe_of(model).pipeline.verify(torch.randn(6, D, dtype=torch.float64))
    assert result.exact, result
    assert result.checks[0].against == "the whole batch"
    assert any("by the statistics of each microbatch" in line for line in result.notes["microbatches"])
    assert any(it.kind == "buffer" and it.scale > 0 for it in result.checks[0].differences)


class Routed(nn.Module):
    """What its middle does depends on activations; the middle draws random numbers."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            hit = (x.sum(-1) > 0).nonzero()
            out = torch.zeros_like(x)
            if len(hit):
                out[hit[:, 0], hit[:, 1]] = self.layer(x[hit[:, 0], hit[:, 1]])
            return self.drop(out)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(D, D), self.Expert(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.expert(self.first(x)))


def test_a_module_that_is_kept_whole_is_checked_and_named() -> None:
    result = pipe_of(Routed()).pipeline.verify(x())
    assert result.exact, result
    assert any("since module 'expert' is kept whole" in line for line in result.notes["microbatches"])
    assert "module expert is kept whole" in str(result)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(x)
        return hidden if mask.all() else hidden * mask.unsqueeze(-1)


@pytest.mark.parametrize("full", [True, False])
def test_a_guard_on_values_is_kept_and_told(full: bool) -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 3:] = full
    result = pipe_of(Masked()).pipeline.verify(x(), mask)
    assert result.exact, result
    assert f"guards: the model reads {full} from its inputs" in str(result)


class FourRows(nn.Module):
    """Takes batches of even size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise ValueError("rows come in pairs")
        return self.body(x)


def test_what_the_unsplit_model_itself_refuses_is_left_out_and_said() -> None:
    result = pipe_of(FourRows()).pipeline.verify(x())
    assert result.exact, result
    assert [check.verdict for check in result.checks].count("left out") == 2
    assert "left out: the unsplit model itself raises ValueError: rows come in pairs" in str(result)


def test_where_nothing_could_be_compared_nothing_is_exact() -> None:
    empty = Verification(())
    assert not empty.exact
    with pytest.raises(ExactnessError, match="nothing could be compared"):
        empty.raise_if_different()


# What is wrong


@pytest.mark.parametrize("outside", [True, False])
def test_a_wrong_gradient_is_found_and_named(outside: bool) -> None:
    pipe = pipe_of(Residual(), **({} if outside else {"loss_fn": F.mse_loss}))
    call = {"x": x()} if outside else {"x": x(), "target": x()}
    pipe.pipeline.prepare(**call)
    corrupt(pipe, "layers.2.weight", skewed)
    result = pipe.pipeline.verify(**call)
    assert not result.exact
    assert differing(result, "gradient") == {"layers.2.weight"}
    assert differing(result, "output") == set()
    assert [row.group for row in result.rows if row.verdict == "DIFFERENT"] == ["layers.2"]
    with pytest.raises(ExactnessError, match=r"gradient 'layers\.2\.weight' differs by"):
        result.raise_if_different()
    assert "NOT exact" in str(result)


def test_a_wrong_gradient_is_found_on_the_same_microbatches_too() -> None:
    pipe = pipe_of(Routed())
    pipe.pipeline.prepare(x())
    corrupt(pipe, "last.weight", skewed)
    result = pipe.pipeline.verify(x())
    assert result.checks[0].against == "the same microbatches"
    assert differing(result, "gradient") == {"last.weight"}


def test_a_wrong_value_in_evaluation_alone_is_found() -> None:
    pipe = pipe_of(Residual()).eval()
    pipe.pipeline.prepare(x())
    corrupt(pipe, "layers.3.bias", torch.neg)
    result = pipe.train().pipeline.verify(x())
    assert {check.mode for check in result.checks if check.differing} == {"eval"}
    assert differing(result, "output") == {"output"}


def test_a_stage_that_raises_fails_the_check() -> None:
    pipe = pipe_of(Residual())
    pipe.pipeline.prepare(x())
    corrupt(pipe, "layers.1.weight", torch.linalg.vector_norm)
    result = pipe.pipeline.verify(x())
    assert not result.exact
    assert result.checks[0].verdict == "FAILED"
    assert "stage" in result.checks[0].failure


CALLS: SimpleQueue[int] = SimpleQueue()  # in C, so its state is not seen


class Counting(nn.Module):
    """A capture keeps the first answer of what no graph can see."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * CALLS.get_nowait()


def test_what_the_capture_could_not_see_is_found() -> None:
    for number in range(1, 100):
        CALLS.put(number)
    result = pipe_of(Counting()).pipeline.verify(x())
    assert not result.exact
    assert differing(result, "output")


def test_a_buffer_that_comes_out_wrong_is_found() -> None:
    pipe = pipe_of(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)))
    features = torch.randn(6, D, dtype=torch.float64)
    pipe.pipeline.prepare(features)
    corrupt(pipe, "1.running_mean", torch.clone)
    assert differing(pipe.pipeline.verify(features), "buffer") == {"1.running_mean"}


# No mark


def test_the_model_and_the_pipeline_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5), nn.Linear(D, D)).double()
    pipe = pipe_of(model)
    features = torch.randn(6, D, dtype=torch.float64)
    mean_square(pipe(features)).backward()
    model[2].eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state, timeline, plan = torch.get_rng_state(), pipe.pipeline.timeline, pipe.pipeline.plan
    assert pipe.pipeline.verify(features).exact
    assert gradients
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0], name
        assert torch.equal(value, before[name][1]), name
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name
    assert [module.training for module in model.modules()] == modes
    assert pipe.training
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.pipeline.timeline is timeline
    assert pipe.pipeline.plan is plan


def test_an_asynchronous_pipeline_is_checked_without_a_step() -> None:
    model = Residual().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"schedule": "pipedream", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "loss_fn": F.mse_loss}
    pipe = pipe_of(model, **options)
    assert pipe.pipeline.verify(x(), target=x()).exact
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = Residual()
    with pytest.raises(InputError, match="meta"):
        pipe_of(model).pipeline.verify(x())
