"""What is predicted of a 1F1B step on two CPU devices, beside what is measured: stage times and balance.

    python benchmarks/predicted.py
    python benchmarks/predicted.py --models nn.Sequential,GPT-2 --layers 12

Each device computes with one thread. Profile and steps are measured in turn; a busy machine disturbs both, so the share
of the machine's CPU seconds that others took meanwhile is printed, where the system tells it (/proc/stat).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpt import Setting, WithLoss, hugging_face, sequential
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile.ir.graph import Cost
from pipecompile.planning.calibration import Times

Model = tuple[nn.Module, dict[str, Tensor]]  # with the arguments of a call
SIDE = 64  # pixels of an image


class Classifier(nn.Module):
    """A model of pictures with its loss."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(images), labels)


def gpt(make: Callable[[Setting], nn.Module]) -> Callable[[Setting], Model]:
    return lambda setting: (make(setting), text(setting))


def text(setting: Setting) -> dict[str, Tensor]:
    return dict(zip(("input_ids", "labels"), setting.tokens(), strict=True))


def pictures(setting: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, SIDE, SIDE, generator=generator)
    return {"images": images, "labels": torch.randint(10, (setting.batch,), generator=generator)}


def bert(setting: Setting) -> Model:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": setting.layers, "hidden_size": setting.width, "intermediate_size": 4 * setting.width}
    heads = max(1, setting.width // 64)
    config = BertConfig(vocab_size=setting.vocabulary, num_attention_heads=heads, **sizes)
    return BertForMaskedLM(config), text(setting)


def llama(setting: Setting) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": setting.layers, "hidden_size": setting.width, "intermediate_size": 3 * setting.width}
    heads = {"num_attention_heads": max(1, setting.width // 64), "num_key_value_heads": max(1, setting.width // 128)}
    return LlamaForCausalLM(LlamaConfig(vocab_size=setting.vocabulary, use_cache=False, **sizes, **heads)), text(
        setting
    )


def t5(setting: Setting) -> Model:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"num_layers": setting.layers // 2, "d_model": setting.width, "d_ff": 4 * setting.width}
    config = T5Config(vocab_size=setting.vocabulary, num_heads=max(1, setting.width // 64), use_cache=False, **sizes)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config), text(setting)


def vit(setting: Setting) -> Model:
    from torchvision.models import VisionTransformer

    body = VisionTransformer(SIDE, 8, setting.layers, max(1, setting.width // 64), setting.width, 4 * setting.width)
    return Classifier(body), pictures(setting)


def resnet(setting: Setting) -> Model:
    from torchvision.models import resnet18

    return Classifier(resnet18(num_classes=10)), pictures(setting)


MODELS: dict[str, Callable[[Setting], Model]] = {
    "nn.Sequential": gpt(lambda setting: WithLoss(sequential(setting))),
    "GPT-2": gpt(hugging_face),
    "BERT": bert,
    "Llama": llama,
    "T5": t5,
    "ViT": vit,
    "ResNet-18": resnet,
}


def main() -> None:
    options = _options()
    setting = Setting(options.layers, options.width, options.vocabulary, options.length, options.batch, 4)
    torch.set_num_threads(1)
    ms = ("forward ms", "predicted", "backward ms", "predicted")
    it = Table("model", "stage", *ms, "measured / predicted", "busiest / mean", "others' CPU")
    for name in options.models.split(","):
        torch.manual_seed(0)
        others = Others()
        times = measured(*MODELS[name](setting), setting.microbatches, options.rounds)
        share = others.share()
        mean = sum(t.measured.seconds for t in times) / len(times)
        balance = max(t.measured.seconds for t in times) / mean
        for stage, t in enumerate(times):
            pairs = (t.measured.forward, t.predicted.forward, t.measured.backward, t.predicted.backward)
            once = (f"{balance:.3f}", "?" if share is None else f"{share:.0%}") if stage == 0 else ("", "")
            it.add_row(
                name if stage == 0 else "", str(stage), *(f"{1e3 * s:.1f}" for s in pairs), f"{t.ratio:.3f}", *once
            )
    Console().print(it)


def measured(model: nn.Module, call: dict[str, Tensor], microbatches: int, rounds: int) -> list[Times]:
    """The times of each stage, the median of the steps' medians."""
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=microbatches, example_inputs=call)
    steps = []
    for _ in range(rounds):
        out: Any = pipe(**call)
        (out if isinstance(out, Tensor) else out.loss).backward()
        pipe.zero_grad(set_to_none=True)
        assert pipe.pipeline.timeline is not None
        steps.append(pipe.pipeline._capture_in_use.times(pipe.pipeline.timeline))
    stages = zip(*steps[1:], strict=True)  # the first step warms up
    return [Times(many[0].predicted, _median([t.measured for t in many])) for many in stages]


def _median(costs: list[Cost]) -> Cost:
    return Cost(median(c.forward for c in costs), median(c.backward for c in costs))


class Others:
    """What other processes take of the machine's CPU seconds from here on."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float | None:
        if self.start is None or (end := self._now()) is None:
            return None
        all_of_it, busy, mine = (b - a for a, b in zip(self.start, end, strict=True))
        return max(0.0, busy - mine) / all_of_it

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """CPU seconds so far: of the machine, of it those in use, and of them this process's."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_second, (sum(ticks) - ticks[3] - ticks[4]) / per_second, time.process_time()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 256), ("vocabulary", 2000), ("length", 128), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--models", default=",".join(MODELS), help="some of the default, with commas")
    return parser.parse_args()


if __name__ == "__main__":
    main()
