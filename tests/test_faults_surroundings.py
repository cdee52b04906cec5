"""What a pipeline can be called in, and what is done with it as with any module: it works, or says why not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same, step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from toys import D, blocks, mean_square

import pipecompile
from pipecompile.errors import InputError, PipecompileError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = blocks(4).double()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return mean_square(self.body(x))


def pipe_of(model: nn.Module | None = None, **options: Any) -> Any:
    options = {"microbatches": 2, "costs": "count", **options}
    return pipecompile.compile(Net() if model is None else model, devices=["cpu"] * 2, **options)


def floats() -> Tensor:
    return torch.randn(4, D, dtype=torch.float64)


def works(pipe: Any, model: nn.Module, x: Tensor | None = None) -> None:
    x = floats() if x is None else x
    expected = step(model, model, lambda y: y, ((x,), {}))
    assert_same(step(pipe, model, lambda y: y, ((x,), {})), expected)


def with_tangent(pipe: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return pipe(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "grad": (lambda pipe, x: torch.func.grad(pipe)(x), "inside torch.func"),
    "vmap": (lambda pipe, x: torch.func.vmap(pipe)(torch.stack([x, x])), "inside torch.func"),
    "jvp": (lambda pipe, x: torch.func.jvp(pipe, (x,), (x,)), "inside torch.func"),
    "make_fx": (lambda pipe, x: torch.fx.experimental.proxy_tensor.make_fx(pipe)(x), "make_fx"),
    "symbolic_trace": (lambda pipe, x: torch.fx.symbolic_trace(pipe), "symbolic_trace"),
    "dual": (lambda pipe, x: with_tangent(pipe, x), "forward_ad.dual_level"),
    "fake": (lambda pipe, x: pipe(torch._subclasses.FakeTensorMode().from_tensor(x)), "fake tensors"),
}


def compiled_by_method(pipe: Any) -> Any:
    pipe.compile(backend="eager")
    return pipe


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "pipe": lambda model: torch.compile(pipe_of(model), backend="eager"),
    "by method": lambda model: compiled_by_method(pipe_of(model)),
    "model before": lambda model: pipe_of(torch.compile(model, backend="eager")),
    "block before": lambda model: (model.body.compile(backend="eager"), pipe_of(model))[1],
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_around_and_inside_is_exact(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    expected, x = copy.deepcopy(model), floats()
    pipe = COMPILED[name](model)
    for _ in range(2):
        expected.zero_grad()
        model.zero_grad()
        wanted, loss = expected(x), pipe(x)
        wanted.backward()
        loss.backward()
        torch.testing.assert_close(loss, wanted)
        gradients = {n: p.grad for n, p in expected.named_parameters()}
        assert gradients
        for n, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], msg=n)
    assert "recompile" not in capfd.readouterr().err


WHOLE: dict[str, Callable[[Any, Tensor], Any]] = {
    "compile": lambda pipe, x: torch.compile(pipe, backend="eager", fullgraph=True)(x),
    "export": lambda pipe, x: torch.export.export(pipe, (x,), strict=True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_where_torch_must_trace_all_it_says_why_it_cannot(name: str) -> None:
    torch._dynamo.reset()  # or it skips code that it has given up in an earlier test, without an error
    pipe, x = pipe_of(), floats()
    with pytest.raises(Exception, match=r"stages run in threads of their own; .* pipe\.pipeline\.model"):
        WHOLE[name](pipe, x)
    works(pipe, pipe.pipeline.model)


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_follows_one_thread_is_refused(name: str, first: bool) -> None:
    transform, words = TRANSFORMS[name]
    pipe, x = pipe_of(), floats()
    if not first:
        works(pipe, pipe.pipeline.model)
    with pytest.raises(InputError, match=f"(?s){words}.*threads of their own.*pipe.pipeline.model"):
        transform(pipe, x)
    works(pipe, pipe.pipeline.model)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_is_refused() -> None:
    pipe, x = pipe_of(), floats()
    works(pipe, pipe.pipeline.model)
    with pytest.raises(InputError, match=r"inside torch\.jit\.trace"):
        torch.jit.trace(pipe, x)
    with pytest.raises(InputError, match=r"cannot be scripted.*torch\.jit\.script\(pipe\.pipeline\.model\)"):
        torch.jit.script(pipe)
    works(pipe, pipe.pipeline.model)


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
def test_an_asynchronous_pipeline_refuses_other_weights(first: bool) -> None:
    pipe, x = pipe_of(schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), floats()
    if not first:
        pipe(x)
    weights = {name: p.detach() * 2 for name, p in pipe.named_parameters()}
    with pytest.raises(InputError, match=r"'body\.0\.0\.weight' is a plain tensor.*\(pipe\.pipeline\.model"):
        torch.func.functional_call(pipe, weights, (x,))
    pipe(x)
    pipe.pipeline.flush()


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_call(reentrant: bool, first: bool) -> None:
    """A first call is captured within; nothing of that is counted among what the checkpoint sees."""
    model = Net()
    pipe, twin = pipe_of(model), copy.deepcopy(model)
    if not first:
        works(pipe, model)
    found = []
    x = floats()
    for call in (pipe, twin):
        given = x.clone().requires_grad_()
        checkpoint(call, given, use_reentrant=reentrant).backward()
        found.append((given.grad, model.count if call is pipe else twin.count))
    torch.testing.assert_close(found[0], found[1])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


def saved(pipe: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("first", [True, False], ids=["before a call", "after one"])
@pytest.mark.parametrize(
    "make", [lambda p: pickle.loads(pickle.dumps(p)), saved, copy.copy], ids=["pickle", "save", "copy"]
)
def test_a_pipeline_is_pickled_and_copied(make: Callable[[Any], Any], first: bool) -> None:
    pipe = pipe_of().eval()
    pipe.note = "kept"
    if not first:
        works(pipe, pipe.pipeline.model)
    made = make(pipe)
    assert (made.note, made.training, made.pipeline.schedule, made.pipeline.microbatches) == ("kept", False, "1f1b", 2)
    works(made, made.pipeline.model)
    works(pipe, pipe.pipeline.model)


GRID = "0: 0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1\n1: 1F0 2F0 1F1 2F1 2B0 1B0 2I1 1B1 2W1"


@pytest.mark.parametrize(
    "schedule",
    ["interleaved-1f1b", "zb-h1", "zb-v", "auto", GRID],
    ids=["interleaved-1f1b", "zb-h1", "zb-v", "auto", "grid"],
)
def test_a_pipeline_of_any_schedule_is_pickled(schedule: str) -> None:
    pipe = pipe_of(schedule=schedule, verify="never")
    x = floats()
    works(pipe, pipe.pipeline.model, x)
    made = pickled(pipe)
    works(made, made.pipeline.model, x)
    assert made.pipeline.schedule == pipe.pipeline.schedule
    assert str(made.pipeline.program) == str(pipe.pipeline.program)


def test_a_pipeline_with_optimizers_inside_is_not_pickled() -> None:
    pipe = pipe_of(schedule="pipedream", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(PipecompileError, match=r"cannot be pickled.*state_dict"):
        pickle.dumps(pipe)


def test_the_model_cannot_be_exchanged() -> None:
    pipe = pipe_of()
    with pytest.raises(AttributeError, match="model"):
        pipe.pipeline.model = Net()
    with pytest.raises(AttributeError, match="pipeline"):
        pipe.pipeline = pipe_of().pipeline
    works(pipe, pipe.pipeline.model)


class NetBeside(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return {"loss": mean_square(h), "hidden": h}


class NetWithout(Net):
    def forward(self, x: Tensor) -> Any:
        return [self.body(x)]


@pytest.mark.parametrize("net", [Net, NetBeside, NetWithout])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_of_a_call_lives_on_with_nobody_to_use_it(net: type[nn.Module], training: bool) -> None:
    pipe = pipe_of(net()).train(training)
    x = floats().requires_grad_()
    loss = pipe(x)
    alive = weakref.ref(x)
    del loss, x
    gc.collect()
    assert alive() is None


def test_a_pipeline_is_freed_with_its_threads() -> None:
    pipe = pipe_of()
    works(pipe, pipe.pipeline.model)
    threads = [lane.thread.thread for lane in pipe.pipeline._session.lanes.values()]
    alive = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert alive() is None
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


METHODS: dict[str, Callable[[Any], Any]] = {
    "to": lambda pipe: pipe.to("cpu", torch.float64),
    "share_memory": lambda pipe: pipe.share_memory(),
    "apply": lambda pipe: pipe.apply(lambda module: None),
    "zero_grad": lambda pipe: pipe.zero_grad(set_to_none=False),
    "load_state_dict": lambda pipe: pipe.load_state_dict(pipe.state_dict()),
    "add_module": lambda pipe: pipe.add_module("more", nn.Identity()),
    "train": lambda pipe: pipe.eval().train(),
    "double": lambda pipe: pipe.float().double(),
    "freeze": lambda pipe: pipe.requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_done_with_any_module(name: str) -> None:
    pipe = pipe_of()
    works(pipe, pipe.pipeline.model)
    METHODS[name](pipe)
    works(pipe, pipe.pipeline.model)


def test_hooks_on_the_pipeline_itself() -> None:
    pipe, x = pipe_of(), floats().requires_grad_()
    pipe.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    pipe.register_forward_hook(lambda module, args, output: output * 3)
    seen = []
    pipe.register_full_backward_hook(lambda module, given, come: seen.append(come[0].item()))
    loss = pipe(x)
    assert loss.item() == pytest.approx(3 * pipe.pipeline.model.forward(x * 2).item(), rel=1e-12)
    loss.backward()
    assert seen == [1.0]
    works(pipe, pipe.pipeline.model, x.detach().requires_grad_())  # whose hooks they are too


def test_data_parallel_without_gpus() -> None:
    pipe = pipe_of()
    works(nn.DataParallel(pipe) if not torch.cuda.is_available() else pipe, pipe.pipeline.model)
