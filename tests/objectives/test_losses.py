"""Each loss against its formula written by hand, element by element, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from fromzero.errors import ShapeError
from fromzero.objectives import LOSSES, cross_entropy, huber, mse, predicted_start


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def gradient(loss, outputs, targets, **options):
    leaf = outputs.detach().clone().requires_grad_()
    total, count = loss(leaf, targets, **options)
    total.backward()
    return total.detach(), count, leaf.grad


def by_hand_cross_entropy(logits, wanted, weights, smoothing):
    """(sum, gradient) of (B, C) from exponentials alone; `wanted` are probabilities."""
    classes = logits.shape[1]
    wanted = (wanted * (1 - smoothing) + smoothing / classes) * weights
    exponentials = torch.exp(logits - logits.amax(1, keepdim=True))
    softmax = exponentials / exponentials.sum(1, keepdim=True)
    return -(wanted * softmax.log()).sum(), softmax * wanted.sum(1, keepdim=True) - wanted


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_equals_a_hand_written_log_softmax(smoothing, weighted, kind):
    logits = torch.randn(7, 5, dtype=torch.float64) * 10
    weights = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    indices = torch.randint(5, (7,))
    wanted = F.one_hot(indices, 5).double() if kind == "indices" else torch.rand(7, 5, dtype=torch.float64).softmax(1)
    targets = indices if kind == "indices" else wanted
    total, count, slope = gradient(cross_entropy, logits, targets, label_smoothing=smoothing, class_weights=weights)
    theirs_total, theirs_slope = by_hand_cross_entropy(logits, wanted, 1.0 if weights is None else weights, smoothing)
    same(total, theirs_total)
    same(slope, theirs_slope)
    assert count.shape == ()
    same(count.double(), torch.tensor(7.0).double() if weights is None else (wanted * weights).sum())


@pytest.mark.parametrize("samples", [64, 37])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_divided_once_has_the_bits_of_torch_mean(samples, smoothing):
    logits, targets = torch.randn(samples, 10) * 3, torch.randint(10, (samples,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total, count = cross_entropy(ours, targets, label_smoothing=smoothing)
    (total / count).backward()
    F.cross_entropy(theirs, targets, label_smoothing=smoothing).backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy_is_torch_weighted_mean(smoothing):
    logits, targets, weights = torch.randn(37, 4).double(), torch.randint(4, (37,)), torch.tensor([0.1, 1.0, 2.0, 7.0])
    total, count = cross_entropy(logits, targets, class_weights=weights, label_smoothing=smoothing)
    same(total / count, F.cross_entropy(logits, targets, weight=weights.double(), label_smoothing=smoothing))


def test_a_one_hot_row_counts_as_the_index_it_stands_for():
    logits, targets, weights = torch.randn(6, 3).double(), torch.randint(3, (6,)), torch.tensor([1.0, 2.0, 5.0])
    by_index = gradient(cross_entropy, logits, targets, class_weights=weights)
    by_row = gradient(cross_entropy, logits, F.one_hot(targets, 3).double(), class_weights=weights)
    for ours, theirs in zip(by_row, by_index, strict=True):
        same(ours, theirs)


def test_cross_entropy_of_a_map_counts_every_place():
    logits, targets = torch.randn(2, 3, 4, 5).double(), torch.randint(3, (2, 4, 5))
    total, count, slope = gradient(cross_entropy, logits, targets)
    flat = logits.movedim(1, -1).reshape(-1, 3)
    theirs_total, theirs_slope = by_hand_cross_entropy(flat, F.one_hot(targets.flatten(), 3).double(), 1.0, 0.0)
    assert count == 40
    same(total, theirs_total)
    same(slope.movedim(1, -1).reshape(-1, 3), theirs_slope)


def test_no_index_is_skipped_silently():
    with pytest.raises(IndexError, match="-100"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([1, -100]))


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_bce_equals_its_formula(shape, pos_weight):
    logits, targets = torch.randn(shape).double() * 5, torch.rand(shape).double().round()
    total, count, slope = gradient(LOSSES["bce"], logits, targets, pos_weight=pos_weight)
    yes = 1 / (1 + torch.exp(-logits))
    same(total, -(pos_weight * targets * yes.log() + (1 - targets) * (1 - yes).log()).sum(), 1e-9)
    same(slope, (1 - targets) * yes - pos_weight * targets * (1 - yes), 1e-9)
    assert count == logits.numel()


def hand_written(name, error, delta):
    inside = error.abs() <= delta
    return {
        "mse": (error**2, 2 * error),
        "mae": (error.abs(), error.sign()),
        "huber": (
            torch.where(inside, error**2 / 2, delta * (error.abs() - delta / 2)),
            torch.where(inside, error, delta * error.sign()),
        ),
    }[name]


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("mse", {}), ("mae", {}), ("huber", {"delta": 1.0}), ("huber", {"delta": 0.3})],
)
def test_regression_losses_equal_their_formulas(name, options, shape):
    outputs, targets = torch.randn(shape).double() * 2, torch.randn(shape).double()
    total, count, slope = gradient(LOSSES[name], outputs, targets, **options)
    value, theirs_slope = hand_written(name, outputs - targets, options.get("delta", 1.0))
    same(total, value.sum())
    same(slope, theirs_slope)
    assert count == outputs.numel()
    assert count.shape == ()
    assert count.dtype == torch.int64


def examples(name, samples):
    outputs = torch.randn(samples, 3, dtype=torch.float64)
    return outputs, torch.randint(3, (samples,)) if name == "cross_entropy" else torch.rand_like(outputs)


@pytest.mark.parametrize("name", LOSSES)
def test_cutting_a_batch_into_pieces_keeps_sum_count_and_gradient(name):
    options = {"class_weights": torch.tensor([0.5, 1.0, 4.0])} if name == "cross_entropy" else {}
    outputs, targets = examples(name, 13)
    whole = gradient(LOSSES[name], outputs, targets, **options)
    cut = zip(outputs.split((5, 1, 7)), targets.split((5, 1, 7)), strict=True)
    pieces = [gradient(LOSSES[name], some, answers, **options) for some, answers in cut]
    same(sum(piece[0] for piece in pieces), whole[0])
    same(sum(piece[1] for piece in pieces), whole[1])
    same(torch.cat([piece[2] for piece in pieces]), whole[2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("given", "summed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.half, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_float32_or_wider(name, given, summed):
    outputs, targets = examples(name, 50)
    narrow = outputs.to(given)
    total, _, slope = gradient(LOSSES[name], narrow, targets)
    assert total.dtype == summed
    assert slope.dtype == given
    theirs, _ = LOSSES[name](narrow.double(), targets)
    same(total.double(), theirs, 1e-6)


def test_there_are_five_losses_and_all_have_a_start_or_none():
    starts = {name: predicted_start(name, 10) for name in LOSSES}
    assert starts == {"cross_entropy": math.log(10), "bce": math.log(2), "mse": None, "mae": None, "huber": None}


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_the_predicted_start_is_the_loss_of_equal_logits(name):
    targets = torch.tensor([0, 2, 1]) if name == "cross_entropy" else torch.rand(3, 4).round()
    total, count = LOSSES[name](torch.zeros(3, 4), targets)
    assert float(total / count) == pytest.approx(predicted_start(name, 4), rel=1e-6)


@pytest.mark.parametrize("name", ["bce", "mse", "mae", "huber"])
@pytest.mark.parametrize(("outputs", "targets"), [((5,), (5, 1)), ((5, 1), (5,)), ((1,), (1, 1))])
def test_one_column_and_none_belong_together(name, outputs, targets):
    values, answers = torch.randn(outputs).double(), torch.rand(targets).double()
    total, count, slope = gradient(LOSSES[name], values, answers)
    flat_total, flat_count, flat_slope = gradient(LOSSES[name], values.flatten(), answers.flatten())
    assert torch.equal(total, flat_total)
    assert count == flat_count == values.numel()
    assert torch.equal(slope.flatten(), flat_slope)


@pytest.mark.parametrize("name", ["bce", "mse", "mae", "huber"])
@pytest.mark.parametrize(
    ("outputs", "targets"), [((5, 1), (4,)), ((5, 2), (5,)), ((5, 2), (5, 1)), ((1,), (5,)), ((5,), (1, 5)), ((), (1,))]
)
def test_shapes_that_torch_would_broadcast_are_refused_naming_both(name, outputs, targets):
    with pytest.raises(ShapeError) as caught:
        LOSSES[name](torch.zeros(outputs), torch.zeros(targets))
    assert f"targets {targets} do not fit outputs {outputs}" in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        ((5, 3), torch.zeros(5)),
        ((5, 3), torch.zeros(5, 1).long()),
        ((5, 3), torch.zeros(4).long()),
        ((3,), torch.tensor(1)),
        ((5, 3), torch.zeros(5, 2)),
    ],
)
def test_cross_entropy_refuses_targets_that_do_not_fit_naming_both(outputs, targets):
    with pytest.raises(ShapeError) as caught:
        cross_entropy(torch.zeros(outputs), targets)
    assert f"targets {tuple(targets.shape)} of {targets.dtype} do not fit logits {outputs}" in str(caught.value)


def test_cross_entropy_refuses_a_wrong_number_of_class_weights():
    with pytest.raises(ShapeError, match=r"class weights \(2,\) do not fit logits \(4, 3\).*give 3 class weights"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(4).long(), class_weights=torch.ones(2))


def test_whole_number_targets_are_accepted_by_regression():
    assert mse(torch.tensor([1.5]), torch.tensor([1]))[0] == 0.25
    assert huber(torch.tensor([4.0]), torch.tensor([1]), delta=2.0)[0] == 4.0
