"""What an entry of the zoo is, and how one is made from a Hugging Face class.

Every model is tiny and random: weights from a seed, then moved by a little noise so that no bias is zero, no gain is
one and no gradient vanishes by chance. Nothing draws random numbers in training: dropout, layer drop, masking of inputs
and the like are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from models import Draw, Inputs, Model
from oracle import tree_map
from torch import Tensor, nn

VOCABULARY = 61
CLASSES = 5
NOISE = 0.02
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEADS = {"num_key_value_heads": 2}
ROWS = (4, 6)  # batch sizes
SINGLE = {"dtype": torch.float32}  # facts of a model that cannot compute in float64


@dataclass(frozen=True)
class Entry(Model):
    """A model with its family.

    Attributes:
        dtype: float64 where the model can compute in it.
        whole: why its batch cannot be cut into microbatches; empty if it can.
        needs: a module that its loss imports and that may not be installed.
    """

    family: str = ""
    dtype: torch.dtype = torch.float64
    whole: str = ""
    lengths: tuple[int, ...] = (8, 12)
    needs: str = ""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(NOISE * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model._apply(lambda t: t.to(self.dtype.to_complex()) if t.is_complex() else self._cast(t)).train()

    def inputs(self, batch: int, length: int, seed: int = 0) -> Inputs:
        return tree_map(self._cast, super().inputs(batch, length, seed))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def hugging_face(
    name: str, model: str, sample: Callable[[Draw], Inputs], config: dict[str, Any], **facts: Any
) -> Entry:
    """An entry for a class of transformers, by the class's name and its configuration's arguments."""

    def make() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        given = {key: value for key, value in config.items() if value is not None}
        return kind(quiet(kind.config_class(**given)))

    return Entry(name, make, sample, **facts)


def quiet(config: Any) -> Any:
    """The configuration, and those inside it, with all that is random in training off, and no cache."""
    for part in _configs(config):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name in ("mask_time_prob", "mask_feature_prob")):
                setattr(part, name, 0.0)
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict"):
            yield from _configs(value)


# Samples


def text(draw: Draw) -> Inputs:
    ids = draw.ids(VOCABULARY, draw.length)
    return (), {"input_ids": ids, "labels": ids}


def padded_text(draw: Draw) -> Inputs:
    """Text with padding behind all rows but the first of three; every label counts."""
    return (), {**text(draw)[1], "attention_mask": draw.mask()}


def classified_text(draw: Draw) -> Inputs:
    return (), {"input_ids": draw.ids(VOCABULARY, draw.length), "labels": draw.ids(CLASSES)}


def translation(draw: Draw) -> Inputs:
    return (), {"input_ids": draw.ids(VOCABULARY, draw.length), "labels": draw.ids(VOCABULARY, draw.length - 2)}


def pictures(size: int, labels: bool = True) -> Callable[[Draw], Inputs]:
    def sample(draw: Draw) -> Inputs:
        images = draw.floats(3, size, size)
        return (), {"pixel_values": images, "labels": draw.ids(CLASSES)} if labels else {"pixel_values": images}

    return sample


# Losses of outputs


def mean_square(output: Tensor) -> Tensor:
    return output.pow(2).mean()


def all_square(output: Any) -> Tensor:
    """The mean squares of all floating-point tensors of an output that wants gradients, each with its own weight."""
    from oracle import leaves

    found = [t for _, t in leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    return torch.stack([mean_square(tensor) / i for i, tensor in enumerate(found, 1)]).sum()
