"""Processes of one pipeline of which one does things in another order, fails where it is caught, or is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from failing_scenes import CROSSING, Net, Scores, batch, piped, step
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile.compiler import learn
from pipecompile.distributed import processes
from pipecompile.runtime import steps

Said = list[str]  # what each of some calls has come to: its error, or nothing


def tried(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def is_odd() -> bool:
    return dist.get_rank() == 1


def odd_ones(pipe: Any, unsplit: nn.Module, loss_of: Callable[[Any, Tensor], Tensor]) -> list[str]:
    """The parameters of which one more step, on gradients of zero, has other gradients than in the unsplit model."""
    for model in (pipe, unsplit):
        model.zero_grad()
        loss_of(model, batch(5)).backward()
    expected = {name: parameter.grad for name, parameter in unsplit.named_parameters()}
    found = dict(pipe.named_parameters())
    assert found
    return [n for n, p in found.items() if p.grad is None or not torch.allclose(p.grad, expected[n], atol=1e-6)]


def loss_of(model: Any, x: Tensor) -> Tensor:
    """Which a model without a loss leaves to the caller."""
    output = model(x)
    return output if output.ndim == 0 else F.mse_loss(output, batch(9))


def backward_of_another_call(kind: type[nn.Module]) -> Said:
    """Of two calls, rank 1 differentiates the other one. Then all differentiate one more call."""
    torch.manual_seed(0)
    unsplit = kind()
    torch.manual_seed(0)
    pipe = piped(kind())
    losses = [loss_of(pipe, batch(seed)) for seed in (1, 2)]
    said = [tried(losses[is_odd()].backward)]
    if not said[0]:  # gradients are there at once, and the next call tells
        said[0] = tried(lambda: pipe(batch(3)))
    said += odd_ones(pipe, unsplit, loss_of)
    pipe.pipeline.close()
    return said


def a_hook_raises(kind: type[nn.Module]) -> Said:
    """One on the gradient of a parameter of rank 1, where it is caught."""
    torch.manual_seed(0)
    unsplit = kind()
    torch.manual_seed(0)
    pipe = piped(kind())

    def hook(gradient: Tensor) -> None:
        raise ValueError("of the hook")

    handle = next(pipe.parameters()).register_hook(hook) if is_odd() else None
    caught = tried(loss_of(pipe, batch()).backward)
    assert ("of the hook" in caught) == is_odd()
    if handle is not None:
        handle.remove()
    said = [tried(lambda: pipe(batch())), *odd_ones(pipe, unsplit, loss_of)]
    pipe.pipeline.close()
    return said


def a_rerun_that_one_refuses() -> Said:
    """Rank 1 has stepped before a second backward."""
    pipe = piped(Scores())
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    loss = loss_of(pipe, batch())
    loss.backward(retain_graph=True)
    if is_odd():
        optimizer.step()
    said = tried(loss.backward)
    if is_odd():
        assert "was changed in place between the call of the pipeline and this backward" in said
        said = tried(lambda: pipe(batch(1)))
    after = tried(lambda: loss_of(pipe, batch(2)).backward())
    pipe.pipeline.close()
    return [said, after]


def a_flush_of_one() -> Said:
    """Rank 1 flushes where the others call. Then all go on as the same pipeline in threads, which nobody flushed."""
    options: dict[str, Any] = {"schedule": "pipedream", "optimizer": lambda p: torch.optim.SGD(p, 0.1)}
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(0)
    pipe = piped(Net(), **options)
    alone = pipecompile.compile(
        model, ["cpu"] * dist.get_world_size(), microbatches=4, costs="count", verify="never", **options
    )
    with alone.pipeline:
        expected = [alone(batch(seed)).item() for seed in range(5)]
    found = [pipe(batch(seed)).item() for seed in range(2)]
    said = tried(pipe.pipeline.flush if is_odd() else lambda: pipe(batch(2)))
    found += [pipe(batch(seed)).item() for seed in range(2, 5)]
    pipe.pipeline.close()
    return [said, *(f"{one} instead of {other}" for one, other in zip(found, expected, strict=True) if one != other)]


def a_capture_that_one_has_used() -> Said:
    """Rank 1 once evaluates instead. All of them count the same steps in spite of it, and tell what they took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn, "all_short", lambda costs: False)
        pipe = piped(costs=None)
        pipe.eval()
        step(pipe)
        pipe.train()
        step(pipe)
        pipe.train(not is_odd())
        said = [tried(lambda: step(pipe))]
        pipe.train()
        said += [tried(lambda: step(pipe)) for _ in range(learn.WARM_UP + learn.STEPS)]
        assert len(pipe.pipeline.report.learned) == 1
        pipe.pipeline.close()
    return said


def fails_in_preparing() -> Said:
    """Rank 1, after the agreement on a call has begun and before its program."""
    pipe, snapshot = piped(), steps._snapshot

    def fail(*args: Any) -> Any:
        raise MemoryError("no room for buffers")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_snapshot", fail if is_odd() else snapshot)
        return [*(tried(lambda: step(pipe)) for _ in range(2)), tried(pipe.pipeline.close)]


def is_interrupted_in_an_agreement() -> Said:
    """Rank 1, while it waits for the others."""
    pipe, exchange = piped(), processes.exchange

    def interrupted() -> list[Tensor]:
        raise KeyboardInterrupt

    def begin(*args: Any) -> Callable[[], list[Tensor]]:
        wait = exchange(*args)
        return interrupted if is_odd() else wait

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "exchange", begin)
        try:
            said.append(tried(lambda: step(pipe)))
        except KeyboardInterrupt:
            assert is_odd()
    return [*said, tried(lambda: step(pipe)), tried(lambda: step(pipe))]


def passes_what_does_not_travel() -> Said:
    """What rank 1 has for all cannot be pickled."""
    pipe = piped()
    value = (lambda: None) if is_odd() else None
    return [tried(lambda: pipe.pipeline.share.processes.of_each(value)), tried(lambda: step(pipe))]


def the_first_is_interrupted() -> Said:
    """While it makes what the others wait for."""
    make = processes._outcome

    def interrupted(job: Any) -> bytes:
        raise KeyboardInterrupt

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_outcome", interrupted if dist.get_rank() == 0 else make)
        try:
            said.append(tried(piped))
        except KeyboardInterrupt:
            assert dist.get_rank() == 0
    return said


def orders() -> dict[str, Said]:
    """In one start of processes, what several scenes return."""
    return {
        "other backward": backward_of_another_call(Net),
        "other backward, deferred": backward_of_another_call(Scores),
        "hook": a_hook_raises(Net),
        "hook, deferred": a_hook_raises(Scores),
        "rerun": a_rerun_that_one_refuses(),
        "flush": a_flush_of_one(),
        "capture": a_capture_that_one_has_used(),
    }


def failures() -> dict[str, Said]:
    """As ``orders``, of failures that end a pipeline."""
    return {
        "preparing": fails_in_preparing(),
        "agreement": is_interrupted_in_an_agreement(),
        "pickle": passes_what_does_not_travel(),
        "first": the_first_is_interrupted(),
    }


def compiles_beside() -> None:
    """Rank 1 makes a second pipeline where rank 0 calls the first. It waits for rank 0 until something ends it."""
    pipe = piped(pace=CROSSING)
    if is_odd():
        piped(pace=CROSSING)
    step(pipe)


def other_parts() -> dict[str, Said]:
    """What is said of a part of a batch that one process passes otherwise, and of the next call."""
    pipe, part = piped(parts=2), dist.get_rank() // 2
    x, last = batch(part), dist.get_rank() == dist.get_world_size() - 1
    cases = {"type": x.double(), "length": torch.ones(8, 3)}
    said = {
        name: [tried(lambda odd=odd: pipe(odd if last else x)), tried(lambda: step(pipe, x))]
        for name, odd in cases.items()
    }
    if last:
        assert "no argument has a batch dimension" in tried(lambda: pipe(None))
    said["nothing"] = [tried(lambda: step(pipe, x))]  # of the last process alone, which the others do not know
    pipe.pipeline.close()
    return said
