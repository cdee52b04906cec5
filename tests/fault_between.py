"""More kinds of fault: what comes between a forward and its backward, and what surrounds a call."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import torch
from fault_kinds import fresh, gradients, kind, registered, train
from fault_scene import loss_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import D

Meddle = Callable[[Any, nn.Module, Tensor, Tensor], Any]


def _between(name: str, meddle: Meddle) -> None:
    def run(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        modes = [(m, m.training) for m in model.modules()]
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        try:
            loss = loss_of(call(x))
            more = meddle(call, model, x, loss)
            loss.backward()
            return loss.detach(), gradients(model), more
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for module, mode in modes:
                module.training = mode
            for parameter, wants in wanted:
                parameter.requires_grad_(wants)

    run.__name__ = f"between_{name}"
    kind(run)


@torch.no_grad()
def _step(call: Any, model: nn.Module, x: Tensor, loss: Tensor) -> None:
    for parameter in model.parameters():
        parameter.sub_(0.1)


@torch.no_grad()
def _write_data(call: Any, model: nn.Module, x: Tensor, loss: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


@torch.no_grad()
def _write_buffers(call: Any, model: nn.Module, x: Tensor, loss: Tensor) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(1)


@torch.no_grad()
def _write_input(call: Any, model: nn.Module, x: Tensor, loss: Tensor) -> None:
    x.mul_(2)


BETWEEN: dict[str, Meddle] = {
    "nothing": lambda c, m, x, y: None,
    "optimizer_step": _step,
    "gradients_set": _write_data,
    "buffers_written": _write_buffers,
    "input_written": _write_input,
    "another_forward": lambda c, m, x, y: loss_of(c(x * 2)).detach(),
    "another_step": lambda c, m, x, y: loss_of(c(x * 2)).backward(),
    "evaluation": lambda c, m, x, y: _evaluated(c, x),
    "zero_grad": lambda c, m, x, y: m.zero_grad(),
    "eval_mode": lambda c, m, x, y: m.eval() and None,
    "frozen": lambda c, m, x, y: m.requires_grad_(False) and None,
    "loaded": lambda c, m, x, y: m.load_state_dict(copy.deepcopy(m.state_dict())) and None,
    "collected": lambda c, m, x, y: gc.collect() and None,
    "retained": lambda c, m, x, y: y.backward(retain_graph=True),
    "backward_twice": lambda c, m, x, y: y.backward(),
    "create_graph": lambda c, m, x, y: y.backward(create_graph=True),
    "grad_of_a_parameter": lambda c, m, x, y: torch.autograd.grad(y, next(m.parameters()), retain_graph=True)[0],
    "grad_of_a_later_parameter": lambda c, m, x, y: torch.autograd.grad(y, [*m.parameters()][-1], retain_graph=True)[0],
    "grad_of_the_input": lambda c, m, x, y: torch.autograd.grad(y, x, retain_graph=True)[0],
    "loss_written": lambda c, m, x, y: y.data.mul_(2) and None,
    "parameter_exchanged": lambda c, m, x, y: _exchanged(m),
    "threads_of_torch": lambda c, m, x, y: torch.set_num_threads(1),
}


def _evaluated(call: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return loss_of(call(x))


def _exchanged(model: nn.Module) -> None:
    name, parameter = next(iter(model.named_parameters()))
    owner = model.get_submodule(name.rpartition(".")[0])
    own = name.rpartition(".")[2]
    setattr(owner, own, nn.Parameter(parameter.detach().clone()))
    setattr(owner, own, parameter)


for _name, _meddle in BETWEEN.items():
    _between(_name, _meddle)


@kind
def no_backward_at_all(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    """What a call keeps for its backward is freed with its output."""
    given = x.clone().requires_grad_()
    call(x.requires_grad_())  # a pipeline keeps the sample that it has been captured with
    loss = loss_of(call(given))
    alive = weakref.ref(given)
    del loss, given
    gc.collect()
    return alive() is None


@kind
def two_losses_at_once(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    (loss_of(call(x)) + 3 * loss_of(call(x * 2))).backward()
    return gradients(model)


@kind
def losses_in_the_other_order(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    first, second = loss_of(call(x)), loss_of(call(x * 2))
    second.backward()
    first.backward()
    return gradients(model)


@kind
def scaled_by_zero(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    (loss_of(call(x)) * 0).backward()
    return gradients(model)


@kind
def scaled_by_nan(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    (loss_of(call(x)) * float("nan")).backward()
    return gradients(model)


@kind
def gradient_of_another_shape(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    loss_of(call(x)).backward(torch.ones(2, dtype=torch.float64))


@kind
def backward_of_what_is_detached(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    loss_of(call(x)).detach().backward()


@kind
def without_gradients(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with torch.no_grad():
        loss = loss_of(call(x))
    loss.backward()


@kind
def in_inference_mode(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with torch.inference_mode():
        return loss_of(call(x)).item()


@kind
def in_anomaly_mode(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with torch.autograd.detect_anomaly(check_nan=False):
        return train(call, model, x)


@kind
def in_a_checkpoint(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    checkpoint(lambda x: loss_of(call(x)), x.requires_grad_(), use_reentrant=rng.random() < 0.5).backward()
    return gradients(model), x.grad


@kind
def with_saved_tensors_on_the_cpu(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return train(call, model, x)


# What is done with the model


@kind
def frozen_whole(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call.requires_grad_(False)
    try:
        return train(call, model, x)
    finally:
        call.requires_grad_(True)


@kind
def in_eval_mode(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call.eval()
    try:
        return train(call, model, x)
    finally:
        call.train()


@kind
def in_float32(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    call.float()
    try:
        return train(call, model, x.float())
    finally:
        model.zero_grad()
        call.double()
        model.load_state_dict(values)


@kind
def shared_and_applied(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call.apply(lambda module: None)
    call.to("cpu", torch.float64)
    return train(call, model, x)


@kind
def zeroed_and_loaded(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    train(call, model, x)
    call.zero_grad(set_to_none=False)
    call.load_state_dict(call.state_dict())
    return train(call, model, x)


@kind
def loaded_with_wrong_keys(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call.load_state_dict({"no": x})


@kind
def module_added(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    call.add_module("more", nn.Identity())
    try:
        return train(call, model, x)
    finally:
        del model.more


@kind
def parameter_deleted(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    linear = rng.choice([m for m in model.modules() if isinstance(m, nn.Linear)])
    weight = linear.weight
    order = dict(linear._parameters)
    del linear.weight
    try:
        return train(call, model, x)
    finally:
        linear._parameters.clear()
        linear._parameters.update({**order, "weight": weight})


@kind
def module_broken(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    """A layer of another width in its place."""
    block = rng.choice([m for m in model.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Linear)])
    linear = block[0]
    block[0] = nn.Linear(D + 1, D).double()
    try:
        return train(call, model, x)
    finally:
        block[0] = linear


@kind
def copied(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    made = rng.choice([copy.copy, copy.deepcopy, _pickled, _saved])(call)
    loss = loss_of(made(x))
    loss.backward()
    return loss.detach()


def _pickled(call: Any) -> Any:
    return pickle.loads(pickle.dumps(call))


def _saved(call: Any) -> Any:
    file = io.BytesIO()
    torch.save(call, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kind
def in_data_parallel(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return train(nn.DataParallel(call), model, x)


# Transforms


@kind
def by_functional_call(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    weights = {name: p.detach() * 2 for name, p in model.named_parameters()}
    return loss_of(torch.func.functional_call(call, weights, (x,)))


def _transform(name: str, run: Callable[[Any, Tensor], Any]) -> None:
    def transformed(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
        run(call, x)
        return None

    transformed.__name__ = f"transform_{name}"
    kind(transformed)


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "grad": lambda c, x: torch.func.grad(lambda x: loss_of(c(x)))(x),
    "vmap": lambda c, x: torch.func.vmap(lambda x: loss_of(c(x)))(torch.stack([x, x])),
    "jvp": lambda c, x: torch.func.jvp(lambda x: loss_of(c(x)), (x,), (x,)),
    "jacobian": lambda c, x: torch.autograd.functional.jacobian(lambda x: loss_of(c(x)), x),
    "symbolic_trace": lambda c, x: torch.fx.symbolic_trace(c),
    "make_fx": lambda c, x: torch.fx.experimental.proxy_tensor.make_fx(c)(x),
}
for _name, _run in TRANSFORMS.items():
    _transform(_name, _run)


@kind
def replanned_and_verified(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    if hasattr(call, "pipeline"):
        call.pipeline.prepare(x)
        call.pipeline.flush()
        assert call.pipeline.plan.num_stages
        assert str(call.pipeline.program)
        assert call.pipeline.report
    return train(call, model, x)


@kind
def rows_that_change(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    return [train(call, model, fresh(rng, rows))[0] for rows in (3, 4, 8)]


@kind
def hooks_that_come_and_go(call: Any, model: nn.Module, x: Tensor, rng: random.Random) -> Any:
    module = rng.choice([m for m in model.modules() if isinstance(m, nn.Linear)])
    with registered(module.register_forward_hook(lambda m, args, out: out * 2)):
        first = train(call, model, x)
    return first, train(call, model, x)
