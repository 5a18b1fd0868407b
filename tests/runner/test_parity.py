"""Ours against a plain PyTorch loop written here: bit for bit where the work is the same, to rounding where it is cut."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fromzero as fz
from fromzero.data import epoch_order
from fromzero.runner.draws import Draws


class Small(nn.Module):
    """A convolution, dropout and two linear layers.  input: (B, 1, 8, 8)"""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(4 * 36, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


def digits(count: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 3
    x = torch.randn(count, 1, 8, 8, generator=generator) + y[:, None, None, None]
    return x, y


def train(tmp_path: Path, **keys: object) -> fz.Planned:
    return fz.train(runs=tmp_path, quiet=True, report=(), **keys)


@pytest.mark.parametrize("batch", [64, 37])  # 37 is no power of two, and leaves a shorter last batch
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("measured", [False, True])  # measuring in between must leave no trace
def test_weights_after_50_steps_equal_a_plain_loop_bit_for_bit(tmp_path: Path, batch: int, dropout: float, measured: bool) -> None:
    x, y = digits()
    torch.manual_seed(0)
    theirs = Small(dropout)
    given = Small(dropout)
    given.load_state_dict(theirs.state_dict())
    data = {"train": (x, y), "validation": (x[:40] + 0.1, y[:40])} if measured else {"train": (x, y), "hold_out": 0.0}
    keys = {"optimizer": fz.AdamW(lr=1e-2), "batch": batch, "steps": 50, "seed": 5, "evaluate": {"every": "epoch", "keep": "last"}}
    outcome = train(tmp_path, model=given, data=data, **keys)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01)
    draws = Draws(5)  # what falls out is fixed for each example: see test_draws.py, where it is written out
    draws.carry_out(theirs)
    step = epoch = 0
    while step < 50:
        for index in epoch_order(5, epoch, len(x)).split(batch):
            optimizer.zero_grad()
            draws.begin(index, epoch, None)
            F.cross_entropy(theirs(x[index]), y[index]).backward()
            optimizer.step()
            step += 1
            if step == 50:
                break
        epoch += 1

    ours = outcome.model.state_dict()
    assert len(ours) == 6
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(given.state_dict()[name], tensor), "the module given from Python ends with the trained weights"


@pytest.mark.parametrize("pieces", [150, 50, 7, 1])
def test_batch_all_is_gradient_descent_whatever_the_pieces(tmp_path: Path, pieces: int) -> None:
    x, y = digits()
    torch.manual_seed(1)
    theirs = Small()
    given = Small()
    given.load_state_dict(theirs.state_dict())
    keys = {"limits": {"micro_batch": pieces}, "batch": "all", "epochs": 20}
    outcome = train(tmp_path, model=given, data={"train": (x, y), "hold_out": 0.0}, optimizer=fz.SGD(lr=0.1), **keys)
    assert outcome.result["steps"] == 20, "one update an epoch"

    for _ in range(20):  # w ← w − lr · mean over the whole training set of the gradient of −log p(y|x)
        log_p = theirs(x) - theirs(x).logsumexp(1, keepdim=True)
        loss = -log_p[torch.arange(len(y)), y].mean()
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient

    for name, tensor in theirs.state_dict().items():
        largest = tensor.abs().max()
        assert ((outcome.model.state_dict()[name] - tensor).abs() / largest).max() < 1e-6, name


def test_batch_one_is_stochastic_gradient_descent(tmp_path: Path) -> None:
    x, y = digits(30)
    torch.manual_seed(2)
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    given = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    given.load_state_dict(theirs.state_dict())
    outcome = train(tmp_path, model=given, data={"train": (x, y), "hold_out": 0.0}, optimizer=fz.SGD(lr=0.05), batch=1, epochs=2)
    for epoch in range(2):
        for i in epoch_order(0, epoch, 30).tolist():
            scores = theirs(x[i : i + 1])
            error = scores.softmax(1) - F.one_hot(y[i : i + 1], 3)  # d loss / d scores, written out
            with torch.no_grad():
                theirs[1].weight -= 0.05 * error.T @ x[i : i + 1].flatten(1)
                theirs[1].bias -= 0.05 * error[0]
    torch.testing.assert_close(outcome.model.state_dict()["1.weight"], theirs[1].weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 5, 32])
def test_the_losses_do_not_depend_on_the_micro_batch(tmp_path: Path, micro_batch: int) -> None:
    x, y = digits()
    losses = {}
    for limit in ("auto", micro_batch):
        torch.manual_seed(4)
        heard: list[float] = []
        planned = fz.plan(
            {
                "task": "classify",
                "model": Small(),
                "data": {"train": (x, y)},
                "precision": "float64",
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch": 32,
                "epochs": 5,
                "clip": 1.0,
                "limits": {"micro_batch": limit},
                "report": (),
            },
            runs=tmp_path,
        )
        assert planned.plan.micro_batch == (32 if limit == "auto" else micro_batch)
        fz.run(planned, observers=[lambda event, heard=heard: heard.append(event.loss) if hasattr(event, "lr") else None])
        losses[limit] = torch.tensor(heard, dtype=torch.float64)
    assert len(losses["auto"]) == 25
    assert ((losses["auto"] - losses[micro_batch]).abs() / losses["auto"]).max() < 1e-6


def test_a_batch_with_batchnorm_or_draws_of_no_sample_is_not_cut_but_refused(tmp_path: Path) -> None:
    x, y = digits()
    for layer in (nn.AlphaDropout(0.5), nn.BatchNorm1d(64)):
        model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 3))
        with pytest.raises(fz.PlanRefused, match=r"would be cut into pieces of 8 .*limits.micro_batch.*plan never changes"):
            train(tmp_path, model=model, data=(x, y), batch=32, limits={"micro_batch": 8})


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9, 12])
def test_a_run_that_was_interrupted_and_resumed_ends_in_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    import os
    import signal

    x, y = digits()

    def planned(name: str) -> fz.Planned:
        torch.manual_seed(6)
        keys = {"task": "classify", "name": name, "model": Small(0.3), "data": {"train": (x, y)}, "batch": 32, "epochs": 3, "report": ()}
        return fz.plan(keys, runs=tmp_path)

    whole = fz.run(planned("whole"))

    def interrupt(event: object) -> None:
        if getattr(event, "step", 0) == stop_at and hasattr(event, "lr"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(fz.Interrupted, match=f"stopped after step {stop_at} of 15, saved") as caught:
        fz.run(planned("cut"), observers=[interrupt])
    assert caught.value.code == 130
    torch.manual_seed(6)
    resumed = fz.resume("cut", runs=tmp_path, model=Small(0.3), data=(x, y), quiet=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    same = ("steps", "epochs", "train", "validation", "kept_step")
    assert {k: resumed.result[k] for k in same} == {k: whole.result[k] for k in same}
