"""A model on the meta device gets the values that the unsplit model would have, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import saved, state_of
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from toys import D
from unfilled import MAKE, SEED, STEPS, batch, initialized, on_meta, trained

import pipecompile
from pipecompile.errors import InputError, PipecompileError
from pipecompile.ops.away import is_away

SOME = ["gpt2", "llama", "custom"]


def pipe_of(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, ["cpu", "cpu"], **{"microbatches": 4, "costs": "count", **options})


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(model: nn.Module, expected: nn.Module, but: str = " ") -> None:
    found, known = tensors(model), tensors(expected)
    assert found.keys() == known.keys() != set()
    assert [key for key in known if not key.startswith(but) and not torch.equal(found[key], known[key])] == []


@contextmanager
def refused(*said: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    for each in said:
        assert each in str(caught.value)


class Two(nn.Module):
    """Two layers, the first by ``make``."""

    def __init__(self, make: Callable[[], nn.Module] = lambda: nn.Linear(D, D)) -> None:
        super().__init__()
        self.first, self.second = make(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def floats(rows: int = 8) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(0))


# Own initialisers


@pytest.mark.parametrize("name", MAKE)
def test_initialisers_give_the_values_of_the_unsplit_model(name: str) -> None:
    torch.manual_seed(SEED)
    pipe = pipe_of(on_meta(MAKE[name]))
    pipe(**batch(0))
    assert_equal(pipe, initialized(MAKE[name]), but="norm.")  # which the call has moved


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_as_the_unsplit_model_that_was_initialised_alike(name: str, dtype: torch.dtype) -> None:
    expected = trained(pipe_of(initialized(lambda: MAKE[name]().to(dtype))))
    torch.manual_seed(SEED)
    found = trained(pipe_of(on_meta(lambda: MAKE[name]().to(dtype))))
    assert found.keys() == expected.keys()
    assert len(found) > STEPS
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_a_call_is_compared_with_the_unsplit_model() -> None:
    pipe = pipe_of(on_meta(MAKE["llama"]))
    pipe(**batch(0))
    assert [proof.of for proof in pipe.pipeline.proofs] == [len(batch(0)["input_ids"])]
    assert pipe.pipeline.verify(**batch(1)).exact


def test_the_seed_is_that_of_compile_and_the_callers_numbers_stay() -> None:
    torch.manual_seed(SEED)
    pipe = pipe_of(on_meta(Two))
    between = torch.randn(3)
    state = torch.get_rng_state()
    pipe(floats())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(SEED)
    assert torch.equal(torch.randn(3), between)
    model = on_meta(Two).to_empty(device="cpu")
    torch.manual_seed(SEED)
    for linear in (model.first, model.second):
        linear.reset_parameters()
    assert_equal(pipe, model)


def test_parameters_keep_their_identity_and_an_early_optimizer_trains_them() -> None:
    model = on_meta(lambda: Two(lambda: nn.Sequential(nn.Linear(D, D))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    pipe = pipe_of(model)
    pipe(floats()).backward()
    before = [parameter.detach().clone() for parameter in parameters]
    assert [id(p) for p in pipe.parameters()] == [id(p) for p in parameters]
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(parameters, before, strict=True))


def test_a_recurrent_module_is_filled() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(D, D, batch_first=True), nn.Linear(D, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.unsqueeze(1))[0]).square().mean()

    torch.manual_seed(SEED)
    pipe = pipe_of(on_meta(Recurrent))
    pipe(floats())
    model = on_meta(Recurrent).to_empty(device="cpu")
    torch.manual_seed(SEED)
    model.lstm.reset_parameters()
    model.head.reset_parameters()
    assert_equal(pipe, model)


def test_planning_takes_no_memory_and_no_values() -> None:
    pipe = pipe_of(on_meta(MAKE["gpt2"]), example_inputs=batch(0))
    assert pipe.pipeline.plan.num_stages == 2
    assert all(is_away(parameter) for parameter in pipe.parameters())


def test_costs_can_be_measured_with_made_up_values() -> None:
    pipe = pipe_of(on_meta(Two), costs="measure", example_inputs=(floats(),))
    assert "measured" in pipe.pipeline.costs.origin
    assert all(is_away(parameter) for parameter in pipe.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(D, D)), "'first.parametrizations.weight.original0'"),
        (lambda: Bare(False), "no initialiser sets 'first.gain'"),
        (lambda: Bare(True), "buffer 'first.offset' is on the meta device and has no known value"),
        (lambda: Reading(), "module 'first': Reading.reset_parameters(), which initialises it, raised ValueError"),
    ],
)
def test_what_no_initialiser_sets_is_refused_by_name(make: Callable[[], nn.Module], said: str) -> None:
    with refused(said):
        pipe_of(on_meta(lambda: Two(make)))(floats())


class Bare(nn.Module):
    """Has a parameter or a buffer that nothing initialises."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("offset", torch.ones(D), persistent=False)
        else:
            self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.offset if hasattr(self, "offset") else self.gain)


class Reading(Bare):
    """Its initialiser fails."""

    def __init__(self) -> None:
        super().__init__(buffer=False)

    def reset_parameters(self) -> None:
        raise ValueError("not today")


def test_an_initialiser_that_reads_another_modules_parameter_works_where_all_is_kept() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)

        def reset_parameters(self) -> None:
            self.two.weight.copy_(self.one.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    pipe = pipe_of(on_meta(lambda: Two(Copies)))
    pipe(floats())
    assert torch.equal(pipe.first.one.weight, pipe.first.two.weight)


def test_a_model_partly_on_meta_is_refused_without_a_checkpoint() -> None:
    model = on_meta(Two)
    model.second = nn.Linear(D, D)
    with refused("'first.weight' has no value", "'second.weight' has one"):
        pipe_of(model)


def test_a_constant_on_meta_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(D)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with refused("neither a parameter nor a buffer"):
        pipe_of(on_meta(lambda: Two(Constant)))(floats())


@pytest.mark.parametrize(
    "use",
    [
        copy.deepcopy,
        lambda pipe: torch.save(pipe, io.BytesIO()),
        lambda pipe: pipe.state_dict(),
        lambda pipe: pipe.load_state_dict({}),
        lambda pipe: pipe.pipeline.verify(floats()),
    ],
)
def test_values_are_not_used_before_they_are_there(use: Callable[[Any], object]) -> None:
    pipe = pipe_of(on_meta(Two), example_inputs=(floats(),))
    with refused("no values before its first call"):
        use(pipe)
    pipe(floats())
    assert all(tensor.isfinite().all() for tensor in pipe.state_dict().values())


def test_a_model_of_which_one_compilation_failed_is_filled_by_the_next() -> None:
    model = on_meta(Two)
    with pytest.raises(PipecompileError):
        pipe_of(model, example_inputs=(torch.ones(4, D + 1),))
    pipe = pipe_of(model)
    pipe(floats())
    assert all(parameter.isfinite().all() for parameter in pipe.parameters())


def test_a_model_partly_on_meta_is_loaded_over(tmp_path: Path) -> None:
    model, expected = on_meta(Two), Two()
    model.second = nn.Linear(D, D)
    path = saved(state_of(expected), tmp_path)
    assert_equal(pipe_of(model, from_checkpoint=path, example_inputs=(floats(),)), expected)


def test_a_method_that_is_named_as_one_of_transformers_is_not_taken_for_it() -> None:
    class Named(nn.Linear):
        def initialize_weights(self) -> None:
            raise AssertionError

    pipe = pipe_of(on_meta(lambda: Two(lambda: Named(D, D))))
    assert pipe(floats()).isfinite()


# From a checkpoint


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", SOME)
def test_a_checkpoint_is_loaded(tmp_path: Path, name: str, shards: int) -> None:
    expected = initialized(MAKE[name])
    path = saved(state_of(expected), tmp_path, shards)
    pipe = pipe_of(on_meta(MAKE[name]), from_checkpoint=path, example_inputs=batch(0))
    assert_equal(pipe, expected)
    found, known = trained(pipe), trained(pipe_of(expected))
    assert [key for key in known if not torch.equal(found[key], known[key])] == []


def test_a_model_that_has_values_is_overwritten(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = Two()
    path = saved(state_of(expected), tmp_path)
    torch.manual_seed(2)
    assert_equal(pipe_of(Two(), from_checkpoint=path), expected)


def test_the_type_of_the_model_wins(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in Two().state_dict().items()}
    pipe = pipe_of(on_meta(Two), from_checkpoint=saved(state, tmp_path), example_inputs=(floats(),))
    assert {key: tensor.dtype for key, tensor in tensors(pipe).items()} == dict.fromkeys(state, torch.float32)
    assert [key for key in state if not torch.equal(tensors(pipe)[key], state[key].float())] == []


def test_a_tied_weight_may_be_stored_under_any_of_its_names(tmp_path: Path) -> None:
    expected = initialized(MAKE["gpt2"])
    state = state_of(expected)
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    pipe = pipe_of(on_meta(MAKE["gpt2"]), from_checkpoint=saved(state, tmp_path), example_inputs=batch(0))
    assert_equal(pipe, expected)


def test_a_tied_weight_stored_with_two_values_is_refused(tmp_path: Path) -> None:
    state = state_of(initialized(MAKE["gpt2"]))
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with refused("other values under 'lm_head.weight' than under 'transformer.wte.weight'"):
        pipe_of(on_meta(MAKE["gpt2"]), from_checkpoint=saved(state, tmp_path), example_inputs=batch(0))


def test_the_prefix_of_the_base_model_may_be_absent(tmp_path: Path) -> None:
    expected = initialized(MAKE["gpt2"])
    state = {key.removeprefix("transformer."): tensor for key, tensor in state_of(expected).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # old files have it, and the model's class ignores it
    pipe = pipe_of(on_meta(MAKE["gpt2"]), from_checkpoint=saved(state, tmp_path), example_inputs=batch(0))
    assert_equal(pipe, expected)


def test_the_prefix_of_the_base_model_may_be_present(tmp_path: Path) -> None:
    whole = initialized(MAKE["gpt2"])
    pipe = pipe_of(on_meta(lambda: MAKE["gpt2"]().transformer), from_checkpoint=saved(state_of(whole), tmp_path))
    pipe(input_ids=batch(0)["input_ids"])
    assert_equal(pipe, whole.transformer)


def test_what_from_pretrained_saves_is_read(tmp_path: Path) -> None:
    expected = initialized(MAKE["llama"])
    expected.save_pretrained(tmp_path)
    pipe = pipe_of(on_meta(MAKE["llama"]), from_checkpoint=tmp_path, example_inputs=batch(0))
    assert_equal(pipe, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first.bias": None}, ["lacks 'first.bias'", "model.state_dict()"]),
        ({"third": torch.ones(1)}, ["also has 'third'"]),
        ({f"more.{i}": torch.ones(1) for i in range(5)}, ["'more.0', 'more.1', 'more.2' and 2 more"]),
        ({"first.bias": torch.ones(D + 1)}, ["'first.bias' of shape", f"({D + 1},)", f"({D},)"]),
        ({"first.bias": torch.ones(D, dtype=torch.int8)}, ["'first.bias' as I8", "torch.float32"]),
    ],
)
@pytest.mark.parametrize("meta", [True, False])
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], said: list[str], meta: bool
) -> None:
    state = {key: tensor for key, tensor in (Two().state_dict() | change).items() if tensor is not None}
    with refused(*said):
        pipe_of(on_meta(Two) if meta else Two(), from_checkpoint=saved(state, tmp_path))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_text("not a checkpoint")
    with refused("broken.safetensors' cannot be read"):
        pipe_of(on_meta(Two), from_checkpoint=broken)
    with refused("does not exist"):
        pipe_of(on_meta(Two), from_checkpoint=tmp_path / "none")
    pipecompile.save(tmp_path / "saved", Two())
    with refused("is a checkpoint of torch.distributed.checkpoint", "call pipecompile.load() after compile()"):
        pipe_of(on_meta(Two), from_checkpoint=tmp_path / "saved")
    save_file(Two().state_dict(), tmp_path / "other.safetensors")
    with refused("has 2 files *.safetensors"):
        pipe_of(on_meta(Two), from_checkpoint=tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"first.weight": "gone.safetensors"}}')
    with refused("names 'gone.safetensors', which does not exist"):
        pipe_of(on_meta(Two), from_checkpoint=tmp_path)
    index.write_text("[]")
    with refused("is not an index of shards"):
        pipe_of(on_meta(Two), from_checkpoint=tmp_path)


def test_an_argument_on_meta_can_be_planned_but_not_run() -> None:
    with torch.device("meta"):
        x = torch.ones(8, D)
    pipe = pipe_of(on_meta(Two), example_inputs=(x,))
    with pytest.raises(PipecompileError, match="argument 'x' is on the meta device"):
        pipe(x)
