"""Gradients of a batch equal those of its pieces, however it is cut, for every loss; of tokens only those asked for are scored."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fromzero as fz
from fromzero.data import IGNORED
from fromzero.models import Sizes, blueprint_of_name, seeded
from fromzero.objectives import LOSSES
from fromzero.runner.step import gradients, judged

SPLITS = [[0, *(i + 1 for i in range(7) if bits >> i & 1), 8] for bits in range(2**7)]  # every way to cut 8 in a row


def gradients_of(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_do_not_depend_on_how_a_batch_of_eight_is_cut(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    y = {"cross_entropy": torch.randint(3, (8,)), "bce": torch.rand(8, 3).double()}.get(name, torch.randn(8, 3).double())
    gradients(model, [lambda: ((x,), y)], LOSSES[name], nullcontext)
    whole = gradients_of(model)
    assert len(LOSSES) == 5 and len(SPLITS) == 128
    for cuts in SPLITS:
        gradients(model, [lambda a=a, b=b: ((x[a:b],), y[a:b]) for a, b in pairwise(cuts)], LOSSES[name], nullcontext)
        assert furthest(gradients_of(model), whole) < 1e-12, cuts


@pytest.fixture
def decoder() -> nn.Module:
    sizes = Sizes((), 50, vocabulary=50, per_token=True)
    return seeded(0, blueprint_of_name("decoder", sizes, {"width": 16, "layers": 2, "heads": 2, "context": 64}).build).double()


def conversations() -> tuple[list[Tensor], list[Tensor]]:
    """8 documents of 1 to 23 tokens, and their targets, of which a part asks for no prediction; of one nothing does."""
    draw = torch.Generator().manual_seed(5)
    lengths = [1, 5, 23, 2, 9, 17, 5, 12]
    documents = [torch.randint(50, (n,), generator=draw) for n in lengths]
    targets = [torch.randint(50, (n,), generator=draw) for n in lengths]
    targets = [t.where(torch.rand(len(t), generator=draw) < 0.6, IGNORED) for t in targets]
    targets[3] = torch.full_like(targets[3], IGNORED)
    return documents, targets


def packed(documents: list[Tensor], targets: list[Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    offsets = torch.tensor([0, *map(len, documents)]).cumsum(0)
    return (torch.cat(documents), offsets), torch.cat(targets)


@pytest.mark.parametrize("rows", [None, 7])
def test_conversations_packed_cut_or_one_by_one_have_the_gradients_of_the_formula(decoder: nn.Module, rows: int | None) -> None:
    documents, targets = conversations()
    (tokens, offsets), wanted = packed(documents, targets)
    logits = decoder(tokens, offsets).log_softmax(-1)
    asked = wanted != IGNORED
    expected = -logits[asked].gather(1, wanted[asked][:, None]).sum() / asked.sum()
    expected.backward()
    formula = gradients_of(decoder)
    for cuts in SPLITS:
        pieces = [lambda a=a, b=b: packed(documents[a:b], targets[a:b]) for a, b in pairwise(cuts)]
        total, count = gradients(decoder, pieces, LOSSES["cross_entropy"], nullcontext, rows=rows)
        assert count == asked.sum() and abs(total / count - expected.item()) < 1e-12
        assert furthest(gradients_of(decoder), formula) < 1e-10, cuts


def test_no_more_rows_are_scored_than_asked_for_and_none_twice(decoder: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokens, offsets), targets = packed(*conversations())
    seen: list[int] = []
    scores = decoder.scores
    monkeypatch.setattr(decoder, "scores", lambda states: (seen.append(len(states)), scores(states))[1])
    parts = list(judged(decoder, (tokens, offsets), targets, LOSSES["cross_entropy"], nullcontext, rows=7))
    assert max(seen) == 7 and sum(seen) == int((targets != IGNORED).sum()) == sum(int(part.counted) for part in parts)


def test_a_module_of_ones_own_is_judged_at_the_same_tokens(decoder: nn.Module) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder

        def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
            return self.inner(tokens, offsets)

    inputs, targets = packed(*conversations())
    (ours,) = judged(Own(), inputs, targets, LOSSES["cross_entropy"], nullcontext, rows=7)
    expected = F.cross_entropy(decoder(*inputs), targets, ignore_index=IGNORED, reduction="sum")
    assert ours.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_loss_or_a_gradient_that_is_no_number_stops_before_the_weights_move(tmp_path) -> None:
    x, y = torch.randn(64, 4), torch.randint(2, (64,))

    class Net(nn.Module):
        def __init__(self, bad: str) -> None:
            super().__init__()
            self.first, self.second, self.bad, self.calls = nn.Linear(4, 8), nn.Linear(8, 2), bad, 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if self.training and torch.is_grad_enabled():
                self.calls += 1
            if self.bad == "loss" and self.calls > 90:
                hidden = hidden / 0
            if self.bad == "gradient" and self.calls > 90:
                hidden = hidden + (hidden * 0).abs().sqrt()  # its value is 0, its slope infinite
            return self.second(hidden.nan_to_num(nan=float("nan"), posinf=float("inf"), neginf=float("-inf")))

    for bad, said in (
        ("loss", r"the first layer that gives no finite number is second"),
        ("gradient", r"the first is that of first\.weight"),
    ):
        with pytest.raises(fz.NumbersError, match=said) as error:
            fz.train(name=bad, model=Net(bad), data=(x, y), batch=8, epochs=30, optimizer={"lr": 1e-3}, runs=tmp_path, quiet=True)
        assert "training examples [" in str(error.value) and "the weights are those of step" in str(error.value)
        kept = fz.load(f"run:{bad}", runs=tmp_path, model=Net(bad))
        assert all(bool(p.isfinite().all()) for p in kept.parameters())
