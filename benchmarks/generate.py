"""How fast is text made? SmolLM2-135M-Instruct goes on greedily with prompts of 32 tokens; fromzero beside transformers' generate and llama.cpp.

    python benchmarks/generate.py --rounds 5 --json benchmarks/results/generate.json

The sides take turns in one process, so that a slow minute slows all of a round; ratios are taken within a round, and the figure is
tokens made a second, reading the prompts included. fromzero is opened as `fromzero generate` opens it, transformers holds the same
float32 weights, and llama.cpp (where llama-cpp-python is installed) runs the published Q4_1 file with its own greedy loop. One text, or
sixteen together with fromzero (--batch); transformers reads sixteen prompts of one length, so that it pads nothing. No text ends early.
What the sides say is compared: with float32 their greedy tokens should be the same, and how many are is printed. What 8 and 4 bits
cost is printed beside their speed.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from report import arguments, circumstances, in_turn, machine_line, parsed, print_table, ratios, spread, write_json

SOURCE, PROMPT = "smollm2-135m-instruct", 32
TEXT = (
    "The old lighthouse stood at the end of the harbour, where the fishermen had tied up their boats for the night. Every evening the "
    "keeper climbed the stairs, lit the lamp, and wrote down the weather in a small book that nobody else had ever been allowed to read. "
)
PAIRS = (  # ours, theirs, at least
    ("fromzero", "transformers", 1.2),
    ("int8", "transformers", 2.5),
    ("int4", "transformers", 2.5),
    ("int4", "llama.cpp", 0.6),
    ("fromzero together", "transformers together", None),
    ("fromzero together", "fromzero", 8.0),
    ("int4 together", "int4", None),
)
SIDES = tuple(dict.fromkeys(side for *pair, _ in PAIRS for side in pair))
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


def llama(model: Any, prompts: Ids, most: int) -> Ids:
    model.reset()
    return [[token for _, token in zip(range(most), model.generate(prompts[0], temp=0.0, top_k=1, repeat_penalty=1.0), strict=False)]]


def transformers() -> Any:
    """The same weights in transformers' own model"""
    from transformers import LlamaConfig, LlamaForCausalLM

    import fromzero as fz
    from fromzero.models.decoder_families import DECODERS
    from fromzero.weights import open_pretrained, to_theirs

    config, model = open_pretrained(str(fz.fetch(SOURCE))).config, fz.load(SOURCE)
    tensors = to_theirs(model.state_dict(), DECODERS["llama"].names(config, ()))
    return LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**config), state_dict=tensors).eval()


def llama_cpp(threads: int) -> Any:
    import fromzero as fz

    library: Any = importlib.import_module("llama_cpp")
    return library.Llama(str(fz.fetch(SOURCE)), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def main() -> None:
    parser = arguments(__doc__, SIDES, rounds=5, steps=128, warmup=4, each="one token of each text")
    parser.add_argument("--batch", type=int, default=16, help="texts that are made together")
    asked = parsed(parser)
    import torch

    from fromzero.use.quantize import open_quick

    torch.set_num_threads(asked.threads)
    seen = circumstances()
    seen["versions"]["transformers"] = importlib.metadata.version("transformers")
    sides = [side for side in asked.only or SIDES if side != "llama.cpp" or find_spec("llama_cpp")]
    prompts = prompts_of(max(asked.batch, 1))
    models, costs = {}, {}
    for kind in dict.fromkeys(side.removesuffix(" together") for side in sides):
        if kind in ("fromzero", "int8", "int4"):
            speaker, costs[kind] = open_quick(SOURCE, Path("runs"), None if kind == "fromzero" else kind)
            models[kind] = speaker.model
        else:
            models[kind] = transformers() if kind == "transformers" else llama_cpp(asked.threads)
    if "llama.cpp" in models:
        seen["versions"]["llama-cpp-python"] = importlib.metadata.version("llama-cpp-python")
    ways: dict[str, Callable[[Any, Ids, int], Ids]] = {"transformers": theirs, "llama.cpp": llama}
    said: dict[str, Ids] = {}

    def run(side: str, most: int) -> Ids:
        kind = side.removesuffix(" together")
        return ways.get(kind, ours)(models[kind], prompts if side != kind else prompts[:1], most)

    for side in sides:
        run(side, asked.warmup)

    def measure(side: str) -> dict[str, Any]:
        began = time.perf_counter()
        said[side] = run(side, asked.steps)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens_per_second": sum(map(len, said[side])) / seconds}

    found = in_turn(sides, asked.rounds, measure)
    speeds = {side: [one["tokens_per_second"] for one in rows] for side, rows in found.items()}
    lost = {kind: f"{cost.quantised:.3f}, in float32 {cost.plain:.3f}" for kind, cost in costs.items() if cost is not None}
    print_table(
        [["side", "tokens/s", "loss on a fixed text"], *([side, spread(speeds[side]).show(1), lost.get(side, "")] for side in sides)]
    )
    compared = [(a, b, least) for a, b, least in PAIRS if a in speeds and b in speeds]
    shares = {f"{a} / {b}": ratios(speeds[a], speeds[b]) for a, b, _ in compared}
    least_of = {f"{a} / {b}": least for a, b, least in compared}
    verdicts = {
        name: "" if (least := least_of[name]) is None else f"{least}: {'met' if share.median >= least else 'MISSED'}"
        for name, share in shares.items()
    }
    print_table(
        [["ratio", "median (least to most)", "at least"], *([name, share.show(2), verdicts[name]] for name, share in shares.items())]
    )
    equal = {f"{a} / {b}": same(said[a], said[b]) for a, b, _ in compared}
    for name, share in equal.items():
        print(f"{name}: {share:.1%} of the tokens are the same")
    print(machine_line(seen))
    found_shares = {name: vars(share) for name, share in shares.items()}
    write_json(asked.json, {"circumstances": seen, "rounds": found, "loss": lost, "ratios": found_shares, "equal": equal})


def same(one: Ids, other: Ids) -> float:
    """The share of equal tokens in the texts that both have"""
    pairs = [(a, b) for left, right in zip(one, other, strict=False) for a, b in zip(left, right, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
