"""``generate`` of transformers runs in the stages, through which its cache passes: the unsplit model's tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import transformers
from decoders import LENGTH, MODELS, built, prompts
from long import LONG, some
from torch import Tensor, nn

import pipecompile
from pipecompile.compiler.generation import StagedEncoder
from pipecompile.errors import CaptureError, ExactnessError, InputError

TOKENS = 7
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 8},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}
pytestmark = pytest.mark.filterwarnings("ignore:the model has been captured")  # a pipe for all tests
FEW = ("greedy", "sampled", "beams")
CASES = [(name, way) for name in MODELS for way in (WAYS if LONG else FEW) if LONG or name in ("gpt2", "llama", "t5")]


@cache
def models() -> dict[str, Any]:
    """All models: transformers notes the class of each in a table, on which captures depend."""
    return {name: built(name) for name in MODELS}


@cache
def pair(name: str) -> tuple[Any, Any]:
    """A pipe, and its model on its own. Pipes are kept, so that ways to generate share captures."""
    model = models()[name]
    return pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=2, costs="count"), model


def same_environment() -> Any:
    """Pytest names each test in the environment, which transformers' attention reads, so that captures depend on it."""
    return patch.dict(os.environ, {"PYTEST_CURRENT_TEST": "any"})


def generated(module: Any, padded: bool = False, rows: int = 4, **options: Any) -> Tensor:
    torch.manual_seed(7)
    ends = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
    with same_environment():
        found = module.generate(
            **{**prompts(rows, padded), **ends, **options}, return_dict_in_generate=True, output_logits=True
        )
    assert all(step.isfinite().all() for step in found.logits)
    tokens: Tensor = found.sequences
    return tokens


@pytest.mark.parametrize(("name", "way"), CASES)
def test_tokens_are_the_unsplit_models(name: str, way: str) -> None:
    if (name, way) in {("mamba", "static"), ("mistral", "static")}:
        pytest.skip("transformers has no static cache for it, or one of another size")
    pipe, model = pair(name)
    padded = way != "several"
    wanted = generated(model, padded, **WAYS[way])
    assert len(wanted.unique()) > 3
    assert torch.equal(generated(pipe, padded, **WAYS[way]), wanted)


@pytest.mark.parametrize(("name", "most"), [("llama", 2), ("t5", 3)])
def test_a_prompt_and_all_tokens_are_a_capture_each(name: str, most: int) -> None:
    """T5's encoder is a third one. The other lengths and numbers of rows need no capture of their own."""
    pipe, model = pair(name)
    generated(pipe, padded=True)
    before = pipe.pipeline.captures
    for rows in (3, 5):
        options = {"min_new_tokens": TOKENS + rows, "max_new_tokens": TOKENS + rows}
        assert torch.equal(generated(pipe, True, rows, **options), generated(model, True, rows, **options))
    assert pipe.pipeline.captures == before
    if not LONG:  # other ways make others
        assert before == most
    counts = [int(line.split(" reads ")[1].split()[0]) for line in pipe.pipeline.report.caches]
    assert sum(counts) == 2 * 2 * (2 if name == "t5" else 1)  # keys and values, two layers, and those of the encoder


def layers(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield layer.keys
        yield layer.values


def test_a_cache_of_the_caller_is_filled_in_place() -> None:
    pipe, model = pair("llama")
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad(), same_environment():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            found, wanted = pipe(ids[:, start:end], cache=ours), model(ids[:, start:end], cache=theirs)
            assert found.cache is ours
            torch.testing.assert_close(found.logits, wanted.logits)
    assert ours.get_seq_length() == 6
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(layers(ours), layers(theirs), strict=True):
        torch.testing.assert_close(mine, other)
    ours.crop(-1)
    with torch.no_grad(), same_environment():
        again = pipe(ids[:, 5:], cache=ours).logits
    torch.testing.assert_close(again, wanted.logits)


def test_a_conversation_goes_on_with_its_cache() -> None:
    found = []
    for module in pair("llama"):
        kept = transformers.DynamicCache(config=module.config)
        first = generated(module, cache=kept)
        more = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        found.append(generated(module, **more, cache=kept, max_new_tokens=3, min_new_tokens=3))
        assert kept.get_seq_length() == LENGTH + TOKENS + 2  # the last token has not been read
    assert torch.equal(*found)


def test_learned_keys_and_values_get_the_unsplit_models_gradients() -> None:
    """As in prefix tuning."""
    pipe, model = pair("llama")
    batch = prompts()
    mask = torch.cat([torch.ones(4, 3, dtype=torch.int64), batch["attention_mask"]], 1)
    found = []
    for module in (pipe, model):
        prefix = torch.randn(2, 2, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        prefix.requires_grad_()
        kept = transformers.DynamicCache()
        for number, (keys, values) in enumerate(prefix):
            kept.update(keys.expand(4, 2, 3, 8), values.expand(4, 2, 3, 8), number)
        out = module(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["input_ids"], cache=kept)
        out.loss.backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        found.append((out.loss.detach(), prefix.grad, gradients))
        module.zero_grad()
    assert found[1][1].abs().max() > 0
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*past_key_values. (is deprecated|and .cache. are set):FutureWarning")  # by PEFT
def test_prefix_tuning_trains_and_does_not_generate() -> None:
    """PEFT's ``generate`` passes the prefix as a second cache, which the unsplit model leaves unused."""
    model = built("llama").train()
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], schedule="zb-v", microbatches=2, costs="count")
    batch, found = prompts(padded=True), []
    for module in (pipe, model):
        torch.manual_seed(0)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned = peft.get_peft_model(module, config).double()
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}))
        if module is pipe:
            with pytest.raises(CaptureError, match=r"2 key-value caches.*; pass one, .* prefix tuning"):
                generated(tuned.eval())
    assert next(iter(found[1][1].values())).abs().max() > 0
    torch.testing.assert_close(*found)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*past_key_values. is deprecated:FutureWarning")  # by PEFT
def test_a_tuned_prefix_generates_as_the_cache_of_the_models_own_generate() -> None:
    """The prefix is in the tokens that whole forwards choose, without any cache."""
    pipe, model = pair("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    prompt = prompts()["input_ids"]
    wanted = prompt
    for _ in range(3):
        chosen = tuned(input_ids=wanted, attention_mask=torch.ones_like(wanted)).logits[:, -1:].argmax(-1)
        wanted = torch.cat([wanted, chosen], 1)
    there = torch.zeros(len(prompt), 3, dtype=torch.int64)
    ids = torch.cat([there, prompt], 1)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None}
    found = pipe.generate(**options, cache=tuned.get_prompt(len(prompt)))
    assert torch.equal(found[:, 3:], wanted)
    assert not torch.equal(wanted, pipe.generate(**{**options, "input_ids": prompt, "attention_mask": None}))


PROMPTS: dict[str, Any] = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # by PEFT
@pytest.mark.parametrize(
    ("name", "kind"), some([("llama", "prompt tuning"), ("llama", "p-tuning"), ("t5", "p-tuning")], 3)
)
def test_learned_prompts_generate_the_unsplit_models_tokens(name: str, kind: str) -> None:
    make, options = PROMPTS[kind]
    short = {} if LONG else {"min_new_tokens": 3, "max_new_tokens": 3}
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    found = []
    for module in (pipecompile.compile(built(name), ["cpu", "cpu"], microbatches=2, costs="count"), built(name)):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(module, make(task_type=task, num_virtual_tokens=3, **options)).double().eval()
        found.append(generated(tuned, padded=True, **short))
    assert torch.equal(*found)
    assert not torch.equal(found[1], generated(built(name), padded=True, **short)), "the prompt does not matter"


def test_a_pipe_of_an_adapted_model_says_where_to_compile() -> None:
    tuned = peft.get_peft_model(built("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    pipe = pipecompile.compile(tuned, ["cpu", "cpu"], microbatches=2, costs="count")
    with pytest.raises(InputError, match=r"never the pipe.*; compile the model inside \(peft\.get_peft_model\("):
        generated(pipe)


class Forgetful(nn.Module):
    """Fills a cache and does not return it; or, asked to, returns it and leaves out its own part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any, other: Any = None) -> Any:
        keys, _ = cache.update(self.linear(x), x, 0)
        return self.out(keys.sum(-2)), other


def test_what_would_be_lost_is_refused() -> None:
    pipe = pipecompile.compile(Forgetful(), ["cpu", "cpu"], microbatches=2, costs="count")
    x = torch.randn(4, 2, 3, 4)
    with pytest.raises(CaptureError, match="does not return it, so what forward stores in it would be lost"):
        pipe(x, transformers.DynamicCache())
    one, two = transformers.DynamicCache(), transformers.DynamicCache()
    with pytest.raises(CaptureError, match="2 key-value caches"):
        pipe(x, one, two)
    assert len(one) == len(two) == 0
    odd = transformers.DynamicCache()
    odd.stream = object()
    with pytest.raises(InputError, match=r"the cache holds a object in 'stream', which is neither a tensor nor"):
        pipe(x, odd)
    layer = transformers.cache_utils.BaseQuantizedLayer
    odd = transformers.Cache(layers=[type("Layer", (layer,), {"_quantize": None, "_dequantize": None})()])
    with pytest.raises(InputError, match=r"the cache holds a Layer in 'layers.0'"):
        pipe(x, odd)


def test_a_pipe_with_a_loss_function_does_not_generate() -> None:
    pipe = pipecompile.compile(built("llama"), ["cpu"], loss_fn=lambda out, target: out.logits.sum())
    with pytest.raises(InputError, match="compiled without loss_fn="):
        generated(pipe)


def test_a_cache_that_a_stage_computes_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the unsplit model sees the cache."""
    pipe = pipecompile.compile(built("gpt2"), ["cpu", "cpu"], microbatches=2, costs="count")
    update = transformers.cache_utils.DynamicLayer.update

    def scaled(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        fake = type(keys).__name__ == "FakeTensor"
        return update(self, keys * 1.01 if fake else keys, values, *args, **kwargs)

    monkeypatch.setattr(transformers.cache_utils.DynamicLayer, "update", scaled)
    with pytest.raises(ExactnessError, match=r"output 'cache\.layers_0_keys' differs"):
        pipe(**prompts(), use_cache=True)


def test_labels_among_the_arguments_of_generate_are_not_for_the_encoder() -> None:
    """As Seq2SeqTrainer passes them; an encoder ignores them, but the whole model would compute a loss."""

    class Pipe(nn.Module):
        def forward(self, input_ids: Tensor, labels: Any = None, decoder_input_ids: Any = None, **_: Any) -> Any:
            assert labels is None
            assert decoder_input_ids is not None
            states = input_ids[..., None].float()
            return transformers.modeling_outputs.Seq2SeqLMOutput(encoder_last_hidden_state=states)

    ids = prompts()["input_ids"]
    found = StagedEncoder(Pipe(), nn.Identity())(input_ids=ids, labels=ids, return_dict=True)
    assert torch.equal(found.last_hidden_state[..., 0], ids.float())


class Seeing(transformers.LlavaForConditionalGeneration):
    """Has an encoder of images, which counts its calls by ``generate`` outside of the model's forward."""

    encoded = 0

    def __init__(self) -> None:
        heads = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        eyes = transformers.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **heads)
        words = transformers.LlamaConfig(**heads, bos_token_id=0, eos_token_id=1, pad_token_id=2, vocab_size=32)
        options = {"image_token_index": 5, "vision_feature_layer": -1}
        super().__init__(transformers.LlavaConfig(vision_config=eyes, text_config=words, **options))

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        Seeing.encoded += 1
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)


def pictures() -> dict[str, Tensor]:
    ids = torch.randint(6, 32, (4, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 1:5] = 5
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_stages_encode_the_images_of_a_prompt() -> None:
    torch.manual_seed(0)
    model = Seeing().double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 6.0
    pipe = pipecompile.compile(copy.deepcopy(model), ["cpu", "cpu"], microbatches=1, costs="count")
    wanted = generated(model, **pictures())
    assert len(wanted.unique()) > 3
    other = pictures() | {"pixel_values": -pictures()["pixel_values"]}
    assert not torch.equal(wanted, generated(model, **other))
    before = Seeing.encoded
    assert torch.equal(generated(pipe, **pictures()), wanted)
    assert Seeing.encoded == before
    assert pipe.pipeline.captures == 2
    if LONG:
        assert torch.equal(generated(pipe, **other), generated(model, **other))
        ways = {"num_beams": 2}
        assert torch.equal(generated(pipe, **pictures(), **ways), generated(model, **pictures(), **ways))
        assert Seeing.encoded == before + 3  # twice by the model


def test_images_of_rows_that_are_repeated_are_encoded_on_one_device() -> None:
    """The features are repeated, so they are needed before the first call."""

    class Apart(Seeing):
        def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
            raise RuntimeError("Expected all tensors to be on the same device")

    pipe = pipecompile.compile(Apart().double().eval(), ["cpu", "cpu"], microbatches=1, costs="count")
    with pytest.raises(RuntimeError, match="same device"):
        generated(pipe, **pictures(), num_beams=2)
    pipe.lm_head.to("meta")
    with pytest.raises(InputError, match="weights are on the devices of several stages; pass mm_encoder_outputs="):
        generated(pipe, **pictures(), num_beams=2)
