"""Augmentation: a batch of images in, the same images shifted, turned and mirrored out.

Each image's change is a function of (seed, epoch, sample), so no batch size, restart or process alters it.
Dims: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero.data.order import keyed_uniform


@dataclass(frozen=True)
class Augmentation:
    """shift: share of the side; rotate: degrees; flip: mirror half of the images."""

    shift: float = 0.0
    rotate: float = 0.0
    flip: bool = False

    def __call__(self, images: Tensor, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
        """images: (B, C, H, W) float.  samples: (B,) their indices in the training set.  returns: (B, C, H, W)"""
        drawn = keyed_uniform(seed, epoch, samples, 4).to(images.dtype)
        centred = drawn[:, :3] * 2 - 1  # (B, 3) in [-1, 1)
        angle = centred[:, 0] * math.radians(self.rotate)
        if self.flip:  # before the turn: mirrored pixels are moved, never interpolated
            images = torch.where((drawn[:, 3] < 0.5)[:, None, None, None], images.flip(-1), images)
        if not self.shift and not self.rotate:
            return images
        height, width = images.shape[-2:]
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos, -sin * height / width, centred[:, 1] * 2 * self.shift], dim=1),
            torch.stack([sin * width / height, cos, centred[:, 2] * 2 * self.shift], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)  # (B, H, W, 2)
        return F.grid_sample(images, grid, align_corners=False, padding_mode="zeros")
