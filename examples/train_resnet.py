"""Fine-tunes a ResNet over two devices on images, with the loss outside the model and frozen batch normalization.

    python examples/train_resnet.py --steps 10

Batch normalization in training uses the statistics of what it sees, here a microbatch, as in GPipe. Fine-tuning
freezes them, so that the loss is the unsplit model's; without ``freeze`` below it is near, not equal. With a network
the weights are ImageNet's and the images CIFAR-10's; without one, weights are random and the images are stripes drawn
here, whose direction is the class.
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from beside import options, report, train
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18
from train_gpt2 import go_offline_unless_the_hub_answers

import pipecompile

CLASSES = 10


def load_model() -> nn.Module:
    try:
        model = resnet18(weights=ResNet18_Weights.DEFAULT)
    except OSError:
        print("model: ResNet-18 with random weights, since ImageNet's cannot be reached")
        model = resnet18()
    model.fc = nn.Linear(model.fc.in_features, CLASSES)
    return model


def load_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(count, 3, 32, 32)`` and their classes ``(count,)``."""
    from datasets import load_dataset

    try:
        rows = load_dataset("uoft-cs/cifar10", split="train").shuffle(seed=0).select(range(count)).with_format("torch")
        return rows["img"][:].float() / 255, rows["label"][:]
    except (OSError, ValueError):
        print("images: stripes in ten directions, since CIFAR-10 cannot be reached")
    classes = torch.randint(CLASSES, (count,))
    angle = (classes * math.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    stripes = torch.sin((x * angle.cos() + y * angle.sin()) + torch.rand(count, 1, 1) * 6)
    return stripes[:, None].expand(-1, 3, -1, -1) + 0.3 * torch.randn(count, 3, 32, 32), classes


def freeze(model: nn.Module) -> nn.Module:
    """Batch normalization uses, and keeps, the statistics that it has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["images"]), batch["classes"])


def main() -> None:
    chosen = options(__doc__, batch=16).parse_args()
    go_offline_unless_the_hub_answers()
    model = freeze(load_model().train())
    images, classes = (each.split(chosen.batch) for each in load_images(chosen.steps * chosen.batch))
    data = [{"images": x, "classes": y} for x, y in zip(images, classes, strict=True)]
    twin = deepcopy(model)
    pipe = pipecompile.compile(model, devices=["cpu"] * chosen.stages, microbatches=chosen.microbatches)
    split = train(pipe, torch.optim.SGD(pipe.parameters(), lr=0.01, momentum=0.9), data, loss_of)
    report(pipe, split, train(twin, torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9), data, loss_of))


if __name__ == "__main__":
    main()
