"""Language: a corpus in, pieces of text whose every token is predicted out. A document never runs into another.

Dims: M examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.data.answers import Soft
from fromzero.data.columns import inspect_column
from fromzero.data.load import DataFacts, Loaded, Preparation
from fromzero.data.opening import TABLES, Request, find_path
from fromzero.data.split import hold_out
from fromzero.data.table import missing, read_table, read_text
from fromzero.data.text import TextExamples, TextFormat, fit_text, next_tokens
from fromzero.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """Documents as they were read."""

    name: str
    documents: Sequence[str]


def load_corpus(request: Request) -> Loaded:
    """Read, split and cut into pieces of max_tokens.

    One long document is held out by its end; several by a share of them, by distinct content.
    raises: DataError where there is no text, or too little to hold some out
    """
    corpus = read_corpus(request.train, request)
    if request.validation is not None:
        train, held = list(corpus.documents), list(read_corpus(request.validation, request).documents)
    else:
        train, held = _split(corpus.documents, request.hold_out, request.seed)
    form = fit_text(request.text, train, "text", special=False)
    examples, validation = next_tokens(form, train), next_tokens(form, held) if held else None
    if not len(examples) or (validation is not None and not len(validation)):
        raise DataError(
            "is too short: a document needs two tokens", why=f"{sum(map(len, train))} characters to learn from", file=corpus.name
        )
    facts = examples.facts(form)
    return Loaded(
        examples,
        validation,
        Preparation(form, Soft(())),
        DataFacts(
            source=corpus.name,
            kind="corpus",
            train=len(examples),
            validation=0 if validation is None else len(validation),
            input_shape=(),
            outputs=facts.vocabulary,
            classes=None,
            train_counts={},
            validation_counts={},
            columns={},
            notes=(),
            repeats=len(train) - len(set(train)),
            shared=len(set(train) & set(held)),
            conflicting=0,
            lowest=0.0,
            highest=0.0,
            set_aside={},
            target_mean=(),
            target_std=(),
            given_indices=False,
            bytes=examples.flat.nbytes + (0 if validation is None else validation.flat.nbytes),
            digest=_digest(form, train, held),
            text=facts,
        ),
    )


def corpus_again(source: Any, form: TextFormat, request: Request) -> TextExamples:
    """Other text in the pieces and tokens of a run, for evaluation."""
    return next_tokens(form, read_corpus(source, request).documents)


def read_corpus(source: Any, request: Request) -> Corpus:
    """A text file is one document; a folder has one in each .txt file, a table one in each row of its text column."""
    if isinstance(source, str) and len(source) < 4096 and Path(source).suffix.lower() not in TABLES:
        path = find_path(source, request.folders)
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        documents = [read_text(file) for file in files]
        if not any(text.strip() for text in documents):
            raise DataError(
                f"holds no text ({len(files)} text files)", file=str(path), mend="name a .txt file, a folder of them, or a table"
            )
        return Corpus(str(path), [text for text in documents if text.strip()])
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
        return Corpus("texts given from Python", list(source))
    if not isinstance(source, str):
        raise DataError(
            f"{type(source).__name__} is no corpus", mend="name a .txt file, a folder of them or a table, or give a list of texts"
        )
    table = read_table(find_path(source, request.folders))
    texts = [name for name, cells in table.columns.items() if inspect_column(name, cells).kind == "text"]
    column = request.columns[0] if request.columns else "text" if "text" in table.columns else texts[0] if len(texts) == 1 else None
    if column not in table.columns:
        raise DataError(
            f"has no column '{column}'" if column else "does not say which column is the text",
            mend=f"name it with data.input; the columns are {', '.join(list(table.columns)[:12])}",
            file=table.file,
            key="data.input",
        )
    return Corpus(table.file, [str(cell) for cell in table.columns[column] if not missing(cell)])


def _split(documents: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    if not share:
        return list(documents), []
    if len(documents) == 1:
        at = round(len(documents[0]) * (1 - share))
        return [documents[0][:at]], [documents[0][at:]]
    kept, held = hold_out([text.encode("utf-8", "surrogatepass") for text in documents], [""] * len(documents), share, seed)
    return [documents[i] for i in kept], [documents[i] for i in held]


def _digest(form: TextFormat, train: Sequence[str], held: Sequence[str]) -> str:
    digest = hashlib.sha256(form.tokenizer.encode())
    for text in (*train, "", *held):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
