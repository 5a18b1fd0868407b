"""Describing: data in, what a first recipe needs to know out. Nothing is split, prepared or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fromzero.data.columns import ColumnFacts, as_word
from fromzero.data.conversations import holds_conversations, read_conversations
from fromzero.data.corpus import survey
from fromzero.data.images import GREY_MODES, ImageFormat, find_images, image_header
from fromzero.data.language import read_corpus
from fromzero.data.opening import TABLES, Request, open_source
from fromzero.data.sources import ArrayRows, TableRows
from fromzero.data.table import missing
from fromzero.data.text import TextRows
from fromzero.errors import DataError

MOST_CLASSES = 20  # a column of whole numbers with more values than this is taken for a number


@dataclass(frozen=True)
class Description:
    """What was seen and guessed. why: a sentence for each guess, by recipe key."""

    source: str
    kind: str  # table | images | arrays | text | corpus | chat
    rows: int
    task: str
    target: str | None
    classes: tuple[str, ...]
    inputs: tuple[str, ...]
    columns: tuple[ColumnFacts, ...]
    set_aside: dict[str, str]
    image: ImageFormat | None
    same_size: bool
    why: dict[str, str]
    latin: bool = True  # text: nearly all of it is in Latin letters


def describe(source: str, *, task: str | None = None, target: str | None = None) -> Description:
    """raises: DataError where the data cannot be read"""
    path = Path(source)
    if task == "chat" or (task is None and target is None and path.suffix.lower() in TABLES and holds_conversations(source, (Path(),))):
        return _chat(source)
    if task == "language" or path.suffix.lower() == ".txt":
        return _corpus(source)
    if path.is_dir():
        return _images(path)
    rows = open_source(source, Request(train=source, target=target))
    if (
        task == "regress"
        and target is None
        and isinstance(rows, TableRows)
        and not _all_numbers([v for v in rows.labels if not missing(v)])
    ):
        numbers = [f.name for f in rows.facts if f.kind == "number"]
        if not numbers:
            raise DataError("no column holds numbers to predict", mend="use --task classify", file=source)
        rows = open_source(source, Request(train=source, target=numbers[-1]))
    why: dict[str, str] = {}
    if isinstance(rows, (TableRows, TextRows)):
        labels: Any = [v for v in rows.labels if not missing(v)]
        if not labels:
            raise DataError(f"column '{rows.target}' is empty", mend="name the answer with --target", file=source)
        why["data.target"] = (
            f"{'as asked' if target else 'the column most likely to be the answer'}; the columns are {', '.join(rows.table.columns)}"
        )
    else:
        labels = rows.labels
    if task is None:
        task, why["task"] = _task(labels)
    classes = tuple(sorted({as_word(v) for v in labels})) if task == "classify" and not isinstance(labels, Tensor) else ()
    image = None
    if isinstance(rows, ArrayRows) and rows.inputs.ndim == 4:
        image = ImageFormat(rows.inputs.shape[2], rows.inputs.shape[3], rows.inputs.shape[1])
    return Description(
        source=source,
        kind=rows.kind,
        rows=len(rows),
        task=task,
        target=rows.target if isinstance(rows, (TableRows, TextRows)) else None,
        classes=classes,
        inputs=rows.inputs if isinstance(rows, TableRows) else (rows.column,) if isinstance(rows, TextRows) else (),
        columns=rows.facts if isinstance(rows, TableRows) else (),
        set_aside=rows.set_aside if isinstance(rows, (TableRows, TextRows)) else {},
        image=image,
        same_size=True,
        why=why,
        latin=_latin(rows.texts) if isinstance(rows, TextRows) else True,
    )


def _corpus(source: str) -> Description:
    corpus = read_corpus(source, Request(train=source))
    why = {"task": "text to be gone on with"}
    some = [next(iter(blocks), "") for blocks in islice(corpus.documents(), 200)]
    return Description(source, "corpus", survey(corpus).characters, "language", None, (), (), (), {}, None, True, why, _latin(some))


def _chat(source: str) -> Description:
    read = read_conversations(source, None, (Path(),))
    why = {"task": f"conversations, recognised by {read.shape}"}
    unused = dict.fromkeys(read.unused, "is no part of a conversation")
    return Description(source, "chat", len(read.items), "chat", None, (), (), (), unused, None, True, why)


def _latin(texts: Sequence[str]) -> bool:
    some = "".join(texts[:200])[:20_000]
    return sum(character < "\u0250" for character in some) > 0.9 * len(some)


def _task(labels: Any) -> tuple[str, str]:
    if isinstance(labels, Tensor):
        return "regress", "the answers are several numbers"
    distinct = len({as_word(v) for v in labels})
    if not _all_numbers(labels):
        return "classify", f"the answers are words, {distinct} different ones"
    whole = all(float(v).is_integer() for v in labels)
    if whole and distinct <= MOST_CLASSES:
        return "classify", f"the answers are {distinct} different whole numbers"
    return "regress", f"the answers are numbers, {distinct} different ones"


def _all_numbers(labels: Any) -> bool:
    try:
        return all(float(v) == float(v) for v in labels)
    except (TypeError, ValueError, OverflowError):
        return False


def _images(path: Path) -> Description:
    tree = find_images(path)
    headers = []
    for image in tree.paths[:500]:
        try:
            headers.append(image_header(image))
        except DataError:
            continue  # the plan names it and asks
    if not headers:
        raise DataError("no image can be read", file=str(path))
    sizes = {size for size, _ in headers}
    height, width = sorted(sizes)[len(sizes) // 2]
    grey = {mode for _, mode in headers} <= GREY_MODES
    classes = tuple(sorted(set(tree.labels)))
    form = ImageFormat(height, width, 1 if grey else 3)
    return Description(
        str(path),
        "images",
        len(tree.paths),
        "classify",
        None,
        classes,
        (),
        (),
        {},
        form,
        len(sizes) == 1,
        {"task": "a folder for each class"},
    )
