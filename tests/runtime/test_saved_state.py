"""What is saved of a pipeline loads into any number of stages and into the unsplit model, bit for bit, and back."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from pairs import pipe_of
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import VOCABULARY, D, blocks

SHAPES = [0, 1, 2, 3, 4]  # numbers of stages; 0: the unsplit model


class Language(nn.Module):
    """A tied weight, a frozen one, a buffer that the forward writes and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, D)
        self.body = blocks(4)
        self.head = nn.Linear(D, VOCABULARY)
        self.head.weight = self.words.weight
        self.frozen = nn.Parameter(torch.rand(D), requires_grad=False)
        self.register_buffer("mean", torch.rand(D))
        self.register_buffer("scale", torch.full((D,), 2.0), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.body[:2](self.words(ids) * self.scale + self.frozen)
        self.mean.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
        return F.cross_entropy(self.head(self.body[2:](h)).flatten(0, 1), labels.flatten())


def text(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (2, 4, 6), generator=generator))


def shaped(stages: int, seed: int = 0) -> nn.Module:
    """A model of its own seed, in so many stages."""
    torch.manual_seed(seed)
    model = Language().double()
    return pipe_of(model, stages) if stages else model


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)


def trained(stages: int, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = shaped(stages)
    optimizer = optimizer_of(module)
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        module(*text(seed)).backward()
        optimizer.step()


def assert_same_state(actual: Any, expected: Any, where: str = "") -> None:
    """Two trees of states, bit for bit."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same_state(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=where)
    else:
        assert actual == expected, where


@pytest.mark.parametrize(("source", "target"), [*permutations(SHAPES, 2)])
def test_a_state_goes_from_any_number_of_stages_to_any_other(source: int, target: int, tmp_path: Path) -> None:
    module, optimizer = trained(source)
    other = shaped(target, seed=1)
    other_optimizer = optimizer_of(other)
    advance(other, other_optimizer)  # it is captured, and has a state of its own
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert str(other.load_state_dict(loaded["model"], strict=True)) == "<All keys matched successfully>"
    other_optimizer.load_state_dict(loaded["optimizer"])
    assert_same_state(dict(other.state_dict()), dict(module.state_dict()))
    assert_same_state(other_optimizer.state_dict(), optimizer.state_dict())
    assert "scale" not in loaded["model"]
    assert torch.equal(other.scale, torch.full((D,), 2.0).double())
    assert other.head.weight is other.words.weight
    for each in ((module, optimizer), (other, other_optimizer)):
        advance(*each)
    for (name, value), same in zip(other.state_dict().items(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(value, same, msg=name)


@pytest.mark.parametrize("stages", SHAPES)
def test_a_state_that_is_assigned_is_what_the_next_step_uses(stages: int) -> None:
    source, _ = trained(0)
    expected, module = shaped(0, seed=1), shaped(stages, seed=1)
    module(*text())
    losses = []
    for each in (expected, module):
        state = {name: value.clone() for name, value in source.state_dict().items()}
        each.load_state_dict(state, assign=True)
        assert each.words.weight.data_ptr() == state["words.weight"].data_ptr()
        assert each.frozen.requires_grad is False
        advance(each, optimizer_of(each))
        losses.append(each(*text(5)))
    torch.testing.assert_close(*losses)
    for (name, value), same in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, same, msg=name)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loaded_between_a_call_and_its_backward_is_not_mixed_in(assign: bool) -> None:
    module, state = shaped(2), {name: value * 2 for name, value in shaped(0).state_dict().items()}
    expected = shaped(0)
    expected(*text()).backward()
    old = dict(module.named_parameters())
    loss = module(*text())
    module.load_state_dict(state, assign=assign)
    loss.backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(old[name].grad, parameter.grad, msg=name)


@pytest.mark.parametrize("stages", SHAPES)
def test_safetensors_files_go_both_ways(stages: int, tmp_path: Path) -> None:
    module, _ = trained(stages)
    save_model(module, str(tmp_path / "model.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == set(module.state_dict()) - {"words.weight"}
    for target in SHAPES:
        other = shaped(target, seed=1)
        assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
        assert_same_state(dict(other.state_dict()), dict(module.state_dict()))
        assert other.head.weight is other.words.weight


def test_transformers_saves_and_loads_the_model_of_a_pipeline(tmp_path: Path) -> None:
    gpt2 = MODELS["gpt2"]
    pipe, (_, kwargs) = pipe_of(gpt2.build(), 3), gpt2.inputs(4, 6)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    pipe(**kwargs).loss.backward()
    optimizer.step()
    pipe.save_pretrained(tmp_path)
    other = type(pipe.pipeline.model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_state(dict(other.state_dict()), dict(pipe.state_dict()))


def test_a_state_of_other_keys_or_shapes_is_refused_in_torchs_words() -> None:
    module = shaped(2)
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        module.load_state_dict({**state, "more": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for mean"):
        module.load_state_dict({**state, "mean": torch.ones(D + 1)})
    del state["head.bias"]
    assert module.load_state_dict(state, strict=False).missing_keys == ["head.bias"]
