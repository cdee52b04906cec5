"""A pipe is its model to everybody who looks: class, signature, attributes, modules, state, and to tools."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from oracle import assert_same, step
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.func import functional_call
from toys import D

import pipecompile
from pipecompile.errors import CaptureError, ExecutionError, InputError

WORDS = 32
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Custom(nn.Module):
    """Has submodules of all the names that a pipeline might want for itself."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(D, D)
        self.stages = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.memory = nn.Linear(D, D)
        self.plan = nn.Parameter(torch.rand(D))
        self.register_buffer("report", torch.ones(D))
        self.schedule = "cosine"

    def forward(self, x: Tensor, *, weight: float = 1.0) -> Tensor:
        h = self.model(x).tanh()
        for stage in self.stages:
            h = stage(h).sin()
        return (self.memory(h) * self.plan + self.report).square().mean() * self.scale * weight

    def twice(self, x: Tensor) -> Tensor:
        return self(x) * 2

    def verify(self) -> str:
        return "the model's own"


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=WORDS, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=WORDS,
        max_position_embeddings=32, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def words(rows: int = 4) -> Call:
    ids = torch.randint(3, WORDS, (rows, 6), generator=torch.Generator().manual_seed(rows))
    return (), {"input_ids": ids, "labels": ids}


def floats(rows: int = 4) -> Call:
    return (torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)),), {}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Call]]] = {
    "custom": (Custom, floats),
    "gpt2": (gpt2, words),
    "llama": (llama, words),
}


def both(name: str, **options: Any) -> tuple[Any, nn.Module, Call]:
    """A pipe, and another model with its weights; both in float64."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().double().train()
    options = {"microbatches": 2, "costs": "count"} | options
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], **options)
    return pipe, model, inputs()


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["loss"]


def trained(module: nn.Module, call: Call) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(module(*call[0], **call[1])).backward()
        optimizer.step()
    return dict(module.state_dict())


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_class_signature_and_attributes_are_the_models(name: str) -> None:
    pipe, model, call = both(name)
    for _ in range(2):
        assert isinstance(pipe, type(model))
        assert type(pipe).__name__ == type(model).__name__
        assert type(pipe).__module__ == type(model).__module__
        assert inspect.signature(pipe.forward) == inspect.signature(model.forward)
        assert inspect.signature(type(pipe).forward) == inspect.signature(type(model).forward)
        assert set(vars(pipe)) == set(vars(model))
        assert repr(pipe) == f"{pipe.pipeline!r} of\n{model!r}"
        assert [path for path, _ in pipe.named_modules()] == [path for path, _ in model.named_modules()]
        assert [path for path, _ in pipe.named_parameters()] == [path for path, _ in model.named_parameters()]
        assert [path for path, _ in pipe.named_buffers()] == [path for path, _ in model.named_buffers()]
        assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert isinstance(pipe.pipeline, pipecompile.Pipeline)
    assert type(pipe.pipeline.model) is type(model)
    assert type(model).__name__ in repr(pipe.pipeline)


def test_no_name_of_the_models_is_hidden() -> None:
    pipe, model, (args, _) = both("custom")
    assert isinstance(pipe.model, nn.Linear)
    assert isinstance(pipe.stages[1], nn.Linear)
    assert isinstance(pipe.memory, nn.Linear)
    assert isinstance(pipe.plan, nn.Parameter)
    assert pipe.schedule == "cosine"
    assert pipe.verify() == "the model's own"
    torch.testing.assert_close(pipe.twice(*args), model.twice(*args))
    assert pipe.pipeline.plan.num_stages == 2


def test_an_attribute_that_is_set_is_the_models() -> None:
    pipe, model, call = both("custom")
    for module in (pipe, model):
        step(module, module, loss_of, call)
        module.scale = 3.0
        module.memory.weight.requires_grad_(False)
        module.more = nn.Linear(1, 1)
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert pipe.pipeline.model.more is pipe.more
    pipe.forward = lambda x: pipe.memory(x).sum()
    model.forward = lambda x: model.memory(x).sum()
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert pipe.pipeline.captures == 3
    for module in (pipe, model):
        del module.forward
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))


def test_modes_are_the_models() -> None:
    pipe, model, _ = both("gpt2")
    for module in (pipe, model):
        assert module.eval() is module
        assert not module.training
        assert not any(child.training for child in module.modules())
    assert not pipe.pipeline.model.training
    assert pipe.train() is pipe
    assert pipe.pipeline.model.training


def test_a_model_that_has_a_pipeline_of_its_own_is_refused() -> None:
    model = Custom()
    model.pipeline = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"attribute 'pipeline' of its own.*rename"):
        pipecompile.compile(model, ["cpu", "cpu"])


def test_a_pipe_is_not_split_again() -> None:
    pipe, _, _ = both("custom")
    with pytest.raises(InputError, match=r"already a pipeline; compile pipe\.pipeline\.model"):
        pipecompile.compile(pipe, ["cpu", "cpu"])


def test_a_tool_may_give_a_pipe_a_class_of_its_own() -> None:
    """As ``fully_shard`` does: a subclass of the pipe's, made for it."""
    pipe, model, call = both("custom")
    before = type(pipe)
    pipe.__class__ = type("Sharded", (before,), {"note": lambda self: self.scale})
    assert pipe.note() == 2.0
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
    assert pipe.pipeline.captures == 1


def test_what_a_tool_makes_of_the_pipes_class_is_a_model() -> None:
    """A slice of a Sequential is ``self.__class__(...)``; so are models read by ``type(pipe).from_pretrained``."""
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(4))).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    (x,), _ = floats()
    part = pipe[1:3]
    assert type(part) is nn.Sequential
    assert torch.equal(part(x), model[2](model[1](x)))
    assert (len(pipe), pipe[1], list(pipe)) == (4, model[1], list(model))


class AnswersAll(nn.Module):
    """Has an answer for every name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


class InSlots(nn.Sequential):
    __slots__ = ("factor",)


def test_a_model_that_answers_to_every_name() -> None:
    model = AnswersAll().double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    assert_same(step(pipe, pipe, loss_of, floats()), step(model, model, loss_of, floats()))
    assert pipe.whatever is None


def test_a_scripted_model() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).double())
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    seen = []
    for module in (pipe, model):  # which share their parameters
        loss = module(*floats()[0]).square().mean()
        loss.backward()
        seen.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
        model.zero_grad()
    assert_equal(*seen)


def test_a_module_with_slots_is_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D), InSlots(nn.Linear(D, D))).double()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], costs="count")
    with pytest.raises(CaptureError, match=r"module '1' keeps attributes in the __slots__ of class InSlots.*remove"):
        pipe(*floats()[0])


def test_data_parallel_is_refused() -> None:
    pipe, _, call = both("gpt2")
    step(nn.DataParallel(pipe), pipe, loss_of, call)  # of one device, or none: calls the module as it is
    with pytest.raises(InputError, match=r"DataParallel copies the model .*Trainer: set arguments\._n_gpu = 1"):
        pipe._replicate_for_data_parallel()  # as torch.nn.parallel.replicate does


def test_a_closed_pipeline_says_so() -> None:
    pipe, _, (args, _) = both("custom")
    with pipe.pipeline:
        pipe(*args)
    with pytest.raises(ExecutionError, match=r"has been closed.*compile the model again"):
        pipe(*args)


def test_a_class_that_nothing_can_inherit_from_is_refused() -> None:
    class Final(nn.Module):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

    with pytest.raises(InputError, match=r"Final cannot be subclassed.*Final is final"):
        pipecompile.compile(Final(), ["cpu", "cpu"])


# State


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_goes_to_and_from_the_unsplit_model(name: str) -> None:
    pipe, model, call = both(name)
    assert_equal(trained(pipe, call), trained(model, call))
    kept = io.BytesIO()
    torch.save(pipe.state_dict(), kept)
    kept.seek(0)
    other = MODELS[name][0]().double()
    other.load_state_dict(torch.load(kept, weights_only=True))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", MODELS)
def test_torchs_distributed_checkpoints_see_the_model(name: str) -> None:
    pipe, model, call = both(name)
    assert_equal(get_model_state_dict(pipe), get_model_state_dict(model))
    made = {}
    for module in (pipe, model):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        loss_of(module(*call[0], **call[1])).backward()
        optimizer.step()
        made[module] = get_optimizer_state_dict(module, optimizer)["state"]
    assert list(made[pipe]) == list(made[model])
    for path in made[model]:
        assert_equal(made[pipe][path], made[model][path])
    fresh, _, _ = both(name)
    set_model_state_dict(fresh, get_model_state_dict(model))
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_pretrained_model_is_saved_and_read(make: Callable[[], nn.Module], tmp_path: Any) -> None:
    pipe, model, call = both(make.__name__)
    trained(pipe, call)
    trained(model, call)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    again = type(model).from_pretrained(tmp_path)
    assert again.config.architectures == [type(model).__name__]
    assert_equal(dict(again.double().state_dict()), dict(model.state_dict()))


class Writer(nn.Module):
    """Has a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1))  # type: ignore[no-any-return]

    def generate(self, ids: Tensor, count: int) -> Tensor:
        for _ in range(count):
            ids = torch.cat([ids, self(ids).argmax(-1, keepdim=True)], 1)
        return ids


def test_a_models_own_loop_calls_the_pipe() -> None:
    model = Writer()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    ids = torch.randint(WORDS, (4, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe.generate(ids, 3), model.generate(ids, 3))
    assert pipe.pipeline.calls == 3


def test_a_loop_that_never_calls_the_pipe_is_refused() -> None:
    """As that of a PEFT model, which calls the model inside."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Writer()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)  # type: ignore[no-any-return]

        def generate(self, ids: Tensor, count: int) -> Tensor:
            return self.inner.generate(ids, count)

    pipe = pipecompile.compile(Around(), ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(
        InputError, match=r"modules inside it \('inner'\) and never the pipe.*; generate with pipe\.pip"
    ):
        pipe.generate(torch.zeros(4, 3, dtype=torch.int64), 2)


# Other weights


@pytest.mark.parametrize("name", MODELS)
def test_functional_call_differentiates_by_the_weights_it_is_given(name: str) -> None:
    pipe, model, call = both(name)
    seen = []
    for module in (pipe, model):
        for factor in (1.1, 0.9):
            weights = {n: (p.detach() * factor).requires_grad_() for n, p in module.named_parameters()}
            loss = loss_of(functional_call(module, weights, *call))
            (loss / 2).backward()
            seen.append({n: weight.grad for n, weight in weights.items()} | {"loss": loss.detach()})
            assert all(p.grad is None for p in module.parameters())
    assert_equal(seen[0], seen[2])
    assert_equal(seen[1], seen[3])
    assert pipe.pipeline.captures == 1
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))


def test_an_inner_loop_of_meta_learning() -> None:
    """MAML's first order: a step on weights that are computed from others, with the loss outside of the model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    model = Net().double()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count")
    seen = []
    for module in (pipe, model):
        x = floats()[0][0].requires_grad_()
        weights = dict(module.named_parameters())
        loss = functional_call(module, {n: p * 1.0 for n, p in weights.items()}, (x,)).square().mean()
        steps = torch.autograd.grad(loss, list(weights.values()))
        moved = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), steps, strict=True)}
        functional_call(module, moved, (x,)).square().mean().backward()
        seen.append({n: p.grad for n, p in module.named_parameters()} | {"x": x.grad})
    assert_equal(*seen)


def test_gradients_of_gradients_by_other_weights_are_refused() -> None:
    pipe, _, call = both("custom")
    weights = {n: p.detach().clone().requires_grad_() for n, p in pipe.named_parameters()}
    loss = loss_of(functional_call(pipe, weights, *call))
    with pytest.raises(ExecutionError, match="create_graph=True"):
        torch.autograd.grad(loss, list(weights.values()), create_graph=True)


def test_weights_of_another_shape_are_refused() -> None:
    pipe, _, call = both("custom")
    with pytest.raises(
        (InputError, ExecutionError), match=r"'plan' of shape .* cannot be replaced .*pass one of the same"
    ):
        functional_call(pipe, {"plan": torch.rand(1, dtype=torch.float64)}, *call)


class Watched(Tensor):
    """A class that sees torch's functions, of which a fake mode knows nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_a_class_that_watches_functions() -> None:
    found = []
    for module in both("custom")[:2]:
        module.memory.weight = nn.Parameter(module.memory.weight.detach().as_subclass(Watched))
        ended = trained(module, floats())
        found.append({name: value.detach().as_subclass(Tensor) for name, value in ended.items()})
    assert_equal(*found)
