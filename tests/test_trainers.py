"""Tools that train, on a pipe as on its model: transformers' Trainer, PEFT."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from long import some
from oracle import assert_same, step
from test_facade import MODELS, assert_equal, both, loss_of, trained, words
from torch import Tensor, nn

import pipecompile

IDS = torch.randint(3, 32, (32, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
LORA: dict[str, Any] = {
    "gpt2": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "llama": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "custom": {"r": 2, "target_modules": ["model", "memory"]},
}


def trainer(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, logging_steps=1, save_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
        dataloader_pin_memory=False, **{"max_steps": 4} | options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:8])


def losses(made: transformers.Trainer) -> list[float]:
    """Of each step, then of an evaluation."""
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line] + [made.evaluate()["eval_loss"]]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "the best model at the end": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), some(product(["gpt2", "llama"], OPTIONS), 3))
def test_transformers_trainer_takes_a_pipe_for_the_model(name: str, options: str, tmp_path: Path) -> None:
    pipe, model, _ = both(name)
    made = {module: trainer(module, tmp_path / str(i), **OPTIONS[options]) for i, module in enumerate((pipe, model))}
    ours, theirs = (losses(made[module]) for module in (pipe, model))
    assert len(theirs) == 5
    assert ours == pytest.approx(theirs, rel=1e-5)  # the trainer adds up in single precision
    assert_equal(dict(pipe.state_dict()), dict(model.state_dict()))
    made[pipe].save_model(str(tmp_path / "kept"))
    again = type(model).from_pretrained(tmp_path / "kept").double()
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    pipe, model, _ = both("gpt2")
    trainer(pipe, tmp_path).train()
    again, _, _ = both("gpt2")
    resumed = trainer(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    trainer(model, tmp_path / "other").train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_in_bfloat16_with_checkpoints_streams_predicts_and_goes_on(tmp_path: Path) -> None:
    pipe, model, _ = both("llama")
    options = {"bf16": True, "gradient_checkpointing": True, "optim": "sgd"}
    seen = []
    for number, module in enumerate((pipe.float(), model.float())):
        made = trainer(module, tmp_path / str(number), **options)
        made.train_dataset = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
        found = losses(made)
        again = trainer(module, tmp_path / str(number), **options | {"max_steps": 6})
        again.train(resume_from_checkpoint=True)
        found += [line["loss"] for line in again.state.log_history if "loss" in line]
        seen.append([torch.tensor(found), torch.tensor(again.predict(ROWS[:5]).predictions)])
    for ours, theirs in zip(*seen, strict=True):
        assert theirs.numel() >= 11
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


# PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_a_pipe_is_lora_on_the_model(name: str) -> None:
    pipe, model, call = both(name)
    step(pipe, pipe, loss_of, call)
    seen = []
    for module in (pipe, model):
        torch.manual_seed(1)
        tuned = peft.get_peft_model(module, peft.LoraConfig(**LORA[name])).double()
        seen.append({n: p.requires_grad for n, p in tuned.named_parameters()})
        trained(tuned, call)
        seen.append(dict(tuned.state_dict()))
    assert seen[0] == seen[2]
    assert not all(seen[0].values())
    assert_equal(seen[1], seen[3])


@pytest.mark.filterwarnings("ignore")
def test_a_pipe_of_a_model_with_lora() -> None:
    _, model, _ = both("llama")
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**LORA["llama"])).double()
    pipe = pipecompile.compile(copy.deepcopy(tuned), ["cpu", "cpu"], microbatches=2, costs="count")
    assert isinstance(pipe, peft.PeftModel)
    assert pipe.active_adapter == "default"
    call = words()
    assert_same(step(pipe, pipe, loss_of, call), step(tuned, tuned, loss_of, call))
    assert_equal(trained(pipe, call), trained(tuned, call))
    assert list(peft.get_peft_model_state_dict(pipe)) == list(peft.get_peft_model_state_dict(tuned))


def frozen_but(module: nn.Module, words: str) -> dict[str, Tensor]:
    for path, parameter in module.named_parameters():
        parameter.requires_grad_(words in path)
    return {path: p for path, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_freezing_by_path(name: str) -> None:
    pipe, model, call = both(name)
    step(pipe, pipe, loss_of, call)
    last = "memory" if name == "custom" else "mlp"
    assert list(frozen_but(pipe, last)) == list(frozen_but(model, last)) != []
    assert_same(step(pipe, pipe, loss_of, call), step(model, model, loss_of, call))
