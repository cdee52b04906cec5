"""Trains CLIP over two devices: two towers, one for images and one for texts, that meet in a contrastive loss.

    python examples/train_clip.py --steps 10

The loss compares each image with each text of the batch, so samples mix. It is the end of the model: pipecompile
computes it once from the joined features, and the loss is that of the whole batch, not of its microbatches. With a
network it takes OpenAI's weights; without one, a small CLIP from a configuration. The images are drawn here: coloured
squares, whose texts name colour and place.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from beside import options, report, train
from train_gpt2 import go_offline_unless_the_hub_answers

import pipecompile

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
WORDS = ("", "a", "square", *COLOURS, "at", *map(str, range(16)))  # of the tokenizer that is made here


def load_model() -> Any:
    from transformers import CLIPConfig, CLIPModel

    try:
        return CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
    except OSError:
        print("model: a small CLIP with random weights, since OpenAI's cannot be reached")
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        ends = {"bos_token_id": 1, "eos_token_id": len(WORDS), "pad_token_id": 0}
        text = {**sizes, **ends, "vocab_size": len(WORDS) + 1, "max_position_embeddings": 8, "projection_dim": 32}
        vision = {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 32}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def tokens(texts: list[str], model: Any) -> torch.Tensor:
    if model.config.text_config.vocab_size > len(WORDS) + 1:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained("openai/clip-vit-base-patch32")
        return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    return torch.tensor([[*(WORDS.index(word) for word in text.split()), len(WORDS)] for text in texts])


def batches(model: Any, count: int, size: int) -> list[dict[str, Any]]:
    found, width = [], model.config.vision_config.image_size
    for _ in range(count):
        images, texts = torch.zeros(size, 3, width, width), []
        for image in images:
            colour, place = list(COLOURS)[int(torch.randint(4, ()))], int(torch.randint(16, ()))
            top, left = place // 4 * width // 4, place % 4 * width // 4
            image[:, top : top + width // 4, left : left + width // 4] = torch.tensor(COLOURS[colour])[:, None, None]
            texts.append(f"a {colour} square at {place}")
        found.append({"input_ids": tokens(texts, model), "pixel_values": images, "return_loss": True})
    return found


def main() -> None:
    chosen = options(__doc__, batch=16).parse_args()
    go_offline_unless_the_hub_answers()
    model = load_model()
    data = batches(model, chosen.steps, chosen.batch)
    twin = deepcopy(model.train())
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.Adam(pipe.parameters(), lr=1e-3), data)
    report(pipe, split, train(twin, torch.optim.Adam(twin.parameters(), lr=1e-3), data))
    print(*pipe.pipeline.report.microbatches, sep="\n")


if __name__ == "__main__":
    main()
