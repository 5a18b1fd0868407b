"""Score: a model that speaks and a JSON-lines file of questions in, its share of right answers and every single answer out.

Dims: N tokens end to end, R tokens of all choices, V vocabulary.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import fromzero.data.tokens as tk
from fromzero.data.table import read_text
from fromzero.errors import DataError, Fault, UserError, did_you_mean
from fromzero.models.generate import scores_at
from fromzero.use.speak import Speaker, complete, converse

EVERY = 10.0  # seconds between two lines of progress
Question = dict[str, Any]


def score(speaker: Speaker, path: Path, task: str) -> dict[str, Any]:
    """task: choice, the likeliest of several texts after the question; exact, the greedy answer compared with what is right

    returns:  the means of what each question measured, and the questions as `rows`
    raises:   UserError for another task, DataError listing every line that is no question
    """
    if task not in TASKS:
        raise UserError(f"--task {task} is not known", mend=did_you_mean(task, TASKS) or " or ".join(TASKS))
    fault, measure = TASKS[task]
    questions, rows, told = _read(path, fault), [], time.monotonic()
    for question in questions:
        rows.append({**question, **measure(speaker, question)})
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            print(f"{len(rows)} of {len(questions)} questions", file=sys.stderr, flush=True)
    means = {name: fmean(row[name] for row in rows) for name in rows[0] if isinstance(rows[0][name], bool)}
    return {"model": speaker.name, "data": str(path), "task": task, "questions": len(rows), **means, "rows": rows}


def _read(path: Path, fault: Callable[[Mapping[str, Any]], str]) -> list[Question]:
    """Each line of the file that is not empty, with its number as `line`."""
    found, faults = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                question = json.loads(line)
                wrong = fault(question) if isinstance(question, dict) and _is_text(question.get("question")) else "has no question"
            except ValueError as error:
                question, wrong = {}, f"is no JSON ({error})"
            faults += [Fault(wrong, file=str(path), line=number)] if wrong else []
            found.append({"line": number, **question} if isinstance(question, dict) else {})
    if faults or not found:
        raise DataError(faults or "holds no questions", file=str(path), mend='a line is {"question": …, "answer": …}')
    return found


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
        said = f"the question of line {question['line']} has {max(map(len, whole))} tokens with a choice"
        raise DataError(said, why=f"the model reads {speaker.context}", mend="shorten it")
    rows: list[int] = []
    begin = 0
    for ids, start in zip(whole, starts, strict=True):
        rows += range(begin + start - 1, begin + len(ids) - 1)
        begin += len(ids)
    sizes = [len(ids) - start for ids, start in zip(whole, starts, strict=True)]
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
