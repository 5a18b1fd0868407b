"""cnn: images in, class scores or numbers out, through blocks of convolutions that halve the image.

Dims: B batch, C channels, H height, W width, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class CNN(nn.Module):
    """For each entry of `channels` a block Conv 3×3 – (BatchNorm) – ReLU – MaxPool 2; then mean over the image and a head.

    source: LeCun et al., Proc. IEEE 86 (1998); mean over the image after Lin, Chen, Yan, arXiv:1312.4400 section 3.2
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int,
        *,
        channels: Sequence[int] = (32, 64),
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(inputs) != 3:
            raise ValueError(
                f"cnn takes images (channels, height, width); the data has inputs of shape {tuple(inputs)}; mlp takes any shape"
            )
        depth, height, width = inputs
        if min(height, width) >> len(channels) < 1:
            raise ValueError(f"{len(channels)} blocks halve an image of {height}×{width} away; give fewer channels")
        blocks: list[nn.Module] = []
        for size in channels:
            blocks.append(nn.Conv2d(depth, size, 3, padding=1, bias=not batch_norm))
            blocks += [nn.BatchNorm2d(size)] if batch_norm else []
            blocks += [nn.ReLU(), nn.MaxPool2d(2)]
            depth = size
        self.body = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(depth, outputs)

    @property
    def stages(self) -> tuple[str, ...]:
        return (*(f"body.{i}" for i in range(len(self.body))), "head")

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float.  returns: (B, K)"""
        features = self.body(x).mean(dim=(2, 3))  # (B, channels[-1])
        scores: Tensor = self.head(self.dropout(features))  # (B, K)
        return scores
