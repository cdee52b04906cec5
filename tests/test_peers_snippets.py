"""Models that other pipelines refuse, crash on, or train wrongly, each as small as it can be.

F01 to F18 failed, and W01 to W12 gave wrong numbers without a word, with torch 2.13 ``torch.distributed.pipelining``.
Here each gives the unsplit model's own loss, output, gradients and buffers on the whole batch, or is refused before
anything runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from effects import TimesTwo
from long import some
from oracle import assert_same, microbatched, step
from torch import Tensor, nn
from torch.nn import functional as F

import pipecompile
from pipecompile.errors import CaptureError

D = 16
ROWS = 8
EACH = pytest.mark.parametrize(("stages", "schedule"), some([(3, "1f1b"), (2, "gpipe"), (3, "gpipe"), (2, "1f1b")], 4))


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.ReLU())


class Blocks(nn.Module):
    """Blocks ``a`` to ``d``; a test says what the forward does with them."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = block(), block(), block(), nn.Linear(D, D)
        self.body = body
        self.double()

    def forward(self, x: Any, *rest: Any, **options: Any) -> Any:
        return self.body(self, x, *rest, **options)

    def chain(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def rows(count: int = ROWS, *, seed: int = 0) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(output: Any, target: Tensor) -> Tensor:
    """Mean squared error of all floating point tensors in an output."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum((F.mse_loss(t, target) for t in tensors), target.new_zeros(()))


def pipe_of(model: nn.Module, stages: int = 3, schedule: str = "1f1b", microbatches: int = 4, **options: Any) -> Any:
    return pipecompile.compile(
        model, ["cpu"] * stages, schedule=schedule, microbatches=microbatches, costs="count", **options
    )


def same_step(
    model: nn.Module,
    *args: Any,
    stages: int = 3,
    schedule: str = "1f1b",
    microbatches: int = 4,
    loss_fn: Callable[[Any, Tensor], Tensor] = square,
    target: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """One step, loss inside the pipeline, against the unsplit model on the whole batch; the pipeline."""
    pipe = pipe_of(model, stages, schedule, microbatches, loss_fn=loss_fn)
    target = rows(seed=9) if target is None else target
    again(pipe, *args, target=target, loss_fn=loss_fn, **kwargs)
    assert pipe.pipeline.plan.num_stages == stages
    return pipe


def again(pipe: Any, *args: Any, target: Tensor, loss_fn: Callable[..., Tensor] = square, **kwargs: Any) -> None:
    """A further step of a pipeline against its unsplit model."""
    actual = step(pipe, pipe.pipeline.model, lambda loss: loss, (args, {**kwargs, "target": target}))
    expected = step(
        lambda *a, **k: loss_fn(pipe.pipeline.model(*a, **k), target),
        pipe.pipeline.model,
        lambda loss: loss,
        (args, kwargs),
    )
    assert_same(actual, expected)


def loss_of(output: Any) -> Tensor:
    return output.loss


def same_labelled(model: nn.Module, inputs: dict[str, Any], stages: int, schedule: str = "1f1b") -> Any:
    """One step of a model that computes its own loss."""
    pipe = pipe_of(model, stages, schedule)
    assert_same(step(pipe, model, loss_of, ((), inputs)), step(model, model, loss_of, ((), inputs)))
    assert pipe.pipeline.plan.num_stages == stages
    return pipe


def same_output(pipe: Any, *args: Any, **kwargs: Any) -> None:
    """Without gradients: the model's own output, type and values."""
    with torch.no_grad():
        actual, expected = pipe(*args, **kwargs), pipe.pipeline.model(*args, **kwargs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)


def ids(length: int = 12, count: int = 4, vocabulary: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


# Refused or crashed elsewhere


@EACH
def test_f01_skip(stages: int, schedule: str) -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.d(self.c(self.b(h)) + h)

    same_step(Blocks(body), rows(), stages=stages, schedule=schedule)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **{"use_cache": False, **options})).double()


@pytest.mark.parametrize("masked", [False, True])
@EACH
def test_f02_llama_of_three_stages(stages: int, schedule: str, masked: bool) -> None:
    inputs = {"input_ids": ids(), "labels": ids()}
    if masked:
        inputs["attention_mask"] = (torch.arange(12) >= torch.tensor([[0], [2], [5], [1]])).long()
    same_labelled(llama(), inputs, stages, schedule)


def test_f03_gemma2_of_three_stages() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager", "use_cache": False}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).double()
    same_labelled(model, {"input_ids": ids(), "labels": ids()}, 3)


@pytest.mark.parametrize("stages", [2, 3])
def test_f04_t5(stages: int) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    model = T5ForConditionalGeneration(config).double()
    same_labelled(model, {"input_ids": ids(), "labels": ids(7, seed=1)}, stages)


@pytest.mark.parametrize("where", ["with", "decorator", "outer"])
def test_f05_no_grad(where: str) -> None:
    @torch.no_grad()
    def frozen(self: Blocks, x: Tensor) -> Tensor:
        return self.b(x)

    def body(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            h = h + (self.b(h) if where == "with" else frozen(self, h))
        return self.d(self.c(h))

    if where == "outer":
        same_output(pipe_of(Blocks(body)), rows())
    else:
        same_step(Blocks(body), rows())


def test_f06_autocast() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
        return self.d(self.c(self.b(x.float())))

    model, x, target = Blocks(body).float(), rows().float(), rows(seed=9).float()
    pipe = same_step(model, x, target=target, microbatches=1)
    assert any("enter_region" in stage.code for stage in pipe.pipeline.stages)

    def loss(output: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    in_order = microbatched(model, loss, ((x,), {}), 4, inside=False)  # the whole batch rounds to bfloat16 otherwise
    assert_same(step(pipe_of(model), model, loss, ((x,), {})), in_order, exact=True)


@EACH
def test_f07_late_input(stages: int, schedule: str) -> None:
    def body(self: Blocks, x: Tensor, y: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)))) + y

    same_step(Blocks(body), rows(), rows(seed=1), stages=stages, schedule=schedule)


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **off, **options})).double()


@EACH
def test_f08_labels(stages: int, schedule: str) -> None:
    same_labelled(gpt2(), {"input_ids": ids(), "labels": ids()}, stages, schedule)


def test_f09_scalar_keyword_arguments() -> None:
    def body(self: Blocks, x: Tensor, *, scale: Tensor | None = None, flag: bool = True, k: int = 2) -> Tensor:
        h = self.b(self.a(x))
        h = self.c(h) if flag else h
        return self.d(h if scale is None else h * scale) * k

    pipe = same_step(Blocks(body), rows(), scale=torch.tensor(0.5, dtype=torch.float64), flag=True, k=5)
    again(pipe, rows(), flag=False, k=3, target=rows(seed=9))
    again(pipe, rows(), target=rows(seed=9))


def test_f10_broadcast_keyword_argument() -> None:
    def body(self: Blocks, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x) + shift)))

    shift = torch.linspace(0, 1, D, dtype=torch.float64).requires_grad_()
    model = Blocks(body)
    same_step(model, rows(), shift=shift)
    gradients = []
    for module in (pipe_of(model), model):
        shift.grad = None
        module(rows(), shift=shift).pow(2).mean().backward()
        gradients.append(shift.grad)
    torch.testing.assert_close(*gradients)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return x


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_f11_branch_on_data(sign: float) -> None:
    """On an input it is a guard: both branches, captured once each."""

    def on_input(self: Blocks, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return self.chain(x)

    x = rows().abs()
    pipe = same_step(Blocks(on_input), sign * x)
    again(pipe, -sign * x, target=rows(seed=9))
    again(pipe, sign * x, target=rows(seed=9))
    assert pipe.pipeline.captures == 2


def test_f11_branch_on_an_activation() -> None:
    def on_activation(self: Blocks, x: Tensor) -> Tensor:
        return self.d(self.c(self.e(self.b(self.a(x)))))

    model = Blocks(on_activation)
    model.e = Doubling()
    pipe = same_step(model, rows(), microbatches=1)
    assert any("module e is kept whole" in note for note in pipe.pipeline.report.notes)
    with pytest.raises(CaptureError, match=r"module 'e'.*samples of the batch mix here"):  # the whole batch branches
        pipe_of(model, microbatches=4)(rows())
    pipe = pipe_of(
        model, microbatches=4, batching=pipecompile.Batching(allow_mixing=["e"])
    )  # relu's outputs: every microbatch does the same
    torch.testing.assert_close(pipe(rows()), model(rows()))

    def at_the_root(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.d(self.b(h * 2 if h.sum() > 0 else h))

    with pytest.raises(CaptureError, match=r"test_peers_snippets.py.*move it into a module of its own"):
        pipe_of(Blocks(at_the_root))(rows())


def test_f12_loop_over_an_item() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item()) + 1):
            x = self.a(x)
        return self.d(self.c(self.b(x)))

    pipe = same_step(Blocks(body), rows())
    again(pipe, rows() * 0.1, target=rows(seed=9))
    assert pipe.pipeline.captures == 2


def test_f13_write_to_a_view_across_the_cut() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h[:, :2]
        h2 = self.b(h)
        v.add_(1)
        return self.d(self.c(h2) + h)

    same_output(pipe_of(Blocks(body)), rows())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # so there is no gradient to compare
        Blocks(body)(rows()).sum().backward()


@dataclass
class Hidden:
    first: Tensor
    last: Tensor
    name: str = "hidden"


def test_f14_dataclass_output() -> None:
    def body(self: Blocks, x: Tensor) -> Hidden:
        h = self.a(x)
        return Hidden(h, self.d(self.c(self.b(h))))

    def loss_fn(output: Hidden, target: Tensor) -> Tensor:
        return F.mse_loss(output.last, target) + output.first.pow(2).mean()

    model = Blocks(body)
    pipe = pipe_of(model, loss_fn=loss_fn)
    again(pipe, rows(), target=rows(seed=9), loss_fn=loss_fn)
    bare = pipe_of(model)
    with torch.no_grad():
        actual, expected = bare(rows()), model(rows())
    assert isinstance(actual, Hidden)
    assert actual.name == "hidden"
    torch.testing.assert_close((actual.first, actual.last), (expected.first, expected.last))


def test_f15_dynamic_cache() -> None:
    model = llama(use_cache=True)
    inputs = {"input_ids": ids(), "labels": ids()}
    pipe = pipe_of(model)
    actual = step(lambda **k: pipe(**k).loss, model, lambda loss: loss, ((), inputs))
    expected = step(lambda **k: model(**k).loss, model, lambda loss: loss, ((), inputs))
    assert_same(actual, expected)
    assert any("use_cache is off" in note for note in pipe.pipeline.report.notes)
    assert model.config.use_cache is True


def test_f16_nested_input() -> None:
    def body(self: Blocks, batch: list[Any]) -> Tensor:
        x, rest = batch
        return self.d(self.c(self.b(self.a(x) + rest["k"])))

    same_step(Blocks(body), [rows(), {"k": rows(seed=1)}])


@pytest.mark.parametrize("first", [4, 6])
def test_f17_other_batch_size(first: int) -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x) + torch.arange(x.shape[0]).unsqueeze(1) * 0
        h = self.b(h).view(x.shape[0], 2, -1).flatten(1)
        return self.d(self.c(h))

    pipe = same_step(Blocks(body), rows(first), target=rows(first, seed=9), microbatches=2)
    for count in (10 - first, 8, 5, 1):
        again(pipe, rows(count), target=rows(count, seed=9))


def test_f17_llama_of_other_sizes() -> None:
    model = llama()
    pipe = pipe_of(model, microbatches=2)
    for count, length in ((4, 12), (2, 12), (4, 10), (4, 12)):
        inputs = {"input_ids": ids(length, count), "labels": ids(length, count)}
        assert_same(step(pipe, model, loss_of, ((), inputs)), step(model, model, loss_of, ((), inputs)))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_f18_one_microbatch(schedule: str) -> None:
    same_step(Blocks(Blocks.chain), rows(), stages=2, schedule=schedule, microbatches=1)


# Silently wrong elsewhere


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(64, D)
        self.body = nn.Sequential(*(block() for _ in range(6)))
        self.head = nn.Linear(D, 64, bias=False)
        self.head.weight = self.emb.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.emb(x)))


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@EACH
def test_w01_tied_weights(stages: int, schedule: str) -> None:
    model = Tied()
    pipe = same_step(model, ids(), target=ids(seed=1), loss_fn=cross_entropy, stages=stages, schedule=schedule)
    assert [tied.parameter for tied in pipe.pipeline.plan.tied] == ["emb.weight"]
    unsplit = Tied()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (pipe, unsplit)]
    for _ in range(2):
        for module, optimizer in zip((pipe, unsplit), optimizers, strict=True):
            optimizer.zero_grad()
            loss = module(ids(), target=ids(seed=1)) if module is pipe else cross_entropy(module(ids()), ids(seed=1))
            loss.backward()
            optimizer.step()
    assert model.head.weight is model.emb.weight
    for (name, parameter), expected in zip(model.named_parameters(), unsplit.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


@EACH
def test_w01_tied_weights_of_gpt2(stages: int, schedule: str) -> None:
    pipe = same_labelled(gpt2(), {"input_ids": ids(), "labels": ids()}, stages, schedule)
    assert [tied.parameter for tied in pipe.pipeline.plan.tied] == ["transformer.wte.weight"]


def test_w02_custom_backward() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        return self.d(self.c(TimesTwo.apply(self.b(self.a(x)))))

    same_step(Blocks(body), rows())


def valid_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels that are not -100."""
    return F.cross_entropy(logits, labels, ignore_index=-100)


@EACH
def test_w03_ignored_labels(stages: int, schedule: str) -> None:
    labels = ids(count=ROWS, vocabulary=D)[:, 0]
    labels[[0, 2, 3]] = -100  # the microbatches of two rows have 1, 0, 2 and 2 labels that count
    options = {"stages": stages, "schedule": schedule, "loss_fn": valid_entropy}
    same_step(Blocks(Blocks.chain), rows(), target=labels, **options)


@EACH
def test_w04_empty_microbatch(stages: int, schedule: str) -> None:
    labels = ids(count=ROWS, vocabulary=D)[:, 0]
    labels[4:6] = -100
    options = {"stages": stages, "schedule": schedule, "loss_fn": valid_entropy}
    pipe = same_step(Blocks(Blocks.chain), rows(), target=labels, **options)
    assert not any(p.grad is not None and p.grad.isnan().any() for p in pipe.parameters())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_w05_uneven_microbatches(schedule: str) -> None:
    same_step(Blocks(Blocks.chain), rows(7), target=rows(7, seed=9), schedule=schedule)


def test_w06_optional_mask() -> None:
    def body(self: Blocks, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.b(self.a(x))
        return self.d(self.c(h if mask is None else h * mask))

    mask = (rows(seed=3) > 0).double()
    pipe = same_step(Blocks(body), rows(), mask=None)
    again(pipe, rows(), mask=mask, target=rows(seed=9))
    again(pipe, rows(), mask=1 - mask, target=rows(seed=9))
    again(pipe, rows(), target=rows(seed=9))
    assert pipe.pipeline.captures <= 3


def test_w07_python_flag() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.d(self.c(self.b(h)) if self.flag else self.c(h))

    model = Blocks(body)
    model.flag = True
    pipe = same_step(model, rows())
    for flag in (False, True, False):
        model.flag = flag
        again(pipe, rows(), target=rows(seed=9))
    assert pipe.pipeline.captures == 2


def test_w07_counter() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        self.calls += 1
        return self.chain(x) * (2 if self.calls % 3 == 0 else 1)

    model, unsplit = Blocks(body), Blocks(body)
    model.calls = unsplit.calls = 0
    pipe = pipe_of(model)
    for calls in range(1, 8):
        actual, expected = (step(m, m, lambda y: y.pow(2).mean(), ((rows(),), {})) for m in (pipe, unsplit))
        assert_same(actual, expected)
        assert model.calls == unsplit.calls == calls
    assert pipe.pipeline.captures == 2


def test_w08_dropout_in_eval() -> None:
    def body(self: Blocks, x: Tensor) -> Tensor:
        return self.d(F.dropout(self.c(self.b(self.a(x))), 0.5, self.training))

    model = Blocks(body)
    pipe = pipe_of(model)
    torch.manual_seed(0)
    dropped = pipe(rows())
    torch.testing.assert_close(pipe.eval()(rows()), model(rows()))
    assert not torch.allclose(dropped, model(rows()))
    torch.manual_seed(0)
    torch.testing.assert_close(pipe.train()(rows()), dropped)
    assert pipe.pipeline.captures == 2


class Outputs(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, Tensor]


@EACH
def test_w09_batch_norm(stages: int, schedule: str) -> None:
    """Statistics are those of each microbatch, as in GPipe, and that is said; steps are counted once a batch."""

    def body(self: Blocks, x: Tensor) -> Tensor:
        return self.d(self.c(self.norm(self.b(self.a(x)))))

    model = Blocks(body)
    model.norm = nn.BatchNorm1d(D).double()
    pipe = pipe_of(model, stages, schedule, 2)
    actual = step(pipe, model, lambda out: out.square().mean(), ((rows(),), {}))
    expected = microbatched(model, lambda out: out.square().mean(), ((rows(),), {}), 2, False)
    assert_same(actual, expected, buffers=False)
    assert int(actual.buffers["norm.num_batches_tracked"]) == 1
    torch.testing.assert_close(actual.buffers["norm.running_var"], expected.buffers["norm.running_var"])
    assert any(
        "batch normalization uses each microbatch's statistics" in line for line in pipe.pipeline.report.microbatches
    )
    whole = pipe_of(model, stages, schedule, 1)
    reference = step(model, model, lambda out: out.square().mean(), ((rows(),), {}))
    assert_same(step(whole, model, lambda out: out.square().mean(), ((rows(),), {})), reference)


@pytest.mark.parametrize("kind", [dict, Outputs])
def test_w10_outputs(kind: type) -> None:
    def body(self: Blocks, x: Tensor) -> Any:
        h0 = self.a(x)
        h = self.b(h0)
        return kind(logits=self.d(self.c(h)), hidden=(h0, h))

    def loss_fn(output: Any, target: Tensor) -> Tensor:
        assert type(output) is kind
        logits, hidden = output.values() if isinstance(output, dict) else output
        return F.mse_loss(logits, target) + hidden[0].pow(2).mean() + hidden[1].abs().mean()

    pipe = pipe_of(Blocks(body), loss_fn=loss_fn)
    again(pipe, rows(), target=rows(seed=9), loss_fn=loss_fn)
    same_output(pipe_of(Blocks(body)), rows())


def test_w11_variable_length() -> None:
    model = gpt2()
    pipe = pipe_of(model)
    for length in (6, 9, 6):
        inputs = {"input_ids": ids(length), "labels": ids(length)}
        assert_same(step(pipe, model, loss_of, ((), inputs)), step(model, model, loss_of, ((), inputs)))
    assert pipe.pipeline.captures == 1


class Keys(nn.Module):
    """A buffer that is not saved, batch norm, an unused child, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("scale", torch.full((D,), 0.5), persistent=False)
        self.register_buffer("shift", torch.full((D,), 0.1))
        self.a, self.b, self.unused = block(), block(), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(D)
        self.again = self.b
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.b(self.a(x * self.scale) + self.shift)))


def test_w12_keys() -> None:
    model, expected = Keys(), Keys()
    pipe = pipe_of(model, stages=2, microbatches=1)
    pipe(rows()).sum().backward()
    expected(rows()).sum().backward()
    assert list(pipe.state_dict()) == list(expected.state_dict())
    assert [n for n, _ in pipe.named_parameters()] == [n for n, _ in expected.named_parameters()]
    torch.testing.assert_close(dict(pipe.state_dict()), dict(expected.state_dict()))
    assert pipe.load_state_dict(expected.state_dict()) == expected.load_state_dict(model.state_dict())


def test_w12_keys_of_albert() -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AlbertForMaskedLM(AlbertConfig(**sizes, **off, num_hidden_layers=3, num_attention_heads=4)).double()
    keys = list(model.state_dict())
    pipe = same_labelled(model, {"input_ids": ids(), "labels": ids()}, 2)
    assert list(pipe.state_dict()) == keys
    assert keys


def test_every_snippet_has_its_test() -> None:
    names: Mapping[str, Any] = globals()
    named = {name.split("_")[1] for name in names if name.startswith("test_")}
    assert named >= {f"f{i:02}" for i in range(1, 19)} | {f"w{i:02}" for i in (1, 2, 5, 6, 7, 8, 10, 11, 12)}


@dataclass
class Sampled(OrderedDict[str, Any]):
    """An output as diffusers has them: torch knows how to take it apart, and no names for its parts."""

    sample: Any = None

    def __post_init__(self) -> None:
        self["sample"] = self.sample


pytree.register_pytree_node(Sampled, lambda value: ([*value.values()], [*value]), lambda v, keys: Sampled(*v))


def test_an_output_whose_class_names_no_parts() -> None:
    def body(self: Blocks, x: Tensor) -> Any:
        return Sampled(sample=self.b(self.a(x)))

    model = Blocks(body)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    out = pipe(rows())
    assert type(out) is Sampled
    assert out["sample"] is out.sample
    torch.testing.assert_close(out.sample, model(rows()).sample)


def test_a_list_in_an_output_of_a_class_of_its_own() -> None:
    def body(self: Blocks, x: Tensor) -> Any:
        h = self.a(x)
        return Sampled(sample=[h, self.b(h)])

    model = Blocks(body)
    pipe = pipecompile.compile(model, ["cpu", "cpu"], microbatches=2, costs="count")
    out, expected = pipe(rows()), model(rows())
    assert type(out.sample) is list
    assert out["sample"] is out.sample
    torch.testing.assert_close(out.sample, expected.sample)
