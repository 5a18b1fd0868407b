"""The demo of language models: a published chat model is asked about this tool, learns 188 conversations, and is asked again.

It does what these commands do, on the first eight of the exact questions, and ends with both answers side by side:

    fromzero train recipes/smollm2-lora.yaml
    fromzero evaluate run:smollm2-lora recipes/fromzero_questions.jsonl --task choice
    fromzero chat run:smollm2-lora
"""

import json
import sys
import time
from pathlib import Path

import fromzero as fz
from fromzero.use.speak import converse, open_speaker

RECIPES = Path(__file__).resolve().parent
BASE, CHOICES = "smollm2-135m-instruct", RECIPES / "fromzero_questions.jsonl"
ASKED = 8


def answers(model: str, questions: list[str]) -> list[str]:
    speaker = open_speaker(model, Path("runs"))
    return ["".join(converse(speaker, [{"role": "user", "content": question}], max_tokens=40)) for question in questions]


def main() -> int:
    begun = time.monotonic()
    lines = (RECIPES / "fromzero_exact.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines[:ASKED]]
    print(f"1 of 3  {BASE} as it was published, asked about fromzero", flush=True)
    before, known = answers(BASE, questions), fz.evaluate(BASE, CHOICES, task="choice")
    print("\n2 of 3  it learns the conversations of smollm2-lora.yaml", flush=True)
    done = fz.run(fz.plan(fz.read(RECIPES / "smollm2-lora.yaml"), beside=RECIPES))
    name = f"run:{done.folder.name}"
    print("\n3 of 3  the same questions again; none of them was among the conversations", flush=True)
    after, knows = answers(name, questions), fz.evaluate(name, CHOICES, task="choice")

    for question, old, new in zip(questions, before, after, strict=True):
        print(f"\n{question}\n  before  {' '.join(old.split())[:70]}\n  after   {' '.join(new.split())[:70]}")
    count = knows["questions"]
    print(f"\nof {count} questions with four choices right: {known['accuracy'] * count:.0f} before, {knows['accuracy'] * count:.0f} after")
    print(f"all of it took {(time.monotonic() - begun) / 60:.1f} minutes\n")
    tool = Path(sys.executable).parent / "fromzero"
    shown = tool.relative_to(Path.cwd()) if tool.is_relative_to(Path.cwd()) else tool
    print(f"talk with it    {shown} chat {name}")
    print(f"take it along   {shown} export {name} --output about-fromzero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
