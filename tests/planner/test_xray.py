"""Findings: what beginners meet in their model and data is said, with its mend; and not said where all is well."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fromzero as fz
from fromzero.planner.make import make


def blobs(count: int = 120, classes: int = 3, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return torch.randn(count, width, generator=generator) + 2 * F.one_hot(y, width).float(), y


def codes(model: object, data: object, **keys: object) -> dict[str, str]:
    """code → message, of everything but notes"""
    planned = fz.plan({"task": "classify", "model": model, "data": {"train": data}, **keys})
    return {f.code: str(f) for f in planned.plan.findings if f.severity != "note"}


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), *layers)


def test_a_sound_recipe_has_no_findings() -> None:
    assert codes(net(), blobs()) == {}


def test_softmax_before_cross_entropy_is_found_as_a_layer_and_as_a_function() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.log_softmax(self.body(x), dim=1)

    assert "ends in softmax, and cross_entropy applies softmax again" in codes(net(nn.Softmax(1)), blobs())["softmax-twice"]
    assert "log_softmax of log_softmax is itself" in codes(Functional(), blobs())["softmax-twice"]


def test_log_softmax_twice_really_changes_no_gradient_and_softmax_twice_really_does() -> None:
    scores = torch.randn(5, 3, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1])
    plain = torch.autograd.grad(F.cross_entropy(scores, y), scores)[0]
    twice = torch.autograd.grad(F.cross_entropy(F.log_softmax(scores, 1), y), scores)[0]
    torch.testing.assert_close(plain, twice, rtol=1e-5, atol=1e-7)
    spoiled = torch.autograd.grad(F.cross_entropy(scores.softmax(1), y), scores)[0]
    assert spoiled.norm() < 0.5 * plain.norm()


def test_dropout2d_on_flat_features_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout2d(0.5), nn.Linear(16, 3))
    assert "layer '2' is Dropout2d but gets flat features" in codes(model, blobs())["dropout2d-flat"]


def test_a_layer_without_gradient_and_one_that_never_runs_are_found() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.spare = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).detach())

    found = codes(Detached(), blobs())
    assert "no gradient reaches first.weight, first.bias" in found["no-gradient"]
    assert "spare.weight, spare.bias" in found["idle-layer"]


def test_labels_out_of_range_are_refused_with_their_counts() -> None:
    x, y = blobs()
    y = y.clone()
    y[7] = 5
    said = r"6 classes, the model 3 outputs; labels from 3 on are out of range \(0: .*; '5' stands 1 times, first at .*, example 7; .*head: new"
    with pytest.raises(fz.PlanRefused, match=said):
        fz.train(model=net(), data=(x, y), quiet=True)


def test_one_based_labels_are_noticed() -> None:
    x, y = blobs()
    model = nn.Linear(4, 4)
    assert "none is 0; class indices start at 0; these look 1-based" in codes(model, (x, y + 1))["one-based"]


def test_one_class_is_refused() -> None:
    x, _ = blobs()
    with pytest.raises(fz.PlanRefused, match="all 108 training examples are of class '0'"):
        fz.train(model=net(), data=(x, torch.zeros(120, dtype=torch.int64)), quiet=True)


def test_inputs_that_are_not_scaled_are_found() -> None:
    x, y = blobs()
    found = codes(net(), (x * 255, y))
    assert "inputs run from" in found["input-scale"] and "a fresh network should start near 1.1 (ln C)" in found["initial-loss"]


def test_an_initial_loss_far_from_ln_c_is_found() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(100)
    x, y = blobs()
    planned = fz.plan({"task": "classify", "model": lambda: copy.deepcopy(model), "data": {"train": (x, y)}})
    assert any(f.code == "initial-loss" for f in planned.plan.findings)


def test_a_learning_rate_at_which_the_loss_rises_is_found_with_a_tenth_of_it() -> None:
    found = codes(net(), blobs(), optimizer=fz.SGD(lr=300.0))
    assert "the loss rose from" in found["loss-rises"] and "try optimizer.lr=30" in found["loss-rises"]


def test_a_class_without_validation_example_is_named() -> None:
    x, y = blobs(121)
    y = y.clone()
    y[:] = y % 2
    y[120] = 2
    assert "no validation example of class 2" in codes(net(), (x, y))["class-not-validated"]


def test_conflicting_labels_are_counted() -> None:
    x, y = blobs()
    found = codes(net(), (torch.cat([x, x[:5]]), torch.cat([y, (y[:5] + 1) % 3])))
    assert "5 inputs carry more than one label" in found["conflicting-labels"]


def test_validation_rows_that_stand_in_train_are_counted_and_left_out_unless_kept() -> None:
    x, y = blobs()
    data = {"train": (x, y), "validation": (torch.cat([x[:9], x[:4] + 9]), y[:13])}
    for shared, left, said in (("leave_out", 4, "left out of the validation"), ("keep", 13, "flatters")):
        planned = fz.plan({"task": "classify", "model": net(), "data": {**data, "shared": shared}}, probe=False)
        finding = next(f for f in planned.plan.findings if f.code == "leak")
        assert finding.what.startswith("9 validation examples") and said in finding.why
        assert planned.plan.facts.data.validation == left


def test_a_split_never_shares_content() -> None:
    x, y = blobs()
    planned = fz.plan({"task": "classify", "model": net(), "data": {"train": (torch.cat([x, x]), torch.cat([y, y])), "hold_out": 0.3}})
    assert planned.plan.facts.data.shared == 0 and planned.plan.facts.data.repeats == 120


def test_columns_that_cannot_be_learned_from_are_set_aside_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [f"{i},N{i:04d},same,{(i * 37 % 17) / 7},{'ab'[i % 2]}" for i in range(80)]
    path.write_text("\n".join(["number,name,what,x,label", *rows]))
    planned = fz.plan({"task": "classify", "model": "mlp", "data": str(path)})
    said = [str(f) for f in planned.plan.findings if f.code == "column-set-aside"]
    assert len(said) == 3
    assert "column 'name' is not used; looks like an identifier" in said[1] and "column 'what' is not used; has one value" in said[2]


def test_wide_answers_of_regress_are_found() -> None:
    x, _ = blobs()
    planned = fz.plan({"task": "regress", "model": nn.Linear(4, 1), "data": {"train": (x, x[:, 0] * 1000)}})
    assert any(f.code == "target-scale" for f in planned.plan.findings)


def test_nothing_that_trains_is_refused() -> None:
    with pytest.raises(fz.PlanRefused, match="every parameter is frozen"):
        fz.train(model=net(), data=blobs(), freeze=["*"], quiet=True)


def test_a_model_that_does_not_take_the_data_says_both_shapes() -> None:
    with pytest.raises(fz.ModelError, match=r"fails on inputs of shape \(2, 4\)"):
        fz.plan({"task": "classify", "model": nn.Linear(9, 3), "data": {"train": blobs()}})


def test_memory_that_nothing_fits_is_refused_with_the_amount() -> None:
    with pytest.raises(
        fz.PlanRefused, match=r"one sample needs about .* [MG]B \(process .*\), the limit is 100 B.* raise limits.memory to \d+MB"
    ):
        fz.train(model=net(), data=blobs(), limits={"memory": 100.0}, quiet=True)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 40_000), nn.ReLU(), nn.Linear(40_000, 3))


def test_a_batch_is_cut_where_memory_is_short() -> None:
    recipe = {"task": "classify", "model": wide(), "data": {"train": blobs()}, "batch": "all"}
    free = fz.plan(recipe, probe=False).plan
    short = free.recipe.model_copy(update={"limits": free.recipe.limits.model_copy(update={"memory": free.predicted_peak_bytes - 10e6})})
    made = make(short, free.facts)
    assert 1 <= made.micro_batch < free.micro_batch == 108 and (free.grade, made.grade) == ("bitwise", "reordered")
    assert made.predicted_peak_bytes <= short.limits.memory < free.predicted_peak_bytes
