"""A GPT-2-shaped decoder on characters: training tokens per second, share of the machine's arithmetic and peak memory, three ways.

    python benchmarks/decoder.py --rounds 5 --json benchmarks/results/decoder.json

6 layers, width 384, 6 heads, pieces of 256 characters, 12 of them a step, AdamW 1e-3, float32, no dropout. The vocabulary
is the corpus's characters: 65 for tinyshakespeare, as in nanoGPT's shakespeare-char, not GPT-2's 50,257 tokens; fromzero
keeps one more row, for characters that it never saw. Each measurement is a process of its own; the sides take turns.

The clock runs over whole steps: a batch fetched, forward, backward, update; where a side does so by default, the loss
brought to Python. Starting, loading, planning and the warm-up steps are outside. Peak memory is that of the whole process.
Utilisation is (6 · parameters without embeddings + 12 · L · D · T) · tokens/s over the floating-point operations per
second of a large matrix product, measured in the same process with the same threads after training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn import Stopwatch
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

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
LAYERS, WIDTH, HEADS, BLOCK, BATCH = 6, 384, 6, 256, 12
LR, WEIGHT_DECAY, SEED = 1e-3, 0.01, 0
IN_BLOCKS = LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH  # parameters without embeddings; the tied head is one
FLOPS_PER_TOKEN = 6 * IN_BLOCKS + 12 * LAYERS * WIDTH * BLOCK  # forward and backward, arXiv:2204.02311 appendix B
SIDE_OF_MATRIX = 2048


@dataclass(frozen=True)
class Trained:
    """What a side did, so that all can be held to the same. loss: mean over all steps, in nats a token."""

    parameters: int
    loss: float


class Watch(Stopwatch):
    """Also turns torch's profiler on for the timed steps, where asked."""

    def __init__(self, warmup: int, steps: int, profiler: Any = None) -> None:
        super().__init__(warmup, steps)
        self.profiler = profiler

    def tick(self) -> bool:
        last = super().tick()
        if self.profiler is not None and self.step == self.warmup:
            self.profiler.start()
        if self.profiler is not None and self.step == self.last:
            self.profiler.stop()
        return last


# ------------------------------------------------------------------------------------------- the sides


def fromzero(corpus: str, watch: Watch, threads: int) -> Trained:
    """With all that a run does by default: its plan, its folder, the console, the page, events.jsonl."""
    import fromzero as fz
    from fromzero.report.events import StepDone

    losses: list[float] = []

    def observe(event: Any) -> None:
        if type(event) is StepDone:
            losses.append(event.loss)
            watch.tick()

    recipe = {
        "name": "bench",
        "task": "language",
        "model": {"from": "decoder", "family": "gpt2", "width": WIDTH, "layers": LAYERS, "heads": HEADS, "context": BLOCK},
        "data": {"train": corpus, "tokenizer": "characters", "max_tokens": BLOCK, "hold_out": 0},
        "optimizer": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY},
        "batch": BATCH,
        "steps": watch.last,
        "seed": SEED,
        "limits": {"threads": threads, "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as runs:
        done = fz.run(fz.plan(recipe, runs=runs), observers=[observe])
    return Trained(done.result["parameters"], sum(losses) / len(losses))


def transformers(corpus: str, watch: Watch, threads: int, activation: str = "gelu_new") -> Trained:
    """GPT2LMHeadModel and Trainer with their defaults; logs, checkpoints and progress bar off, clipping and schedule too."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    text, vocabulary = encoded(corpus)
    pieces = text[: len(text) // BLOCK * BLOCK].view(-1, BLOCK)  # labels are the inputs: the model shifts them itself
    set_seed(SEED)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=BLOCK,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            max_steps=watch.last,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=SEED,
        )
        torch.set_num_threads(threads)
        model = GPT2LMHeadModel(config)
        examples = [{"input_ids": piece, "labels": piece} for piece in pieces]
        done = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Tick()]).train()
    return Trained(model.num_parameters(), done.training_loss)


def transformers_fused_gelu(corpus: str, watch: Watch, threads: int) -> Trained:
    """The same with torch's own tanh GELU, as the other sides have it, instead of the formula in Python that GPT-2's config names."""
    return transformers(corpus, watch, threads, "gelu_pytorch_tanh")


def plain(corpus: str, watch: Watch, threads: int) -> Trained:
    """benchmarks/gpt_plain.py: a loop and a model by hand, on random pieces."""
    import torch
    from gpt_plain import GPT, train

    text, vocabulary = encoded(corpus)
    torch.manual_seed(SEED)
    model = GPT(vocabulary, context=BLOCK, width=WIDTH, layers=LAYERS, heads=HEADS)
    losses: list[float] = []

    def after_step(loss: float) -> bool:
        losses.append(loss)
        return watch.tick()

    train(model, text, batch=BATCH, block=BLOCK, lr=LR, after_step=after_step)
    return Trained(sum(p.numel() for p in model.parameters()), sum(losses) / len(losses))


SIDES: dict[str, Callable[[str, Watch, int], Trained]] = {
    "fromzero": fromzero,
    "transformers": transformers,
    "transformers_fused_gelu": transformers_fused_gelu,
    "plain": plain,
}
NEEDS = ("transformers", "accelerate")  # of the extra `bench`


def encoded(corpus: str) -> tuple[Any, int]:
    """returns: (M,) int64, a number for each character, and how many different ones there are"""
    import torch

    text = Path(corpus).read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


# ------------------------------------------------------------------------------------- child and parent


def child(side: str, corpus: str, warmup: int, steps: int, threads: int, profile: bool) -> None:
    """Train one side and print what it took."""
    import torch

    torch.set_num_threads(threads)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile else None
    watch = Watch(warmup, steps, profiler)
    trained = SIDES[side](corpus, watch, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if profiler is not None:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    found = {
        "tokens_per_second": steps * BATCH * BLOCK / watch.seconds(),
        "peak_bytes": peak,
        "sgemm_flops_per_second": sgemm(),
        "parameters": trained.parameters,
        "loss": trained.loss,
        "threads": torch.get_num_threads(),
    }
    found["utilisation"] = FLOPS_PER_TOKEN * found["tokens_per_second"] / found["sgemm_flops_per_second"]
    print(json.dumps(found))


def sgemm(repeats: int = 8) -> float:
    """Floating-point operations per second of a float32 matrix product, the fastest of some."""
    import torch

    a, b = torch.rand(2, SIDE_OF_MATRIX, SIDE_OF_MATRIX)
    out, fastest = torch.empty_like(a), float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIDE_OF_MATRIX**3 / fastest


def prepare(file: str, synthetic: bool) -> dict[str, Any]:
    """Write the text that every side reads.  returns: what it is"""
    real = SHAKESPEARE.is_file() and not synthetic
    if real:
        text = SHAKESPEARE.read_text(encoding="utf-8")
    else:
        draw = random.Random(SEED)
        letters = "".join(map(chr, range(65, 91))) + "".join(map(chr, range(97, 123))) + " \n.,;:!?'-&3$"  # 65, as many as Shakespeare has
        text = letters + "".join(draw.choices(letters, k=1_000_000))
    Path(file).write_text(text, encoding="utf-8")
    return {"corpus": "tinyshakespeare" if real else "random characters", "characters": len(text), "vocabulary": len(set(text))}


def here(names: list[str]) -> tuple[list[str], list[str]]:
    """Split into those that can be measured and those whose package is missing, and say so."""
    absent = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    missing = [name for name in names if name.startswith("transformers") and absent]
    for name in missing:
        print(f"!!! {name} is NOT measured: {' and '.join(absent)} not installed; pip install -e '.[bench]'", file=sys.stderr)
    return [name for name in names if name not in missing], missing


def main() -> None:
    parser = arguments(__doc__, SIDES, rounds=5, steps=12, warmup=3, each="of 3,072 tokens each")
    parser.add_argument("--synthetic", action="store_true", help="random characters even where tinyshakespeare is at hand")
    parser.add_argument("--profile", action="store_true", help="no timings: one run of each side under torch's profiler")
    asked = parsed(parser)
    if asked.child is not None:
        child(*asked.child, asked.warmup, asked.steps, asked.threads, asked.profile)
        return

    sides, missing = here(asked.only or list(SIDES))
    seen = circumstances()
    seen["versions"] |= {name: importlib.metadata.version(name) for name in NEEDS if importlib.util.find_spec(name)}
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(asked.threads), "MKL_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "corpus.txt")
        seen |= prepare(file, asked.synthetic)
        again = [sys.executable, __file__, "--warmup", str(asked.warmup), "--steps", str(asked.steps), "--threads", str(asked.threads)]
        if asked.profile:
            for side in sides:
                print(f"{side}\n{run_child([*again, '--profile', '--child', side, file], env)}")
            return
        found = in_turn(sides, asked.rounds, lambda side: last_json(run_child([*again, "--child", side, file], env)))
    for side, all_ in found.items():
        embeddings = all_[0]["parameters"] - IN_BLOCKS
        if embeddings % WIDTH or not 0 <= embeddings // WIDTH - BLOCK - seen["vocabulary"] <= 1:
            sys.exit(f"{side} trained {embeddings + IN_BLOCKS:,} parameters: the sides are not the same model")
    show(found, missing, seen)
    shape = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "block": BLOCK, "batch": BATCH}
    shape |= {"parameters_without_embeddings": IN_BLOCKS, "flops_per_token": FLOPS_PER_TOKEN}
    write_json(asked.json, {**seen, **shape, "steps": asked.steps, "warmup": asked.warmup, "missing": missing, "found": found})


def show(found: dict[str, list[dict[str, Any]]], missing: list[str], seen: dict[str, Any]) -> None:
    speed = {side: [one["tokens_per_second"] for one in all_] for side, all_ in found.items()}
    peak = {side: [one["peak_bytes"] / 1e6 for one in all_] for side, all_ in found.items()}
    rows = [
        [
            "side",
            "tokens/s: median (min to max)",
            "fromzero / side",
            "utilisation",
            "sgemm GFLOP/s",
            "peak MB",
            "fromzero / side",
            "mean loss",
        ]
    ]
    for side, all_ in found.items():
        compare = side != "fromzero" and "fromzero" in found
        faster = ratios(speed["fromzero"], speed[side]).show(3) if compare else ""
        larger = ratios(peak["fromzero"], peak[side]).show(3) if compare else ""
        used = spread([100 * one["utilisation"] for one in all_])
        sgemms = spread([one["sgemm_flops_per_second"] / 1e9 for one in all_])
        loss = spread([one["loss"] for one in all_])
        memory = f"{spread(peak[side]).median:.0f}"
        rows.append([side, spread(speed[side]).show(0), faster, f"{used.show(1)} %", sgemms.show(0), memory, larger, loss.show(2)])
    print_table(rows)
    threads = sorted({one["threads"] for all_ in found.values() for one in all_})
    print(f"\n{machine_line(seen)}\nthreads {', '.join(map(str, threads))}; ratios are medians over rounds (min to max)")
    rows_of = {side: (all_[0]["parameters"] - IN_BLOCKS) // WIDTH - BLOCK for side, all_ in found.items()}
    print(f"corpus: {seen['corpus']}, {seen['characters']:,} characters; vocabulary: its {seen['vocabulary']} different characters;")
    print(f"rows of the token embedding: {', '.join(f'{side} {rows}' for side, rows in rows_of.items())}")
    for side in missing:
        print(f"!!! {side} was NOT measured: pip install -e '.[bench]'")


if __name__ == "__main__":
    main()
