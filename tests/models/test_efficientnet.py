"""EfficientNet-Lite0 as a catalogue model and as a family. Its arithmetic: tests/parity/test_images.py."""

import pytest
import torch
import torch.nn.functional as F

from fromzero.models.efficientnet import FAMILY, ConvNorm, EfficientNetLite0
from fromzero.weights.translate import to_ours, to_theirs

CONFIG = {"model_type": "efficientnet-lite0"}


def test_it_has_the_published_number_of_values() -> None:
    with torch.device("meta"):
        model = FAMILY.build(CONFIG)
    assert sum(t.numel() for t in model.state_dict().values()) == 4_694_073  # with buffers, as in the file
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert len(model.state_dict()) == 296


def test_each_parameter_lies_inside_exactly_one_stage_and_stages_run_in_order() -> None:
    model = EfficientNetLite0((1, 32, 32), 3)
    owners = {name: [s for s in model.stages if name.startswith(f"{s}.")] for name, _ in model.named_parameters()}
    assert len(owners) == 149
    assert all(len(found) == 1 for found in owners.values())
    ran: list[str] = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_pre_hook(lambda *_, stage=stage: ran.append(stage))
    model(torch.rand(2, 1, 32, 32))
    assert tuple(ran) == model.stages
    assert len(ran) == 19


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((8,), r"efficientnet takes images \(channels, height, width\); the data has inputs of shape \(8,\)"),
        ((1, 28, 28), "needs 32×32 or more, these are 28×28; give larger images, or resnet with stem: small"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(inputs: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNetLite0(inputs, 3)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_the_zeros_around_an_image_are_tensorflows(kernel: int, stride: int, size: int) -> None:
    layer = ConvNorm(1, 1, kernel, stride=stride, active=False).double().eval()
    x = torch.rand(1, 1, size, size, dtype=torch.float64)
    theirs = torch.zeros(-(-size // stride), -(-size // stride), dtype=torch.float64)
    spare = max((len(theirs) - 1) * stride + kernel - size, 0) // 2  # pixels before the first; one more may be behind the last
    for i in range(len(theirs)):
        for j in range(len(theirs)):
            for a in range(kernel):
                for b in range(kernel):
                    row, column = i * stride + a - spare, j * stride + b - spare
                    if 0 <= row < size and 0 <= column < size:
                        theirs[i, j] += layer.conv.weight[0, 0, a, b].detach() * x[0, 0, row, column]
    torch.testing.assert_close(layer(x)[0, 0], theirs / (1 + 1e-3) ** 0.5)


def test_batch_norm_is_tensorflows_and_weights_begin_with_he_of_one_group() -> None:
    torch.manual_seed(0)
    model = EfficientNetLite0((3, 64, 64), 3)
    layers = [m for m in model.modules() if isinstance(m, ConvNorm)]
    assert len(layers) == 49
    assert {(m.norm.eps, m.norm.momentum) for m in layers} == {(1e-3, 0.01)}
    for m in layers:
        fan_out = m.kernel**2 * m.conv.out_channels / m.conv.groups
        assert m.conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


def test_dropout_falls_only_where_it_is_asked_for() -> None:
    x = torch.rand(4, 3, 32, 32)
    plain, dropping = EfficientNetLite0((3, 32, 32), 3), FAMILY.build(CONFIG, inputs=(3, 32, 32), outputs=3, dropout=0.5)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(dropping(x), dropping(x))


def test_the_family_names_every_tensor_once_and_comes_back_in_the_same_bits() -> None:
    model = FAMILY.build(CONFIG, inputs=(3, 32, 32), outputs=5)
    names = FAMILY.names(CONFIG, ())
    ours = model.state_dict()
    assert set(names) == set(ours)
    theirs = to_theirs(ours, names)
    assert len(theirs) == 296
    known = ["_conv_stem.weight", "_bn0.running_var", "_blocks.0._depthwise_conv.weight", "_blocks.0._bn1.num_batches_tracked"]
    known += ["_blocks.15._expand_conv.weight", "_blocks.15._bn2.bias", "_conv_head.weight", "_bn1.weight", "_fc.weight", "_fc.bias"]
    assert not [name for name in known if name not in theirs]
    assert "_blocks.0._expand_conv.weight" not in theirs
    back = to_ours(theirs, FAMILY.names(CONFIG, theirs.keys()), file="memory", ignored=FAMILY.ignored)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    bare = [name for name in theirs if not name.startswith("_fc")]
    assert set(ours) - set(FAMILY.names(CONFIG, bare)) == {"head.weight", "head.bias"}


def test_it_learns_from_zero() -> None:
    torch.manual_seed(0)
    y = torch.arange(12) % 3
    x = torch.rand(12, 1, 32, 32) * 0.5
    for shade, at in enumerate((0, 10, 20)):
        x[y == shade, :, at : at + 10] += 0.5
    model = EfficientNetLite0((1, 32, 32), 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
