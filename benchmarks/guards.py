"""What it costs on each call to see that nothing has changed since a model was captured.

    python benchmarks/guards.py
    python benchmarks/guards.py --models gpt2,t5

Models of real depth and little width, two stages on CPU devices. ``look`` is whether anything on the model's modules is
another than at the call before (hooks, modes, attributes, tensors), ``facts`` whether what the capture has read holds
(globals, classes, code), ``arguments`` what the call's own arguments are compared for, sizes included. Microseconds,
the least median of twenty rounds of thirty calls; the share is that of ``look`` and ``facts`` in a step of 20 ms.
``after a change`` is a call after a hook has come and gone: everything is looked at closely.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

import pipecompile
from pipecompile.batching import Rows

sys.path.insert(0, str(Path(__file__).parent))
from unet import UNet

STEP = 20_000  # microseconds
LIMIT = 20, 1  # microseconds, and for each module
VOCABULARY = 128

Made = tuple[nn.Module, dict[str, Any]]


def gpt2() -> Made:
    config = transformers.GPT2Config(
        n_embd=48, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config), _ids()


def llama() -> Made:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=32,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config), _ids()


def t5() -> Made:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=12, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), _ids()


def unet() -> Made:
    images = torch.randn(4, 3, 16, 16)
    return UNet(width=16), {"images": images, "noise": images}


def resnet50() -> Made:
    import torchvision

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision.models.resnet50(width_per_group=4, num_classes=10)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.net(image).square().mean()

    return WithLoss(), {"image": torch.randn(4, 3, 32, 32)}


MODELS: dict[str, Callable[[], Made]] = {"gpt2": gpt2, "llama": llama, "t5": t5, "unet": unet, "resnet50": resnet50}


def _ids() -> dict[str, Any]:
    ids = torch.randint(VOCABULARY, (4, 16))
    return {"input_ids": ids, "labels": ids}


def microseconds(run: Callable[[], Any], rounds: int = 20, times: int = 30) -> float:
    """The least of the rounds' medians: other work on the machine only adds."""
    medians = []
    for _ in range(rounds):
        taken = []
        for _ in range(times):
            start = perf_counter()
            run()
            taken.append(perf_counter() - start)
        medians.append(statistics.median(taken))
    return min(medians) * 1e6


def measured(make: Callable[[], Made]) -> tuple[int, float, float, float, float]:
    """Modules, and the microseconds of each part."""
    torch.manual_seed(0)
    model, inputs = make()
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=1, costs="count")
    pipe.pipeline.prepare(**inputs)
    batches = pipe.pipeline._batches
    states, batch = batches.states, batches.of((), inputs)
    attributes, rows = batch.compiled.captured.attributes, Rows.of(batch.call.batch, 1)
    modules = len(list(model.modules()))
    look = microseconds(lambda: states.look(model))
    facts = microseconds(lambda: attributes.changed(states.number))
    both = microseconds(lambda: batch.compiled.broken(batch.call, rows, states.number))

    def after_a_change() -> None:
        model.register_forward_hook(print).remove()
        model.counted = states.number  # type: ignore[assignment]
        attributes.changed(states.number if states.look(model) else -1)

    return modules, look, facts, both - facts, microseconds(after_a_change, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    torch.set_num_threads(1)
    table = Table("model", "modules", "look", "facts", "allowed", "of a step", "arguments", "after a change")
    for name in parser.parse_args().models.split(","):
        modules, look, facts, rest, closely = measured(MODELS[name])
        allowed = LIMIT[0] + LIMIT[1] * modules
        table.add_row(
            name,
            str(modules),
            f"{look:.0f} us",
            f"{facts:.0f} us",
            f"{allowed} us",
            f"{(look + facts) / STEP:.2%}",
            f"{rest:.0f} us",
            f"{closely / 1000:.1f} ms",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
