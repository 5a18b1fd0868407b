"""Image models against other judges: outputs and every gradient, elementwise, in float64.

ResNet and EfficientNet: against plain functional calls that walk a dict of tensors, whose names and shapes are written from
the papers' tables; ResNet also against transformers'. ViT: against transformers'.
"""

import fnmatch
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fromzero.models.efficientnet import FAMILY as LITE
from fromzero.models.efficientnet import EfficientNetLite0
from fromzero.models.resnet import ResNet
from fromzero.models.vit import FAMILY as VIT
from fromzero.weights.translate import to_ours, to_theirs

Tensors = dict[str, Tensor]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def randomize(tensors: Tensors, seed: int = 0) -> Tensors:
    """Values of sensible size for every tensor: nothing stays at one or zero, where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            made[name] = torch.full_like(tensor, 7)
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim == 1:
            made[name] = noise.abs() * 0.5 + 0.5 if name.endswith("var") else 0.3 * noise + 1.0 * name.endswith("weight")
        else:
            made[name] = noise / tensor[0].numel() ** 0.5
    return made


def backward(outputs: Tensor, leaves: Tensors) -> Tensors:
    """Gradients of a sum weighted by fixed noise, so that no two outputs count the same."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9), dtype=outputs.dtype)
    return dict(zip(leaves, torch.autograd.grad((outputs * weights).sum(), list(leaves.values())), strict=True))


def compare(ours: Tensors, theirs: Tensors, *, vanish: str = "", within: float = 1e-10) -> None:
    """Each tensor to `within` of its largest value. vanish: glob of gradients that are zero but for rounding, on both sides."""
    assert set(ours) == set(theirs)
    largest = max(tensor.abs().max() for tensor in theirs.values())
    for name, tensor in theirs.items():
        assert tensor.isfinite().all(), name
        if fnmatch.fnmatchcase(name, vanish):
            assert max(tensor.abs().max(), ours[name].abs().max()) < 1e-10 * largest, name
            continue
        assert tensor.abs().max() > 1e-8 * largest, f"{name} is nearly nothing, which shows no mistake"
        far = (ours[name] - tensor).abs().max() / tensor.abs().max()
        assert far < within, f"{name} is off by {far:.1e} of its largest"


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensors]:
    x = x.clone().requires_grad_()
    outputs = model(x)
    return outputs.detach(), backward(outputs, {"x": x, **dict(model.named_parameters())})


class Walk:
    """Plain functional calls on a dict of tensors; batch-norm's new statistics are kept in `after`."""

    def __init__(self, tensors: Tensors, *, training: bool, eps: float, momentum: float) -> None:
        self.leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if t.is_floating_point() and "running" not in n}
        self.after = {n: t.clone() for n, t in tensors.items() if n not in self.leaves}
        self.training, self.eps, self.momentum = training, eps, momentum

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return F.conv2d(x, self.leaves[f"{name}.weight"], stride=stride, padding=padding, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var = self.after[f"{name}.running_mean"], self.after[f"{name}.running_var"]
        weight, bias = self.leaves[f"{name}.weight"], self.leaves[f"{name}.bias"]
        if self.training:
            self.after[f"{name}.num_batches_tracked"] += 1
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.leaves[f"{name}.weight"], self.leaves[f"{name}.bias"])


def norm_names(name: str, width: int) -> Tensors:
    vectors = {f"{name}.{kind}": torch.empty(width) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {**vectors, f"{name}.num_batches_tracked": torch.tensor(0)}


# ResNet. arXiv:1512.03385 table 1: a depth has so many blocks in conv2_x to conv5_x, of these kernels and widths.
TABLE = {
    18: ((2, 2, 2, 2), ((3, 1), (3, 1))),
    34: ((3, 4, 6, 3), ((3, 1), (3, 1))),
    50: ((3, 4, 6, 3), ((1, 1), (3, 1), (1, 4))),
    101: ((3, 4, 23, 3), ((1, 1), (3, 1), (1, 4))),
    152: ((3, 8, 36, 3), ((1, 1), (3, 1), (1, 4))),
}


def torchvision_tensors(depth: int, channels: int, outputs: int, *, stem: int = 7) -> Tensors:
    counts, kernels = TABLE[depth]
    made = {"conv1.weight": torch.empty(64, channels, stem, stem), **norm_names("bn1", 64)}
    size = 64
    for group, count in enumerate(counts):
        for index in range(count):
            block, given = f"layer{group + 1}.{index}", size
            for number, (kernel, times) in enumerate(kernels, 1):
                wanted = 64 * 2**group * times
                made[f"{block}.conv{number}.weight"] = torch.empty(wanted, size, kernel, kernel)
                made |= norm_names(f"{block}.bn{number}", wanted)
                size = wanted
            if index == 0 and (group > 0 or size != given):
                made[f"{block}.downsample.0.weight"] = torch.empty(size, given, 1, 1)
                made |= norm_names(f"{block}.downsample.1", size)
    return {**made, "fc.weight": torch.empty(outputs, size), "fc.bias": torch.empty(outputs)}


def plain_resnet(walk: Walk, x: Tensor, depth: int, *, small: bool) -> Tensor:
    counts, kernels = TABLE[depth]
    mean, std = (torch.tensor(v, dtype=torch.float32).double() for v in IMAGENET)  # as float32 has them
    if x.shape[1] == 1:
        mean, std = (torch.tensor(v, dtype=torch.float32).mean().double().reshape(1) for v in IMAGENET)
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(x.shape[1])], dim=1)
    x = F.relu(walk.norm(walk.conv(x, "conv1", *((1, 1) if small else (2, 3))), "bn1"))
    x = x if small else F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for group, count in enumerate(counts):
        for index in range(count):
            block, stride, y = f"layer{group + 1}.{index}", 2 if group and not index else 1, x
            for number, (kernel, _) in enumerate(kernels, 1):
                halves = number == (1 if len(kernels) == 2 else 2)  # a bottleneck's 3×3
                y = walk.conv(y, f"{block}.conv{number}", stride if halves else 1, kernel // 2)
                y = walk.norm(y, f"{block}.bn{number}")
                y = F.relu(y) if number < len(kernels) else y
            if f"{block}.downsample.0.weight" in walk.leaves:
                x = walk.norm(walk.conv(x, f"{block}.downsample.0", stride), f"{block}.downsample.1")
            x = F.relu(x + y)
    return walk.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), "fc")


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_names_and_shapes_are_those_of_the_public_weights(depth: int) -> None:
    with torch.device("meta"):
        model, theirs = ResNet((3, 224, 224), 1000, depth=depth), torchvision_tensors(depth, 3, 1000)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in theirs.items()}
    assert list(model.state_dict()) == list(theirs), "and in their order"
    assert len(theirs) == {18: 122, 34: 218, 50: 320, 101: 626, 152: 932}[depth]
    model.load_state_dict(theirs, strict=True, assign=True)


@pytest.mark.parametrize(
    ("depth", "shape", "small", "training"),
    [
        (18, (1, 33, 47), False, False),
        (18, (1, 33, 47), False, True),
        (18, (3, 9, 8), True, True),
        (50, (3, 32, 33), False, True),
    ],
)
def test_resnet_equals_plain_functional_calls(depth: int, shape: tuple[int, int, int], small: bool, training: bool) -> None:
    tensors = randomize(torchvision_tensors(depth, shape[0], 5, stem=3 if small else 7))
    ours = ResNet(shape, 5, depth=depth, stem="small" if small else "full").double().train(training)
    ours.load_state_dict(tensors, strict=True)
    x = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = run(ours, x)

    walk = Walk(tensors, training=training, eps=1e-5, momentum=0.1)
    leaf = x.clone().requires_grad_()
    theirs = plain_resnet(walk, leaf, depth, small=small)
    compare({"outputs": outputs, **gradients}, {"outputs": theirs.detach(), **backward(theirs, {"x": leaf, **walk.leaves})})
    statistics = {n: t for n, t in ours.state_dict().items() if n in walk.after}
    assert len(statistics) == 3 * len([n for n in tensors if n.endswith("running_var")])
    compare(statistics, walk.after)


def transformers_name(ours: str) -> str:
    """layer2.0.conv3.weight → resnet.encoder.stages.1.layers.0.layer.2.convolution.weight"""
    parts, kind = ours.split(".")[:-1], ours.split(".")[-1]
    if parts == ["fc"]:
        return f"classifier.1.{kind}"
    what = "convolution" if parts[-1].startswith("conv") or parts[-1] == "0" else "normalization"
    if len(parts) == 1:
        return f"resnet.embedder.embedder.{what}.{kind}"
    place = f"resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    inner = "shortcut" if parts[2] == "downsample" else f"layer.{int(parts[2][-1]) - 1}"
    return f"{place}.{inner}.{what}.{kind}"


@pytest.mark.parametrize(("depth", "training"), [(18, True), (50, False)])
def test_resnet_equals_transformers(depth: int, training: bool) -> None:
    counts, kernels = TABLE[depth]
    bottleneck = len(kernels) == 3
    config = transformers.ResNetConfig(
        depths=list(counts),
        hidden_sizes=[64 * 2**g * (4 if bottleneck else 1) for g in range(4)],
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=5,
    )
    theirs = transformers.ResNetForImageClassification(config).double().train(training)
    tensors = randomize(torchvision_tensors(depth, 3, 5))
    theirs.load_state_dict({transformers_name(n): t for n, t in tensors.items()}, strict=True)
    ours = ResNet((3, 32, 32), 5, depth=depth).double().train(training)
    ours.load_state_dict(tensors, strict=True)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = run(ours, x)

    leaf = x.clone().requires_grad_()
    mean, std = (torch.tensor(v, dtype=torch.float32).double().reshape(3, 1, 1) for v in IMAGENET)
    logits = theirs((leaf - mean) / std).logits
    named = dict(theirs.named_parameters())
    leaves = {"x": leaf, **{n: named[transformers_name(n)] for n, _ in ours.named_parameters()}}
    assert len(leaves) == 1 + len(named)
    compare({"outputs": outputs, **gradients}, {"outputs": logits.detach(), **backward(logits, leaves)})


# EfficientNet-B0. arXiv:1905.11946 table 1, stages 2 to 8, and arXiv:1801.04381 for MBConv: widening, kernel, channels, layers, stride.
STAGES = ((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1))


def blocks() -> list[tuple[int, int, int, int, int]]:
    """channels in, channels out, kernel, stride, widening of the 16 blocks"""
    made, size = [], 32
    for widening, kernel, channels, layers, stride in STAGES:
        for index in range(layers):
            made.append((size, channels, kernel, 1 if index else stride, widening))
            size = channels
    assert len(made) == 16
    return made


def lite_tensors(channels: int, outputs: int) -> Tensors:
    made = {"_conv_stem.weight": torch.empty(32, channels, 3, 3), **norm_names("_bn0", 32)}
    for index, (size, wanted, kernel, _, widening) in enumerate(blocks()):
        block, inner = f"_blocks.{index}", size * widening
        if widening > 1:
            made |= {f"{block}._expand_conv.weight": torch.empty(inner, size, 1, 1), **norm_names(f"{block}._bn0", inner)}
        made |= {f"{block}._depthwise_conv.weight": torch.empty(inner, 1, kernel, kernel), **norm_names(f"{block}._bn1", inner)}
        made |= {f"{block}._project_conv.weight": torch.empty(wanted, inner, 1, 1), **norm_names(f"{block}._bn2", wanted)}
    made |= {"_conv_head.weight": torch.empty(1280, 320, 1, 1), **norm_names("_bn1", 1280)}
    return {**made, "_fc.weight": torch.empty(outputs, 1280), "_fc.bias": torch.empty(outputs)}


def same_conv(walk: Walk, x: Tensor, name: str, kernel: int, stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's `same`, by adding a whole kernel of zeros at the end and cutting what is too much."""
    wanted = [(side + stride - 1) // stride for side in x.shape[2:]]
    before = [max((n - 1) * stride + kernel - side, 0) // 2 for n, side in zip(wanted, x.shape[2:], strict=True)]
    padded = x.new_zeros(*x.shape[:2], x.shape[2] + 2 * kernel, x.shape[3] + 2 * kernel)
    padded[:, :, before[0] : before[0] + x.shape[2], before[1] : before[1] + x.shape[3]] = x
    return walk.conv(padded, name, stride, 0, groups)[:, :, : wanted[0], : wanted[1]]


def plain_lite(walk: Walk, x: Tensor) -> Tensor:
    x = same_conv(walk, (255 * x - 127) / 128, "_conv_stem", 3, 2)
    x = walk.norm(x, "_bn0").clamp(0, 6)
    for index, (size, wanted, kernel, stride, widening) in enumerate(blocks()):
        block, y = f"_blocks.{index}", x
        if widening > 1:
            y = walk.norm(walk.conv(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = same_conv(walk, y, f"{block}._depthwise_conv", kernel, stride, size * widening)
        y = walk.norm(y, f"{block}._bn1").clamp(0, 6)
        y = walk.norm(walk.conv(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if stride == 1 and size == wanted else y
    x = walk.norm(walk.conv(x, "_conv_head"), "_bn1").clamp(0, 6)
    return walk.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), "_fc")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(3, 97, 97), (1, 32, 50)])
def test_efficientnet_equals_plain_functional_calls(shape: tuple[int, int, int], training: bool) -> None:
    tensors = randomize(lite_tensors(shape[0], 5))
    names = LITE.names({}, tensors.keys())
    ours = EfficientNetLite0(shape, 5).double().train(training)
    ours.load_state_dict(to_ours(tensors, names, file="memory"), strict=True)
    x = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = run(ours, x)

    walk = Walk(tensors, training=training, eps=1e-3, momentum=0.01)
    leaf = x.clone().requires_grad_()
    theirs = plain_lite(walk, leaf)
    expected = to_ours(
        {"x": leaf, **walk.leaves}, {"x": (("x",), "same", ())} | {n: v for n, v in names.items() if v[0][0] in walk.leaves}, file=""
    )
    shift = "*.project.norm.bias" if training else ""  # only convolutions 1×1 see it, whose batch-norm takes it away again
    compare({"outputs": outputs, **gradients}, {"outputs": theirs.detach(), **backward(theirs, expected)}, vanish=shift)
    statistics = {names[n][0][0]: t for n, t in ours.state_dict().items() if names[n][0][0] in walk.after}
    assert len(statistics) == 3 * 49
    compare(statistics, walk.after)


# ViT


def vit_config(**keys: object) -> transformers.ViTConfig:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    given = {"image_size": (24, 16), "patch_size": 8, "num_labels": 5, "attn_implementation": "sdpa", **sizes, **keys}
    return transformers.ViTConfig(**given)


def in_float64(theirs: nn.Module) -> nn.Module:
    theirs.double().load_state_dict(randomize(theirs.state_dict()))
    return theirs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_vit_equals_transformers(tmp_path: Path, channels: int, eps: float) -> None:
    theirs = in_float64(transformers.ViTForImageClassification(vit_config(num_channels=channels, layer_norm_eps=eps)))
    theirs.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    names = VIT.names(config, tensors.keys())
    ours = VIT.build(config).double()
    ours.load_state_dict(to_ours(tensors, names, file="memory", ignored=VIT.ignored), strict=True)
    x = torch.rand(3, channels, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = run(ours, x)

    leaf = x.clone().requires_grad_()
    logits = theirs((leaf - 0.5) / 0.5).logits
    named = dict(theirs.named_parameters())
    found = backward(logits, {"x": leaf, **named})
    mine = to_theirs(gradients, names)
    as_published = {published(n): t for n, t in found.items() if n != "x"}
    assert len(as_published) == len(named) == 4 + 3 * 16 + 4
    shift = "*.key.bias"  # adds the same to all scores of a query, which softmax does not see
    compare({"outputs": outputs, "x": gradients["x"], **mine}, {"outputs": logits.detach(), "x": found["x"], **as_published}, vanish=shift)


def published(name: str) -> str:
    """transformers 5 calls its modules otherwise than the files that it reads and writes."""
    for new, old in (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def test_what_we_write_of_a_vit_has_the_files_bits_and_transformers_reads_it(tmp_path: Path) -> None:
    theirs = in_float64(transformers.ViTForImageClassification(vit_config())).float().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = VIT.build(config).eval()
    ours.load_state_dict(to_ours(tensors, VIT.names(config, tensors.keys()), file="memory"), strict=True)
    written = to_theirs(ours.state_dict(), VIT.names(config, ()))
    assert set(written) == set(tensors)
    assert len(written) == 56
    assert all(torch.equal(written[n], t) for n, t in tensors.items())

    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours", attn_implementation="sdpa").eval()
    x = torch.rand(2, 3, 24, 16)
    assert torch.equal(back((x - 0.5) / 0.5).logits, theirs((x - 0.5) / 0.5).logits)
    torch.testing.assert_close(ours(x), back((x - 0.5) / 0.5).logits)


def test_a_bare_vit_gives_its_body_and_leaves_its_pooler(tmp_path: Path) -> None:
    theirs = in_float64(transformers.ViTModel(vit_config())).eval()
    theirs.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert "pooler.dense.weight" in tensors
    names = VIT.names(config, tensors.keys())
    ours = VIT.build(config, outputs=7).double().eval()
    assert set(ours.state_dict()) - set(names) == {"head.weight", "head.bias"}
    left = ours.load_state_dict(to_ours(tensors, names, file="memory", ignored=VIT.ignored), strict=False)
    assert sorted(left.missing_keys) == ["head.bias", "head.weight"]
    assert not left.unexpected_keys
    assert VIT.names(config, ()) == names
    seen: list[Tensor] = []
    ours.norm.register_forward_hook(lambda module, given, made: seen.append(made))
    x = torch.rand(2, 3, 24, 16, dtype=torch.float64)
    ours(x)
    compare({"class": seen[0]}, {"class": theirs((x - 0.5) / 0.5).last_hidden_state[:, 0]})
