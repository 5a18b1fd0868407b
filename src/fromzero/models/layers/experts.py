"""Experts: each token's vector in, the weighted sum of a few gated feed-forwards out, chosen by a router. No token is dropped.

Dims: N tokens end to end, D width, F hidden width of an expert, E experts, P experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero.models.layers.feedforward import ACTIVATIONS


class Experts(nn.Module):
    """The P likeliest of E experts, weighted by the router's softmax over all E. There is no loss that balances their load.

    normalised:  the P weights are divided by their sum
    source:      arXiv:2401.04088 section 2.1
    """

    def __init__(self, width: int, hidden: int, *, experts: int, per_token: int, normalised: bool, activation: str) -> None:
        super().__init__()
        self.per_token, self.normalised, self.activate = per_token, normalised, ACTIVATIONS[activation]
        self.router = nn.Linear(width, experts, bias=False)
        self.gates = nn.Parameter(torch.empty(experts, hidden, width))  # whoever builds the model fills these three
        self.ups = nn.Parameter(torch.empty(experts, hidden, width))
        self.downs = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, D).  returns: (N, D). On a GPU this waits for the device: the loop needs each expert's number of tokens."""
        scores = self.router(x)  # (N, E)
        shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = shares.topk(self.per_token, dim=-1)  # (N, P)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # (N · P,) one expert's after the other's
        places = order // self.per_token
        counts = chosen.flatten().bincount(minlength=len(self.gates)).tolist()
        # unbind once: its backward fills one gradient, where an index for each expert would add up E whole ones
        each = zip(x[places].split(counts), self.gates.unbind(), self.ups.unbind(), self.downs.unbind(), strict=True)
        parts = [F.linear(self.activate(F.linear(part, gate)) * F.linear(part, up), down) for part, gate, up, down in each if len(part)]
        out = torch.cat(parts) * weights.flatten()[order, None].to(x.dtype)  # (N · P, D)
        return torch.zeros_like(x).index_add(0, places, out.to(x.dtype))
