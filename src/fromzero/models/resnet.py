"""resnet: images in, class scores or numbers out, through blocks that add something to what they are given.

Names, shapes and arithmetic are those of torchvision's public weights, so that their files load as they are.
Dims: B batch, C channels, H height, W width, D width of the features, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # a layer; arXiv:1512.03385 table 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]: red, green, blue
STRIDES = {"full": 32, "small": 8}  # from the image to the last features: no smaller image has a pixel for each


class ResNet(nn.Module):
    """A stem, four layers of residual blocks that halve the image three times, then mean over the image and a head.

    depth:          18 and 34 have blocks of two 3×3 convolutions; 50, 101 and 152 have bottlenecks of 1×1, 3×3 and 1×1
    stem:           full: 7×7 with stride 2 and a max-pool, as in the weights; small: 3×3 with stride 1, for images under 64 px
    zero_residual:  let each block begin as its shortcut (arXiv:1706.02677 section 5.1); the public weights began without it

    Pixels come in [0, 1] and are set to ImageNet's mean and spread here: with one channel, to the mean of the three.
    source: arXiv:1512.03385 sections 3 and 4.1, small stem section 4.2; the stride of a bottleneck is in its 3×3
            convolution (arXiv:1706.02677 section 5.1), not in the first 1×1; He init by fan-out arXiv:1502.01852 section 2.2
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: Sequence[int], outputs: int, *, depth: int = 18, stem: str = "full", zero_residual: bool = False) -> None:
        super().__init__()
        if len(inputs) != 3:
            raise ValueError(f"resnet takes images (channels, height, width); the data has inputs of shape {tuple(inputs)}")
        if depth not in BLOCKS:
            raise ValueError(f"resnet has no depth {depth}; give {', '.join(map(str, BLOCKS))}")
        if stem not in STRIDES:
            raise ValueError(f"resnet has no stem '{stem}'; give {' or '.join(STRIDES)}")
        channels, height, width = inputs
        if min(height, width) < STRIDES[stem]:
            mend = "give stem: small, or larger images" if stem == "full" else "give larger images, or cnn with few channels"
            raise ValueError(f"the {stem} stem needs images of {STRIDES[stem]}×{STRIDES[stem]} or more, these are {height}×{width}; {mend}")
        self.small = stem == "small"
        self.register_buffer("mean", _per_channel(MEAN, channels), persistent=False)
        self.register_buffer("std", _per_channel(STD, channels), persistent=False)
        self.conv1 = nn.Conv2d(channels, 64, 3 if self.small else 7, 1 if self.small else 2, 1 if self.small else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        kind = Basic if depth < 50 else Bottleneck
        counts = BLOCKS[depth]
        self.layer1 = _layer(kind, 64, 64, counts[0], stride=1)
        self.layer2 = _layer(kind, 64 * kind.expansion, 128, counts[1], stride=2)
        self.layer3 = _layer(kind, 128 * kind.expansion, 256, counts[2], stride=2)
        self.layer4 = _layer(kind, 256 * kind.expansion, 512, counts[3], stride=2)
        self.fc = nn.Linear(512 * kind.expansion, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_residual and isinstance(module, (Basic, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    @property
    def stages(self) -> tuple[str, ...]:
        layers = (("layer1", self.layer1), ("layer2", self.layer2), ("layer3", self.layer3), ("layer4", self.layer4))
        return ("conv1", "bn1", *(f"{name}.{i}" for name, layer in layers for i in range(len(layer))), "fc")

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float in [0, 1].  returns: (B, K)"""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        if not self.small:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))  # (B, D) → (B, K)
        return scores


class Basic(nn.Module):
    """x + two 3×3 convolutions of x; the first has the stride."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """x + a 3×3 convolution of x at a quarter of the width; the 3×3 has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.downsample = _shortcut(inputs, width * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _layer(kind: type[Basic] | type[Bottleneck], inputs: int, width: int, count: int, *, stride: int) -> nn.Sequential:
    """The first block has the stride; the others keep size and width."""
    first = kind(inputs, width, stride)
    return nn.Sequential(first, *(kind(width * kind.expansion, width, 1) for _ in range(count - 1)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """x itself where the shapes agree, else a 1×1 convolution of it: option B of arXiv:1512.03385 section 4.1."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    """(C, 1, 1): the three values, or their mean for every channel where there are not three"""
    three = torch.tensor(values)
    return (three if channels == len(values) else three.mean().expand(channels)).reshape(-1, 1, 1).clone()
