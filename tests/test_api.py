"""A pipeline in place of its model: in every way that a training loop uses one, the numbers are the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import assert_same, preserved, split, step
from pairs import EITHER, INSIDE, OUTSIDE, assert_equal_gradients, both, gradients, loss_of, pipe_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import ExecutionError, InputError, PipecompileError

# The step


@EITHER
def test_a_gradient_that_comes_in_scales_all_that_go_out(name: str) -> None:
    pipe, model, inputs = both(name)
    for module in (pipe, model):
        loss_of(name, module, inputs).backward(torch.tensor(0.25, dtype=torch.float64))
    assert_equal_gradients(pipe, model)


@EITHER
def test_gradients_accumulate_over_calls(name: str) -> None:
    pipe, model, _ = both(name)
    for seed in range(3):
        inputs = MODELS[name].inputs(4, 6, seed)
        for module in (pipe, model):
            (loss_of(name, module, inputs) / 3).backward()
    assert_equal_gradients(pipe, model)


@EITHER
def test_losses_of_two_calls_may_be_summed_before_backward(name: str) -> None:
    pipe, model, _ = both(name)
    calls = [MODELS[name].inputs(4, 6, seed) for seed in range(2)]
    for module in (pipe, model):
        sum(loss_of(name, module, inputs) * i for i, inputs in enumerate(calls, 1)).backward()
    assert_equal_gradients(pipe, model)


@EITHER
def test_steps_of_an_optimizer_follow_one_another(name: str) -> None:
    pipe, model, _ = both(name)
    for module in (pipe, model):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        for seed in range(4):
            optimizer.zero_grad()
            loss_of(name, module, MODELS[name].inputs(4, 6, seed)).backward()
            optimizer.step()
    for (name, parameter), expected in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


def test_zero_grad_between_the_call_and_backward_loses_nothing() -> None:
    pipe, model, inputs = both(INSIDE)
    for module in (pipe, model):
        loss = loss_of(INSIDE, module, inputs)
        module.zero_grad()
        loss.backward()
    assert_equal_gradients(pipe, model)


def test_a_call_alone_delivers_no_gradient() -> None:
    pipe, _, inputs = both(INSIDE)
    loss_of(INSIDE, pipe, inputs)
    assert set(gradients(pipe).values()) == {None}


def test_two_calls_may_go_backward_in_any_order() -> None:
    pipe, model, _ = both(OUTSIDE)
    for module in (pipe, model):
        losses = [loss_of(OUTSIDE, module, MODELS[OUTSIDE].inputs(4, 6, seed)) for seed in range(3)]
        for i in (1, 0, 2):
            losses[i].backward()
    assert_equal_gradients(pipe, model)


def test_several_outputs_share_a_backward_when_the_loss_is_outside() -> None:
    model = MODELS["named_tuple_output"]
    pipe, unsplit, inputs = both("named_tuple_output")
    for module in (pipe, unsplit):
        output = module(*inputs[0])
        (output.left.sum() * 2 + output.right.pow(2).mean() + output.right[0].sum()).backward()
    assert_equal_gradients(pipe, unsplit)
    assert model.loss(pipe(*inputs[0])).requires_grad


def test_a_schedule_of_any_kind_gives_the_same_numbers() -> None:
    for schedule in ("sequential", "gpipe", "1f1b"):
        pipe, model, inputs = both(INSIDE, schedule=schedule, stages=3)
        loss = MODELS[INSIDE].loss
        assert_same(step(pipe, pipe.pipeline.model, loss, inputs), step(model, model, loss, inputs))


# A loss function of the user's


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = blocks(3), nn.Linear(D, 5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.body(x if shift is None else x + shift)
        return self.head(h)


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Classifier().double(), torch.randn(4, D, dtype=torch.float64), torch.tensor([1, 4, 0, 2])


@pytest.mark.parametrize(
    "make", [lambda: cross_entropy, nn.CrossEntropyLoss, lambda: lambda *a: {"loss": F.nll_loss(*a)}]
)
def test_a_loss_function_runs_in_the_last_stage(make: Callable[[], Any]) -> None:
    model, x, target = classifier()
    loss_fn = make()
    pipe = pipe_of(model, loss_fn=loss_fn)

    def unsplit(x: Tensor, target: Tensor) -> Any:
        return loss_fn(model(x), target)

    def find(output: Any) -> Tensor:
        return output["loss"] if isinstance(output, dict) else output

    assert_same(step(pipe, model, find, ((x,), {"target": target})), step(unsplit, model, find, ((x, target), {})))


def test_a_loss_function_leaves_the_models_own_arguments_alone() -> None:
    model, x, target = classifier()
    pipe = pipe_of(model, loss_fn=cross_entropy)
    loss = pipe(x, shift=x * 2, target=target)
    torch.testing.assert_close(loss, cross_entropy(model(x, x * 2), target))


def test_a_loss_function_without_target_is_refused() -> None:
    model, x, _ = classifier()
    with pytest.raises(InputError, match="target"):
        pipe_of(model, loss_fn=cross_entropy)(x)


# Modes


def test_no_grad_gives_the_output_without_a_history() -> None:
    pipe, model, (args, kwargs) = both(OUTSIDE)
    with torch.no_grad():
        output = pipe(*args, **kwargs)
    torch.testing.assert_close(output, model(*args, **kwargs), check_stride=False)
    assert not output.requires_grad


def test_inference_mode_gives_the_same_output() -> None:
    pipe, model, (args, kwargs) = both(OUTSIDE)
    with torch.inference_mode():
        torch.testing.assert_close(pipe(*args, **kwargs), model(*args, **kwargs))
    loss_of(OUTSIDE, pipe, (args, kwargs)).backward()
    loss_of(OUTSIDE, model, (args, kwargs)).backward()
    assert_equal_gradients(pipe, model)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = blocks(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2](self.dropout(self.body[:2](x)))


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    pipe, x = pipe_of(Dropout()), torch.ones(4, D)
    assert not torch.equal(pipe(x), pipe(x))
    assert not pipe.eval().pipeline.model.training
    torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))
    assert pipe.train().pipeline.model.dropout.training
    assert not torch.equal(pipe(x), pipe(x))
    assert pipe.pipeline.captures == 2


def test_a_model_put_into_evaluation_itself_is_noticed() -> None:
    pipe, x = pipe_of(Dropout()), torch.ones(4, D)
    pipe(x)
    pipe.pipeline.model.eval()
    torch.testing.assert_close(pipe(x), pipe.pipeline.model(x))


def test_evaluation_trains_too_where_gradients_are_wanted() -> None:
    pipe, model, inputs = both(INSIDE)
    for module in (pipe.eval(), model.eval()):
        loss_of(INSIDE, module, inputs).backward()
    assert_equal_gradients(pipe, model)


def test_a_seed_gives_the_same_dropout_twice() -> None:
    pipe, x = pipe_of(Dropout(), stages=1), torch.ones(4, D)
    pipe(x)
    outputs = [(torch.manual_seed(3), pipe(x))[1] for _ in range(2)]
    assert torch.equal(*outputs)


def test_the_same_call_with_and_without_autocast_is_two_captures() -> None:
    model, x = blocks(4), torch.randn(4, D)
    pipe = pipe_of(model)
    plain = pipe(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = pipe(x)
    assert pipe.pipeline.captures == 2
    assert not torch.equal(plain, low.float())
    torch.testing.assert_close(plain, model(x))


class Scattered(nn.Module):
    """Asks for the type of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[1](self.layers[0](x).tanh())
        out = torch.zeros(h.shape, dtype=h.dtype).scatter(1, torch.zeros(len(h), 1, dtype=torch.long), h)
        return self.layers[2](out).to(h.dtype)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_type_that_the_model_asks_for_follows_the_callers_autocast(order: tuple[bool, bool]) -> None:
    model, x = Scattered(), torch.randn(4, D)
    pipe = pipe_of(model, microbatches=1)
    for enabled in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, expected = pipe(x), model(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_the_mode_of_the_first_call_leaves_no_mark_on_the_next(mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Dropout().eval()
    pipe, x = pipe_of(model), torch.randn(4, D)
    with mode():
        pipe(x)
    pipe(x).square().mean().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


# Parameters and inputs


@pytest.mark.parametrize("name", ["frozen", "unused"])
def test_a_parameter_that_takes_no_part_has_no_gradient(name: str) -> None:
    pipe, model, inputs = both(name)
    for module in (pipe, model):
        loss_of(name, module, inputs).backward()
    assert None in gradients(model).values()
    assert_equal_gradients(pipe, model)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_inputs_that_want_a_gradient_get_it(microbatches: int) -> None:
    pipe, model, ((x, late), _) = both(OUTSIDE, microbatches=microbatches)
    got = []
    for module in (pipe, model):
        leaves = [x.clone().requires_grad_(), late.clone().requires_grad_()]
        mean_square(module(*(leaf * 2 for leaf in leaves))).backward()
        got.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*got)
    assert_equal_gradients(pipe, model)


def test_an_input_without_a_batch_gets_the_sum_over_the_microbatches() -> None:
    model = MODELS["options"]
    pipe, unsplit, ((x,), kwargs) = both("options", microbatches=4)
    got = []
    for module in (pipe, unsplit):
        scale = kwargs["scale"].clone().requires_grad_()
        model.loss(module(x, **{**kwargs, "scale": scale})).backward()
        got.append(scale.grad)
    torch.testing.assert_close(*got)


@EITHER
def test_one_tensor_given_as_two_arguments_gets_both_gradients(name: str) -> None:
    pipe, model, ((x, _), _) = both(OUTSIDE)
    loss_fn = {INSIDE: {"loss_fn": lambda out, target: (out * target).mean()}, OUTSIDE: {}}[name]
    pipe = pipe_of(model, **loss_fn)
    got = []
    for module in (pipe, model):
        leaf = x.clone().requires_grad_()
        if name == INSIDE and module is pipe:
            pipe(leaf, leaf, target=x).backward()
        else:
            (module(leaf, leaf) * x).mean().backward()
        got.append(leaf.grad)
    torch.testing.assert_close(*got)


def test_state_dict_has_the_models_keys_and_loads_both_ways() -> None:
    pipe, model, inputs = both("tied")
    assert list(pipe.state_dict()) == list(model.state_dict())
    other = MODELS["tied"].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    pipe.load_state_dict(other.state_dict())
    torch.testing.assert_close(loss_of("tied", pipe, inputs), loss_of("tied", other, inputs))
    model.load_state_dict(pipe.state_dict())
    torch.testing.assert_close(loss_of("tied", model, inputs), loss_of("tied", other, inputs))


def test_a_checkpoint_loaded_between_two_calls_is_what_the_next_call_uses() -> None:
    pipe, model, inputs = both(INSIDE)
    loss_of(INSIDE, pipe, inputs)
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    pipe.load_state_dict(state, assign=True)
    model.load_state_dict(state)
    for module in (pipe, model):
        loss_of(INSIDE, module, inputs).backward()
    assert_equal_gradients(pipe, model)


def test_the_pipelines_parameters_are_the_models() -> None:
    pipe, _, inputs = both("buffers_in_place")
    pipe(*inputs[0])
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        names = [(n, id(t)) for n, t in getattr(pipe.pipeline.model, kind)() if t is not pipe.pipeline.model]
        assert [(n, id(t)) for n, t in getattr(pipe, kind)() if t is not pipe] == names


def test_what_the_pipeline_lacks_is_the_models() -> None:
    pipe, _, _ = both("gpt2")
    assert pipe.config.n_layer == 3
    assert pipe.get_input_embeddings() is pipe.pipeline.model.transformer.wte
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pipe.no_such_thing


def test_a_model_cast_through_the_pipeline_computes_in_its_new_type() -> None:
    pipe, model, ((x, late), _) = both(OUTSIDE)
    pipe(x, late)
    output = pipe.float()(x.float(), late.float())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, model.float()(x.float(), late.float()))


def test_the_original_model_still_works_beside_its_pipeline() -> None:
    pipe, model, inputs = both(OUTSIDE)
    loss_of(OUTSIDE, pipe, inputs).backward()
    loss_of(OUTSIDE, pipe.pipeline.model, inputs).backward()
    (loss_of(OUTSIDE, model, inputs) * 2).backward()
    assert_equal_gradients(pipe, model)


def test_two_pipelines_of_one_model_share_its_parameters() -> None:
    pipe, model, inputs = both(OUTSIDE)
    other = pipe_of(pipe.pipeline.model, stages=3)
    for module in (pipe, other, model, model):
        loss_of(OUTSIDE, module, inputs).backward()
    assert_equal_gradients(pipe, model)


def test_an_output_may_be_changed_in_place_by_the_caller() -> None:
    pipe, model, ((x, late), _) = both(OUTSIDE)
    for module in (pipe, model):
        output = module(x, late)
        output.mul_(2).add_(1)
        mean_square(output).backward()
    assert_equal_gradients(pipe, model)


# What cannot be asked of a pipeline


def test_a_step_of_the_optimizer_before_backward_is_refused() -> None:
    pipe, _, inputs = both(OUTSIDE)
    loss = loss_of(OUTSIDE, pipe, inputs)
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.add_(1)
    with pytest.raises(ExecutionError, match=r"parameter 'body.* was changed in place.*before optimizer\.step"):
        loss.backward()


# compile()


@pytest.mark.parametrize("form", [lambda x, late: ((x,), {"late": late}), lambda x, late: (x, late),
                                  lambda x, late: [x, late], lambda x, late: {"x": x, "late": late}])  # fmt: skip
def test_example_inputs_capture_at_once(form: Callable[..., Any]) -> None:
    model = MODELS[OUTSIDE]
    (x, late), _ = model.inputs(4, 6)
    pipe = pipe_of(model.build(), example_inputs=form(x, late))
    assert (pipe.pipeline.captures, pipe.pipeline.plan.num_stages, len(pipe.pipeline.stages)) == (1, 2, 2)
    assert pipe.pipeline.timeline is None
    torch.testing.assert_close(pipe(x, late=late), pipe.pipeline.model(x, late))
    assert pipe.pipeline.captures == 1


def test_one_tensor_is_an_example_of_one_argument() -> None:
    pipe = pipe_of(MODELS["used_twice"].build(), example_inputs=torch.ones(4, 6, D, dtype=torch.float64))
    assert pipe.pipeline.captures == 1


def test_example_inputs_with_a_loss_function_hold_its_target() -> None:
    model, x, target = classifier()
    pipe = pipe_of(model, loss_fn=cross_entropy, example_inputs=((x,), {"target": target}))
    torch.testing.assert_close(pipe(x, target=target), cross_entropy(model(x), target))
    assert pipe.pipeline.captures == 1


def test_before_the_first_call_there_is_no_plan() -> None:
    pipe, _, inputs = both(OUTSIDE)
    for name in ("plan", "stages", "predicted", "report"):
        with pytest.raises(PipecompileError, match="captured at the first call"):
            getattr(pipe.pipeline, name)
    pipe(*inputs[0])
    assert pipe.pipeline.plan.num_stages == 2


def test_a_pipeline_shows_its_plan_program_and_timelines() -> None:
    pipe, _, inputs = both(INSIDE, microbatches=2)
    loss_of(INSIDE, pipe, inputs).backward()
    rows = [[str(i) for i in pipe.pipeline.program.row_of(stage)] for stage in range(2)]
    assert rows == [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]
    done = {(span.rank, span.instruction) for span in pipe.pipeline.timeline.spans}
    assert done == {(rank, i) for rank, row in enumerate(pipe.pipeline.program.ranks) for i in row}
    assert {span.instruction for span in pipe.pipeline.predicted.spans} == {i for _, i in done}
    assert pipe.pipeline.predicted.makespan > 0


def test_a_forward_alone_runs_no_backward() -> None:
    pipe, _, (args, _) = both(OUTSIDE)
    with torch.no_grad():
        pipe(*args)
    assert [[str(i) for i in pipe.pipeline.program.row_of(stage)] for stage in range(2)] == [
        ["0F0", "0F1"],
        ["1F0", "1F1"],
    ]


def test_a_report_says_what_is_tied_guarded_and_recomputed() -> None:
    pipe, _, inputs = both("tied")
    pipe(**inputs[1])
    report = pipe.pipeline.report
    assert report.tied == ("embedding.weight over stages 0, 1, gradients summed",)
    assert report.to_dict()["tied"] == [*report.tied]
    assert report.to_dict().keys() == {field.name for field in fields(pipecompile.Report)}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "tied\n    embedding.weight over stages 0, 1, gradients summed" in str(report)
    assert not report.recomputed
    assert "\nrecomputed" not in str(report)  # topics without a sentence are not printed


def test_a_report_says_what_microbatches_change() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5), nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).square().mean()

    x = torch.randn(8, D)
    cut = pipe_of(Net(), microbatches=2)
    cut.pipeline.prepare(x)
    said = " ".join(cut.pipeline.report.microbatches)
    assert "mean over rows" in said
    assert "batch normalization uses each microbatch's statistics (module 'body.1'" in said
    assert "random numbers differ from the unsplit model's (1 random call, first in module 'body.2'" in said
    whole = pipe_of(Net(), microbatches=1)
    whole.pipeline.prepare(x)
    assert whole.pipeline.report.microbatches == ()


def test_three_virtual_stages_may_share_one_device() -> None:
    pipe, model, inputs = both(INSIDE, stages=3)
    assert_same(
        step(pipe, pipe.pipeline.model, MODELS[INSIDE].loss, inputs), step(model, model, MODELS[INSIDE].loss, inputs)
    )
    assert pipe.pipeline.plan.rank_of == (0, 1, 2)


def test_one_stage_is_a_pipeline_too() -> None:
    pipe, model, inputs = both(INSIDE, stages=1)
    assert_same(
        step(pipe, pipe.pipeline.model, MODELS[INSIDE].loss, inputs), step(model, model, MODELS[INSIDE].loss, inputs)
    )


def test_a_last_smaller_microbatch_counts_by_its_rows() -> None:
    pipe, model, _ = both(INSIDE, microbatches=4)
    inputs = MODELS[INSIDE].inputs(6, 6)
    assert_same(
        step(pipe, pipe.pipeline.model, MODELS[INSIDE].loss, inputs), step(model, model, MODELS[INSIDE].loss, inputs)
    )


def test_the_default_is_two_microbatches_a_stage() -> None:
    pipe = pipecompile.compile(MODELS[OUTSIDE].build(), ["cpu"] * 3, costs="count")
    pipe(*MODELS[OUTSIDE].inputs(12, 6)[0])
    assert pipe.pipeline.program.microbatches == tuple(range(6))


def test_train_and_eval_alternate_on_one_placement() -> None:
    model = nn.Sequential(blocks(2), nn.BatchNorm1d(D), blocks(2)).double()
    pipe, x = pipe_of(model), torch.randn(6, D, dtype=torch.float64)
    for _ in range(2):
        before = model[1].running_mean.clone()
        torch.testing.assert_close(pipe.eval()(x), model(x))
        assert torch.equal(model[1].running_mean, before)
        assert not torch.allclose(pipe.train()(x), pipe.eval()(x))
        assert not torch.equal(model[1].running_mean, before)
    assert pipe.pipeline.captures == 2


# Asynchronous


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def asynchronous(stages: int = 2, **options: Any) -> Any:
    return pipe_of(MODELS["skip_to_loss"].build(), stages, schedule="pipedream", optimizer=sgd, **options)


def moved(pipe: Any) -> Callable[[], bool]:
    before = [parameter.detach().clone() for parameter in pipe.parameters()]
    return lambda: any(not torch.equal(b, p) for b, p in zip(before, pipe.parameters(), strict=True))


def test_flush_ends_what_is_under_way_and_a_second_one_does_nothing() -> None:
    pipe = asynchronous()
    args, kwargs = MODELS["skip_to_loss"].inputs(4, 6)
    pipe(*args, **kwargs)
    still_under_way = moved(pipe)
    pipe.pipeline.flush()
    assert still_under_way()
    after_flush = moved(pipe)
    pipe.pipeline.flush()
    assert not after_flush()


def test_a_flush_after_every_call_of_one_microbatch_is_plain_training() -> None:
    pipe, model = asynchronous(3, microbatches=1), MODELS["skip_to_loss"].build()
    optimizer = sgd(list(model.parameters()))
    for seed in range(3):
        args, kwargs = MODELS["skip_to_loss"].inputs(4, 6, seed)
        pipe(*args, **kwargs)
        pipe.pipeline.flush()
        optimizer.zero_grad()
        model(*args, **kwargs).backward()
        optimizer.step()
    for (name, parameter), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, msg=name)


def test_an_asynchronous_loss_has_nothing_to_go_backward() -> None:
    pipe = asynchronous()
    args, kwargs = MODELS["skip_to_loss"].inputs(4, 6)
    assert not pipe(*args, **kwargs).requires_grad


def test_an_asynchronous_pipeline_evaluates_between_its_steps() -> None:
    pipe, through = asynchronous(costs="count"), asynchronous(costs="count")  # measured ones may cut them differently
    for seed in range(3):
        args, kwargs = MODELS["skip_to_loss"].inputs(4, 6, seed)
        torch.testing.assert_close(pipe(*args, **kwargs), through(*args, **kwargs))
        with torch.no_grad():
            pipe.eval()(*args, **kwargs)
        pipe.train()
    pipe.pipeline.flush()
    through.pipeline.flush()
    for parameter, same in zip(pipe.parameters(), through.parameters(), strict=True):
        torch.testing.assert_close(parameter, same)


def test_an_asynchronous_pipeline_takes_other_lengths() -> None:
    pipe = asynchronous()
    still = moved(pipe)
    for length in (6, 9, 6):
        args, kwargs = MODELS["skip_to_loss"].inputs(4, length)
        assert torch.isfinite(pipe(*args, **kwargs))
    pipe.pipeline.flush()
    assert still()
    assert pipe.pipeline.captures == 1


def test_minibatches_of_unequal_calls_are_each_a_step() -> None:
    steps: list[int] = []
    model = MODELS["skip_to_loss"].build()
    shapes = {tuple(p.shape) for p in model.parameters()}

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if any(tuple(p.shape) in shapes for group in self.param_groups for p in group["params"]):
                steps.append(1)  # not a step that is timed, on parameters of another model
            super().step(closure)

    pipe = pipe_of(model, schedule="pipedream", optimizer=partial(Counting, lr=0.1), microbatches=3)
    for batch in (6, 3, 1):
        args, kwargs = MODELS["skip_to_loss"].inputs(batch, 6)
        pipe(*args, **kwargs)
    pipe.pipeline.flush()
    assert len(steps) == 2 * (3 + 3 + 1)


def test_an_asynchronous_pipeline_steps_on_the_gradient_of_each_minibatch() -> None:
    pipe = asynchronous(1, microbatches=2)
    model, inputs = MODELS["skip_to_loss"].build(), MODELS["skip_to_loss"].inputs(4, 6)
    optimizer = sgd(list(model.parameters()))
    args, kwargs = inputs
    pipe(*args, **kwargs)
    pipe.pipeline.flush()
    for part, named in split(inputs, 2):
        with preserved(nn.Module()):
            optimizer.zero_grad()
            model(*part, **named).backward()
            optimizer.step()
    for (name, parameter), same in zip(pipe.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, msg=name)
