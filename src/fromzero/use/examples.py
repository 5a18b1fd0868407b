"""Examples: prepared data in, pictures of it for the terminal out, as the model sees it."""

from __future__ import annotations

import os
import sys
import textwrap
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fromzero.data import ChatFormat, Classes, Loaded, Numbers, TextExamples, TextFormat
from fromzero.data.columns import Columns
from fromzero.data.examples import IGNORED
from fromzero.data.tokens import decode
from fromzero.data.tokens import pieces as token_texts

_SHADES = " .:-=+*#%@"
MOST_COLUMNS = 72
MOST_TOKENS = 200
MOST_SHOWN = 2000  # tokens of a conversation
_BEGIN, _END = "\ue000", "\ue001"  # of the private use area: one column each while lines are folded


def show_examples(loaded: Loaded, count: int) -> tuple[str, list[dict[str, Any]]]:
    """The first training examples of the split: text for people, values for programs."""
    index = torch.arange(min(count, len(loaded.train)))
    if isinstance(loaded.train, TextExamples):
        return _texts(loaded, loaded.train, index)
    (inputs,), targets = loaded.train.take(index)
    names = _input_names(loaded)
    shown, values = [], []
    for i in range(len(inputs)):
        answer = _answer(loaded, targets[i])
        shown.append(f"example {i}: {answer}\n{_picture(inputs[i], names)}")
        values.append({"answer": answer, "shape": list(inputs[i].shape), "input": inputs[i].tolist()})
    return "\n\n".join(shown), values


def _texts(loaded: Loaded, examples: TextExamples, index: Tensor) -> tuple[str, list[dict[str, Any]]]:
    """Texts cut into their tokens by bars."""
    form = loaded.preparation.inputs
    if isinstance(form, ChatFormat):
        return _chats(loaded, form, examples, index)
    assert isinstance(form, TextFormat)
    shown, values = [], []
    for i in index.tolist():
        (ids, _), target = examples.take(torch.tensor([i]))
        answer = "the next token, at each token" if examples.answers is None else _answer(loaded, target[0])
        pieces = token_texts(form.tokenizer, ids.tolist())
        text = "|".join(piece.replace("\n", "⏎") for piece in pieces[:MOST_TOKENS])
        more = f" … ({len(pieces)} tokens)" if len(pieces) > MOST_TOKENS else f"  ({len(pieces)} tokens)"
        shown.append(f"example {i}: {answer}\n" + textwrap.fill(text + more, MOST_COLUMNS, initial_indent="  ", subsequent_indent="  "))
        values.append({"answer": answer, "tokens": ids.tolist(), "pieces": pieces})
    return "\n\n".join(shown), values


def _chats(loaded: Loaded, form: ChatFormat, examples: TextExamples, index: Tensor) -> tuple[str, list[dict[str, Any]]]:
    """Conversations as the model sees them, special tokens included; what is trained stands out. Below: what was seen in all of them."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    begin, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    shown, values = [], []
    for i in index.tolist():
        (inputs, _), targets = examples.take(torch.tensor([i]))
        ids, trained = [*inputs.tolist(), int(examples.flat[examples.starts[i] + len(inputs)])], [False, *(targets != IGNORED).tolist()]
        text, at = "", 0
        for flag, run in groupby(trained[:MOST_SHOWN]):
            before, at = at, at + len(list(run))
            # of whole beginnings, for a piece by itself may lose its first blank
            said = decode(form.tokenizer, ids[:at])[len(decode(form.tokenizer, ids[:before])) :].replace("\n", "⏎\n")
            text += f"{_BEGIN}{said}{_END}" if flag else said
        lines = [
            part for line in text.rstrip("\n").split("\n") for part in textwrap.wrap(line, MOST_COLUMNS, drop_whitespace=False) or [""]
        ]
        more = f", of which {MOST_SHOWN} are shown" if len(ids) > MOST_SHOWN else ""
        body = "\n".join("  " + line for line in lines).replace(_BEGIN, begin).replace(_END, end)
        shown.append(f"example {i}: {len(ids)} tokens{more}, {sum(trained)} trained\n{body}")
        values.append({"tokens": ids, "pieces": token_texts(form.tokenizer, ids), "trained": trained})
    seen = loaded.facts.chat
    below = [part for said in (seen.lines() if seen else ()) for part in textwrap.wrap(said, MOST_COLUMNS + 4, subsequent_indent="  ")]
    return "\n\n".join([*shown, "\n".join(below)]), values


def _answer(loaded: Loaded, target: Tensor) -> str:
    answers = loaded.preparation.answers
    if isinstance(answers, Classes):
        return answers.names[int(target.reshape(-1)[0])]
    if isinstance(answers, Numbers):
        restored = answers.restored(target.reshape(1, -1))[0].tolist()
        return ", ".join(f"{n} {v:.6g}" for n, v in zip(answers.names, restored, strict=True))
    return ", ".join(f"{v:.3g}" for v in target.reshape(-1).tolist()[:12])


def _input_names(loaded: Loaded) -> list[str]:
    form = loaded.preparation.inputs
    if not isinstance(form, Columns):
        return []
    names: list[str] = []
    for column in form.columns:
        if column.kind == "number":
            names += [column.name] + [f"{column.name} empty"] * column.flag
        else:
            names += [f"{column.name}={word}" for word in column.categories] + [f"{column.name} empty"] * (column.policy == "category")
    return names


def _picture(example: Tensor, names: list[str]) -> str:
    if example.ndim == 3:
        return _image(example.mean(0))
    flat = example.reshape(-1).tolist()
    if names:
        return "\n".join(f"  {name:<32.32} {value:>9.4g}" for name, value in zip(names, flat, strict=True))
    return "  " + ", ".join(f"{v:.4g}" for v in flat[:24]) + (f" … ({len(flat)} values)" if len(flat) > 24 else "")


def _image(grey: Tensor) -> str:
    """(H, W) → shades, two characters a pixel where they fit."""
    step = max(1, -(-grey.shape[1] * 2 // MOST_COLUMNS))
    low, high = float(grey.min()), float(grey.max())
    scaled = (grey[::step, ::step] - low) / ((high - low) or 1.0) * (len(_SHADES) - 1)
    return "\n".join("  " + "".join(_SHADES[int(v)] * 2 for v in row).rstrip() for row in scaled.tolist())
