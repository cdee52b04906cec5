"""Generation on accelerators: each layer's keys and values are where its stage is, which does the layer's work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from decoders import built, prompts
from long import some
from machines import EARLY, LATE, NO_CUDA, RANDOM, Machine
from scenes import piped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipecompile import PlanOptions

TOKENS = 6
HEAD = 8  # the size of a key, of Llama and of T5
OPTIONS: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
MULTIPLICATIONS = ("mm", "addmm")  # with the weight of a linear layer

NAMES = ("gpt2", "llama", "t5")
PINS = {"encoder": 0, "decoder.block.0": 1, "decoder.block.1": 2}  # T5's; else its decoder is one stage

CASES = [
    *(pytest.param(m, n, id=f"{m}-{n}") for m, n in some(product((LATE, EARLY, RANDOM[0]), NAMES), 4)),
    *(pytest.param(Machine("cuda"), n, id=f"cuda-{n}", marks=[pytest.mark.cuda, NO_CUDA]) for n in NAMES),
]


def staged(model: nn.Module, name: str, machine: Machine) -> nn.Module:
    if name == "t5":
        return piped(model, machine, where=(0, 1, 2), microbatches=2, plan=PlanOptions(pins=PINS))
    return piped(model, machine, where=(0, 1), microbatches=2)


def is_key(value: object) -> bool:
    """Whether a value has the shape of keys, which T5's biases of positions, also passed on, never have here."""
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == HEAD > TOKENS + 1


class Counted(TorchDispatchMode):
    """Counts matrix multiplications by the device of their result, and keys and values that change their device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[torch.device] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in MULTIPLICATIONS:
            self.found[out.device] += 1
        if is_key(out):
            self.moved += any(is_key(argument) and argument.device != out.device for argument in args)
        return out


def layers(cache: Any) -> Iterator[tuple[str, Any]]:
    """The layers of a cache, with the names of its parts."""
    parts = ("self_attention_cache", "cross_attention_cache") if hasattr(cache, "self_attention_cache") else ("",)
    for part in parts:
        for number, layer in enumerate((getattr(cache, part) if part else cache).layers):
            yield f"{part}{number}", layer


def stage_devices(model: nn.Module, name: str) -> dict[str, torch.device]:
    """The device of each layer's weights, by the names of ``layers``."""
    if name == "gpt2":
        return {str(i): block.attn.c_attn.weight.device for i, block in enumerate(model.transformer.h)}
    if name == "llama":
        return {str(i): layer.self_attn.k_proj.weight.device for i, layer in enumerate(model.model.layers)}
    found = {}
    for i, block in enumerate(model.decoder.block):
        found[f"self_attention_cache{i}"] = block.layer[0].SelfAttention.k.weight.device
        found[f"cross_attention_cache{i}"] = block.layer[1].EncDecAttention.k.weight.device
    return found


@pytest.mark.parametrize(("machine", "name"), CASES)
def test_keys_and_values_stay_on_the_device_of_their_stage(machine: Machine, name: str) -> None:
    model = built(name)
    wanted = model.generate(**prompts(padded=True), **OPTIONS)
    machine.start()
    pipe = staged(model, name, machine)
    for _ in range(2):  # the first time, the weights are moved in the middle
        ids = {key: value.to(machine[0]) for key, value in prompts(padded=True).items()}
        found = pipe.generate(**ids, **OPTIONS)
        where = stage_devices(model, name)
        assert len(set(where.values())) == 2
        assert {part: layer.keys.device for part, layer in layers(found["cache"])} == where
        assert {part: layer.values.device for part, layer in layers(found["cache"])} == where
        assert torch.equal(found.sequences.cpu(), wanted.sequences)
        for (part, ours), (_, theirs) in zip(layers(found["cache"]), layers(wanted["cache"]), strict=True):
            torch.testing.assert_close(ours.keys.cpu(), theirs.keys, rtol=1e-9, atol=1e-11, msg=part)
            torch.testing.assert_close(ours.values.cpu(), theirs.values, rtol=1e-9, atol=1e-11, msg=part)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_each_device_multiplies_with_its_own_weights(name: str) -> None:
    """As often as the unsplit model does, in each of two microbatches; T5's encoder takes a token for the decoder."""
    model = built(name)
    called: Counter[nn.Module] = Counter()
    hooks = [m.register_forward_hook(lambda m, *_: called.update([m])) for m in model.modules() if type(m) is nn.Linear]
    model.generate(**prompts(), **OPTIONS)
    if name == "t5":
        model(**prompts(), decoder_input_ids=torch.zeros(4, 1, dtype=torch.int64))
        called.subtract(m for m in model.encoder.modules() if m in called)
    for hook in hooks:
        hook.remove()
    LATE.start()
    pipe = staged(model, name, LATE)
    pipe.generate(**prompts(), **OPTIONS)  # captures
    with Counted() as counted:
        pipe.generate(**prompts(), **OPTIONS)
    wanted: Counter[torch.device] = Counter()
    last = LATE[len(pipe.pipeline.devices) - 1]
    for linear, calls in called.items():  # a head with the weight of the embedding is in the last stage
        wanted[last if linear is model.lm_head else linear.weight.device] += 2 * calls
    assert len(wanted) == (3 if name == "t5" else 2)
    assert counted.found == wanted
    assert counted.moved == 0


def test_a_moved_key_would_be_seen() -> None:
    LATE.start()
    with Counted() as counted:
        torch.zeros(1, 2, 3, HEAD).to(LATE[1]).to(LATE[0])
    assert counted.moved == 2


def test_beams_reorder_the_cache_of_each_stage() -> None:
    model = built("llama")
    options = {**OPTIONS, "num_beams": 3}
    wanted = model.generate(**prompts(), **options)
    EARLY.start()
    found = staged(model, "llama", EARLY).generate(**prompts(), **options)
    assert torch.equal(found.sequences.cpu(), wanted.sequences)
    assert [layer.keys.device for _, layer in layers(found["cache"])] == [EARLY[0], EARLY[1]]
