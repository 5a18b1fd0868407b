"""Score: a model that speaks and a JSON-lines file of questions in, its share of right answers and every single answer out.

Dims: N tokens end to end, R tokens of all choices, V vocabulary.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import fromzero.data.tokens as tk
from fromzero.data.opening import find_path
from fromzero.data.table import read_objects, refuse
from fromzero.errors import DataError, Fault, UserError, did_you_mean
from fromzero.models.scores import scores_at
from fromzero.use.speak import Speaker, complete, converse

FIGURES = ("accuracy", "accuracy_norm", "exact", "contains")
EVERY = 10.0  # seconds between two lines of progress
Question = dict[str, Any]


def score(speaker: Speaker, source: str, task: str) -> dict[str, Any]:
    """task: choice, the likeliest of several texts after the question; exact, the greedy answer compared with what is right

    source:   a file of questions, one an object
    returns:  the means of what each question measured, and the questions as `rows`
    raises:   UserError for another task, DataError listing every line that is no question
    """
    if task not in TASKS:
        raise UserError(f"--task {task} is not known", mend=did_you_mean(task, TASKS) or " or ".join(TASKS))
    fault, measure = TASKS[task]
    questions, faults = read_objects(find_path(source, (Path(),)))
    said = [(line, fault(question) if _is_text(question.get("question")) else "has no question") for line, question in questions]
    refuse([*faults, *(Fault(wrong, file=source, line=line) for line, wrong in said if wrong)])
    rows: list[Question] = []
    told = time.monotonic()
    for line, question in questions:
        rows.append({"line": line, **question, **measure(speaker, question)})
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            print(f"{len(rows)} of {len(questions)} questions", file=sys.stderr, flush=True)
    means = {name: fmean(row[name] for row in rows) for name in FIGURES if name in rows[0]}
    return {"model": speaker.name, "data": source, "task": task, "questions": len(rows), **means, "rows": rows}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _choice_fault(question: Mapping[str, Any]) -> str:
    choices, answer = question.get("choices"), question.get("answer")
    if not (isinstance(choices, list) and len(choices) > 1 and all(map(_is_text, choices))):
        return "needs choices: a list of at least two texts"
    named = answer in choices if isinstance(answer, str) else type(answer) is int and 0 <= answer < len(choices)
    return "" if named else f"its answer {answer!r} is none of the {len(choices)} choices, nor the place of one, from 0"


def _choose(speaker: Speaker, question: Question) -> dict[str, Any]:
    """Each choice is a document that begins with the question; all are read at once.

    source: the two accuracies are acc and acc_norm of lm-evaluation-harness: the largest log-probability, in all and per character
    """
    asked, choices = question["question"], question["choices"]
    if speaker.chat is not None:
        prompt = speaker.encode_turns([{"role": "user", "content": asked}])
        whole = [[*prompt, *ids] for ids in tk.encode(speaker.tokenizer, choices, special=False)]
        starts = [len(prompt)] * len(choices)
    else:
        space, prompt = "" if asked[-1].isspace() else " ", speaker.encode(asked)
        whole = [speaker.encode(asked + space + choice) for choice in choices]
        starts = [max(1, _shared(prompt, ids)) for ids in whole]  # a token may hold the end of the question and a choice's begin
    if max(map(len, whole)) > speaker.context:
        said = f"'{asked[:60]} …' has {max(map(len, whole))} tokens with a choice"
        raise DataError(said, why=f"the model reads {speaker.context}", mend="shorten it")
    sizes = [len(ids) - start for ids, start in zip(whole, starts, strict=True)]
    ends = accumulate(map(len, whole))
    rows = [end - 1 - left for end, size in zip(ends, sizes, strict=True) for left in range(size, 0, -1)]  # (R,) before each of a choice
    targets = torch.tensor([token for ids, start in zip(whole, starts, strict=True) for token in ids[start:]])  # (R,)
    nats = scores_at(speaker.model, whole, rows).double().cpu().log_softmax(dim=1)[torch.arange(len(targets)), targets]
    logs = [float(part.sum()) for part in nats.split(sizes)]
    shares = [log / len(choice) for log, choice in zip(logs, choices, strict=True)]
    best, best_norm = logs.index(max(logs)), shares.index(max(shares))
    right = choices.index(question["answer"]) if isinstance(question["answer"], str) else question["answer"]
    return {"logprobs": logs, "chosen": best, "chosen_norm": best_norm, "accuracy": best == right, "accuracy_norm": best_norm == right}


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids two rows begin with in common, but not all of the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other) - 1))


def _exact_fault(question: Mapping[str, Any]) -> str:
    answer = question.get("answer")
    fine = _is_text(answer) or (isinstance(answer, list) and answer and all(map(_is_text, answer)))
    return "" if fine else "needs an answer: a text, or a list of texts of which any is right"


def _answer(speaker: Speaker, question: Question) -> dict[str, Any]:
    """Without a chat template the answer is the first line that follows the question: raw text knows no other end."""
    said = ""
    if speaker.chat is not None:
        said = "".join(converse(speaker, [{"role": "user", "content": question["question"]}]))
    else:
        for piece in complete(speaker, question["question"]):
            said += piece
            if "\n" in said.lstrip():
                break
        said = said.strip().partition("\n")[0]
    right = [question["answer"]] if isinstance(question["answer"], str) else question["answer"]
    wanted, plain = [_plain(text) for text in right], _plain(said)
    return {"said": said, "exact": plain in wanted, "contains": any(f" {text} " in f" {plain} " for text in wanted)}


def _plain(text: str) -> str:
    """Without case, punctuation and white space that could differ; a text of nothing else stays as it is."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split()) or text.strip()


TASKS: dict[str, tuple[Callable[[Mapping[str, Any]], str], Callable[[Speaker, Question], dict[str, Any]]]] = {
    "choice": (_choice_fault, _choose),
    "exact": (_exact_fault, _answer),
}
