"""Golden losses: the loss of every step of a few small runs, written down. A change that moves them changed the mathematics.

`python tests/golden/test_golden.py` writes them anew; the change then says why.
"""

import tempfile
from pathlib import Path

import pytest
import torch

import fromzero as fz

HERE = Path(__file__).parent
CASES = {
    "mlp-adamw": {"task": "classify", "model": "mlp", "optimizer": fz.AdamW(lr=1e-2), "batch": 16, "epochs": 3},
    "cnn-sgd-dropout": {
        "task": "classify",
        "model": {"from": "cnn", "channels": [4, 8], "dropout": 0.3, "batch_norm": True},
        "optimizer": fz.SGD(lr=0.05, momentum=0.9, nesterov=True),
        "schedule": {"name": "one_cycle"},
        "batch": 16,
        "epochs": 3,
    },
    "regress-huber-augment": {
        "task": "regress",
        "model": {"from": "cnn", "channels": [4]},
        "loss": {"name": "huber", "delta": 0.5},
        "optimizer": fz.RMSProp(lr=1e-3),
        "schedule": {"name": "cosine", "warmup": 3},
        "clip": 1.0,
        "batch": "all",
        "steps": 12,
    },
}


def losses(name: str, runs: Path) -> list[float]:
    generator = torch.Generator().manual_seed(11)
    y = torch.arange(96) % 3
    x = torch.randn(96, 1, 8, 8, generator=generator) + y[:, None, None, None]
    data: dict[str, object] = {"train": (x, y if CASES[name]["task"] == "classify" else y.float() * 2 - 1)}
    if "augment" in name:
        data["augment"] = "light"
    heard: list[float] = []
    planned = fz.plan({**CASES[name], "data": data, "report": ()}, runs=runs, probe=False)
    fz.run(planned, observers=[lambda event: heard.append(event.loss) if hasattr(event, "lr") else None])
    return heard


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_as_it_was_written_down(name: str, tmp_path: Path) -> None:
    written = [float(line) for line in (HERE / f"{name}.txt").read_text().split()]
    found = losses(name, tmp_path)
    assert len(found) == len(written) >= 12
    assert found == pytest.approx(written, rel=1e-5)


def test_stopping_early_and_keeping_the_best_follow_the_validation_loss(tmp_path: Path) -> None:
    x, y = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)), torch.randint(0, 2, (120,))
    heard: list[object] = []
    recipe = {
        "task": "classify",
        "model": "mlp",
        "data": {"train": (x, y)},
        "optimizer": fz.AdamW(lr=0.02),
        "epochs": 60,
        "evaluate": {"every": "epoch", "stop_after": 4},
        "report": (),
    }
    outcome = fz.run(fz.plan(recipe, runs=tmp_path, probe=False), observers=[heard.append])
    measured = [event for event in heard if type(event).__name__ == "Evaluated"]
    best = min(measured, key=lambda event: event.loss)
    assert outcome.result["status"] == "done" and outcome.result["steps"] < 120, "noise cannot be learned: it stops"
    assert [event.best for event in measured[-4:]] == [False] * 4
    assert outcome.result["validation"]["loss"] == best.loss and outcome.result["kept_step"] == best.step
    assert fz.evaluate("run:run", runs=tmp_path, train_data=(x, y))["loss"] == pytest.approx(best.loss, abs=1e-9)
    assert (tmp_path / "run" / "model" / "final.safetensors").exists()


if __name__ == "__main__":
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            (HERE / f"{case}.txt").write_text("".join(f"{loss!r}\n" for loss in losses(case, Path(folder))))
