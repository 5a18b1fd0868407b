"""Language: a corpus in, pieces of text whose every token is predicted out. A document runs into another only where a stream is asked for.

Dims: M examples, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

import fromzero.data.tokens as tk
from fromzero.data.answers import Soft
from fromzero.data.columns import inspect_column
from fromzero.data.contents import Contents, contents
from fromzero.data.corpus import Corpus, Part, content_key, fit, folder_of, pieces, survey
from fromzero.data.images import printable
from fromzero.data.load import DataFacts, Loaded, Preparation
from fromzero.data.opening import TABLES, Request, find_path
from fromzero.data.split import hold_out_contents
from fromzero.data.table import Table, missing, read_blocks, read_parts, read_table, read_text
from fromzero.data.text import TextExamples, TextFormat
from fromzero.errors import DataError

IN_MEMORY = 64 * 2**20  # bytes of files: a corpus of more is read as a stream, and its tokens are kept in the cache


def load_corpus(request: Request) -> Loaded:
    """Read, split and cut into pieces of max_tokens.

    One long document is held out by its end; several by a share of them, by distinct content.
    raises: DataError where there is no text, or too little to hold some out
    """
    corpus = read_corpus(request.train, request)
    train = survey(corpus)
    held = survey(read_corpus(request.validation, request)) if request.validation is not None else None
    sources = tuple(_contents(part) for part in (train, held) if part is not None)
    if held is None and request.hold_out:
        train, held = _split(train, request.hold_out, request.seed)
    form = fit(request.text, train)
    examples, validation = pieces(form, train), pieces(form, held) if held is not None and len(held.contents) else None
    if not len(examples) or (validation is not None and not len(validation)):
        raise DataError("is too short: a document needs two tokens", why=f"{train.characters} characters to learn from", file=corpus.name)
    facts = examples.facts(form)
    contents = held.contents if held is not None else train.contents[:0]
    kept = [(part.corpus, made) for part, made in ((train, examples), (held, validation)) if part is not None and made is not None]
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
            notes=tuple(_notes(form, corpus, request.text.tokenizer)),
            repeats=len(train.contents) - len(np.unique(train.contents)),
            shared=len(np.intersect1d(train.contents, contents)),
            conflicting=0,
            lowest=0.0,
            highest=0.0,
            set_aside={},
            target_mean=(),
            target_std=(),
            given_indices=False,
            bytes=sum((0 if part.folder else made.flat.nbytes) + 16 * len(made) for part, made in kept),
            digest=content_key(form.tokenizer, train.contents.tobytes(), contents.tobytes()),
            text=facts,
        ),
        sources,
    )


def _contents(part: Part) -> Contents:
    rows = [one.tobytes() for one in part.contents]
    return contents(part.corpus.name, "document", rows, names=part.corpus.names)


def _notes(form: TextFormat, corpus: Corpus, tokenizer: str) -> Iterator[str]:
    if corpus.folder is not None:
        yield f"the text is larger than {IN_MEMORY >> 20} MiB: it is read as a stream, and its tokens are kept in {corpus.folder}"
    if form.stream and tokenizer == "characters":
        yield f"{tk.END} is a token more than the characters: it stands between documents"


def corpus_again(source: Any, form: TextFormat, request: Request) -> TextExamples:
    """Other text in the pieces and tokens of a run, for evaluation."""
    return pieces(form, survey(read_corpus(source, request)))


def read_corpus(source: Any, request: Request) -> Corpus:
    """A text file is one document; a folder has one in each .txt file, a table one in each row of its text column.

    raises: DataError where there is no text; where some of it cannot be read, now if it is small, or else when it is
    """
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
        return _in_memory("texts given from Python", source)
    if not isinstance(source, str):
        raise DataError(
            f"{type(source).__name__} is no corpus", mend="name a .txt file, a folder of them or a table, or give a list of texts"
        )
    path = find_path(source, request.folders)
    if path.suffix.lower() in TABLES:
        return _of_table(path, request)
    files = text_files(path) if path.is_dir() else [path]
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        return Corpus(str(path), lambda: _of_files(files), folder_of(files, None), _below(path, files))
    documents = {file: text for file in files if (text := read_text(file)).strip()}
    if not documents:
        raise DataError(f"holds no text ({len(files)} text files)", file=str(path), mend="name a .txt file, a folder of them, or a table")
    return _in_memory(str(path), list(documents.values()), _below(path, documents))


def text_files(folder: Path) -> list[Path]:
    """The .txt files at any depth. Hidden ones and what is no file, such as a pipe or a link to nothing, are left out by rule."""
    return [path for path in sorted(folder.rglob("*.txt")) if path.is_file() and not path.name.startswith(".")]


def _below(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """Names of documents that are files of a folder"""
    return tuple(printable(str(file.relative_to(folder))) for file in files) if folder.is_dir() else ()


def _in_memory(name: str, documents: Iterable[str], names: tuple[str, ...] = ()) -> Corpus:
    return Corpus(name, lambda: ([text] for text in documents), names=names)


def _of_files(files: list[Path]) -> Iterator[Iterable[str]]:
    for file in files:
        blocks = read_blocks(file)
        begin = list(islice(blocks, 2))
        if len(begin) > 1 or "".join(begin).strip():
            yield chain(begin, blocks)


def _of_table(path: Path, request: Request) -> Corpus:
    if path.stat().st_size <= IN_MEMORY:
        table = read_table(path)
        return _in_memory(table.file, list(_texts(table, _column(table, request))))
    column = _column(next(read_parts(path)), request)
    return Corpus(
        str(path), lambda: ([text] for part in read_parts(path, column) for text in _texts(part, column)), folder_of([path], column)
    )


def _texts(table: Table, column: str) -> Iterator[str]:
    return (str(cell) for cell in table.columns.get(column, ()) if not missing(cell))


def _column(table: Table, request: Request) -> str:
    texts = [name for name, cells in table.columns.items() if inspect_column(name, cells).kind == "text"]
    column = request.columns[0] if request.columns else "text" if "text" in table.columns else texts[0] if len(texts) == 1 else None
    if column is None or column not in table.columns:
        raise DataError(
            f"has no column '{column}'" if column else "does not say which column is the text",
            mend=f"name it with data.input; the columns are {', '.join(list(table.columns)[:12])}",
            file=table.file,
            key="data.input",
        )
    return column


def _split(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    if len(part.contents) == 1:
        at = round(part.characters * (1 - share))
        return (
            replace(part, lengths=np.array([at]), span=(0, at)),
            replace(part, contents=part.contents + 1, lengths=part.lengths - at, span=(at, part.characters)),
        )
    held = hold_out_contents(part.contents, share, seed)
    kept, aside = (replace(part, contents=part.contents[rows], lengths=part.lengths[rows], chosen=rows) for rows in (~held, held))
    return kept, aside
