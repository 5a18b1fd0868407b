"""LoRA of SmolLM2-135M-Instruct on conversations of mixed length: tokens per second, memory and losses, five ways.

    python benchmarks/lora.py --rounds 3 --json benchmarks/results/lora.json

Rank 8, alpha 16, every linear layer of the blocks, no dropout; 96 conversations of the seed tasks of Self-Instruct
(arXiv:2212.10560) in batches of 8, none cut; AdamW 2e-4, no weight decay, no clipping, float32. Only the assistant's words
and the end of its turn are trained. Each measurement is a process of its own; the sides take turns. Conversations of more
than 512 tokens are not drawn: eight of them, padded, ask for more memory than a usual machine has.

A first process writes what all sides read: the model as a folder, the conversations as messages and, rendered by the
model's own template, as ids with a flag per token, the first A and B in PEFT's format, and the order, which is that of
fromzero's epochs. So the losses of all sides but `trl_packed`, whose steps are other conversations, can be held together.

Tokens are those of the conversations, padding not counted. The clock runs over whole steps: a batch fetched, forward,
backward, update, the loss brought to Python; a step's speed is its tokens over its seconds, and the figure of a run is the
median over its steps (`steady`) or all tokens over all seconds (`whole`: long conversations weigh as they do in a day's
work). Starting, loading, planning and the warm-up are outside. Peak memory is that of the whole process.

Utilisation is the arithmetic that the task asks for over what the processor does in a large matrix product (as in
decoder.py). For N tokens in documents of n_d, of which T are trained, per step:

    4 · P · N  +  6 · R · N  +  12 · L · D · Σ n_d²  +  4 · V · D · T

P the frozen matrices of the blocks and V · D the head at trained rows (forward and the gradient of what goes in; none of
weights, hence 4 and not 6), R the adapters, L · D · Σ n_d² attention, as arXiv:2204.02311 appendix B counts it. Padding,
scores of tokens that are not trained, attention between documents and what is done twice count as nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from decoder import Watch, sgemm
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

TASKS = ROOT.parent / "shared" / "data" / "self_instruct_seed_tasks.jsonl"
MODEL = "smollm2-135m-instruct"
CONVERSATIONS, BATCH = 96, 8
LONGEST = 512  # tokens: Trainer took 12.7 GB for 8 conversations padded to 482, and would take about 35 for 8 of 1,400
RANK, ALPHA, LR, SEED = 8, 16, 2e-4, 0
IGNORED = -100
NEEDS = ("transformers", "accelerate", "peft", "trl", "datasets")  # of the extra `bench`
SAME_STEPS = ("trainer", "trl_padded", "trl_padding_free", "fromzero")  # sides whose losses are of the same conversations
Example = dict[str, list[int]]  # input_ids and labels, IGNORED where not trained


class Steps(Watch):
    """Also keeps when each step ended, its loss, and how many conversations' tokens it held."""

    def __init__(self, warmup: int, steps: int, profiler: Any = None) -> None:
        super().__init__(warmup, steps, profiler)
        self.ended: list[float] = []
        self.losses: list[float] = []
        self.batches: list[list[Example]] | None = None  # of a side that makes its own

    def tick(self) -> bool:
        self.ended.append(time.perf_counter())
        return super().tick()

    def timed(self, batches: Sequence[Sequence[Example]]) -> Iterator[tuple[Sequence[Example], float]]:
        """Each step after the warm-up: its conversations and its seconds"""
        seconds = [after - before for before, after in itertools.pairwise(self.ended)]
        return zip(batches[self.warmup : self.last], seconds[self.warmup - 1 : self.last - 1], strict=True)


# ------------------------------------------------------------------------------------------- the sides
# Each: the folder that prepare() wrote, a watch told after every step, and the threads.


def fromzero(folder: Path, watch: Steps, threads: int) -> None:
    """With all that a run does by default: its plan, its folder, the console, the page, events.jsonl."""
    import fromzero as fz
    from fromzero.report.events import StepDone

    def observe(event: Any) -> None:
        if type(event) is StepDone:
            watch.losses.append(event.loss)
            watch.tick()

    recipe = {
        "name": "bench",
        "task": "chat",
        "model": MODEL,
        "adapter": {"name": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear", "start": str(folder / "adapter")},
        "data": {"train": str(folder / "conversations.jsonl"), "hold_out": 0},
        "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.0},
        "batch": BATCH,
        "steps": watch.last,
        "seed": SEED,
        "limits": {"threads": threads, "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as runs:
        fz.run(fz.plan(recipe, runs=runs), observers=[observe])


def trainer(folder: Path, watch: Steps, threads: int) -> None:
    """transformers.Trainer on peft's model, batches padded to their longest conversation."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class Watched(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> Any:
            return noted(watch, super().training_step(*arguments, **named))

    tokenizer = tokenizer_of(folder)
    with tempfile.TemporaryDirectory() as output:
        Watched(
            model=adapted(folder),
            args=TrainingArguments(**settings(output, watch)),
            train_dataset=ordered(folder, watch.last),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            processing_class=tokenizer,
            callbacks=[ticking(watch)],
        ).train()


def trl_padded(folder: Path, watch: Steps, threads: int, **chosen: Any) -> None:
    """trl's SFTTrainer. Two of its defaults are set aside: bfloat16, for equal losses, and recomputed activations, to be faster."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Watched(SFTTrainer):
        def training_step(self, *arguments: Any, **named: Any) -> Any:
            return noted(watch, super().training_step(*arguments, **named))

    with tempfile.TemporaryDirectory() as output:
        chosen = {**settings(output, watch), "bf16": False, "gradient_checkpointing": False, "max_length": None, **chosen}
        side = Watched(
            model=adapted(folder),
            args=SFTConfig(**chosen),
            train_dataset=Dataset.from_list(ordered(folder, watch.last)),
            processing_class=tokenizer_of(folder),
            callbacks=[ticking(watch)],
        )
        if chosen.get("packing"):
            rows = itertools.cycle(in_documents(row) for row in side.train_dataset)
            watch.batches = list(itertools.islice(rows, watch.last))
        side.train()


def trl_padding_free(folder: Path, watch: Steps, threads: int) -> None:
    """The 8 conversations end to end. On a CPU there is no flash attention: torch's own gets a mask that keeps them apart."""
    trl_padded(folder, watch, threads, padding_free=True)


def trl_packed(folder: Path, watch: Steps, threads: int) -> None:
    """Each step is one row of at most 1,024 tokens (trl's default), filled best fit first: about 8 conversations, but other ones."""
    trl_padded(folder, watch, threads, packing=True, max_length=1024, per_device_train_batch_size=1)


SIDES: dict[str, Callable[[Path, Steps, int], None]] = {
    "fromzero": fromzero,
    "trainer": trainer,
    "trl_padded": trl_padded,
    "trl_packed": trl_packed,
    "trl_padding_free": trl_padding_free,
}


def settings(output: str, watch: Steps) -> dict[str, Any]:
    """What Trainer and SFTTrainer are both told: this task, and nothing written or shown."""
    return {
        "output_dir": output,
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": watch.last,
        "learning_rate": LR,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": SEED,
    }


def noted(watch: Steps, loss: Any) -> Any:
    watch.losses.append(loss.item())
    return loss


def ticking(watch: Steps) -> Any:
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    return Tick()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def adapted(folder: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


# -------------------------------------------------------------------------------------- what all read


def ordered(folder: Path, steps: int) -> list[Example]:
    """The conversations of so many steps, one after another, as ids and labels."""
    written = json.loads((folder / "examples.json").read_text())
    examples = [
        {"input_ids": ids, "labels": [token if learned else IGNORED for token, learned in zip(ids, trained, strict=True)]}
        for ids, trained in zip(written["ids"], written["trained"], strict=True)
    ]
    return [examples[place] for place in written["order"][: steps * BATCH]]


def in_batches(all_: Sequence[Any]) -> list[Sequence[Any]]:
    return [all_[start : start + BATCH] for start in range(0, len(all_), BATCH)]


def in_documents(row: dict[str, Any]) -> list[Example]:
    """A packed row taken apart"""
    ends = list(itertools.accumulate(row["seq_lengths"], initial=0))
    return [{key: row[key][start:end] for key in ("input_ids", "labels")} for start, end in itertools.pairwise(ends)]


def prepare(folder: Path, steps: int) -> None:
    """Write what every side reads.  Prints what it is as JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fromzero.data import epoch_order
    from fromzero.weights import open_pretrained, write_folder

    published = open_pretrained(MODEL)
    tensors = {name: published.tensors[name] for name in published.tensors}
    write_folder(
        folder / "model",
        published.config,
        tensors,
        tokenizer=published.tokenizer,
        special=published.special,
        chat_template=published.chat_template,
        generation=published.generation,
    )
    tokenizer = tokenizer_of(folder)
    drawn = ((chat, *rendered(tokenizer, chat)) for chat in conversations())
    fitting = itertools.islice((one for one in drawn if len(one[1]) <= LONGEST), CONVERSATIONS)
    chats, ids, trained = zip(*fitting, strict=True)
    (folder / "conversations.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    epochs = -(-steps * BATCH // CONVERSATIONS)
    order = [place for epoch in range(epochs) for place in epoch_order(SEED, epoch, CONVERSATIONS).tolist()]
    (folder / "examples.json").write_text(json.dumps({"ids": ids, "trained": trained, "order": order}))

    torch.manual_seed(SEED)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), lora)
    model.save_pretrained(folder / "adapter")
    config = published.config
    lengths = sorted(map(len, ids))
    found = {
        "conversations": "seed tasks of Self-Instruct" if TASKS.is_file() else "random words",
        "tokens": sum(lengths),
        "trained_tokens": sum(map(sum, trained)),
        "lengths": {"shortest": lengths[0], "median": median(lengths), "longest": lengths[-1]},
        "tokens_with_padding": sum(BATCH * max(len(ids[place]) for place in batch) for batch in in_batches(order[:CONVERSATIONS])),
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "frozen_in_blocks": sum(t.numel() for name, t in tensors.items() if ".layers." in name and t.dim() == 2),
        "head": config["vocab_size"] * config["hidden_size"],
        "adapters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(found))


def conversations() -> Iterator[list[dict[str, str]]]:
    """One question and its answer each, shuffled. Without the file, random words whose lengths are spread as widely."""
    draw = random.Random(SEED)
    if TASKS.is_file():
        tasks = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
        for task in draw.sample(tasks, len(tasks)):
            first = task["instances"][0]
            yield turns("\n\n".join(filter(None, [task["instruction"], first["input"]])), first["output"])
    words = [start + end for start in "bdfglmnprst" for end in ("a", "e", "ing", "one")]
    while not TASKS.is_file():
        yield turns(*(" ".join(draw.choices(words, k=max(2, round(draw.lognormvariate(3.6, 1.0))))) for _ in range(2)))


def turns(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def rendered(tokenizer: Any, chat: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
    """returns: ids, and 1 for each token of the answer and of the end of its turn"""
    asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ends = len(asked) + len(chat[-1]["content"] + tokenizer.eos_token)
    if whole[len(asked) : ends] != chat[-1]["content"] + tokenizer.eos_token:
        sys.exit(f"the template does not put the answer after its prompt: {whole[:200]!r}")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [int(len(asked) <= start and end <= ends) for start, end in encoded["offset_mapping"]]


# ------------------------------------------------------------------------------------- child and parent


def child(side: str, folder: Path, warmup: int, steps: int, threads: int, profile: bool) -> None:
    """Train one side and print what it took."""
    import torch

    torch.set_num_threads(threads)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile else None
    watch = Steps(warmup, steps, profiler)
    SIDES[side](folder, watch, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if profiler is not None:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    watch.seconds()  # ends here if steps are missing
    timed = list(watch.timed(watch.batches or in_batches(ordered(folder, watch.last))))
    tokens = [sum(len(one["input_ids"]) for one in batch) for batch, _ in timed]
    seconds = [one for _, one in timed]
    found = {
        "steady_tokens_per_second": median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_tokens": tokens,
        "step_trained_tokens": [sum(map(trained_in, batch)) for batch, _ in timed],
        "step_seconds": seconds,
        "losses": watch.losses,
        "peak_bytes": peak,
        "sgemm_flops_per_second": sgemm(),
        "square_lengths": sum(len(one["input_ids"]) ** 2 for batch, _ in timed for one in batch),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found))


def trained_in(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"])


def flops(one: dict[str, Any], seen: dict[str, Any]) -> float:
    """What the timed steps of a measurement ask for; the formula stands at the top"""
    linear = (4 * seen["frozen_in_blocks"] + 6 * seen["adapters"]) * sum(one["step_tokens"])
    attention = 12 * seen["layers"] * seen["width"] * one["square_lengths"]
    return float(linear + attention + 4 * seen["head"] * sum(one["step_trained_tokens"]))


def main() -> None:
    parser = arguments(__doc__, SIDES, rounds=3, steps=12, warmup=1, each="of 8 conversations each; 12 are an epoch")
    parser.add_argument("--profile", action="store_true", help="no timings: one run of each side under torch's profiler")
    asked = parsed(parser)
    if asked.child is not None:
        side, folder = asked.child[0], Path(asked.child[1])
        if side == "prepare":
            prepare(folder, asked.warmup + asked.steps)
        else:
            child(side, folder, asked.warmup, asked.steps, asked.threads, asked.profile)
        return
    if absent := [package for package in NEEDS if importlib.util.find_spec(package) is None]:
        sys.exit(f"{', '.join(absent)} not installed: pip install -e '.[bench,dev]'")

    sides, seen = asked.only or list(SIDES), circumstances()
    seen["versions"] |= {name: importlib.metadata.version(name) for name in NEEDS}
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(asked.threads), "MKL_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, "--warmup", str(asked.warmup), "--steps", str(asked.steps), "--threads", str(asked.threads)]
        print("writing the model, the conversations and the adapter", file=sys.stderr, flush=True)
        seen |= last_json(run_child([*again, "--child", "prepare", folder], env))
        if asked.profile:
            for side in sides:
                print(f"{side}\n{run_child([*again, '--profile', '--child', side, folder], env)}")
            return
        found = in_turn(sides, asked.rounds, lambda side: last_json(run_child([*again, "--child", side, folder], env)))
    for one in itertools.chain.from_iterable(found.values()):
        one["utilisation"] = flops(one, seen) / sum(one["step_seconds"]) / one["sgemm_flops_per_second"]
    apart = differences_of_losses(found)
    show(found, apart, seen)
    shape = {"model": MODEL, "rank": RANK, "alpha": ALPHA, "lr": LR, "batch": BATCH, "count": CONVERSATIONS}
    write_json(asked.json, {**seen, **shape, "steps": asked.steps, "warmup": asked.warmup, "loss_differences": apart, "found": found})


def differences_of_losses(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Side → its largest difference of a step's loss from that of `trainer`, or of the first side there is, over all rounds"""
    same = [side for side in SAME_STEPS if side in found]
    if len(same) < 2:
        return {}
    first = found[same[0]][0]["losses"]
    return {
        f"{side} - {same[0]}": max(abs(a - b) for one in found[side] for a, b in zip(one["losses"], first, strict=True))
        for side in same[1:]
    }


def show(found: dict[str, list[dict[str, Any]]], apart: dict[str, float], seen: dict[str, Any]) -> None:
    figures = {
        "steady tokens/s": ("steady_tokens_per_second", 1),
        "whole tokens/s": ("tokens_per_second", 1),
        "peak MB": ("peak_bytes", 1e6),
    }
    head = ["side"]
    for title in figures:
        head += [title, "fromzero / side"]
    rows = [[*head, "utilisation", "first loss", "last loss"]]
    for side, all_ in found.items():
        row = [side]
        for key, unit in figures.values():
            theirs = [one[key] / unit for one in all_]
            compare = side != "fromzero" and "fromzero" in found
            ours = [one[key] / unit for one in found["fromzero"]] if compare else []
            row += [spread(theirs).show(0), ratios(ours, theirs).show(2) if compare else ""]
        used = spread([100 * one["utilisation"] for one in all_])
        rows.append([*row, f"{used.show(1)} %", f"{all_[0]['losses'][0]:.4f}", f"{all_[0]['losses'][-1]:.4f}"])
    print_table(rows)
    threads = sorted({one["threads"] for all_ in found.values() for one in all_})
    sgemms = spread([one["sgemm_flops_per_second"] / 1e9 for all_ in found.values() for one in all_])
    lengths = seen["lengths"]
    print(
        f"\n{machine_line(seen)}\nthreads {', '.join(map(str, threads))}; sgemm {sgemms.show(0)} GFLOP/s; ratios are medians over rounds (min to max)"
    )
    print(
        f"{CONVERSATIONS} conversations, {seen['conversations']}: {seen['tokens']:,} tokens, {seen['trained_tokens']:,} of them trained, ",
        end="",
    )
    print(f"{lengths['shortest']} to {lengths['longest']} a conversation (median {lengths['median']:.0f});")
    print(f"padded to the longest of its batch an epoch is {seen['tokens_with_padding']:,} tokens")
    for sides, most in apart.items():
        print(f"losses of {sides}: at most {most:.1e} apart{'' if most <= 1e-4 else '  !!! more than 1e-4'}")


if __name__ == "__main__":
    main()
