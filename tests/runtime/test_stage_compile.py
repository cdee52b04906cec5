"""``stage_compile=``: stages that ``torch.compile`` compiles train as the unsplit model does, and nothing is silent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import VOCABULARY, D, Tied, blocks, mean_square

import pipecompile
from pipecompile import PlanOptions
from pipecompile.compiler import rehearse
from pipecompile.errors import ExactnessError, ExecutionError, InputError
from pipecompile.ops.backends import check_backend

# torch reads .grad of tensors that are not leaves, and hides the warning, unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]
STEPS = 3


class Net(nn.Module):
    """Blocks, and something between them."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between, self.last = blocks(2), between or nn.Identity(), blocks(2)

    def forward(self, x: Tensor) -> Tensor:
        return mean_square(self.last(self.between(self.first(x))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(blocks(1), nn.Dropout(0.5), blocks(2))

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.inner, h, use_reentrant=False)


class Experts(nn.Module):
    """Python looks at activations, so the module is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return torch.stack([self.low(row) if row.sum().item() < 0 else self.high(row) for row in h])


class Cast(nn.Module):
    """Two products in bfloat16, in an autocast of the model's own, and a mask made without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.abs().amax(dim=-1, keepdim=True).clamp(min=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            inner = self.inner(h)
        return h / scale + inner.float()


class Doubled(torch.autograd.Function):
    """Its gradient is not that of its forward, so a function that is traced into another one would show."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = blocks(1), blocks(1)

    def forward(self, h: Tensor) -> Tensor:
        return self.after(Doubled.apply(self.before(h)))


class Selected(nn.Module):
    """How many entries are selected depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        rows, columns = (h.amax(dim=-1) > 0).nonzero(as_tuple=True)
        return h.index_put((rows, columns), self.scale * h[rows, columns].tanh())


class Decaying(nn.Module):
    """Writes buffers; its backward needs an old value of one. torch.compile drops that copy, or the write (2.13)."""

    scale: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(1)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, h: Tensor) -> Tensor:
        self.calls.add_(1)
        before = self.scale.clone()
        self.scale.mul_(0.5)
        return torch.tanh(self.body(h) * before)


class Ragged(nn.Module):
    """Lengths change: positions, a reshape and a mask are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, D), nn.Embedding(32, D)
        self.body, self.head = blocks(3), nn.Linear(D, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        rows, length = ids.shape
        h = self.words(ids) + self.positions(torch.arange(length))
        weights = torch.ones(length, length).tril().to(h.dtype)
        h = self.body(h) + (weights / weights.sum(-1, keepdim=True)) @ h
        return F.cross_entropy(self.head(h).reshape(rows * length, -1), labels.flatten(), ignore_index=0)


def floats(rows: int = 6) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [((torch.randn(rows, 3, D, dtype=torch.float64, generator=generator),), {}) for _ in range(STEPS)]


def tokens(*lengths: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(VOCABULARY, (2, 6, length), generator=generator) for length in lengths]
    return [((ids, labels), {}) for ids, labels in drawn]


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def piped(model: nn.Module, backend: Any = "aot_eager", **options: Any) -> Any:
    options = {"microbatches": 3, "costs": "count", "devices": ["cpu", "cpu"], "stage_compile": backend, **options}
    return pipecompile.compile(model, **options)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def train(call: Callable[..., Any], model: nn.Module, batches: Batches) -> list[dict[str, Tensor | None]]:
    """The loss, each parameter and each gradient by name, at each step of an optimizer."""
    optimizer = sgd(list(model.parameters()))
    torch.manual_seed(2)
    seen = []
    for args, kwargs in batches:
        loss = loss_of(call(*args, **kwargs))
        if loss.requires_grad:  # otherwise the stages have stepped their own optimizers
            loss.backward()
        parameters = {f"<{name}>": p.detach().clone() for name, p in model.named_parameters()}
        seen.append({"<loss>": loss.detach(), **parameters, **gradients(model)})
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_close(actual: list[dict[str, Tensor | None]], expected: list[dict[str, Tensor | None]]) -> None:
    assert actual
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, msg=lambda m, at=(number, name): f"{at}: {m}")


def parts_of(pipe: Any) -> list[Any]:
    return [part for stage in pipe.pipeline._capture_in_use.stages for part in stage.compiled]


def graphs(pipe: Any) -> list[int]:
    return [part.graphs for part in parts_of(pipe)]


@dataclass(frozen=True)
class Case:
    """A model and its batches; ``graphs`` of each part, in all steps together."""

    make: Callable[[], nn.Module]
    batches: Batches
    graphs: list[int]
    options: dict[str, Any] = field(default_factory=dict)


PIPEDREAM = {"schedule": "pipedream", "optimizer": sgd, "verify": "never"}
CASES = {
    "tied, gpipe": Case(Tied, tokens(4, 4, 4), [1, 1], {"schedule": "gpipe"}),
    "batch norm": Case(lambda: Net(nn.BatchNorm1d(3)), floats(), [1, 1]),
    "checkpoint with dropout": Case(lambda: Net(Checkpointed()), floats(), [1, 1, 1, 1]),
    "kept whole": Case(lambda: Net(Experts()), floats(), [1, 1]),
    "autocast and no_grad": Case(lambda: Net(Cast()), floats(), [1, 1, 1, 1, 1]),
    "custom function": Case(lambda: Net(Custom()), floats(), [1, 1]),
    "data-dependent sizes": Case(lambda: Net(Selected()), floats(), [1, 1]),
    "written buffer": Case(lambda: Net(Decaying()), floats(), [1, 1, 1], {"microbatches": 1}),
    "dropout": Case(lambda: Net(nn.Dropout(0.5)), floats(), [1, 1]),
    "recomputed dropout": Case(
        lambda: Net(nn.Dropout(0.5)), floats(), [1, 1], {"plan": PlanOptions(recompute="always")}
    ),
    "pipedream": Case(lambda: Net(nn.Dropout(0.5)), floats(), [1, 1], PIPEDREAM),
    "ragged": Case(Ragged, tokens(5, 7, 4), [1, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_stages_train_as_uncompiled_ones(name: str) -> None:
    case = CASES[name]
    uncompiled, model = built(case.make), built(case.make)
    pipe = piped(model, **case.options)
    other = piped(uncompiled, False, **{**case.options, "verify": "never"})
    expected = train(other, uncompiled, case.batches)
    assert_close(train(pipe, model, case.batches), expected)
    assert any(expected[0][name] is not None for name in gradients(model)) == ("optimizer" not in case.options)
    assert graphs(pipe) == case.graphs
    assert not other.pipeline.report.compiled
    assert all(not part.why for part in parts_of(pipe))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for the CPU with g++, which is missing")
def test_inductor_trains_as_the_unsplit_model() -> None:
    unsplit, model = built(Ragged), built(Ragged)
    pipe = piped(model, True)
    assert_close(train(pipe, model, tokens(5, 7, 4)), train(unsplit, unsplit, tokens(5, 7, 4)))
    assert graphs(pipe) == [1, 1]
    assert pipe.pipeline.report.compiled[0].startswith("stage 0: 1 part by inductor (1 graph so far, ")


def test_the_callers_autocast_and_an_evaluation_have_graphs_of_their_own() -> None:
    uncompiled, model = built(Net), built(Net)
    pipe, other = piped(model), piped(uncompiled, False)
    ((x,), _), *_ = floats()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [call(x) for call in (pipe, other)]
        torch.testing.assert_close(*losses)
    with torch.no_grad():
        torch.testing.assert_close(pipe(x), other(x))
    assert pipe.pipeline.captures == 2
    assert graphs(pipe) == [1, 1]


def test_a_second_backward_reruns_compiled_stages() -> None:
    unsplit, model = built(Net), built(Net)
    for call in (unsplit, piped(model)):
        loss = call(floats()[0][0][0])
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close([gradients(model)], [gradients(unsplit)])


# What is compiled is told


def test_the_code_of_a_stage_shows_its_parts_and_the_report_counts_them() -> None:
    pipe = piped(built(lambda: Net(nn.Dropout(0.5))), example_inputs=floats()[0])
    assert "compiled_0(" in pipe.pipeline._capture_in_use.stages[0].code
    assert "# compiled_0" in pipe.pipeline._capture_in_use.stages[0].code
    assert any("1 random" in line for line in pipe.pipeline.report.compiled)
    assert all("not called yet" in line for line in pipe.pipeline.report.compiled)


def refuses(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    raise NotImplementedError("this backend compiles nothing")


def test_a_part_that_cannot_be_compiled_runs_uncompiled_with_a_warning() -> None:
    unsplit, model = built(Net), built(Net)
    pipe = piped(model, refuses)
    with pytest.warns(UserWarning, match="stage [01], compiled_0 .*runs uncompiled.*BackendCompilerFailed") as seen:
        losses = train(pipe, model, floats())
    assert_close(losses, train(unsplit, unsplit, floats()))
    assert len(seen) == 2
    assert sum("runs uncompiled: BackendCompilerFailed" in line for line in pipe.pipeline.report.compiled) == 2


def test_too_many_graphs_of_one_part_are_not_silent() -> None:
    """The setting that the caller's thread has made applies to the threads of the stages."""
    from torch._dynamo import config

    pipe = piped(built(Net), "eager")
    x = floats()[0][0][0]
    with config.patch(recompile_limit=1):
        pipe(x).backward()
        with torch.no_grad(), pytest.warns(UserWarning, match="FailOnRecompileLimitHit"):
            loss = pipe(x)
    torch.testing.assert_close(loss, built(Net)(x))
    assert graphs(pipe) == [1, 1]


def wrong(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that halves a factor."""

    def run(*values: Any) -> Any:
        return tuple(out * 0.5 if isinstance(out, Tensor) else out for out in graph(*values))

    return run


def test_a_backend_that_computes_something_else_is_found_by_the_first_call() -> None:
    pipe = piped(built(Net), wrong)
    with pytest.raises(ExactnessError, match=r"output 'output'(?s:.*)compiled by wrong; stage_compile=False"):
        pipe(floats()[0][0][0])


def test_an_error_in_a_compiled_part_tells_its_line() -> None:
    model = built(Ragged)
    pipe = piped(model)
    ((ids, labels), _), *_ = tokens(4)
    pipe(ids, labels)
    with pytest.raises(ExecutionError, match=r"module 'words', .*test_stage_compile.py"):
        pipe(ids + VOCABULARY, labels)


def test_a_rehearsed_plan_that_stays_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that are far off make a rehearsal correct them; the plan, of two stages that cannot move, stays."""
    monkeypatch.setattr(rehearse, "all_short", lambda costs: False)
    monkeypatch.setattr(rehearse, "HOLDS", 0.0)
    plan = PlanOptions(pins={"first": 0, "last": 1}, tune="rehearse")
    pipe = piped(built(Net), costs="measure", plan=plan, example_inputs=floats()[0])
    assert "rehearsal" in pipe.pipeline.report.costs[0]
    assert graphs(pipe) == [1, 1]


# What is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("cudagraphs", "several microbatches"),
        ("reduce-overhead", "CUDA graphs"),
        ("max-autotune", "CUDA graphs"),
        ("nonesuch", "is not a backend of torch.compile; it must be one of"),
        (1, "it must be True, False"),
        (None, "it must be True, False"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=f"stage_compile={given!r}.*{words}"):
        piped(Net(), given)


def test_inductor_without_a_compiler_is_refused() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(InputError, match=r"none was found.*no-such-compiler.*install g\+\+.*'aot_eager'"),
    ):
        piped(Net(), True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(("device", "words"), [("cuda", "triton"), ("privateuseone", "'privateuseone' devices")])
def test_inductor_without_what_a_device_needs_is_refused(device: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_backend(True, [torch.device("cpu"), torch.device(device)])


def test_a_python_that_torch_compile_does_not_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported() -> None:
        raise RuntimeError("Python 4 not yet supported")

    monkeypatch.setattr("torch._dynamo.eval_frame.check_if_dynamo_supported", unsupported)
    with pytest.raises(InputError, match=r"Python 4 not yet supported.*stage_compile=False"):
        piped(Net(), "eager")
