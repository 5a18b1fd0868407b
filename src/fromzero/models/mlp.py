"""mlp: vectors in, class scores or numbers out, through fully connected layers. With no hidden layer it is the perceptron.

Dims: B batch, D width of the input, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear – ReLU – (Dropout) for each hidden width, then a Linear head.

    source: Rumelhart, Hinton, Williams, Nature 323 (1986); ReLU after Nair and Hinton, ICML 2010
    """

    def __init__(self, inputs: Sequence[int], outputs: int, *, hidden: Sequence[int] = (64, 64), dropout: float = 0.0) -> None:
        super().__init__()
        width = math.prod(inputs)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)

    @property
    def stages(self) -> tuple[str, ...]:
        return (*(f"body.{i}" for i in range(len(self.body))), "head")

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, …) float, D values a sample.  returns: (B, K)"""
        hidden: Tensor = self.body(x.flatten(1))  # (B, D)
        scores: Tensor = self.head(hidden)  # (B, K)
        return scores
