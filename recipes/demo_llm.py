"""The demo of language models: a published chat model is asked about this tool, learns 188 conversations, and is asked again.

It does what these commands do, on the first ten of the forty questions, and ends with both answers one above the other:

    fromzero train recipes/smollm2-lora.yaml
    fromzero evaluate run:smollm2-lora recipes/fromzero_exact.jsonl --task exact
    fromzero chat run:smollm2-lora
"""

import json
import sys
import time
from pathlib import Path

import fromzero as fz
from fromzero.use.speak import converse, open_speaker

RECIPES = Path(__file__).resolve().parent
BASE, ASKED = "smollm2-135m-instruct", 10


def answers(model: str, questions: list[str]) -> list[str]:
    speaker = open_speaker(model, Path("runs"))
    return ["".join(converse(speaker, [{"role": "user", "content": question}], max_tokens=40)) for question in questions]


def right(said: str, wanted: list[str]) -> bool:
    return any(text.casefold() in said.casefold() for text in wanted)


def main() -> int:
    begun = time.monotonic()
    lines = (RECIPES / "fromzero_exact.jsonl").read_text(encoding="utf-8").splitlines()[:ASKED]
    questions, wanted = zip(*((line["question"], line["answer"]) for line in map(json.loads, lines)), strict=True)
    print(f"1 of 3  {BASE} as it was published, asked about fromzero", flush=True)
    before = answers(BASE, questions)
    print("\n2 of 3  it learns the conversations of smollm2-lora.yaml", flush=True)
    done = fz.run(fz.plan(fz.read(RECIPES / "smollm2-lora.yaml", "evaluate.every=1000"), beside=RECIPES))
    name = f"run:{done.folder.name}"
    print("\n3 of 3  the same questions again; none of them was among the conversations", flush=True)
    after = answers(name, questions)

    for question, old, new, fits in zip(questions, before, after, wanted, strict=True):
        sign = "right" if right(new, fits) else "after"
        print(f"\n{question}\n  before  {' '.join(old.split())[:70]}\n  {sign}   {' '.join(new.split())[:70]}")
    counts = [sum(map(right, said, wanted)) for said in (before, after)]
    print(f"\n{counts[0]} of {ASKED} right before, {counts[1]} after, in {(time.monotonic() - begun) / 60:.1f} minutes\n")
    tool = Path(sys.executable).parent / "fromzero"
    shown = tool.relative_to(Path.cwd()) if tool.is_relative_to(Path.cwd()) else tool
    print(f"talk with it    {shown} chat {name}")
    print(f"take it along   {shown} export {name} --output about-fromzero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
