"""How fast is text made? SmolLM2-135M-Instruct goes on greedily with prompts of 32 tokens; fromzero beside transformers' generate.

    python benchmarks/generate.py --rounds 5 --json benchmarks/results/generate.json

The sides take turns in one process, so that a slow minute slows all of a round; ratios are taken within a round. Both hold the same
weights in float32, and the figure is tokens made a second, reading the prompts included. One text, or sixteen together with
fromzero (--batch); transformers reads sixteen prompts of one length, so that it pads nothing. No text ends early. What the sides say is
compared: with float32 their greedy tokens should be the same, and how many are is printed.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

from report import arguments, circumstances, in_turn, machine_line, parsed, print_table, ratios, spread, write_json

SOURCE, PROMPT = "smollm2-135m-instruct", 32
TEXT = (
    "The old lighthouse stood at the end of the harbour, where the fishermen had tied up their boats for the night. Every evening the "
    "keeper climbed the stairs, lit the lamp, and wrote down the weather in a small book that nobody else had ever been allowed to read. "
)
PAIRS = (("fromzero", "transformers"), ("fromzero together", "transformers together"), ("fromzero together", "fromzero"))
SIDES = tuple(dict.fromkeys(side for pair in PAIRS for side in pair))
Ids = list[list[int]]


def prompts_of(count: int) -> Ids:
    """Of one length, each another part of one text"""
    import fromzero as fz
    from fromzero.data import tokens as tk
    from fromzero.weights import open_pretrained

    (ids,) = tk.encode(open_pretrained(str(fz.fetch(SOURCE))).tokenizer, [TEXT * 2], special=False)
    return [ids[first : first + PROMPT] for first in range(count)]


def ours(model: Any, prompts: Ids, most: int) -> Ids:
    from fromzero.models.together import Batch, Sampling

    batch = Batch(model, ())
    said: dict[int, list[int]] = {batch.add(ids, Sampling(most=most)): [] for ids in prompts}
    while len(batch):
        for one in batch.step():
            said[one.number].append(one.token)
    return list(said.values())


def theirs(model: Any, prompts: Ids, most: int) -> Ids:
    import torch

    ids = torch.tensor(prompts)
    with torch.no_grad():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found: Ids = whole[:, ids.shape[1] :].tolist()
    return found


def both() -> tuple[Any, Any]:
    """One set of weights in our model and in transformers' own"""
    from transformers import LlamaConfig, LlamaForCausalLM

    import fromzero as fz
    from fromzero.models.decoder_families import DECODERS
    from fromzero.weights import open_pretrained, to_theirs

    config, model = open_pretrained(str(fz.fetch(SOURCE))).config, fz.load(SOURCE)
    tensors = to_theirs(model.state_dict(), DECODERS["llama"].names(config, ()))
    return model, LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**config), state_dict=tensors).eval()


def main() -> None:
    parser = arguments(__doc__, SIDES, rounds=5, steps=128, warmup=4, each="one token of each text")
    parser.add_argument("--batch", type=int, default=16, help="texts that are made together")
    asked = parsed(parser)
    import torch

    torch.set_num_threads(asked.threads)
    seen = circumstances()
    seen["versions"]["transformers"] = importlib.metadata.version("transformers")
    (model, other), prompts = both(), prompts_of(max(asked.batch, 1))
    runs: dict[str, Callable[[int], Ids]] = {
        "fromzero": lambda most: ours(model, prompts[:1], most),
        "transformers": lambda most: theirs(other, prompts[:1], most),
        "fromzero together": lambda most: ours(model, prompts, most),
        "transformers together": lambda most: theirs(other, prompts, most),
    }
    sides, said = asked.only or list(SIDES), {}
    for side in sides:
        runs[side](asked.warmup)

    def measure(side: str) -> dict[str, Any]:
        began = time.perf_counter()
        said[side] = runs[side](asked.steps)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens_per_second": sum(map(len, said[side])) / seconds}

    found = in_turn(sides, asked.rounds, measure)
    speeds = {side: [one["tokens_per_second"] for one in rows] for side, rows in found.items()}
    print_table([["side", "tokens/s"], *([side, spread(speeds[side]).show(1)] for side in sides)])
    compared = [(a, b) for a, b in PAIRS if a in speeds and b in speeds]
    shares = {f"{a} / {b}": ratios(speeds[a], speeds[b]) for a, b in compared}
    print_table([["ratio", "median (least to most)"], *([name, share.show(2)] for name, share in shares.items())])
    equal = {f"{a} / {b}": same(said[a], said[b]) for a, b in compared}
    for name, share in equal.items():
        print(f"{name}: {share:.1%} of the tokens are the same")
    print(machine_line(seen))
    write_json(asked.json, {"circumstances": seen, "rounds": found, "ratios": {n: vars(s) for n, s in shares.items()}, "equal": equal})


def same(one: Ids, other: Ids) -> float:
    """The share of equal tokens in the texts that both have"""
    pairs = [(a, b) for left, right in zip(one, other, strict=False) for a, b in zip(left, right, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
