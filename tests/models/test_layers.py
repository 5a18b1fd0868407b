"""The layers whose backward passes are written out: torch's own formulas, and numerical gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fromzero.models.layers.feedforward import ACTIVATIONS, FeedForward
from fromzero.models.layers.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 16)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_root_mean_square_norm_is_torchs_and_its_gradients_are(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, 1e-5, offset=offset).double()
    with torch.no_grad():
        norm.weight.normal_()
    x, gradient = torch.randn(*shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape, dtype=torch.float64)
    ours = norm(x)
    theirs = F.rms_norm(x, (16,), norm.weight + offset, 1e-5)
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (x, norm.weight), gradient), torch.autograd.grad(theirs, (x, norm.weight), gradient), strict=True
    ):
        assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-13)


def test_the_norm_of_half_precision_is_computed_in_float32() -> None:
    x = torch.full((2, 512), 300.0, dtype=torch.float16)  # its square is past the largest half
    assert torch.allclose(RMSNorm(512, 1e-5).half()(x), torch.ones(2, 512, dtype=torch.float16), rtol=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_feed_forward_has_the_gradients_of_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    layer = FeedForward(8, 12, activation=activation, gated=True, bias=True).double()
    x, gradient = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)
    gate, up = layer.up(x).chunk(2, dim=-1)
    formula = layer.down(ACTIVATIONS[activation](gate) * up)
    given = (x, *layer.parameters())
    ours = layer(x)
    assert torch.equal(ours, formula)
    for mine, wanted in zip(torch.autograd.grad(ours, given, gradient), torch.autograd.grad(formula, given, gradient), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-14)


def test_a_gate_keeps_only_what_came_in() -> None:
    layer, kept = FeedForward(8, 12, activation="silu", gated=True, bias=False), []
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept.count((5, 24)) == 1 and kept.count((5, 12)) == 1  # what came in, and what the next product reads
