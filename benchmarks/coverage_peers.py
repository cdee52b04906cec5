"""Which models of the zoo torch.export and torch's pipeline() get right, beside pipecompile: one table from one run.

    python benchmarks/coverage_peers.py --jobs 2 --json out/coverage_peers.json

Every way captures the model in training mode on one batch, with the loss inside where the model has one, and is then
asked for the loss and every gradient of a batch of the same sizes with other values, and of a batch of other sizes.

    export            torch.export.export(strict=False), all sizes fixed, as they are by default
    export, dynamic   the same with Dim.AUTO for every size
    export, strict    the same as the first with strict=True
    pipeline()        torch.distributed.pipelining.pipeline, cut at the middle of the longest list of layers. What
                      it gives is run as one graph, and gradients of a weight that it has copied into both halves are
                      added up: kinder than its runtime, which refuses most of these models (no labels, no skips)
    pipecompile       compile(devices=["cpu", "cpu"], microbatches=1)
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the zoo is among the tests

from oracle import Run, preserved
from zoo import ROWS, ZOO, Entry
from zoo.check import TOLERANCE, difference, missing
from zoo.forked import Found, run_each

import pipecompile

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Gradients = dict[str, Tensor | None]
Call = Callable[..., Any]
Modules = Sequence[nn.Module]
COLUMNS = ("captured", "loss", "gradients", "other sizes")


class Export:
    """A way by torch.export."""

    def __init__(self, strict: bool, dynamic: bool = False) -> None:
        self.strict = strict
        self.dynamic = dynamic

    def capture(self, model: nn.Module, inputs: Inputs) -> tuple[Call, Modules]:
        args, kwargs = inputs
        shapes = _all_dynamic(model, inputs) if self.dynamic else None
        exported = torch.export.export(model, args, kwargs, strict=self.strict, dynamic_shapes=shapes).module()
        return exported, [exported]


def _all_dynamic(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Every dimension of every tensor as torch.export decides, by the names of arguments."""
    from torch.export import Dim

    args, kwargs = inputs
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {
        name: pytree.tree_map(lambda leaf: [Dim.AUTO] * leaf.ndim if isinstance(leaf, Tensor) else None, value)
        for name, value in arguments.items()
    }


class TorchPipeline:
    """A way by torch.distributed.pipelining."""

    def capture(self, model: nn.Module, inputs: Inputs) -> tuple[Call, Modules]:
        from torch.distributed.pipelining import SplitPoint, pipeline

        args, kwargs = inputs
        with preserved(model):
            spec = pytree.tree_structure(model(*args, **kwargs))  # pipeline() gives the leaves alone
        pipe = pipeline(model, args, kwargs, {_middle(model): SplitPoint.BEGINNING})
        if pipe.num_stages != 2:
            raise RuntimeError(f"pipeline() made {pipe.num_stages} stages")

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            return pytree.tree_unflatten(pytree.tree_leaves(fx.Interpreter(pipe.split_gm).run(*tensors)), spec)

        return call, [pipe.get_stage_module(stage) for stage in range(2)]


class Ours:
    """A way by pipecompile."""

    def capture(self, model: nn.Module, inputs: Inputs) -> tuple[Call, Modules]:
        pipe = pipecompile.compile(model, devices=["cpu", "cpu"], microbatches=1, costs="count", example_inputs=inputs)
        return pipe, [model]


WAYS: Mapping[str, Any] = {
    "pipecompile": Ours(),
    "export": Export(strict=False),
    "export, dynamic": Export(strict=False, dynamic=True),
    "export, strict": Export(strict=True),
    "pipeline()": TorchPipeline(),
}


def examine(entry: Entry) -> Iterator[dict[str, Any]]:
    """For each way its marks: how far it got, and what stopped it."""
    for name, way in WAYS.items():
        model = entry.build()
        marks: dict[str, Any] = {"seconds": None, "stopped": "", **dict.fromkeys(COLUMNS, False)}
        yield {name: marks}
        try:
            _judge(entry, model, way, marks)
        except Exception as error:
            marks["stopped"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
        yield {name: marks}


def _judge(entry: Entry, model: nn.Module, way: Any, marks: dict[str, Any]) -> None:
    start = time.perf_counter()
    call, modules = way.capture(model, entry.inputs(ROWS[0], entry.lengths[0]))
    marks["seconds"], marks["captured"] = time.perf_counter() - start, True
    said = _compare(entry, model, call, modules, entry.inputs(ROWS[0], entry.lengths[0], seed=1))
    marks["loss"] = not said.startswith("wrong: loss")
    marks["gradients"] = not said
    marks["stopped"] = said
    if not said:
        marks["stopped"] = _compare(entry, model, call, modules, entry.inputs(ROWS[1], entry.lengths[-1], seed=2))
        marks["other sizes"] = not marks["stopped"]


def _compare(entry: Entry, model: nn.Module, call: Call, modules: Modules, inputs: Inputs) -> str:
    """Where a way differs from the model on a batch; empty if it does not."""
    expected = _run(entry, model, model, [model], inputs)
    actual = _run(entry, model, call, modules, inputs)
    known = {name: actual.gradients.get(name) for name in expected.gradients}
    return difference(Run(actual.loss, None, known, {}), expected, TOLERANCE[entry.dtype])


def _run(entry: Entry, model: nn.Module, call: Call, modules: Modules, inputs: Inputs) -> Run:
    """A step; the gradients gather in ``modules``, which hold the model's parameters or copies of them."""
    args, kwargs = inputs
    with ExitStack() as stack:
        for module in (model, *modules):
            stack.enter_context(preserved(module))
        value = entry.loss(call(*args, **kwargs))
        value.backward()
        return Run(value.detach(), None, _gradients(model, modules), {})


def _gradients(model: nn.Module, modules: Sequence[nn.Module]) -> Gradients:
    """Gradients by the model's own names, those of several copies of a parameter added up."""
    names = {name: owner for owner, parameter in model.named_parameters() for name in _names(model, parameter)}
    found: Gradients = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            gradient, known = parameter.grad, found.get(names.get(name, name))
            found[names.get(name, name)] = (
                gradient if known is None else known if gradient is None else known + gradient
            )
    return {name: None if gradient is None else gradient.clone() for name, gradient in found.items()}


def _names(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """All the names of a parameter, which has several if it is tied."""
    return [name for name, known in model.named_parameters(remove_duplicate=False) if known is parameter]


def _middle(model: nn.Module) -> str:
    """The name of the layer at the middle of the longest list of layers."""
    lists = [(len(m), name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    if not lists or max(lists)[0] < 2:
        raise RuntimeError("the model has no list of layers to cut")
    length, name = max(lists, key=lambda pair: (pair[0], -len(pair[1])))
    return f"{name}.{length // 2}" if name else str(length // 2)


def report(results: Sequence[Found]) -> str:
    """Counts for each way; what stopped it on which model is in the JSON."""
    lines = [
        f"| {len(results)} models | {' | '.join(COLUMNS)} | seconds, median |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for way in WAYS:
        marks = [found.facts.get(way, {}) for found in results]
        counts = Counter(column for mark in marks for column in COLUMNS if mark.get(column))
        seconds = sorted(mark["seconds"] for mark in marks if mark.get("seconds"))
        middle = f"{seconds[len(seconds) // 2]:.2f}" if seconds else ""
        lines.append(f"| {way} | {' | '.join(str(counts[column]) for column in COLUMNS)} | {middle} |")
    return "\n".join(lines)


def main() -> None:
    options = _options()
    names = [n for n in ZOO if not missing(ZOO[n]) and (re.search(options.only, n) or ZOO[n].family == options.only)]
    _warm_up()
    results = []
    for found in run_each(names, _work, options.jobs, options.seconds):
        results.append(found)
        right = [way for way in WAYS if found.facts.get(way, {}).get("gradients")]
        print(f"{len(results):3}/{len(names)} {found.name}: {', '.join(right) or 'none'} {found.ended}", flush=True)
    print("\n" + report(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({f.name: {**f.facts, "ended": f.ended} for f in results}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern that names must contain, or a family")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all ways of one model")
    parser.add_argument("--json", type=Path, help="where the marks go")
    return parser.parse_args()


def _work(name: str) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    yield from examine(ZOO[name])


def _warm_up() -> None:
    """Captures a model in every way, so that the children share what that imports; runs none after a capture."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torchvision  # noqa: F401
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    entry = ZOO["tied"]
    for way in WAYS.values():
        way.capture(entry.build(), entry.inputs(ROWS[0], entry.lengths[0]))


if __name__ == "__main__":
    main()
