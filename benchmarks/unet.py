"""A U-Net as in image generation: residual blocks, attention at the lowest resolutions, skips over the whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before, self.between = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(F.silu(self.between(self.first(F.silu(self.before(x))))))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
        return x + self.project(out.transpose(1, 2).reshape(x.shape))


class UNet(nn.Module):
    """Predicts the noise in images of shape ``[rows, 3, size, size]``; gives the mean squared error."""

    def __init__(self, width: int = 128, factors: tuple[int, ...] = (1, 2, 3, 4), blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths, now = [width], width
        for level, factor in enumerate(factors):
            for _ in range(blocks):
                self.down.append(self._block(now, now := width * factor, level > 1))
                widths.append(now)
            if level < len(factors) - 1:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                widths.append(now)
        self.middle = nn.Sequential(Block(now, now), Attention(now), Block(now, now))
        for level, factor in reversed([*enumerate(factors)]):
            for number in range(blocks + 1):
                block = self._block(now + widths.pop(), now := width * factor, level > 1)
                grow = level > 0 and number == blocks
                self.up.append(nn.Sequential(block, nn.Upsample(scale_factor=2)) if grow else block)
        self.leave = nn.Sequential(nn.GroupNorm(8, now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    @staticmethod
    def _block(inputs: int, outputs: int, attends: bool) -> nn.Module:
        return nn.Sequential(Block(inputs, outputs), Attention(outputs)) if attends else Block(inputs, outputs)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        x = self.enter(images + noise)
        kept = [x]
        for module in self.down:
            kept.append(x := module(x))
        x = self.middle(x)
        for module in self.up:
            x = module(torch.cat([x, kept.pop()], dim=1))
        return F.mse_loss(self.leave(x), noise)
