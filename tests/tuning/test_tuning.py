"""Freezing and heads: what is named stands still, bit for bit, and everything else trains."""

import pytest
import torch
from torch import nn

import fromzero as fz
from fromzero.tuning import Frozen, find_frozen, freeze, frozen_digest, new_head, set_training


class Body(nn.Module):
    """Layers registered in another order than they run.  input: (B, 1, 6, 6)"""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv1(x)).relu()
        return self.head(self.drop(self.conv2(x).relu().mean((2, 3))))


def images(count: int = 90, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(count) % classes
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1)) + y[:, None, None, None], y


def layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    from fromzero.models import inspect_model

    return {layer.name: tuple(layer.tensors) for layer in inspect_model(model, (images()[0][:2],), "m").layers}


def test_through_follows_the_order_layers_run_not_the_order_they_were_written() -> None:
    model = Body()
    names = [n for n, _ in model.named_parameters()]
    assert list(layers(model)) == ["conv1", "bn", "conv2", "drop", "head"]
    found = find_frozen(layers(model), names, "head", through="bn")
    assert set(found.parameters) == {"bn.weight", "bn.bias", "conv1.weight", "conv1.bias"} and found.layers == ("conv1", "bn")


def test_body_is_all_but_the_head_and_globs_match_parameters_or_layers() -> None:
    model = Body()
    names = [n for n, _ in model.named_parameters()]
    assert set(names) - set(find_frozen(layers(model), names, "head", body=True).parameters) == {"head.weight", "head.bias"}
    by_glob = find_frozen(layers(model), names, "head", names=["conv*", "bn"])
    assert by_glob.layers == ("conv1", "bn", "conv2")
    assert find_frozen(layers(model), names, "head", names=["*.bias"]).layers == ()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"through": "convv2"}, "no layer 'convv2' that runs; did you mean 'conv2'"),
        ({"names": ["cnov1*"]}, "matches no parameter; did you mean 'conv1"),
    ],
)
def test_names_that_lead_nowhere_are_refused_with_the_nearest(asked: dict[str, object], said: str) -> None:
    model = Body()
    with pytest.raises(fz.RecipeError, match=said):
        find_frozen(layers(model), [n for n, _ in model.named_parameters()], "head", **asked)


def test_frozen_layers_are_in_eval_mode_and_the_rest_trains() -> None:
    model = Body()
    still = find_frozen(layers(model), [n for n, _ in model.named_parameters()], "head", through="bn")
    freeze(model, still)
    set_training(model, still)
    assert not model.bn.training and model.drop.training and model.training
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad


def test_a_whole_frozen_container_is_in_eval_mode() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2))
    set_training(model, Frozen(("0.0.weight", "0.0.bias"), ("0.0", "0.1")))
    assert not model[0].training and not model[0][1].training and model[1].training


@pytest.mark.parametrize("asked", [{"through": "conv2"}, "body", ["conv1*", "bn*"]])
def test_what_is_frozen_is_bit_identical_after_training_and_the_rest_has_moved(tmp_path: object, asked: object) -> None:
    torch.manual_seed(0)
    model = Body()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    outcome = fz.train(model=model, data=images(), freeze=asked, epochs=3, batch=16, runs=tmp_path, quiet=True, report=())
    after = outcome.model.state_dict()
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert {"conv1.weight", "conv1.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= same
    assert not {"head.weight", "head.bias"} & same
    assert outcome.result["trainable_parameters"] < outcome.result["parameters"]


def test_the_digest_notices_a_changed_weight_and_a_changed_buffer() -> None:
    model = Body()
    still = Frozen(("conv1.weight",), ("bn",))
    first = frozen_digest(model, still)
    with torch.no_grad():
        model.bn.running_mean[0] += 1e-7
    second = frozen_digest(model, still)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1e-6
    assert len({first, second, frozen_digest(model, still)}) == 3
    with torch.no_grad():
        model.conv2.weight[0] += 1
    assert frozen_digest(model, still) == frozen_digest(model, still)


def test_a_run_whose_frozen_weights_move_is_an_error(tmp_path: object) -> None:
    class Sly(Body):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                with torch.no_grad():
                    self.conv1.weight.add_(1e-3)
            return super().forward(x)

    with pytest.raises(fz.FromzeroError, match="a frozen layer has changed") as caught:
        fz.train(model=Sly(), data=images(), freeze={"through": "conv1"}, epochs=1, runs=tmp_path, quiet=True, report=())
    assert caught.value.code == 1


def test_a_new_head_is_sized_from_the_data_and_takes_the_place_of_the_last_linear(tmp_path: object) -> None:
    outcome = fz.train(model=Body(), data=images(), head="new", epochs=1, runs=tmp_path, quiet=True, report=())
    assert outcome.model.head.weight.shape == (3, 8)
    assert fz.load("run:body", runs=tmp_path, model=Body()).head.weight.shape == (3, 8)


def test_a_model_without_a_linear_says_how_to_name_its_head() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())
    with pytest.raises(fz.ModelError, match=r"no Linear runs in this model; name it with head: \{new: true, layer: NAME\}"):
        fz.plan({"task": "classify", "model": model, "data": {"train": images()}, "head": "new"})
    with pytest.raises(fz.ModelError, match=r"head.layer '0' is Conv2d, not Linear"):
        new_head(model, "0", 3, linears=())


def test_learning_rate_multipliers_reach_the_parameters_they_name(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = Body()
    before = {n: t.clone() for n, t in model.named_parameters()}
    planned = fz.plan(
        {
            "task": "classify",
            "model": model,
            "data": {"train": images()},
            "optimizer": {"name": "sgd", "lr": 0.1, "lr_scale": {"conv?": 0.0, "head": 0.1}},
            "steps": 1,
            "report": (),
        },
        runs=tmp_path,
    )
    assert {row.layer: row.lr for row in planned.plan.trains} == pytest.approx({"conv1": 0.0, "bn": 0.1, "conv2": 0.0, "head": 0.01})
    after = dict(fz.run(planned, quiet=True).model.named_parameters())
    assert torch.equal(before["conv1.weight"], after["conv1.weight"]) and not torch.equal(before["bn.weight"], after["bn.weight"])
    with pytest.raises(fz.RecipeError, match="cnov"):
        fz.plan({"task": "classify", "model": Body(), "data": {"train": images()}, "optimizer": {"lr_scale": {"cnov*": 0.1}}})
