"""ViT as a catalogue model and as a family. Its arithmetic against transformers': tests/parity/test_images.py."""

import pytest
import torch
import torch.nn.functional as F

from fromzero.errors import ModelError, ShapeError
from fromzero.models.vit import FAMILY, SIZES, ViT

SMALL = {"patch": 4, "width": 32, "depth": 2, "heads": 4}
CONFIG = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_the_named_sizes_have_the_published_numbers_of_parameters() -> None:
    counted = {}
    for name, size in SIZES.items():
        with torch.device("meta"):
            counted[name] = sum(p.numel() for p in ViT((3, 224, 224), 1000, **size).parameters())
    # 5.7, 22.1 and 86.6 million with 16 pixels a patch: arXiv:2012.12877 table 1 gives 5M, 22M and 86M
    assert counted == {"vit-tiny": 5_717_416, "vit-small": 22_050_664, "vit-base": 86_567_656}


def test_each_parameter_lies_inside_exactly_one_stage_and_stages_run_in_order() -> None:
    model = ViT((1, 8, 8), 3, **SMALL)
    owners = {name: [s for s in model.stages if name.startswith(f"{s}.")] for name, _ in model.named_parameters()}
    assert len(owners) == 4 + 2 * 12 + 4
    assert all(len(found) == 1 for found in owners.values())
    ran: list[str] = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_pre_hook(lambda *_, stage=stage: ran.append(stage))
    model(torch.rand(2, 1, 8, 8))
    assert tuple(ran) == model.stages == ("embedding", "blocks.0", "blocks.1", "norm", "head")


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((8,), {}, r"vit takes images \(channels, height, width\); the data has inputs of shape \(8,\)"),
        ((1, 28, 28), {}, "patches of 16×16 do not fill images of 28×28; give patch: 2, 4, 7, 14, 28"),
        ((1, 31, 28), {"patch": 4}, "patches of 4×4 do not fill images of 31×28; give images of another size"),
        ((1, 28, 28), {"patch": 0}, "patches of 0×0 do not fill"),
        ((1, 32, 32), {"heads": 5}, "5 heads do not share a width of 192 evenly"),
        ((1, 32, 32), {"heads": 0}, "0 heads do not share"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(inputs: tuple[int, ...], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(inputs, 3, **options)


def test_images_of_another_shape_are_refused_when_they_come() -> None:
    model = ViT((3, 8, 12), 3, **SMALL)
    assert model(torch.rand(2, 3, 8, 12)).shape == (2, 3)
    for wrong in ((3, 12, 8), (3, 16, 16), (1, 8, 12)):  # the first has as many patches
        with pytest.raises(ShapeError, match=r"do not fit a vit built for \(3, 8, 12\).*learned a position.*data.input"):
            model(torch.rand(2, *wrong))


def test_weights_begin_within_twice_their_spread_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    model = ViT((3, 32, 32), 10, patch=4, depth=2)
    checked = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert parameter.abs().max() <= 0.04, name
            assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.15), name  # what a normal cut at two has left
        checked += 1
    assert checked == 4 + 24 + 4


def test_dropout_falls_in_training_where_it_is_asked_for() -> None:
    x = torch.rand(4, 1, 8, 8)
    plain, dropping = ViT((1, 8, 8), 3, **SMALL), ViT((1, 8, 8), 3, dropout=0.5, **SMALL)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(dropping(x), dropping(x))
    assert torch.equal(dropping.eval()(x), dropping(x))


def test_pixels_are_set_by_one_number_or_by_one_a_channel() -> None:
    x = torch.rand(2, 3, 8, 8)
    seen: list[torch.Tensor] = []
    for mean, std in ((0.5, 0.5), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])):
        model = ViT((3, 8, 8), 3, mean=mean, std=std, **SMALL)
        model.embedding.patches.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        model(x)
    assert torch.equal(seen[0], (x - 0.5) / 0.5)
    assert torch.equal(seen[1][:, 2], (x[:, 2] - 0.3) / 0.6)


def test_a_config_becomes_a_model_and_options_go_before_it() -> None:
    config = {**CONFIG, "image_size": [8, 16], "patch_size": [4, 4], "num_channels": 1, "id2label": {"0": "a", "1": "b", "2": "c"}}
    model = FAMILY.build({**config, "hidden_dropout_prob": 0.3, "layer_norm_eps": 1e-5})
    assert model(torch.rand(1, 1, 8, 16)).shape == (1, 3)
    assert (model.embedding.dropout.p, model.norm.eps, model.blocks[0].expand.out_features) == (0.3, 1e-5, 48)
    assert FAMILY.build(config, inputs=(3, 8, 8), outputs=7, dropout=0.1)(torch.rand(1, 3, 8, 8)).shape == (1, 7)
    assert FAMILY.build({**CONFIG, "num_labels": 4}).head.out_features == 4


@pytest.mark.parametrize("other", [{"hidden_act": "gelu_new"}, {"qkv_bias": False}, {"patch_size": [16, 8]}])
def test_a_config_that_asks_for_something_else_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"gelu, biases and square patches here; its config\.json has"):
        FAMILY.build({**CONFIG, **other})


def test_it_learns_from_zero() -> None:
    torch.manual_seed(0)
    y = torch.arange(12) % 3
    x = torch.rand(12, 1, 12, 12) * 0.5
    for shade, at in enumerate((0, 4, 8)):
        x[y == shade, :, at : at + 4] += 0.5
    model = ViT((1, 12, 12), 3, **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
