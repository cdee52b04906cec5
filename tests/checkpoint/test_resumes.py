"""A training that is saved and loaded goes on as if nothing had happened, on any number of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resumed import WAYS, Net, batch, begun, on
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import pipecompile


@pytest.mark.parametrize("way", WAYS)
def test_a_training_goes_on_bit_for_bit(tmp_path: Path, way: str) -> None:
    straight = begun(way, **on(2)).run(3)
    straight.save(tmp_path / "step_3")
    straight.run(3)
    resumed = begun(way, seed=1, **on(2)).load(tmp_path / "step_3").run(3)
    assert resumed.losses == {step: straight.losses[step] for step in (3, 4, 5)}
    found = resumed.weights
    assert len(found) == 20
    assert [name for name, value in straight.weights.items() if not torch.equal(found[name], value)] == []
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in t.optimizer.param_groups] for t in (straight, resumed)
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 4), (1, 3)])
def test_another_number_of_stages_goes_on_bit_for_bit(tmp_path: Path, saved: int, loaded: int) -> None:
    straight = begun(**on(saved)).run(3)
    straight.save(tmp_path / "step_3")
    weights = straight.weights
    straight.run(3)
    resumed = begun(seed=1, **on(loaded)).load(tmp_path / "step_3")
    found = resumed.weights
    assert [name for name, value in weights.items() if not torch.equal(found[name], value)] == []
    assert resumed.run(3).losses == {step: straight.losses[step] for step in (3, 4, 5)}


@pytest.mark.parametrize(("saved", "loaded"), [(0, 3), (3, 0)])
def test_a_model_that_is_not_split_goes_on_to_rounding(tmp_path: Path, saved: int, loaded: int) -> None:
    """Its batch normalization sees the whole batch, so one microbatch; its dropout draws other numbers, so none."""
    one = {"microbatches": 1}

    def training(stages: int, seed: int) -> object:
        return begun("foreach", seed=seed, model=undropped(seed), **(on(stages) | one if stages else {}))

    straight = training(saved, 0).run(3)
    straight.save(tmp_path / "step_3")
    straight.run(3)
    resumed = training(loaded, 1).load(tmp_path / "step_3").run(3)
    torch.testing.assert_close(list(resumed.losses.values()), [straight.losses[step] for step in (3, 4, 5)])
    torch.testing.assert_close(resumed.weights, straight.weights)


def undropped(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = Net().double()
    drop = torch.nn.functional.dropout

    def forward(ids: torch.Tensor) -> torch.Tensor:
        h = net.words(ids) * net.frozen * net.unsaved
        for layer in net.layers:
            h = drop(torch.tanh(layer(h)), 0.0)
        return nn.functional.cross_entropy(net.head(net.norm(h)), ids)

    net.forward = forward
    return net


def test_a_model_that_is_not_split_goes_on_with_its_own_dropout(tmp_path: Path) -> None:
    straight = begun().run(3)
    straight.save(tmp_path / "step_3")
    straight.run(3)
    resumed = begun(seed=1).load(tmp_path / "step_3").run(3)
    assert resumed.losses == {step: straight.losses[step] for step in (3, 4, 5)}


def test_a_state_before_the_first_step(tmp_path: Path) -> None:
    straight = begun(**on(2))
    straight.save(tmp_path / "step_0")
    straight.run(2)
    resumed = begun(seed=1, **on(4)).run(1).load(tmp_path / "step_0")
    assert not any(resumed.optimizer.state.values())
    assert resumed.step == 0
    assert resumed.run(2).losses == straight.losses


def test_gradients_that_were_accumulated_are_kept(tmp_path: Path) -> None:
    one, two = begun(**on(2)).run(1), begun(seed=1, **on(2)).run(1)
    one.pipe(batch(7)).backward()
    one.save(tmp_path / "step_1")
    for each in (one, two):
        if each is two:
            two.load(tmp_path / "step_1")
        each.pipe(batch(8)).backward()
        each.optimizer.step()
    found = two.weights
    assert [name for name, value in one.weights.items() if not torch.equal(found[name], value)] == []


def test_the_stages_own_optimizers_go_on(tmp_path: Path) -> None:
    def pipe(seed: int) -> object:
        torch.manual_seed(seed)
        place = {"schedule": "pipedream", "optimizer": lambda ps: torch.optim.AdamW(ps, 1e-2), **on(2)}
        model = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.1), nn.Tanh()) for _ in range(4)))
        options = {"microbatches": 4, "costs": "count", "loss_fn": nn.functional.mse_loss, "verify": "never"}
        return pipecompile.compile(model, **place, **options, example_inputs=((x(0),), {"target": x(0)}))

    def x(step: int) -> torch.Tensor:
        return torch.randn(8, 10, generator=torch.Generator().manual_seed(step))

    def run(pipe: object, steps: range) -> list[float]:
        losses = [pipe(x(step), target=x(step)).item() for step in steps]
        pipe.pipeline.flush()
        return losses

    straight = pipe(0)
    run(straight, range(3))
    straight(x(3), target=x(3))
    with pytest.raises(pipecompile.InputError, match="cannot be saved while microbatches are in flight"):
        pipecompile.save(tmp_path / "step_3", straight)
    straight.pipeline.flush()
    pipecompile.save(tmp_path / "step_4", straight)
    expected = run(straight, range(4, 7))
    resumed = pipe(1)
    pipecompile.load(tmp_path / "step_4", resumed)
    assert run(resumed, range(4, 7)) == expected
    found = resumed.state_dict()
    assert [name for name, value in straight.state_dict().items() if not torch.equal(found[name], value)] == []
    with pytest.raises(pipecompile.InputError, match="leave out optimizer="):
        pipecompile.save(tmp_path / "step_5", straight, torch.optim.SGD(straight.parameters(), 0.1))


def test_the_files_are_those_of_torch_with_the_names_of_the_model(tmp_path: Path) -> None:
    training = begun("foreach", **on(4)).run(2)
    training.save(tmp_path / "step_2")
    dcp_to_torch_save(tmp_path / "step_2", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    own = training.weights
    once = {name for name in own if name != "head.weight"}  # tied to words.weight
    of_model = {key.removeprefix("model."): value for key, value in found.items() if key.startswith("model.")}
    assert of_model.keys() == once
    assert all(torch.equal(value, own[name]) for name, value in of_model.items())
    trained = {id(p): name for name, p in training.pipe.named_parameters() if p.requires_grad}
    state = {
        f"optimizer.{trained[id(p)]}.{key}": value
        for p, values in training.optimizer.state.items()
        for key, value in values.items()
    }
    assert len(state) == 3 * len(trained)
    assert {key for key in found if not key.startswith("model.")} == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_weights_alone(tmp_path: Path) -> None:
    training = begun(**on(2)).run(1)
    training.save(tmp_path / "all")
    pipecompile.save(tmp_path / "weights", training.pipe)
    for folder in ("all", "weights"):
        torch.manual_seed(5)
        other, before = Net(), torch.get_rng_state()
        assert pipecompile.load(tmp_path / folder, other) == ({"step": 1} if folder == "all" else {})
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in training.weights.items())
