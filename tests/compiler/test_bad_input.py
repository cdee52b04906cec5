"""Bad input: each case has an error of ours that says what was seen and what to do, or just works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS
from oracle import assert_same, step
from torch import Tensor, nn
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import CaptureError, InfeasibleError, InputError, PipecompileError, PlanError

KEPT = "skip_to_loss"


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.body = blocks(layers).double()

    def forward(self, x: Tensor, scale: float = 1.0, names: Any = None) -> Tensor:
        return self.body(x) * scale


def pipe_of(model: nn.Module | None = None, stages: int = 2, **options: Any) -> Any:
    options = {"microbatches": 2, "costs": "count", **options}
    return pipecompile.compile(model or Net(), devices=["cpu"] * stages, **options)


def floats(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, D)), dtype=torch.float64)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def refused(kind: type[Exception], *words: str) -> Any:
    """Expects an error of ours with these words in order."""
    assert issubclass(kind, PipecompileError)
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, words)))


def works_after(pipe: pipecompile.Pipeline) -> None:
    """A refused call leaves the pipeline as good as new."""
    x = floats()
    expected = step(pipe.pipeline.model, pipe.pipeline.model, mean_square, ((x,), {}))
    assert_same(step(pipe, pipe.pipeline.model, mean_square, ((x,), {})), expected)


# Devices

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_cuda
@pytest.mark.parametrize("devices", [[0, 1], ["cuda:0", "cuda:1"], ["cpu", "cuda"], [torch.device("cuda", 0)]])
def test_cuda_devices_that_are_not_there(devices: Any) -> None:
    with refused(InputError, "cuda:0", "0 cuda devices", "devices=['cpu', 'cpu']"):
        pipecompile.compile(Net(), devices=devices)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "", None, 1.5, -1])
def test_a_device_that_nobody_knows(device: Any) -> None:
    with refused(InputError, repr(device), "is not a device"):
        pipecompile.compile(Net(), devices=["cpu", device])


@pytest.mark.parametrize("devices", ["cpu", [], 2, torch.device("cpu"), (), None])
def test_devices_that_are_no_list(devices: Any) -> None:
    with refused(InputError, "devices=", repr(devices), "one device per stage"):
        pipecompile.compile(Net(), devices=devices)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_kind_of_device_that_cannot_run_here(device: str) -> None:
    with refused(InputError, device):
        pipecompile.compile(Net(), devices=["cpu", device])


# Options


def test_an_unknown_schedule() -> None:
    with refused(InputError, "schedule='zigzag'", "'sequential', 'gpipe', '1f1b'", "'zb-v'", "'auto'"):
        pipe_of(schedule="zigzag")


@pytest.mark.parametrize("microbatches", [0, -1, 1.5, "2"])
def test_a_number_of_microbatches_that_is_none(microbatches: Any) -> None:
    with refused(InputError, f"microbatches={microbatches!r}", "at least 1"):
        pipe_of(microbatches=microbatches)


@pytest.mark.parametrize("value", [True, "yes"])
def test_parameters_that_cannot_be_divided(value: Any) -> None:
    with refused(InputError, f"fully_shard={value!r}", "needs mesh= with the dimension 'data'"):
        pipe_of(fully_shard=value)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "sequential"])
def test_an_optimizer_where_the_user_steps(schedule: str) -> None:
    with refused(InputError, f"schedule={schedule!r}", "pipe.parameters()"):
        pipe_of(schedule=schedule, optimizer=sgd)


def test_pipedream_without_an_optimizer() -> None:
    with refused(InputError, "schedule='pipedream'", "optimizer="):
        pipe_of(schedule="pipedream")


def test_an_optimizer_that_is_made_already() -> None:
    model = Net()
    with refused(InputError, "optimizer=", "function"):
        pipe_of(model, schedule="pipedream", optimizer=sgd(list(model.parameters())))(floats())


@pytest.mark.parametrize("costs", ["guess", True])
def test_costs_that_are_not_known(costs: Any) -> None:
    with refused(InputError, f"costs={costs!r}", "measure", "count"):
        pipe_of(costs=costs)(floats())


@pytest.mark.parametrize("option", ["batching", "plan"])
def test_options_that_are_not_of_their_class(option: str) -> None:
    with refused(InputError, f"{option}={{'replicas': 2}}", "pipecompile."):
        pipe_of(**{option: {"replicas": 2}})


@pytest.mark.parametrize("value", [5, 2.5, "ab", object()])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((pipecompile.Batching, field.name) for field in fields(pipecompile.Batching)),
        *((pipecompile.PlanOptions, field.name) for field in fields(pipecompile.PlanOptions)),
    ],
)
def test_an_option_of_the_wrong_type(kind: Any, name: str, value: Any) -> None:
    takes_numbers = {"search_seconds": (5, 2.5), "optimizer_state": (5, 2.5)}
    takes_numbers |= {"max_stages": (5,), "stages_per_rank": (5,)}
    if value in takes_numbers.get(name, ()):
        assert getattr(kind(**{name: value}), name) == value
        return
    with refused(InputError, name, repr(value), "must be"):
        kind(**{name: value})


@pytest.mark.parametrize("model", [torch.sin, None, "gpt2", Net])
def test_a_model_that_is_no_module(model: Any) -> None:
    with refused(InputError, "nn.Module"):
        pipecompile.compile(model, devices=["cpu"])


def test_pipedream_whose_cut_should_move() -> None:
    moving = pipecompile.PlanOptions(tune="train")
    with refused(InputError, "tune='train'", "schedule='pipedream'", "tune='rehearse'"):
        pipe_of(schedule="pipedream", optimizer=sgd, plan=moving)


def test_pipedream_without_a_loss() -> None:
    pipe = pipe_of(schedule="pipedream", optimizer=sgd)
    with refused(InputError, "schedule='pipedream'", "loss inside", "loss_fn="):
        pipe(floats())


def test_a_parameter_tied_over_stages_under_pipedream() -> None:
    model = MODELS["tied"]
    pipe = pipe_of(model.build(), schedule="pipedream", optimizer=sgd)
    with refused(PlanError, "embedding.weight"):
        pipe(**model.inputs(4, 6)[1])


# Stages


@pytest.mark.parametrize("stages", [9, 40])
def test_more_stages_than_the_model_can_be_cut_into(stages: int) -> None:
    with refused(InfeasibleError, str(stages), "stages"):
        pipe_of(Net(2), stages)(floats())


def test_as_many_stages_as_there_are_operations_work() -> None:
    pipe = pipe_of(nn.Sequential(Net(1)), 3)
    works_after(pipe)
    assert pipe.pipeline.plan.num_stages == 3


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().cos().tan()


def test_a_model_without_parameters_works_in_one_stage() -> None:
    x = floats()
    torch.testing.assert_close(pipe_of(Plain(), 1)(x), x.sin().cos().tan())


def test_a_model_without_parameters_is_cut_too() -> None:
    x = floats()
    torch.testing.assert_close(pipe_of(Plain(), 2)(x), x.sin().cos().tan())


# Batches


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_batch_smaller_than_or_uneven_for_the_microbatches_works(batch: int) -> None:
    model = MODELS["dict_in_out"]
    pipe, inputs = pipe_of(model.build(), microbatches=4), model.inputs(batch, 6)
    assert_same(
        step(pipe, pipe.pipeline.model, model.loss, inputs),
        step(pipe.pipeline.model, pipe.pipeline.model, model.loss, inputs),
    )
    assert len(pipe.pipeline.program.microbatches) == min(batch, 4)


def test_an_empty_batch() -> None:
    pipe = pipe_of()
    with refused(InputError, "batch is empty"):
        pipe(floats(0, D))
    works_after(pipe)
    with refused(InputError, "batch is empty"):
        pipe(floats(0, D))


def test_rows_that_do_not_match() -> None:
    model = MODELS["dict_in_out"]
    pipe, ((batch,), _) = pipe_of(model.build()), model.inputs(4, 6)
    pipe(batch)
    with refused(InputError, "mask", "3 rows", "batch has 4"):
        pipe({**batch, "mask": batch["mask"][:3]})
    pipe(batch)


def test_rows_that_do_not_match_in_the_first_call() -> None:
    model = MODELS["dict_in_out"]
    pipe, ((batch,), _) = pipe_of(model.build()), model.inputs(4, 6)
    with refused(PipecompileError, "3"):
        pipe({**batch, "mask": batch["mask"][:3]})


WORDS = ["a", "b", "c", "d"]


@pytest.mark.parametrize("names", [WORDS, tuple(WORDS), np.zeros(4), np.array(WORDS), [1, 2, 3, 4]])
def test_a_batch_that_is_not_made_of_tensors(names: Any) -> None:
    pipe = pipe_of()
    with refused(InputError, "'names'", type(names).__name__, "torch.as_tensor"):
        pipe(floats(), names=names)
    works_after(pipe)


def test_strings_inside_a_dict_of_the_batch() -> None:
    pipe = pipe_of()
    with refused(InputError, "'names.text'", "list", "4 items"):
        pipe(floats(), names={"text": ["a", "b", "c", "d"]})


def test_an_array_of_numpy_as_the_first_argument() -> None:
    with refused(InputError, "'x'", "ndarray", "torch.as_tensor"):
        pipe_of()(np.zeros((4, D)))


@pytest.mark.parametrize("names", ["text", 3, None, [True, False], ["a", "b"], {"a": 1}])
def test_options_that_are_no_batch_work(names: Any) -> None:
    pipe, x = pipe_of(), floats()
    torch.testing.assert_close(pipe(x, names=names), pipe.pipeline.model(x))


def test_a_call_without_any_tensor() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = blocks(2)

        def forward(self, times: int) -> Tensor:
            return self.body(torch.ones(3, D)) * times

    pipe = pipe_of(Constant())
    torch.testing.assert_close(pipe(2), pipe.pipeline.model(2))


# Arguments


def test_an_argument_that_the_model_does_not_take() -> None:
    pipe = pipe_of()
    with refused(InputError, "unexpected keyword argument 'colour'", "it takes x", "scale"):
        pipe(floats(), colour="red")
    works_after(pipe)


def test_too_many_arguments() -> None:
    with refused(InputError, "too many positional arguments", "it takes x"):
        pipe_of()(floats(), 1.0, None, 3)


def test_a_missing_argument() -> None:
    with refused(InputError, "missing a required argument: 'x'", "it takes x"):
        pipe_of()(scale=2.0)


def test_an_argument_in_another_form_is_captured_anew() -> None:
    pipe, x = pipe_of(), floats()
    for scale in (1.0, 2.0, 1.0):
        torch.testing.assert_close(pipe(x, scale=scale), pipe.pipeline.model(x, scale))
    assert pipe.pipeline.captures == 2


def test_another_tree_of_inputs_is_captured_anew() -> None:
    model = MODELS["options"]
    pipe, ((x,), kwargs) = pipe_of(model.build()), model.inputs(4, 6)
    for named in (kwargs, {}, {"shift": x.clone()}, {**kwargs, "shift": x.clone(), "times": 3}, kwargs):
        inputs = ((x,), named)
        assert_same(
            step(pipe, pipe.pipeline.model, mean_square, inputs),
            step(pipe.pipeline.model, pipe.pipeline.model, mean_square, inputs),
        )
    assert pipe.pipeline.captures == 4


def test_a_tensor_where_a_number_was_is_captured_anew() -> None:
    pipe, x = pipe_of(), floats()
    pipe(x, scale=2.0)
    for scale in (torch.tensor(2.0), floats(4, 1), floats(D)):
        torch.testing.assert_close(pipe(x, scale=scale), pipe.pipeline.model(x, scale))


def test_unhashable_options_that_change_are_seen() -> None:
    class Listed(Net):
        def forward(self, x: Tensor, layers: list[int]) -> Tensor:
            for i in layers:
                x = self.body[i](x)
            return x

    pipe, x, layers = pipe_of(Listed()), floats(), [0, 1, 2]
    for layer in (0, 1):
        layers[0] = layer
        torch.testing.assert_close(pipe(x, layers), pipe.pipeline.model(x, layers))


def test_a_set_that_changes_is_seen() -> None:
    pipe_model = Sets()
    pipe, x, wanted = pipe_of(pipe_model), floats(), {0}
    torch.testing.assert_close(pipe(x, wanted), pipe_model(x, wanted))
    wanted.add(1)
    torch.testing.assert_close(pipe(x, wanted), pipe_model(x, wanted))


class Sets(Net):
    def forward(self, x: Tensor, wanted: set[int]) -> Tensor:
        for i in range(3):
            x = self.body[i](x) if i in wanted else x * 2
        return x


def test_an_input_of_another_type_works_or_says_so() -> None:
    pipe = pipe_of()
    works_after(pipe)
    with refused(PipecompileError, "Float"):
        pipe(floats().float())
    works_after(pipe)


def test_an_input_of_another_width_says_where() -> None:
    pipe = pipe_of()
    works_after(pipe)
    with refused(PipecompileError, "body.0.0"):
        pipe(floats(4, D + 1))
    works_after(pipe)


def test_an_input_of_the_wrong_type_in_the_first_call_says_where() -> None:
    with refused(PipecompileError, "module 'body.0.0'", "test_bad_input.py", "Long"):
        pipe_of()(torch.ones(4, D, dtype=torch.long))


def test_an_index_out_of_range_says_where() -> None:
    model = MODELS["tied"]
    pipe, (_, kwargs) = pipe_of(model.build()), model.inputs(4, 6)
    pipe(**kwargs)
    with refused(PipecompileError, "module 'embedding'", "index out of range"):
        pipe(ids=kwargs["ids"] + 1000, labels=kwargs["labels"])
    torch.testing.assert_close(pipe(**kwargs)[0], pipe.pipeline.model(**kwargs)[0])


def test_an_input_on_the_meta_device() -> None:
    with refused(InputError, "meta"):
        pipe_of()(floats().to("meta"))


def test_a_sparse_input_works_or_says_so() -> None:
    pipe, x = pipe_of(), floats()
    try:
        output = pipe(x.to_sparse())
    except PipecompileError:
        return
    torch.testing.assert_close(output, pipe.pipeline.model(x))


def test_an_input_with_strides_of_its_own_works() -> None:
    pipe = pipe_of()
    for x in (floats(D, 4).T, floats(1, D).expand(4, D), floats(8, D)[::2]):
        torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))


# Models


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](x) if self.body[1](x).sum() > 0 else x


def test_a_model_that_cannot_be_traced() -> None:
    x = torch.ones(4, D)
    pipe = pipe_of(nn.ModuleDict({"route": Routed()})["route"])
    for _ in range(2):
        with refused(CaptureError, "test_bad_input.py", "parameter"):
            pipe(x)
    assert pipe.pipeline.captures == 0


def test_a_model_that_raises_itself() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("only on Sundays")

    with refused(CaptureError, "test_bad_input.py", "only on Sundays"):
        pipe_of(Picky())(floats())


# The loss


def two_losses(h: Tensor) -> dict[str, Tensor]:
    return {"first": h.mean(), "second": h.square().mean(), "h": h}


class Losses(Net):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


def test_several_losses_wait_for_the_caller() -> None:
    pipe, x = pipe_of(Losses(two_losses)), floats()

    def weighted(output: Any) -> Tensor:
        return output["first"] + 0.3 * output["second"]

    actual = step(pipe, pipe.pipeline.model, weighted, ((x,), {}))
    assert_same(actual, step(pipe.pipeline.model, pipe.pipeline.model, weighted, ((x,), {})))
    assert any("outputs first, second could each be the loss" in note for note in pipe.pipeline.report.notes)


def test_an_asynchronous_pipeline_must_know_which_of_several_losses() -> None:
    pipe = pipe_of(Losses(two_losses), schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with refused(InputError, "first, second", "loss_output="):
        pipe(floats())


def test_a_loss_by_name() -> None:
    pipe, x = pipe_of(Losses(two_losses), loss_output="second"), floats()
    actual = step(pipe, pipe.pipeline.model, lambda output: output["second"], ((x,), {}))
    assert_same(actual, step(pipe.pipeline.model, pipe.pipeline.model, lambda output: output["second"], ((x,), {})))


@pytest.mark.parametrize("name", ["third", "h"])
def test_a_loss_that_is_no_output_or_no_number(name: str) -> None:
    pipe = pipe_of(Losses(two_losses), loss_output=name)
    with refused(InputError, f"loss_output={name!r}", "first, second, h"):
        pipe(floats())


def test_an_output_without_a_batch_is_that_of_the_whole_batch() -> None:
    pipe = pipe_of(Losses(lambda h: {"loss": h.mean(), "columns": h.mean(dim=0), "largest": h.amax(dim=0)}))
    x = floats()
    found, expected = pipe(x), pipe.pipeline.model(x)
    for name in ("loss", "columns", "largest"):
        torch.testing.assert_close(found[name], expected[name])


def test_every_error_is_one_of_ours() -> None:
    from pipecompile import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, PipecompileError) for kind in kinds)


class CastsItself(nn.Module):
    """Casts its own layer in its first forward, as routers of some mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.to(torch.float32)
        return self.router(self.first(x).float())


def test_a_forward_that_casts_its_own_parameters_is_refused_until_they_are() -> None:
    model = CastsItself().double()
    pipe = pipe_of(model)
    with refused(CaptureError, "test_bad_input.py", "moves parameters of a Linear to torch.float32"):
        pipe(floats())
    model.router.float()
    x = floats()
    torch.testing.assert_close(pipe(x), model(x))


class SixRows(nn.Module):
    """Works for a batch of six only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D).double(), nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + x.new_ones(6, D))


def test_a_model_of_one_batch_size_is_told_with_the_line_and_without_a_second_introduction() -> None:
    with refused(CaptureError, "works for a batch of 6 only; use microbatches=1", "3 rows", "test_bad_input.py") as it:
        pipe_of(SixRows())(floats(6, D))
    assert "cannot be captured" not in str(it.value)
