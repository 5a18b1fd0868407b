"""Packed weights compute what their numbers say, at every size, and a decoder that is packed says what it said before."""

import pytest
import torch
from torch import nn

from fromzero.models.decoder import Decoder
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.models.layers.packed import Packed, packed
from fromzero.models.together import Batch, Sampling
from fromzero.tuning import add_adapters

SIZES = [(1, 32), (7, 100), (16, 64), (65, 33), (200, 96), (1001, 160)]
ROWS = [1, 2, 3, 5, 16, 40]


def linear(outputs: int, inputs: int) -> nn.Linear:
    torch.manual_seed(outputs)
    return nn.Linear(inputs, outputs, bias=outputs % 2 == 1)


def of(module: nn.Linear, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product written out in float64"""
    y = x.double() @ weight.double().T
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@torch.no_grad()
def test_float32_is_the_same_product(outputs: int, inputs: int) -> None:
    plain = linear(outputs, inputs)
    quick = packed(plain, "float32")
    assert isinstance(quick, Packed)
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        torch.testing.assert_close(quick(x), of(plain, plain.weight, x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@torch.no_grad()
def test_int8_is_the_product_with_whole_numbers_times_a_scale_for_each_output(outputs: int, inputs: int) -> None:
    plain = linear(outputs, inputs)
    quick, scale = packed(plain, "int8"), (plain.weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    whole = (plain.weight / scale).round().clamp(-127, 127)
    assert (whole * scale - plain.weight).abs().max() <= scale.max() * 0.76  # half a step, and the largest lost by a rounded scale
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16().float()
        torch.testing.assert_close(quick(x), of(plain, whole * scale, x).float(), rtol=1e-2, atol=1e-2)  # y is rounded to bfloat16


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@torch.no_grad()
def test_int4_finds_the_numbers_again_that_were_four_bits_before(outputs: int, inputs: int) -> None:
    plain = linear(outputs, inputs)
    groups = -(-inputs // 32)
    steps, least = torch.rand(outputs, groups, 1).bfloat16().float() / 16, -torch.rand(outputs, groups, 1).bfloat16().float()
    whole = torch.randint(0, 16, (outputs, groups, 32))
    whole[..., 0], whole[..., 1] = 0, 15  # as in a block that was rounded so: its ends are used
    plain.weight.copy_((whole * steps + least).flatten(1)[:, :inputs])
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16().float()
        found, exact = packed(plain, "int4")(x), of(plain, plain.weight, x).float()
        far = ((found - exact).norm() / exact.norm()).item()
        assert far < (
            0.02 if inputs % 32 == 0 else 0.1
        )  # scales and products are bfloat16; where zeros fill a group up, it is rounded anew


def talker(**kind: object) -> Decoder:
    torch.manual_seed(0)
    model = DECODERS["llama"].build(decoder_config(vocabulary=301, width=64, layers=2, heads=4, context=64, **kind))
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "far"), [("float32", 1e-5), ("int8", 0.03), ("int4", 0.2)])
@torch.no_grad()
def test_a_packed_decoder_scores_as_before_and_is_left_in_its_mode(kind: str, far: float, tied: bool) -> None:
    model = talker(tied=tied).eval()
    tokens, offsets = torch.randint(0, 301, (40,)), torch.tensor([0, 11, 40])
    before = model(tokens, offsets)
    model.pack(kind)
    after = model(tokens, offsets)
    assert (after - before).norm() / before.norm() < far
    assert kind == "float32" or not torch.equal(after, before)
    assert not any(module.training for module in model.modules())
    kinds = {module.kind for module in model.modules() if isinstance(module, Packed)}
    assert kinds == ({"int4", "int8"} if kind == "int4" else {kind})  # the head keeps 8 bits
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_adapters_are_not_packed_and_go_on_computing() -> None:
    model = talker(tied=True).eval()
    add_adapters(model, {"blocks.0.attention.qkv": (64, 64, 64), "blocks.1.mlp.down": (64,)}, rank=2, alpha=4)
    batch = Batch(model, ())
    batch.add([1, 2, 3], Sampling(most=4))
    before = [batch.step()[0].logprob for _ in range(4)]
    model.pack("float32")
    batch.add([1, 2, 3], Sampling(most=4))
    torch.testing.assert_close([batch.step()[0].logprob for _ in range(4)], before, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, Packed) for module in model.modules()) == 4 * 2 + 1 - 2


def test_what_is_no_linear_of_float32_on_a_cpu_stays_as_it_is() -> None:
    for module in (nn.Identity(), nn.Linear(32, 16).double(), nn.Linear(32, 16, device="meta")):
        assert packed(module, "int8") is module
