"""Corpora: documents that are read again and again in, their tokens end to end out, in memory or as files of the cache.

The files are made once for a text, a choice of its documents and a tokenizer. They only ever grow, the tokens before the rows
that tell of them, so that whoever is killed has lost a few seconds of work: what stands behind the rows is cut off, and
the rest is made. Dims: D documents, S segments, N tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fromzero.data.tokens as tk
from fromzero.data.text import MOST_TEXTS_FOR_BPE, TextAsked, TextExamples, TextFormat, fit_text, next_tokens
from fromzero.errors import DataError
from fromzero.sources import cache_folder, digest_of, locked, write_whole

SEGMENT = 2**18  # characters of a longer document that become tokens at once, so that one document has work for every core
BATCH = 2**21  # characters that become tokens at once: about a second of work, and 100 MB while it lasts
MOST_CHARACTERS_FOR_BPE = 2**28  # of a larger corpus every second segment, or every third …
_FORM = "1"  # of the files; another one makes other files
# Where a document may be cut without changing its tokens: a word and the white space before the next are never one token.
_CUTS = (re.compile(r"[^\W_](?=\s)"), re.compile(r"[^\W_](?=\W)"))
_QUIET_SECONDS = 2.0  # of work of which nothing is said
_SAY_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True)
class Corpus:
    """documents: begins to read; the blocks of text of each document.  folder: of the cache; None: it is small, and in memory
    names: of the files that the documents are; () where they are none"""

    name: str
    documents: Callable[[], Iterator[Iterable[str]]]
    folder: Path | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """Some documents of a corpus, or a span of the characters of the only one.

    contents:  (D,) int64 a digest of each;  lengths: (D,) their characters;  chosen: which of the corpus; None: all
    """

    corpus: Corpus
    contents: NDArray[np.int64]
    lengths: NDArray[np.int64]
    chosen: NDArray[np.bool_] | None = None
    span: tuple[int, int] = (0, sys.maxsize)

    @property
    def characters(self) -> int:
        return int(self.lengths.sum())

    def segments(self) -> Iterator[tuple[str, bool]]:
        """Text of at most SEGMENT characters, and whether its document ends with it."""
        for place, blocks in enumerate(self.corpus.documents()):
            if self.chosen is None or self.chosen[place]:
                yield from _segments(_clip(blocks, *self.span))

    def key(self, *more: object) -> str:
        return content_key(self.contents.tobytes(), *more)


def content_key(*parts: object) -> str:
    """One short name for some values: of a folder, or of data."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def folder_of(files: list[Path], column: str | None) -> Path:
    """Where the tokens of some files are kept: by content, so that the same text elsewhere finds them too.

    The content of a file that has its path, size and time of change is not read again.
    """
    place, seen = cache_folder() / "tokens", [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = place / "files" / content_key(seen)
    if note.is_file():
        content = note.read_text()
    else:
        content = content_key(*map(digest_of, files))
        if time.time_ns() - max(changed for *_, changed in seen) > 2e9:  # the clock of some disks counts whole seconds
            with _writing(place):
                write_whole(note, content.encode())
    return place / content_key(_FORM, SEGMENT, content, column)


def survey(corpus: Corpus) -> Part:
    """All of a corpus, read once.  raises: DataError where it cannot be read"""
    if corpus.folder is None:
        seen = _survey(corpus)
    else:
        path = corpus.folder / "documents"
        with _writing(corpus.folder):
            if not path.is_file():
                write_whole(path, _survey(corpus).tobytes())
        seen = np.fromfile(path, np.int64)
    contents, lengths = seen.reshape(-1, 2).T.copy()
    return Part(corpus, contents, lengths)


def _survey(corpus: Corpus) -> NDArray[np.int64]:
    seen, progress = array("q"), _Progress(f"reading {corpus.name}")
    for blocks in corpus.documents():
        digest, characters = hashlib.blake2b(digest_size=8), 0
        for block in blocks:
            digest.update(block.encode("utf-8", "surrogatepass"))
            characters += len(block)
            progress.add(len(block))
        seen.extend((int.from_bytes(digest.digest(), "little", signed=True), characters))
    return np.array(seen, np.int64)


def fit(asked: TextAsked, part: Part) -> TextFormat:
    """The tokenizer asked for; one that is learned from a corpus on disk is learned once."""
    learned = asked.tokenizer in ("characters", "bpe")
    every = 1 if asked.tokenizer == "characters" else max(-(-part.characters // MOST_CHARACTERS_FOR_BPE), 1)
    progress = _Progress(f"learning a tokenizer from {part.corpus.name}", part.characters // every)
    texts = (progress.add(len(text), text) for text, _ in islice(part.segments(), 0, MOST_TEXTS_FOR_BPE * every, every))
    if part.corpus.folder is None or not learned:
        return fit_text(asked, texts, "text", special=False)
    key = part.key(part.span, asked.tokenizer, asked.vocabulary if asked.tokenizer == "bpe" else asked.stream)
    path = part.corpus.folder / f"tokenizer-{key}.json"
    with _writing(part.corpus.folder):
        if not path.is_file():
            write_whole(path, fit_text(asked, texts, "text", special=False).tokenizer.encode())
    return TextFormat(path.read_text(encoding="utf-8"), asked.max_tokens, "text", False, asked.stream)


def pieces(form: TextFormat, part: Part) -> TextExamples:
    """The documents of a part as examples of next tokens."""
    kind = np.dtype(np.uint16 if tk.vocabulary_size(form.tokenizer) <= 2**16 else np.int32)
    if part.corpus.folder is None:
        made = list(_encoded(form.tokenizer, part.segments(), kind))
        flat = torch.from_numpy(np.concatenate([np.empty(0, kind), *(ids for ids, _ in made)]))
        rows = np.concatenate([_no_rows(), *(rows for _, rows in made)])
    else:
        folder = part.corpus.folder / part.key(part.span, form.tokenizer)
        with _writing(folder):
            rows = _write(folder, part, form.tokenizer, kind)
        dtype = torch.uint16 if kind == np.uint16 else torch.int32
        flat = torch.from_file(str(folder / "tokens"), shared=False, size=int(rows[:, 0].sum(dtype=np.int64)), dtype=dtype)
    begins = np.flatnonzero(np.append(True, rows[:, 3] > 0)[:-1])  # (D,)
    tokens, sizes = (torch.from_numpy(np.add.reduceat(rows[:, column], begins, dtype=np.int64)) for column in (0, 1))
    return next_tokens(form, flat, tokens, sizes, torch.from_numpy(rows[begins, 2]))


def _no_rows() -> NDArray[np.int32]:
    """(S, 4) of each segment: its tokens, its UTF-8 bytes, its first token, and whether its document ends with it."""
    return np.empty((0, 4), np.int32)


def _write(folder: Path, part: Part, tokenizer: str, kind: np.dtype[np.generic]) -> NDArray[np.int32]:
    """Make what is missing of a part's files.  returns: its rows"""
    flat, finished, growing = folder / "tokens", folder / "rows", folder / "rows.part"
    flat.touch()
    if not finished.is_file():
        growing.touch()
    path = finished if finished.is_file() else growing
    rows = np.fromfile(path, np.int32, path.stat().st_size // 16 * 4).reshape(-1, 4)
    size = int(rows[:, 0].sum(dtype=np.int64)) * kind.itemsize
    if flat.stat().st_size < size or (path is finished and flat.stat().st_size > size):  # changed by other hands
        path.unlink()
        flat.unlink()
        return _write(folder, part, tokenizer, kind)
    if path is finished:
        return rows
    os.truncate(flat, size)
    os.truncate(growing, rows.nbytes)
    progress = _Progress(f"tokens of {part.corpus.name}", part.characters)
    with flat.open("ab") as tokens_file, growing.open("ab") as rows_file:
        todo = (segment for place, segment in enumerate(part.segments()) if progress.add(len(segment[0]), place >= len(rows)))
        for tokens, more in _encoded(tokenizer, todo, kind):
            for file, values in ((tokens_file, tokens), (rows_file, more)):
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())  # the tokens are on disk before a row tells of them
    os.replace(growing, finished)
    return np.fromfile(finished, np.int32).reshape(-1, 4)


def _encoded(
    tokenizer: str, segments: Iterable[tuple[str, bool]], kind: np.dtype[np.generic]
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.int32]]]:
    """Tokens and rows of some segments at a time; the tokenizer's end, if it has one, behind each document."""
    end = tk.end_id(tokenizer)
    behind = [] if end is None else [end]
    for batch in _batches(segments):
        ids = tk.encode(tokenizer, [text for text, _ in batch], special=False)
        ids = [[*one, *behind] if last else one for one, (_, last) in zip(ids, batch, strict=True)]
        rows = [
            (len(one), len(text.encode("utf-8", "surrogatepass")), one[0] if one else 0, last)
            for one, (text, last) in zip(ids, batch, strict=True)
        ]
        yield np.fromiter(chain.from_iterable(ids), kind), np.array(rows, np.int32)


def _batches(segments: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for segment in segments:
        batch.append(segment)
        size += len(segment[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _segments(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document cut where its tokens stay the same, whatever its blocks are."""
    rest = ""
    for block in blocks:
        rest, begin = rest + block, 0
        while len(rest) - begin > SEGMENT:
            tail = rest[begin + max(SEGMENT - 4096, 0) : begin + SEGMENT + 1]
            ends = next((found for cut in _CUTS if (found := [match.end() for match in cut.finditer(tail)])), [len(tail) - 1])
            end = begin + SEGMENT + 1 - len(tail) + ends[-1]
            yield rest[begin:end], False
            begin = end
        rest = rest[begin:]
    yield rest, True


def _clip(blocks: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters from `begin` to `end` of a document."""
    place = 0
    for block in blocks:
        if text := block[max(begin - place, 0) : max(end - place, 0)]:
            yield text
        place += len(block)
        if place >= end:
            break


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A folder of the cache held by this process.  raises: DataError where it cannot be written"""
    try:
        with locked(folder):
            yield
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})", mend="free some space, or point XDG_CACHE_HOME elsewhere", file=str(folder)
        ) from None


class _Progress:
    """Says on standard error how far a long piece of work is. characters: of all of it; 0: not known"""

    def __init__(self, work: str, characters: int = 0) -> None:
        self.work, self.total, self.done = work, characters, 0
        self.next = time.monotonic() + _QUIET_SECONDS

    def add(self, characters: int, value: Any = None) -> Any:
        self.done += characters
        if (now := time.monotonic()) >= self.next:
            self.next = now + _SAY_SECONDS
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            print(f"{self.work}: {self.done / 1e6:,.0f}{of} million characters", file=sys.stderr, flush=True)
        return value
