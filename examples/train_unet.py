"""Trains the U-Net of Stable Diffusion over two devices to find the noise in a picture.

    pip install diffusers
    python examples/train_unet.py --steps 10

Its skip connections cross the cut, and each stage gets the timesteps and the text's states that it needs. With a
network it takes the weights of Stable Diffusion 1.5; without one, a small U-Net of the same class from a configuration.
Latents and texts are random.
"""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import torch
from beside import options, report, train
from train_gpt2 import go_offline_unless_the_hub_answers

import pipecompile


def load_model() -> Any:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    try:
        name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        model = UNet2DConditionModel.from_pretrained(name, subfolder="unet")
    except OSError:
        print("model: a small U-Net with random weights, since Stable Diffusion's cannot be reached")
        model = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=32,
        )
    return model.train(), DDPMScheduler(num_train_timesteps=1000)


def batches(model: Any, noises: Any, count: int, size: int) -> list[dict[str, torch.Tensor]]:
    width, features = model.config.sample_size, model.config.cross_attention_dim
    found = []
    for _ in range(count):
        latents, noise = torch.randn(2, size, model.config.in_channels, width, width)
        times = torch.randint(noises.config.num_train_timesteps, (size,))
        noisy = noises.add_noise(latents, noise, times)
        text = torch.randn(size, 8, features)
        found.append({"noisy": noisy, "times": times, "text": text, "noise": noise})
    return found


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(batch["noisy"], batch["times"], encoder_hidden_states=batch["text"]).sample
    return torch.nn.functional.mse_loss(found, batch["noise"])


def main() -> None:
    chosen = options(__doc__).parse_args()
    if importlib.util.find_spec("diffusers") is None:
        print("this example needs diffusers, which is not installed: pip install diffusers")
        return
    go_offline_unless_the_hub_answers()
    model, noises = load_model()
    data = batches(model, noises, chosen.steps, chosen.batch)
    twin = deepcopy(model)
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.Adam(pipe.parameters(), lr=1e-4), data, loss_of)
    report(pipe, split, train(twin, torch.optim.Adam(twin.parameters(), lr=1e-4), data, loss_of))


if __name__ == "__main__":
    main()
