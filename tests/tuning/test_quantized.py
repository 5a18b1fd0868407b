"""Quantised Linears: the published levels, errors within half a step, exact gradients, nothing of the weight's size kept."""

import pytest
import torch
from torch import Tensor, nn

from fromzero.tuning.quantized import QuantizedLinear, nf4_levels

# arXiv:2305.14314, appendix E
PUBLISHED = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
PUBLISHED += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def linear(width: int = 100, rows: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(width, rows)
    nn.init.normal_(made.weight, std=0.02)
    return made


def test_the_levels_of_four_bits_are_the_published_ones() -> None:
    assert nf4_levels() == pytest.approx(PUBLISHED, abs=1e-6) and len(nf4_levels()) == 16


def test_four_bits_give_the_nearest_level_of_a_block_and_the_largest_value_itself() -> None:
    made = linear()
    found = QuantizedLinear(made, 4).weight
    levels = torch.tensor(PUBLISHED)
    for block, values in zip(made.weight.split(64, 1), found.split(64, 1), strict=True):
        scale = block.abs().amax(1, keepdim=True)
        nearest = (block[..., None] - scale[..., None] * levels).abs().amin(-1)
        torch.testing.assert_close((block - values).abs(), nearest, atol=1e-6, rtol=0)
        assert torch.allclose(values.abs().amax(1), scale[:, 0])


def test_eight_bits_are_within_half_a_step_of_each_row() -> None:
    made = linear()
    steps = made.weight.abs().amax(1, keepdim=True) / 127
    assert bool(((made.weight - QuantizedLinear(made, 8).weight).abs() <= steps * 0.50001).all())


@pytest.mark.parametrize(("bits", "per_value", "error"), [(8, 8.06, 0.009), (4, 4.5, 0.1)])
def test_bits_per_value_and_error_are_what_is_said(bits: int, per_value: float, error: float) -> None:
    made = linear(576, 256)
    small = QuantizedLinear(made, bits)
    assert (small.packed.nbytes + small.scale.nbytes) * 8 / made.weight.numel() == pytest.approx(per_value, abs=0.01)
    relative = float((small.weight - made.weight.detach()).norm() / made.weight.detach().norm())
    print(f"{bits} bits: {relative:.4f}")
    assert error / 2 < relative < error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_with_its_values_in_the_type_of_its_input_and_keeps_nothing_for_the_way_back(bits: int, dtype: torch.dtype) -> None:
    layer = QuantizedLinear(linear(), bits)
    x = torch.randn(2, 3, 100, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not kept and y.dtype == dtype
    assert torch.equal(y, nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype)))
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert torch.equal(x.grad, gradient @ layer.weight.to(dtype)) and not list(filter(lambda p: p.requires_grad, layer.parameters()))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_saved_layer_is_read_back_bit_for_bit(bits: int) -> None:
    layer, other = QuantizedLinear(linear(), bits), QuantizedLinear(nn.Linear(100, 24), bits)
    assert set(layer.state_dict()) == {"packed", "scale", "bias"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    torch.testing.assert_close(layer.double().weight, other.weight.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_stay_zeros(bits: int) -> None:
    made = linear()
    nn.init.zeros_(made.weight)
    assert not QuantizedLinear(made, bits).weight.any()
