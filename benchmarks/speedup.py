"""Two stages against one device that runs the whole batch at once: eight models, on two CPU devices.

    python benchmarks/speedup.py --models gpt2 resnet50 --rounds 15

    unsplit      the batch at once, on one thread
    default      pipecompile with the number of microbatches and the schedule that it finds
    best         the best of the numbers and schedules that were tried by hand (``--numbers``, ``--schedules``)
    ideal        the simulated step of the default, with the stage times that its own steps have measured

All ways of a model run in turn in every round. Medians are shown, and the ratios of medians.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from step_time import Way, environment, take_turns, whole
from torch import Tensor, nn
from unet import UNet

import pipecompile
from pipecompile.planning.calibration import corrected

ROWS = 16
Case = tuple[nn.Module, dict[str, Tensor]]
console = Console(width=140)


class WithLoss(nn.Module):
    """A model of scores or pictures with its loss inside."""

    def __init__(self, body: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.body(x), y)


def words(vocabulary: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (ROWS, length))
    return {"input_ids": ids, "labels": ids}


def gpt2() -> Case:
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=12, n_embd=256, n_head=4, vocab_size=8192, n_positions=128, **off)
    return transformers.GPT2LMHeadModel(config), words(8192, 128)


def llama() -> Case:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=8192, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), words(8192, 128)


def bert() -> Case:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4, vocab_size=8192, **off
    )
    return transformers.BertForMaskedLM(config), words(8192, 128)


def t5() -> Case:
    config = transformers.T5Config(
        d_model=256,
        d_ff=1024,
        d_kv=64,
        num_heads=4,
        num_layers=6,
        vocab_size=8192,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), words(8192, 64)


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4, image_size=112,
        patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=100,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(ROWS, 3, 112, 112), "labels": torch.randint(100, (ROWS,))}


def unet() -> Case:
    return UNet(width=32), {"images": torch.randn(ROWS, 3, 64, 64), "noise": torch.randn(ROWS, 3, 64, 64)}


def resnet50() -> Case:
    import torchvision

    model = torchvision.models.resnet50(num_classes=100)
    inputs = {"x": torch.randn(ROWS, 3, 96, 96), "y": torch.randint(100, (ROWS,))}
    return WithLoss(model, nn.functional.cross_entropy), inputs


def mixtral() -> Case:
    config = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=4, vocab_size=8192, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), words(8192, 64)


MODELS = {f.__name__: f for f in (gpt2, llama, bert, t5, vit, unet, resnet50, mixtral)}


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    console.print(environment(), "")
    table = Table("model", "default", "unsplit, s", "default, s", "speed", "best", "best speed", "ideal", "of ideal")
    for name in options.models:
        table.add_row(name, *compare(name, options))
        gc.collect()
    console.print(table)


def compare(name: str, options: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()

    def piped(schedule: str | None = None, microbatches: int | None = None) -> Any:
        options = {"schedule": schedule, "microbatches": microbatches, "verify": "never"}
        return pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], **options)

    default = piped()
    for _ in range(options.settle):  # the first steps may move the cut
        loss_of(default(**inputs)).backward()
    found = default.pipeline.schedule, default.pipeline.microbatches
    tried = [pair for pair in product(options.schedules, options.numbers) if pair != found]
    others = {pair: piped(*pair) for pair in tried}
    ways = [Way("unsplit", whole(model, loss_of, inputs)), Way("default", whole(default, loss_of, inputs))]
    ways += [Way(_name(pair), whole(pipe, loss_of, inputs)) for pair, pipe in others.items()]
    for pipe in others.values():
        for _ in range(options.settle):
            loss_of(pipe(**inputs)).backward()
    take_turns(name, ways, options.rounds, lambda: None)
    unsplit, ours = ways[0].median, ways[1].median
    steps = {_name(found): ours, **{way.name: way.median for way in ways[2:]}}
    best = min(steps, key=lambda way: steps[way])
    ideal = _ideal(default, inputs)
    console.print(f"{name}: " + ", ".join(f"{way} {unsplit / s:.2f}" for way, s in sorted(steps.items())))
    console.print(*default.pipeline.report.schedule, sep="\n")
    console.print(*default.pipeline.report.microbatches[:1], *default.pipeline.report.learned, sep="\n")
    return [
        _name(found), f"{unsplit:.3f}", f"{ours:.3f}", f"{unsplit / ours:.2f}", best, f"{unsplit / steps[best]:.2f}",
        f"{ideal:.3f}", f"{ideal / ours:.2f}",
    ]  # fmt: skip


def _name(found: tuple[str, int]) -> str:
    schedule, microbatches = found
    return f"{schedule}, {microbatches}"


def _ideal(pipe: Any, inputs: dict[str, Tensor]) -> float:
    """The simulated step with the median measured times of each stage over five steps."""
    compiled, seconds = pipe.pipeline._capture_in_use, []
    for _ in range(5):
        loss_of(pipe(**inputs)).backward()
        times = compiled.times(pipe.pipeline.timeline)
        costed = corrected(compiled.planned.costed, compiled.plan, times)
        seconds.append(compiled.planned.work.step_seconds(costed, compiled.plan, compiled.planned.cluster))
    return median(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--numbers", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--schedules", nargs="*", default=["1f1b", "zb-h1"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settle", type=int, default=9, help="steps before the first round, which may move the cut")
    return parser.parse_args()


if __name__ == "__main__":
    main()
