"""The Python that README and docs show runs, and prints what they say it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import pipecompile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n((?:.*\n)*?)```\n(?:\n((?:    .*\n)+))?", re.MULTILINE)
OF_THE_MACHINE = re.compile(r"bottleneck|on rank \d")  # a plan from measured costs


class Block(NamedTuple):
    name: str
    source: str
    printed: str  # what the page shows below it; empty if nothing


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text()), 1):
            source, printed = match.groups(default="")
            found.append(
                Block(
                    f"{page.relative_to(ROOT).as_posix().removeprefix('docs/')} {number}",
                    source,
                    re.sub(r"^    ", "", printed, flags=re.MULTILINE),
                )
            )
    return found


BLOCKS = blocks()


def names_of_a_script() -> dict[str, Any]:
    """What a block that is an excerpt of a script takes for granted."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(32, (8, 6))
    batch = {"input_ids": ids, "labels": ids}
    return {
        "torch": torch,
        "transformers": transformers,
        "peft": peft,
        "get_model_state_dict": get_model_state_dict,
        "pipecompile": pipecompile,
        "model": model,
        "ids": ids,
        "labels": ids,
        "batch": batch,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "pipe": pipecompile.compile(model, devices=["cpu", "cpu"], microbatches=2, costs="count"),
        "weights": {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()},
        "arguments": transformers.TrainingArguments(output_dir="unused", report_to=[], use_cpu=True),
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "writer": Writer(),
    }


class Writer:
    """Takes what TensorBoard's ``SummaryWriter`` takes."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert isinstance(value, float)

    def add_scalars(self, tag: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            assert re.fullmatch(r"\w+", name)
            self.add_scalar(f"{tag}/{name}", value, step)


def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that a page names by number are CPU devices."""
    compiled = pipecompile.compile

    def here(model: Any, devices: Any, **options: Any) -> Any:
        return compiled(model, ["cpu" if isinstance(d, int) else d for d in devices], **options)

    monkeypatch.setattr(pipecompile, "compile", here)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5
    assert sum(bool(block.printed) for block in BLOCKS) >= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_a_block_runs_and_prints_what_the_page_says(
    block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    on_cpus(monkeypatch)
    whole = "import torch" in block.source
    scope = {"__name__": "page"} if whole else names_of_a_script()
    (tmp_path / "page.py").write_text(block.source)
    capsys.readouterr()
    exec(compile(block.source, str(tmp_path / "page.py"), "exec"), scope)
    if block.printed:
        assert settled(capsys.readouterr().out) == settled(block.printed)


def settled(text: str) -> list[str]:
    """Lines without what another machine or folder changes; numbers with six digits, instructions in any order."""
    lines = [line.rstrip() for line in text.strip().splitlines() if not OF_THE_MACHINE.search(line)]
    lines = [" ".join(sorted(line.split())) if re.match(r"\d+: \d", line) else line for line in lines]
    lines = [re.sub(r"(\S*/)?\w+\.py:\d+", "page.py", line) for line in lines]
    return [re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.6g}", line) for line in lines]


def test_only_what_a_machine_changes_is_left_out() -> None:
    assert settled("loss 1.2345678") == settled("loss 1.2345679") != settled("loss 1.2346")
    assert settled("a\n  bottleneck 1 s") == ["a"]
