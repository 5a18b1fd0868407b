"""ResNet as a catalogue model: sizes, refusals, stages, init and what one channel means. Its arithmetic: tests/parity/test_images.py."""

import pytest
import torch
import torch.nn.functional as F

from fromzero.models.resnet import BLOCKS, MEAN, STD, Bottleneck, ResNet

# torchvision's own figures for 1000 outputs
PUBLISHED = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def test_every_depth_has_the_published_number_of_parameters() -> None:
    counted = {}
    for depth in BLOCKS:
        with torch.device("meta"):
            counted[depth] = sum(p.numel() for p in ResNet((3, 224, 224), 1000, depth=depth).parameters())
    assert counted == PUBLISHED
    assert len(counted) == 5


@pytest.mark.parametrize("depth", [18, 50])
def test_each_parameter_lies_inside_exactly_one_stage(depth: int) -> None:
    with torch.device("meta"):
        model = ResNet((3, 64, 64), 3, depth=depth)
    assert model.stages[:3] == ("conv1", "bn1", "layer1.0")
    assert len(model.stages) == 3 + sum(BLOCKS[depth])
    owners = {name: [s for s in model.stages if name.startswith(f"{s}.")] for name, _ in model.named_parameters()}
    assert len(owners) == (62 if depth == 18 else 161)
    assert all(len(found) == 1 for found in owners.values())


def test_the_stages_are_in_the_order_they_run() -> None:
    model = ResNet((1, 32, 32), 3)
    ran: list[str] = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_pre_hook(lambda *_, stage=stage: ran.append(stage))
    model(torch.rand(2, 1, 32, 32))
    assert tuple(ran) == model.stages


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((8,), {}, r"resnet takes images \(channels, height, width\); the data has inputs of shape \(8,\)"),
        ((3, 64, 64), {"depth": 20}, "resnet has no depth 20; give 18, 34, 50, 101, 152"),
        ((3, 64, 64), {"stem": "tiny"}, "resnet has no stem 'tiny'; give full or small"),
        ((1, 28, 40), {}, "the full stem needs images of 32×32 or more, these are 28×40; give stem: small, or larger images"),
        ((1, 8, 7), {"stem": "small"}, "the small stem needs images of 8×8 or more, these are 8×7; give larger images"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(inputs: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(inputs, 3, **options)


@pytest.mark.parametrize(("stem", "side", "last"), [("full", 32, 1), ("full", 64, 2), ("small", 8, 1), ("small", 28, 4)])
def test_the_stem_decides_how_many_pixels_are_left(stem: str, side: int, last: int) -> None:
    model = ResNet((3, side, side), 3, stem=stem).eval()
    shapes = []
    model.layer4.register_forward_hook(lambda module, given, made: shapes.append(made.shape))
    assert model(torch.rand(2, 3, side, side)).shape == (2, 3)
    assert shapes == [(2, 512, last, last)]


def test_pixels_are_set_to_imagenet_and_one_channel_to_the_mean_of_the_three() -> None:
    three, one, five = (ResNet((c, 32, 32), 2).eval() for c in (3, 1, 5))
    assert three.mean.flatten().tolist() == pytest.approx(MEAN)
    assert three.std.flatten().tolist() == pytest.approx(STD)
    assert one.mean.flatten().tolist() == pytest.approx([0.449])
    assert five.std.flatten().tolist() == pytest.approx([0.226] * 5)
    seen: list[torch.Tensor] = []
    three.conv1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    three(torch.tensor(MEAN).reshape(1, 3, 1, 1).expand(1, 3, 32, 32) + torch.tensor(STD).reshape(3, 1, 1))
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 32, 32))
    assert not [name for name in three.state_dict() if name in ("mean", "std")]


def test_weights_begin_with_the_spread_of_he_by_fan_out() -> None:
    torch.manual_seed(0)
    model = ResNet((3, 64, 64), 3, depth=50)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 53
    for m in convolutions:
        wanted = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** 0.5
        assert m.weight.std().item() == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_residual_lets_every_block_begin_as_its_shortcut(depth: int) -> None:
    model = ResNet((3, 32, 32), 3, depth=depth, zero_residual=True)
    block = model.layer1[1]
    zeros = [name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()]
    last = f"bn{3 if isinstance(block, Bottleneck) else 2}.weight"
    assert zeros == [f"{stage}.{last}" for stage in model.stages if stage.startswith("layer")]
    x = torch.rand(2, 256 if isinstance(block, Bottleneck) else 64, 8, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(ResNet((3, 32, 32), 3, depth=depth).layer1[1](x), x)


@pytest.mark.parametrize(("channels", "depth"), [(1, 18), (3, 34)])
def test_it_learns_from_zero(channels: int, depth: int) -> None:
    torch.manual_seed(0)
    y = torch.arange(9) % 3
    x = torch.rand(9, channels, 9, 9) * 0.5
    for shade in range(3):
        x[y == shade, :, 3 * shade : 3 * shade + 3] += 0.5
    model = ResNet((channels, 9, 9), 3, depth=depth, stem="small")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
