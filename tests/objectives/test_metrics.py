"""Each metric against its formula written by hand, over uneven batches, and against torchmetrics where it is sound."""

import math

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multilabel_accuracy,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import r2_score

from fromzero.errors import RecipeError, ShapeError
from fromzero.objectives import Metrics

CLASSIFY, REGRESS = ("accuracy", "macro_f1"), ("r2", "rmse", "mae")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def measured(names, outputs, targets, *, width, binary=False, pieces=None):
    metrics = Metrics(names, outputs=width, binary=binary)
    pieces = pieces or (len(outputs),)
    for some_outputs, some_targets in zip(outputs.split(pieces), targets.split(pieces), strict=True):
        metrics.update(some_outputs, some_targets)
    return metrics.compute()


def f1_by_hand(said, there, kind):
    hits = sum(s == t == kind for s, t in zip(said, there, strict=True))
    return 2 * hits / (said.count(kind) + there.count(kind))


def test_accuracy_and_macro_f1_equal_their_formulas_over_uneven_batches():
    logits, targets = torch.randn(41, 4), torch.randint(4, (41,))
    ours = measured(CLASSIFY, logits, targets, width=4, pieces=(17, 1, 23))
    said, there = logits.argmax(1).tolist(), targets.tolist()
    assert list(ours) == list(CLASSIFY)
    assert ours["accuracy"] == pytest.approx(sum(s == t for s, t in zip(said, there, strict=True)) / 41)
    assert ours["macro_f1"] == pytest.approx(sum(f1_by_hand(said, there, kind) for kind in range(4)) / 4)
    assert ours["accuracy"] == pytest.approx(float(multiclass_accuracy(logits, targets, 4, average="micro")))
    assert ours["macro_f1"] == pytest.approx(float(multiclass_f1_score(logits, targets, 4, average="macro")))


def test_macro_f1_leaves_out_classes_that_nobody_named():
    logits, targets = torch.eye(5)[torch.tensor([0, 0, 1, 2])], torch.tensor([0, 1, 1, 0])
    ours = measured(["macro_f1"], logits, targets, width=5)
    assert ours["macro_f1"] == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)  # 2 was only said, 3 and 4 never


def test_probability_targets_stand_for_their_largest_class():
    logits, rows = torch.randn(9, 3), torch.rand(9, 3)
    assert measured(CLASSIFY, logits, rows, width=3) == measured(CLASSIFY, logits, rows.argmax(1), width=3)


@pytest.mark.parametrize("shape", [(30,), (30, 1)])
def test_one_yes_or_no_is_two_classes_with_the_threshold_at_zero(shape):
    logits, targets = torch.randn(shape), torch.rand(30).round()
    ours = measured(CLASSIFY, logits, targets, width=1, binary=True, pieces=(7, 23))
    said, there = [int(value > 0) for value in logits.flatten()], [int(value) for value in targets]
    assert ours["accuracy"] == pytest.approx(sum(s == t for s, t in zip(said, there, strict=True)) / 30)
    assert ours["macro_f1"] == pytest.approx((f1_by_hand(said, there, 0) + f1_by_hand(said, there, 1)) / 2)


def test_several_labels_are_counted_one_by_one():
    logits, targets = torch.randn(30, 3), torch.rand(30, 3).round()
    logits[:, 2], targets[:, 2] = -1.0, 0.0  # a label never asked nor said: F1 0, as scikit-learn has it
    ours = measured(CLASSIFY, logits, targets, width=3, binary=True, pieces=(11, 19))
    said, there = (logits > 0).int().T.tolist(), targets.int().T.tolist()
    assert ours["accuracy"] == pytest.approx(((logits > 0) == (targets > 0)).double().mean().item())
    assert ours["macro_f1"] == pytest.approx(sum(f1_by_hand(said[k], there[k], 1) for k in range(2)) / 3)
    assert ours["accuracy"] == pytest.approx(float(multilabel_accuracy(logits, targets.int(), 3, average="micro")))
    assert ours["macro_f1"] == pytest.approx(float(multilabel_f1_score(logits, targets.int(), 3, average="macro")))


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_r2_rmse_and_mae_equal_their_formulas_over_uneven_batches(shape):
    targets = torch.randn(shape).double() * 3 + 5
    outputs = targets + torch.randn(shape).double()
    ours = measured(REGRESS, outputs, targets, width=shape[1] if len(shape) > 1 else 1, pieces=(13, 1, 26))
    error = outputs - targets
    shares = 1 - (error**2).sum(0) / ((targets - targets.mean(0)) ** 2).sum(0)
    assert ours["r2"] == pytest.approx(shares.mean().item(), rel=1e-12)
    assert ours["r2"] == pytest.approx(float(r2_score(outputs, targets)))
    assert ours["rmse"] == pytest.approx((error**2).mean().sqrt().item(), rel=1e-12)
    assert ours["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-12)


@pytest.mark.parametrize(("unit", "away"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e5)])
def test_r2_does_not_depend_on_units_or_on_where_zero_lies(unit, away):
    targets = torch.randn(50).double()
    outputs = targets + torch.randn(50).double()
    plain = measured(["r2"], outputs, targets, width=1)["r2"]
    moved = measured(["r2"], (outputs + away) * unit, (targets + away) * unit, width=1)["r2"]
    assert moved == pytest.approx(plain, rel=1e-4)
    assert plain < 0.9


def test_r2_below_two_samples_is_nan_without_a_warning():
    ours = measured(REGRESS, torch.tensor([1.0]), torch.tensor([3.0]), width=1)
    assert math.isnan(ours["r2"])
    assert (ours["rmse"], ours["mae"]) == (2.0, 2.0)


def test_r2_of_a_constant_target_is_zero_or_one_if_hit():
    constant = torch.full((7,), 0.1, dtype=torch.float64)
    assert (constant.square().sum() - constant.sum() ** 2 / 7) != 0  # rounding alone would give it a spread
    assert measured(["r2"], constant, constant, width=1)["r2"] == 1.0
    assert measured(["r2"], constant + 1, constant, width=1)["r2"] == 0.0


@pytest.mark.parametrize(
    ("names", "width", "binary"), [(CLASSIFY, 3, False), (CLASSIFY, 1, True), (CLASSIFY, 2, True), (REGRESS, 2, False)]
)
def test_nothing_seen_is_nan_and_reset_returns_there(names, width, binary):
    metrics = Metrics(names, outputs=width, binary=binary)
    assert all(math.isnan(value) for value in metrics.compute().values())
    targets = torch.zeros(4, dtype=torch.int64) if width == 3 else torch.zeros(4, width)
    metrics.update(torch.rand(4, width), targets)
    first = metrics.compute()
    metrics.update(torch.rand(0, width), targets[:0])  # an empty batch changes nothing
    assert metrics.compute() == pytest.approx(first, nan_ok=True)
    metrics.reset()
    assert all(math.isnan(value) for value in metrics.compute().values())


def test_bfloat16_outputs_that_ask_for_a_gradient_are_taken_in():
    outputs = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    metrics = Metrics(["mae"], outputs=2, binary=False)
    metrics.update(outputs, torch.tensor([[2.0, 5.0]]))
    assert metrics.compute() == {"mae": 1.5}


@pytest.mark.parametrize(
    ("name", "width", "binary", "outputs", "targets"),
    [
        ("accuracy", 3, False, (4, 3), (3,)),
        ("accuracy", 3, False, (4, 2), (4,)),
        ("accuracy", 1, True, (4, 1), (3,)),
        ("accuracy", 2, True, (4, 2), (4, 1)),
        ("mae", 1, False, (4, 1), (3,)),
        ("mae", 2, False, (4, 2), (4,)),
        ("mae", 2, False, (4, 1), (4, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_naming_both(name, width, binary, outputs, targets):
    answers = torch.zeros(targets, dtype=torch.float32 if binary or name == "mae" else torch.int64)
    with pytest.raises(ShapeError) as caught:
        Metrics([name], outputs=width, binary=binary).update(torch.zeros(outputs), answers)
    assert f"targets {targets} of {answers.dtype} do not fit outputs {outputs}" in str(caught.value)


def test_no_names_measure_nothing():
    metrics = Metrics([], outputs=2, binary=False)
    metrics.update(torch.zeros(3, 2), torch.zeros(3).long())
    assert metrics.compute() == {}


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError, match="there is no metric 'acuracy'; did you mean 'accuracy'"):
        Metrics(["acuracy"], outputs=2, binary=False)


def test_metrics_of_two_kinds_are_refused():
    with pytest.raises(RecipeError, match="metrics accuracy, r2 are of 2 kinds"):
        Metrics(["accuracy", "r2"], outputs=2, binary=False)


def test_perplexity_and_token_accuracy_equal_the_formula_over_uneven_batches():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    metrics = Metrics(["perplexity", "token_accuracy"], outputs=7, binary=False)
    for part in (slice(0, 3), slice(3, 40), slice(40, 50)):
        metrics.update(logits[part], targets[part])
    nats = -(logits.double().log_softmax(1)[torch.arange(50), targets]).mean()
    found = metrics.compute()
    assert found["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    with pytest.raises(ShapeError):
        metrics.update(logits, targets[:-1])
