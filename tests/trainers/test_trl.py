"""TRL's trainers on a pipe, beside the unsplit model. Run by ``make trainers``, where TRL is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_facade import both

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["a quick fox", "the lazy dog", "hello", "pipe line", "abc", "some text"] * 4
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
ROWS: dict[str, Any] = {
    "text": [{"text": text} for text in TEXTS],
    "completions": [{"prompt": text[:2], "completion": text[2:]} for text in TEXTS],
    "preferences": [{"prompt": t[:2], "chosen": t[2:], "rejected": t[::-1][:4]} for t in TEXTS],
    "prompts": [{"prompt": text} for text in TEXTS],
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SFT": ("SFT", "text", {}),
    "SFT, accumulated": ("SFT", "text", {"gradient_accumulation_steps": 2}),
    "SFT of completions": ("SFT", "completions", {"completion_only_loss": True}),
    "SFT, packed": ("SFT", "text", {"packing": True, "max_length": 16}),
    "SFT without padding": ("SFT", "text", {"padding_free": True, "max_length": None}),
    "SFT in bfloat16, checkpointed": ("SFT", "text", {"bf16": True, "gradient_checkpointing": True}),
    "DPO": ("DPO", "preferences", {}),
    "DPO with LoRA": ("DPO", "preferences", {}),
    "GRPO": ("GRPO", "prompts", {"num_generations": 2, "max_completion_length": 6}),
}


def tokenizer() -> Any:
    letters = tokenizers.models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(letters)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") + len(text) / 10 for text in completions]


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_of_trl_trains_a_pipe_as_the_model(case: str, tmp_path: Path) -> None:
    kind, rows, options = CASES[case]
    logs = []
    pipe, model, _ = both("llama")
    for module in (pipe.float(), model.float()):
        more: dict[str, Any] = {"reward_funcs": reward} if kind == "GRPO" else {}
        if kind == "DPO":
            more = {"ref_model": both("llama")[1].float()}
        if "LoRA" in case:
            more = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
        common = {
            "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
            "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False,
            "gradient_checkpointing": False, "learning_rate": 0.5, "optim": "sgd",
        }  # fmt: skip
        arguments = getattr(trl, f"{kind}Config")(**common | options)
        torch.manual_seed(0)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=module,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(ROWS[rows]),
            processing_class=tokenizer(),
            **more,
        )
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    assert len(logs[1]) == 3
    near = 2e-2 if options.get("bf16") else 2e-4
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=near, abs=near), name
