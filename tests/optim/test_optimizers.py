"""Each optimizer against its update rule written out, in float64, over several steps of a curved loss."""

import pytest
import torch

from fromzero.errors import RecipeError
from fromzero.optim import OPTIMIZERS, make_optimizer

LR, STEPS = 0.05, 8
START = torch.tensor([0.7, -1.3, 2.1, 0.05], dtype=torch.float64)


def slope(weights):
    """Of sum(w⁴/4 + sin 3w / 3): differs for every element and changes its sign."""
    return weights**3 + torch.cos(3 * weights)


def path_of_torch(name, **options):
    weights = torch.nn.Parameter(START.clone())
    optimizer = make_optimizer(name, [{"params": [weights], "lr": LR}], **options)
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weights**4 / 4 + torch.sin(3 * weights) / 3).sum().backward()
        optimizer.step()
        path.append(weights.detach().clone())
    return torch.stack(path)


def path_by_hand(update):
    weights, path = START.clone(), []
    for number in range(1, STEPS + 1):
        weights = update(weights, slope(weights), number)
        path.append(weights)
    return torch.stack(path)


def sgd(momentum, nesterov, decay):
    memory = {"velocity": torch.zeros_like(START)}

    def update(weights, gradient, number):
        gradient = gradient + decay * weights
        velocity = memory["velocity"] = momentum * memory["velocity"] + gradient
        return weights - LR * (gradient + momentum * velocity if nesterov else velocity)

    return update


def rmsprop(alpha, eps, momentum, decay):
    memory = {"square": torch.zeros_like(START), "velocity": torch.zeros_like(START)}

    def update(weights, gradient, number):
        gradient = gradient + decay * weights
        square = memory["square"] = alpha * memory["square"] + (1 - alpha) * gradient**2
        velocity = memory["velocity"] = momentum * memory["velocity"] + gradient / (square.sqrt() + eps)
        return weights - LR * velocity

    return update


def adam(betas, eps, decay, decoupled):
    memory = {"mean": torch.zeros_like(START), "square": torch.zeros_like(START)}

    def update(weights, gradient, number):
        if decoupled:
            weights = weights - LR * decay * weights
        else:
            gradient = gradient + decay * weights
        mean = memory["mean"] = betas[0] * memory["mean"] + (1 - betas[0]) * gradient
        square = memory["square"] = betas[1] * memory["square"] + (1 - betas[1]) * gradient**2
        unbiased_mean, unbiased_square = mean / (1 - betas[0] ** number), square / (1 - betas[1] ** number)
        return weights - LR * unbiased_mean / (unbiased_square.sqrt() + eps)

    return update


def agree(ours, theirs):
    assert (theirs[-1] - START).abs().min() > 1e-3  # every element has moved
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, True, 0.0), (0.0, False, 0.1), (0.9, True, 0.1)],
)
def test_sgd_follows_its_rule(momentum, nesterov, decay):
    ours = path_of_torch("sgd", momentum=momentum, nesterov=nesterov, weight_decay=decay)
    agree(ours, path_by_hand(sgd(momentum, nesterov, decay)))


@pytest.mark.parametrize(("alpha", "momentum", "decay"), [(0.99, 0.0, 0.0), (0.9, 0.9, 0.0), (0.9, 0.5, 0.1)])
def test_rmsprop_follows_its_rule(alpha, momentum, decay):
    ours = path_of_torch("rmsprop", alpha=alpha, eps=1e-3, momentum=momentum, weight_decay=decay)
    agree(ours, path_by_hand(rmsprop(alpha, 1e-3, momentum, decay)))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_corrects_its_bias_and_adamw_decays_apart(name, betas, decay):
    ours = path_of_torch(name, betas=betas, eps=1e-3, weight_decay=decay)
    agree(ours, path_by_hand(adam(betas, 1e-3, decay, decoupled=name == "adamw")))


def test_adam_and_adamw_differ_where_there_is_decay():
    assert not torch.equal(path_of_torch("adam", weight_decay=0.1), path_of_torch("adamw", weight_decay=0.1))


def test_each_group_steps_with_its_own_learning_rate():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [w], "lr": lr, "base_lr": lr} for w, lr in zip(weights, (0.5, 0.25, 0.0), strict=True)]
    optimizer = make_optimizer("sgd", groups, lr=99.0)
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    assert [w.tolist() for w in weights] == [[0.5, 0.5], [0.75, 0.75], [1.0, 1.0]]
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.0]


def test_there_are_four_optimizers():
    assert list(OPTIMIZERS) == ["sgd", "rmsprop", "adam", "adamw"]


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(RecipeError, match="there is no optimizer 'adamx'; did you mean 'adam"):
        make_optimizer("adamx", [])


@pytest.mark.parametrize("groups", [[], [{"params": []}]])
def test_nothing_to_train_is_refused(groups):
    with pytest.raises(RecipeError, match="freeze: nothing is left to train"):
        make_optimizer("sgd", groups)
