"""What the first call of a pipeline waits for, in seconds and in eager steps, with two stages on the CPU.

    python benchmarks/first_call.py --json out/first_call.json
    python benchmarks/first_call.py --models GPT-2 --again         # and once more in another process
    python benchmarks/first_call.py --zoo 'gpt|bert|resnet'        # models of tests/zoo, by a pattern

Every row is a process of its own, with one thread per operation. The phases are those of ``report.timing``. An eager
step is a forward and a backward of the unsplit model, the median of three after a warm-up. "CPU" is what the processor
was used for, by all threads: on a busy machine, the figure to compare. The cache of costs and plans is off, or, with
``--again``, an empty folder that the second process finds filled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

TEXT = {"vocab_size": 1000}
Built = tuple[Any, tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]


def gpt2() -> Built:
    import transformers

    config = transformers.GPT2Config(n_layer=12, n_embd=256, n_head=4, n_positions=128, use_cache=False, **TEXT)
    return transformers.GPT2LMHeadModel(config), (), _labelled(8, 128), lambda out: out.loss


def llama() -> Built:
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=24, hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=4,
        use_cache=False, **TEXT,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), (), _labelled(8, 128), lambda out: out.loss


def t5() -> Built:
    import transformers

    config = transformers.T5Config(
        num_layers=4, num_decoder_layers=4, d_model=256, d_ff=1024, d_kv=64, num_heads=4, use_cache=False,
        decoder_start_token_id=0, **TEXT,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), (), _labelled(8, 128), lambda out: out.loss


MODELS: dict[str, Callable[[], Built]] = {"GPT-2": gpt2, "Llama": llama, "T5": t5}


def _labelled(rows: int, length: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(2, TEXT["vocab_size"], (rows, length))
    return {"input_ids": ids, "labels": ids}


def _of_the_zoo(name: str) -> Built:
    from zoo import ROWS, ZOO

    entry = ZOO[name]
    args, kwargs = entry.inputs(ROWS[0], entry.lengths[0])
    return entry.build(), args, kwargs, entry.loss


def measure(name: str) -> dict[str, Any]:
    """The first call of a model, measured in this process."""
    import torch

    import pipecompile

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, args, kwargs, loss_of = (MODELS[name] if name in MODELS else lambda: _of_the_zoo(name))()
    model.train()
    eager, eager_cpu = [], []
    for _ in range(4):
        begin, used = time.perf_counter(), time.process_time()
        loss_of(model(*args, **kwargs)).backward()
        eager.append(time.perf_counter() - begin)
        eager_cpu.append(time.process_time() - used)
        model.zero_grad()
    pipe = pipecompile.compile(model, devices=["cpu", "cpu"])
    begin, used = time.perf_counter(), time.process_time()
    loss_of(pipe(*args, **kwargs)).backward()
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    report = pipe.pipeline.report
    return {
        "model": name, "seconds": seconds, "cpu": used, "eager": median(eager[1:]),
        "eager_cpu": median(eager_cpu[1:]), "costs": report.costs,
        "phases": report.timing.by_phase(), "captures": pipe.pipeline.captures,
        "nodes": len(pipe.pipeline.costs.graph), "torch": torch.__version__,
    }  # fmt: skip


def in_a_process(name: str, cache: str) -> dict[str, Any]:
    """The same in a process of its own; an error in words if it fails."""
    environment = {**os.environ, "PIPECOMPILE_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"model": name, "error": ended.stderr.strip().rpartition("\n")[2]}
    found: dict[str, Any] = json.loads(ended.stdout.strip().rpartition("\n")[2])
    return found


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    from rich.console import Console
    from rich.table import Table

    names = options.models.split(",")
    if options.zoo:
        from zoo import ZOO

        names = [name for name in ZOO if re.search(options.zoo, name)]
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            cache = folder if options.again else "off"
            rows += [{**in_a_process(name, cache), "again": number > 0} for number in range(1 + options.again)]
    worked = [row for row in rows if "error" not in row]
    phases = list(worked[0]["phases"]) if worked else []
    table = Table("model", "first call", "eager steps", "CPU", "eager CPU steps", *phases)
    for row in rows:
        table.add_row(*_cells(row, phases))
    console = Console(width=160)
    console.print(table)
    for again in (False, True)[: 1 + options.again]:
        these = sorted(row["seconds"] for row in worked if row["again"] == again)
        if len(these) > 3:
            tenth = these[min(len(these) - 1, round(0.9 * len(these)))]
            said = "again" if again else "first"
            console.print(f"{said}: median {median(these):.2f} s, p90 {tenth:.2f} s, slowest {these[-1]:.2f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


def _cells(row: Mapping[str, Any], phases: list[str]) -> list[str]:
    name = f"{row['model']}{', again' * row['again']}"
    if "error" in row:
        return [name, row["error"]]
    seconds = [f"{row['phases'][phase]:.2f}" for phase in phases]
    taken = [f"{row['seconds']:.2f} s", f"{row['seconds'] / row['eager']:.1f}"]
    used = [f"{row['cpu']:.2f} s", f"{row['cpu'] / row['eager_cpu']:.1f}"]
    return [name, *taken, *used, *seconds]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--zoo", default="", help="instead: models of tests/zoo whose names match this pattern")
    parser.add_argument("--again", action="store_true", help="once more in another process, from the cache")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
