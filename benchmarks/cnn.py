"""The seed CNN on digits: training samples per second and peak memory of fromzero beside four other ways to train it.

    python benchmarks/cnn.py --rounds 7 --json benchmarks/results/cnn.json

Each measurement is a process of its own; the sides take turns. All train the same network on the same array with the
same batch, optimizer and threads. The clock runs over whole steps, epoch ends included: a batch fetched, forward,
backward, update, and the loss brought to Python or logged as that framework does by default. Starting up, loading and
the warm-up steps are outside. Peak memory is that of the whole process.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from report import (
    ROOT,
    arguments,
    circumstances,
    in_turn,
    last_json,
    machine_line,
    parsed,
    print_table,
    ratios,
    run_child,
    spread,
    write_json,
)

NETWORK = ROOT / "recipes" / "models" / "seed_cnn.py"
BATCH = 64
LR = 1e-3
WEIGHT_DECAY = 0.01
SEED = 0


class Stopwatch:
    """Told after every step; remembers when the warm-up and the last step ended."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.last = warmup + steps
        self.warmup, self.step, self.loss = warmup, 0, math.nan
        self._began = self._ended = 0.0

    def tick(self) -> bool:
        """One more step is done.  returns: whether it was the last"""
        self.step += 1
        if self.step == self.warmup:
            self._began = time.perf_counter()
        if self.step == self.last:
            self._ended = time.perf_counter()
        return self.step >= self.last

    def seconds(self) -> float:
        if self.step < self.last:
            raise SystemExit(f"only {self.step} of {self.last} steps were made")
        return self._ended - self._began


# ------------------------------------------------------------------------------------------- the sides
# Each: images (M, 1, 28, 28) float32 and labels (M,) int64 as numpy arrays, a stopwatch told after every step.


def fromzero(images: Any, labels: Any, watch: Stopwatch, threads: int) -> None:
    """With all that a run does by default: its plan, its folder, the console, the page, events.jsonl."""
    import fromzero as fz
    from fromzero.report.events import StepDone

    def observe(event: Any) -> None:
        if type(event) is StepDone:
            watch.tick()
            watch.loss = event.loss

    recipe = {
        "name": "bench",
        "task": "classify",
        "model": f"{NETWORK}:SeedCNN",
        "data": {"train": (images, labels), "hold_out": 0},
        "optimizer": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY},
        "batch": BATCH,
        "steps": watch.last,
        "seed": SEED,
        "limits": {"threads": threads, "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as runs:
        fz.run(fz.plan(recipe, runs=runs), observers=[observe])


def indexed(images: Any, labels: Any, watch: Stopwatch, threads: int) -> None:
    """Plain PyTorch that keeps the data in two tensors and indexes them by hand: as little as a loop can do."""
    import torch
    import torch.nn.functional as F

    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    model, optimizer = _plain_model()
    while True:
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            watch.loss = loss.item()
            if watch.tick():
                return


def dataloader(images: Any, labels: Any, watch: Stopwatch, threads: int) -> None:
    """Plain PyTorch as most tutorials have it."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)), batch_size=BATCH, shuffle=True, num_workers=0)
    model, optimizer = _plain_model()
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            watch.loss = loss.item()
            if watch.tick():
                return


def lightning(images: Any, labels: Any, watch: Stopwatch, threads: int) -> None:
    """Lightning's Trainer, with logger, checkpoints and progress bar off. The loss is logged as its guides do."""
    import lightning
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.optimizer = _plain_model()

        def training_step(self, batch: Any, _: int) -> Any:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return self.optimizer

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
            if watch.tick():
                watch.loss = float(outputs["loss"])

    loader = DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)), batch_size=BATCH, shuffle=True, num_workers=0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=watch.last,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Lit(), loader)


def keras(images: Any, labels: Any, watch: Stopwatch, threads: int) -> None:
    """Keras on its torch backend: the same layers in Keras, channels first, `fit` on arrays without progress bar."""
    import keras

    keras.utils.set_random_seed(SEED)
    keras.config.set_image_data_format("channels_first")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((1, 28, 28)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.SpatialDropout2D(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )
    model.compile(keras.optimizers.AdamW(LR, weight_decay=WEIGHT_DECAY), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if watch.tick():
                watch.loss = float(logs["loss"])  # the mean of its epoch so far
                self.model.stop_training = True  # Keras looks at it after every batch

    model.fit(images, labels, batch_size=BATCH, epochs=math.ceil(watch.last * BATCH / len(images)) + 1, verbose=0, callbacks=[Watch()])


SIDES: dict[str, Callable[..., None]] = {
    "fromzero": fromzero,
    "indexed": indexed,
    "dataloader": dataloader,
    "lightning": lightning,
    "keras": keras,
}
EXTRA = ("lightning", "keras")  # of the extra `bench`


def _plain_model() -> tuple[Any, Any]:
    import torch

    spec = importlib.util.spec_from_file_location("seed_cnn", NETWORK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(SEED)
    model = module.SeedCNN()
    return model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)


# ------------------------------------------------------------------------------------- child and parent


def child(side: str, file: str, warmup: int, steps: int, threads: int) -> None:
    """Train one side and print what it took."""
    import numpy as np
    import torch

    with np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    torch.set_num_threads(threads)
    watch = Stopwatch(warmup, steps)
    SIDES[side](images, labels, watch, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    samples = samples_between(warmup, watch.last, len(images))
    found = {"samples_per_second": samples / watch.seconds(), "peak_bytes": peak, "loss": watch.loss, "threads": torch.get_num_threads()}
    print(json.dumps(found))


def samples_between(first: int, last: int, size: int) -> int:
    """Samples of the steps after `first` up to `last`; the last batch of an epoch is what is left over."""
    per_epoch = math.ceil(size / BATCH)

    def until(step: int) -> int:
        return step // per_epoch * size + step % per_epoch * BATCH

    return until(last) - until(first)


def prepare(file: str, random: bool) -> None:
    """Write the arrays that every child reads, so that no side pays for parsing text."""
    import numpy as np

    if random:
        draw = np.random.default_rng(SEED)
        pixels, labels = draw.integers(0, 256, (5000, 784)), draw.integers(0, 10, 5000)
    else:
        import fromzero as fz

        table = np.loadtxt(fz.fetch("mnist-5k"), delimiter=",", dtype=np.uint8)
        pixels, labels = table[:, :-1], table[:, -1]
    images = (pixels.astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    np.savez(file, images=images, labels=labels.astype(np.int64))


def here(names: list[str]) -> tuple[list[str], list[str]]:
    """Split into those that can be measured and those whose package is missing, and say so."""
    missing = [name for name in names if name in EXTRA and importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"!!! {name} is NOT measured: it is not installed; pip install -e '.[bench]'", file=sys.stderr)
    return [name for name in names if name not in missing], missing


def main() -> None:
    parser = arguments(__doc__, SIDES, rounds=5, steps=158, warmup=20, each="158: two epochs of 5,000 in batches of 64")
    parser.add_argument("--random", action="store_true", help="random images of the same shape, where mnist-5k cannot be fetched")
    asked = parsed(parser)
    if asked.child is not None:
        side, file = asked.child
        if side == "prepare":
            prepare(file, asked.random)
        else:
            child(side, file, asked.warmup, asked.steps, asked.threads)
        return

    sides, missing = here(asked.only or list(SIDES))
    seen = circumstances()
    env = {"KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(asked.threads)}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "digits.npz")
        again = [sys.executable, __file__, "--warmup", str(asked.warmup), "--steps", str(asked.steps), "--threads", str(asked.threads)]
        run_child([*again, *(["--random"] if asked.random else []), "--child", "prepare", file])
        found = in_turn(sides, asked.rounds, lambda side: last_json(run_child([*again, "--child", side, file], env)))
    show(found, missing, seen)
    write_json(asked.json, {**seen, "batch": BATCH, "steps": asked.steps, "warmup": asked.warmup, "missing": missing, "found": found})


def show(found: dict[str, list[dict[str, Any]]], missing: list[str], seen: dict[str, Any]) -> None:
    speed = {side: [one["samples_per_second"] for one in all_] for side, all_ in found.items()}
    peak = {side: [one["peak_bytes"] / 1e6 for one in all_] for side, all_ in found.items()}
    rows = [["side", "samples/s: median (min to max)", "fromzero / side", "peak MB", "fromzero / side", "last loss"]]
    for side in found:
        compare = side != "fromzero" and "fromzero" in found
        faster = ratios(speed["fromzero"], speed[side]).show(3) if compare else ""
        larger = ratios(peak["fromzero"], peak[side]).show(3) if compare else ""
        loss = spread([one["loss"] for one in found[side]])
        rows.append([side, spread(speed[side]).show(0), faster, f"{spread(peak[side]).median:.0f}", larger, loss.show(2)])
    print_table(rows)
    threads = sorted({one["threads"] for all_ in found.values() for one in all_})
    print(f"\n{machine_line(seen)}\nthreads {', '.join(map(str, threads))}; ratios are medians over rounds (min to max)")
    for side in missing:
        print(f"!!! {side} was NOT measured: pip install -e '.[bench]'")


if __name__ == "__main__":
    main()
