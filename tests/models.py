"""The models that the tests train: small, in float64, without dropout, equal for equal seeds.

Each ``Model`` says how to build it, what it takes, how its loss is found, and whether a step over microbatches gives
the whole batch's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import effects
import torch
import toys
from torch import Tensor, nn
from toys import D

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Draw:
    """Random inputs of one batch."""

    batch: int
    length: int
    generator: torch.Generator

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, dtype=torch.float64, generator=self.generator)

    def ids(self, vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(2, vocabulary, (self.batch, *shape), generator=self.generator)

    def mask(self) -> Tensor:
        """Ones, with padding behind all rows but the first."""
        rows = torch.arange(self.batch).remainder(3).unsqueeze(1)
        return (torch.arange(self.length) < self.length - rows).long()


@dataclass(frozen=True)
class Model:
    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[Draw], Inputs]
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    inside: bool = True  # the loss is a part of the output; otherwise it is a function of it
    lengths: tuple[int, ...] = (6, 9)  # one length: the model takes no other
    rows: int = 4  # of a batch that is cut into four microbatches
    mixes: str = ""  # why a step over microbatches differs from one over the whole batch

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()

    def inputs(self, batch: int, length: int, seed: int = 0) -> Inputs:
        return self.sample(Draw(batch, length, torch.Generator().manual_seed(seed)))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=3, n_head=2, use_cache=False, **off)
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=61, max_position_embeddings=32, **sizes, **off))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, use_cache=False, **sizes, **heads))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=61, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False, **sizes)
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    classes = {"num_labels": 5, "problem_type": "single_label_classification"}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes, **off, **classes))


def _resnet50() -> nn.Module:
    """ResNet-50 with an eighth of the width inside its bottlenecks."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes=5, width_per_group=8)


def _resnet50_frozen_norm() -> nn.Module:
    model = _resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _text(draw: Draw) -> Inputs:
    ids = draw.ids(61, draw.length)
    return (), {"input_ids": ids, "labels": ids}


def _padded_text(draw: Draw) -> Inputs:
    return (), {**_text(draw)[1], "attention_mask": draw.mask()}


def _translation(draw: Draw) -> Inputs:
    return (), {"input_ids": draw.ids(61, draw.length), "labels": draw.ids(61, draw.length - 2)}


def _pictures(draw: Draw) -> Inputs:
    return (), {"pixel_values": draw.floats(3, 8, 8), "labels": draw.ids(5)}


def _pairs(draw: Draw) -> Inputs:
    return (draw.ids(toys.VOCABULARY, draw.length),), {"features": draw.floats(5)}


def _dictionary(draw: Draw) -> Inputs:
    batch = {"x": draw.floats(draw.length, D), "mask": draw.mask(), "labels": draw.ids(toys.VOCABULARY, draw.length)}
    return (batch,), {}


def _labelled(draw: Draw) -> Inputs:
    return (), {"ids": draw.ids(toys.VOCABULARY, draw.length), "labels": draw.ids(toys.VOCABULARY, draw.length)}


def _ending(draw: Draw) -> Inputs:
    kwargs = _labelled(draw)[1]
    kwargs["labels"][:, -1] = -100
    return (), kwargs


def _floats(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, D),), {}


def _late(draw: Draw) -> Inputs:
    return (draw.floats(draw.length, D), draw.floats(draw.length, D)), {}


def _late_target(draw: Draw) -> Inputs:
    return _late(draw)[0], {"target": draw.floats(draw.length, D)}


def _nested(draw: Draw) -> Inputs:
    return ((draw.floats(draw.length, D), {"more": [draw.floats(draw.length, D), draw.floats(1, D)]}),), {}


def _options(draw: Draw) -> Inputs:
    scale = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
    return _floats(draw)[0], {"scale": scale, "flag": True, "times": 2}


def _image(size: int) -> Callable[[Draw], Inputs]:
    return lambda draw: ((draw.floats(3, size, size),), {})


def _bare(output: Tensor) -> Tensor:
    return output


def _first(output: Any) -> Tensor:
    return output[0]


def _item(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def _halves(output: Any) -> Tensor:
    return output.left.abs().mean() + toys.mean_square(output.right)


def _hidden(output: dict[str, Any]) -> Tensor:
    return sum(toys.mean_square(hidden) / i for i, hidden in enumerate(output["hidden"], 1))


def _toy(name: str, make: Callable[[], nn.Module], sample: Callable[[Draw], Inputs] = _floats, **facts: Any) -> Model:
    """A model whose output is one tensor, and the loss its mean square, unless ``facts`` say otherwise."""
    return Model(name, make, sample, **{"loss": toys.mean_square, "inside": False, **facts})


def _all() -> tuple[Model, ...]:
    inside = {"loss": _first, "inside": True}
    return (
        Model("gpt2", _gpt2, _text),
        Model("gpt2_padded", _gpt2, _padded_text),
        Model("bert", _bert, _padded_text),
        Model("llama", _llama, _text),
        Model("t5", _t5, _translation),
        Model("vit", _vit, _pictures, lengths=(8,)),
        _toy("resnet50", _resnet50, _image(32), lengths=(32,), rows=8, mixes="batch norm"),
        _toy("resnet50_frozen_norm", _resnet50_frozen_norm, _image(32), lengths=(32,)),
        _toy("sequential", lambda: toys.blocks(5)),
        _toy("unet", toys.UNet, lambda draw: _image(draw.length)(draw), lengths=(8, 12)),
        _toy("two_towers", toys.TwoTowers, _pairs, loss=_bare, inside=True),
        _toy("dict_in_out", toys.DictInOut, _dictionary, loss=_item, inside=True),
        _toy("tied", toys.Tied, _labelled, **inside),
        _toy("tied_thrice", toys.TiedThrice),
        _toy("used_twice", toys.UsedTwice),
        _toy("in_place", effects.InPlace),
        _toy("in_place_views", effects.InPlaceViews),
        _toy("buffers_in_place", effects.BuffersInPlace),
        _toy("buffers_rebound", effects.BuffersRebound),
        _toy("buffer_read", effects.BufferRead, mixes="a buffer that forward changes"),
        _toy("custom_functions", effects.CustomFunctions),
        _toy("no_grad", effects.NoGrad),
        _toy("autocast", effects.Autocast, mixes="gradients rounded to bfloat16"),
        _toy("long_skip", toys.LongSkip, _late),
        _toy("skip_to_loss", toys.SkipToLoss, _late_target, loss=_bare, inside=True),
        _toy("dataclass_output", toys.DataclassOutput, loss=lambda output: output.loss, inside=True),
        _toy("named_tuple_output", toys.NamedTupleOutput, loss=_halves),
        _toy("nested_output", toys.NestedOutput, loss=_hidden),
        _toy("nested_input", toys.NestedInput, _nested),
        _toy("options", toys.Options, _options),
        _toy("integers", toys.Integers),
        _toy("frozen", toys.Frozen),
        _toy("unused", toys.Unused),
        _toy("label_shift", effects.LabelShift, _ending, **inside),
        _toy("sizes", toys.Sizes),
    )


MODELS: dict[str, Model] = {model.name: model for model in _all()}
