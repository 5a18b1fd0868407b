"""Loading: a request in, training and validation examples out, with what was seen and decided on the way.

Dims: M examples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fromzero.data.answers import Answers, Classes, Soft, answered, check_finite, find_classes, fit_numbers, read_numbers
from fromzero.data.catalogue import NAMED_SETS
from fromzero.data.columns import Columns, as_word
from fromzero.data.contents import Contents, contents
from fromzero.data.conversations import ChatFacts
from fromzero.data.examples import Examples, TensorExamples
from fromzero.data.images import ImageFormat, printable
from fromzero.data.opening import Request, open_source
from fromzero.data.sources import ImageRows, InputFormat, ItemRows, RowSource, TableRows, refuse_other_kind
from fromzero.data.split import hold_out, sample
from fromzero.data.text import TextExamples, TextFacts, TextFormat, TextRows
from fromzero.errors import DataError


@dataclass(frozen=True)
class Preparation:
    """How inputs and answers were turned into tensors; kept with the run and used again at prediction."""

    inputs: InputFormat
    answers: Answers
    target: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """What was seen in the data. counts: class → examples; columns: column → what becomes of it."""

    source: str
    kind: str
    train: int
    validation: int
    input_shape: tuple[int, ...]
    outputs: int
    bytes: int
    digest: str
    classes: tuple[str, ...] | None = None
    train_counts: dict[str, int] = field(default_factory=dict)
    validation_counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # class → where its first training example stands
    columns: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repeats: int = 0  # rows whose content stands in an earlier row too
    shared: int = 0  # validation rows whose content stands in train
    conflicting: int = 0  # distinct contents that carry more than one label
    lowest: float = 0.0  # of a sample of the prepared inputs
    highest: float = 0.0
    set_aside: dict[str, str] = field(default_factory=dict)
    target_mean: tuple[float, ...] = ()  # of the training targets, as learned
    target_std: tuple[float, ...] = ()
    given_indices: bool = False  # labels were class indices already
    text: TextFacts | None = None
    chat: ChatFacts | None = None


@dataclass(frozen=True)
class Loaded:
    """contents: of each source, the training data's first."""

    train: Examples
    validation: Examples | None
    preparation: Preparation
    facts: DataFacts
    contents: tuple[Contents, ...] = ()


def load(request: Request) -> Loaded:
    """Read, filter, split and prepare.

    raises: DataError or SourceError with what is wrong, where, and the mend
    """
    source = open_source(request.train, request)
    labels = source.labels
    rows, notes = _kept_rows(source, labels, request)
    answers, given = _find_answers(source, labels, rows, request)
    strata = [as_word(label) for label in labels] if isinstance(answers, Classes) else [""] * len(source)
    whole = _Part(source, labels, source.keys(), rows)
    train_rows, held = _sides(whole, strata, request, notes)
    sources = [whole, *([held] if held is not None and held.source is not source else [])]
    part = replace(whole, rows=train_rows)
    keys, train_keys = whole.keys(), part.keys()
    known, by_content = set(train_keys), not isinstance(source, ItemRows)
    held_keys = held.keys() if held else []
    shared = sum(key in known for key in held_keys) if by_content else 0
    answers = _fit_answers(answers, part, request)
    if held and shared and not request.keep_shared:
        _targets(answers, held.labels, held.rows, held.source)  # a label that is no class is named first
        held = _without(held, known)
        held_keys = held.keys()
    form = source.fit(train_rows)
    train = part.examples(form, answers)
    validation = held.examples(form, answers) if held else None
    preparation = Preparation(form, answers, source.target if isinstance(source, (TableRows, TextRows)) else None)
    classes = isinstance(answers, Classes)
    learned = train.targets.double().reshape(len(train), -1)
    facts = DataFacts(
        source=printable(source.name),
        kind=source.kind,
        train=len(train),
        validation=0 if validation is None else len(validation),
        input_shape=(form.width,) if isinstance(form, Columns) else form.shape,
        outputs=answers.width,
        classes=answers.names if isinstance(answers, Classes) else None,
        train_counts=part.counts(answers),
        validation_counts=held.counts(answers) if held else {},
        first=part.first() if classes else {},
        columns={c.name: str(c) for c in form.columns} if isinstance(form, Columns) else {},
        notes=tuple(notes),
        repeats=len(keys) - len(set(keys)),
        shared=shared,
        conflicting=conflicts(keys, [strata[r] for r in rows]) if classes else 0,
        **_range(train),
        set_aside=source.set_aside if isinstance(source, (TableRows, TextRows)) else {},
        target_mean=() if classes else tuple(learned.mean(0).tolist()),
        target_std=() if classes else tuple(learned.std(0, correction=0).tolist()),
        given_indices=given,
        bytes=_bytes(train) + (_bytes(validation) if validation is not None else 0),
        digest=_digest(train_keys, train, held_keys),
        text=train.facts(form) if isinstance(train, TextExamples) and isinstance(form, TextFormat) else None,
        chat=None,
    )
    return Loaded(train, validation, preparation, facts, tuple(_contents(side, request.columns) for side in sources))


@dataclass(frozen=True)
class _Part:
    """Some rows of a source, with the labels and the content of all of them."""

    source: RowSource
    labels: Any
    contents: Sequence[bytes]
    rows: Sequence[int]

    def keys(self) -> list[bytes]:
        return [self.contents[row] for row in self.rows]

    def examples(self, form: InputFormat, answers: Answers) -> Examples:
        refuse_other_kind(self.source, form)
        return self.source.examples(self.rows, form, _targets(answers, self.labels, self.rows, self.source))

    def counts(self, answers: Answers) -> dict[str, int]:
        if not isinstance(answers, Classes):
            return {}
        counter = Counter(as_word(self.labels[row]) for row in self.rows)
        return {name: counter.get(name, 0) for name in answers.names}

    def first(self) -> dict[str, str]:
        rows = {as_word(self.labels[row]): row for row in reversed(self.rows)}
        return {name: printable(self.source.where(row)) for name, row in sorted(rows.items())}


def _contents(part: _Part, asked: Sequence[str] | None) -> Contents:
    """Of all rows of a part's source. asked: the input columns that were named; None: all count, whatever is found in them"""
    source = part.source
    if isinstance(source, (TableRows, TextRows)):
        columns = source.table.columns if asked is None else (*asked, source.target)
        cells = zip(*(source.table.columns[name] for name in columns), strict=True)
        rows = [repr(row).encode("utf-8", "surrogatepass") for row in cells]
        return contents(source.name, "row", rows, lines=source.table.lines)
    labels = part.labels.tolist() if isinstance(part.labels, Tensor) else part.labels
    rows = [key + repr(label).encode("utf-8", "surrogatepass") for key, label in zip(part.contents, labels, strict=True)]
    return contents(source.name, "example", rows, names=source.names if isinstance(source, ImageRows) else ())


def _sides(whole: _Part, strata: Sequence[str], request: Request, notes: list[str]) -> tuple[list[int], _Part | None]:
    """Rows to learn from, and the part to measure on."""
    rows = whole.rows
    held = None if request.validation is None else _validation(whole.source, request, notes)
    train_rows: list[int] = list(rows)
    if held is None:
        places, held_places = hold_out(whole.keys(), [strata[r] for r in rows], request.hold_out, request.seed)
        train_rows = [rows[p] for p in places]
        held = replace(whole, rows=[rows[p] for p in held_places]) if held_places else None
    if request.limit or request.per_class:
        before = len(train_rows)
        train_rows = sample(train_rows, [strata[r] for r in train_rows], request.seed, examples=request.limit, per_class=request.per_class)
        notes.append(f"data.limit keeps {len(train_rows)} of {before} training examples")
    if not train_rows:
        raise DataError(
            "no training example is left",
            why=f"{len(whole.source)} rows read, {len(rows)} after filters, {0 if held is None else len(held.rows)} held out",
            file=whole.source.name,
        )
    return train_rows, held


def _validation(source: RowSource, request: Request, notes: list[str]) -> _Part:
    """The rows of a validation set of its own, read with the columns of the training set."""
    if isinstance(source, TableRows):
        request = replace(request, target=source.target, columns=source.inputs)
    if isinstance(source, TextRows):
        request = replace(request, target=source.target, columns=(source.column,), reads_text=True)
    other = open_source(request.validation, request)
    labels = other.labels
    rows, more = _kept_rows(other, labels, request)
    notes += [f"validation: {note}" for note in more]
    if not rows:
        raise DataError("no validation example is left", why=f"{len(other)} rows read, 0 after filters", file=other.name)
    return _Part(other, labels, other.keys(), rows)


def _without(held: _Part, known: set[bytes]) -> _Part:
    """Validation rows that do not stand in the training data: a figure measured on those would flatter."""
    rows = [row for row in held.rows if held.contents[row] not in known]
    if not rows:
        raise nothing_apart(len(held.rows), held.source.name)
    return replace(held, rows=rows)


def nothing_apart(count: int, file: str) -> DataError:
    return DataError(
        f"every one of its {count} validation examples stands in the training data too",
        why="nothing would show whether the model has merely learned by heart",
        mend="name other data, or say data.shared: keep",
        file=file,
        key="data.validation",
    )


# ------------------------------------------------------------------------------------ labels and rows


def _kept_rows(source: RowSource, labels: Any, request: Request) -> tuple[list[int], list[str]]:
    """Rows that have an answer, of the classes asked for; and notes about the others."""
    notes = []
    rows = list(range(len(source))) if isinstance(labels, Tensor) else answered(labels)
    if not rows:
        raise DataError("no row has an answer", why=f"{len(source)} rows, all with an empty target", file=source.name)
    if len(rows) < len(source):
        notes.append(f"{len(source) - len(rows)} rows without an answer are left out")
    if request.classes is not None and not isinstance(labels, Tensor) and request.answers != "number":
        kept = [r for r in rows if as_word(labels[r]) in request.classes]
        notes.append(f"data.classes keeps {len(kept)} of {len(rows)} rows")
        rows = kept
    if isinstance(source, ImageRows):
        notes += [f"{count} {reason} left out" for reason, count in source.tree.left_out.items()]
        notes += [f"broken, left out: {path} ({why})" for path, why in source.broken.items()]
    if isinstance(source, (TableRows, TextRows)):
        notes += [f"broken, left out: {fault}" for fault in source.table.left_out]
    return rows, notes


def _find_answers(source: RowSource, labels: Any, rows: list[int], request: Request) -> tuple[Answers | None, bool]:
    """The classes, before numbers are fitted to the training rows; and whether labels were indices already."""
    if request.answers == "number" or isinstance(labels, Tensor):
        return None, False
    among = rows if request.classes is None else answered(labels)
    found = find_classes([labels[r] for r in among], request.classes, lambda i: source.where(among[i]))
    whole = source.kind in ("arrays", "items") and request.classes is None
    given = whole and source.name not in NAMED_SETS
    if given:
        numbers = [float(name) for name in found]
        if min(numbers) < 0:
            row = next(r for r in rows if float(labels[r]) < 0)
            raise DataError(
                f"{source.where(row)}: label {as_word(labels[row])} is below 0",
                why="labels are class indices from 0",
                mend="leave these examples out, or number the classes from 0",
            )
        if max(numbers) > 100_000:
            raise DataError(
                f"its largest label is {max(numbers):.0f}",
                why="labels are class indices from 0",
                mend="to predict numbers use task: regress",
                file=source.name,
            )
        found = tuple(str(i) for i in range(int(max(numbers)) + 1))
    binary = request.answers == "binary"
    if binary and len(found) > 2:
        raise DataError(f"loss bce needs 2 classes, the data has {len(found)}", mend="use cross_entropy", file=source.name)
    return Classes(found, binary), given


def _fit_answers(answers: Answers | None, part: _Part, request: Request) -> Answers:
    source, labels = part.source, part.labels
    if answers is not None:
        return answers
    if request.answers != "number":
        width = labels.shape[1]
        if request.classes is not None and len(request.classes) != width:
            raise DataError(
                f"data.classes names {len(request.classes)} classes, each answer has {width} numbers", file=source.name, key="data.classes"
            )
        return Soft(request.classes or tuple(str(i) for i in range(width)))
    values = _number_values(labels, part.rows, source)
    name = source.target if isinstance(source, TableRows) else "value"
    names = [name] if values.shape[1] == 1 else [f"{name}{i}" for i in range(values.shape[1])]
    return fit_numbers(names, values, scale=request.scale_target)


def _number_values(labels: Any, rows: Sequence[int], source: RowSource) -> Tensor:
    if isinstance(labels, Tensor):
        values = labels[list(rows)].double().reshape(len(rows), -1)
        check_finite(values, lambda i: source.where(rows[i]))
        return values
    return read_numbers([labels[r] for r in rows], lambda i: source.where(rows[i]))


def _targets(answers: Answers, labels: Any, rows: Sequence[int], source: RowSource) -> Tensor:
    if isinstance(answers, Classes):
        return answers.targets([labels[r] for r in rows], lambda i: source.where(rows[i]))
    if isinstance(answers, Soft):
        values = labels[list(rows)].to(torch.float32)
        check_finite(values, lambda i: source.where(rows[i]))
        if bool((values < 0).any()) or bool((values > 1).any()):
            row = int(((values < 0) | (values > 1)).any(1).nonzero()[0])
            raise DataError(
                f"{source.where(rows[row])}: answers are outside 0..1",
                why="rows of several numbers are probabilities or yes-and-no answers",
                mend="to predict numbers use task: regress",
            )
        return torch.as_tensor(values)
    return answers.scaled(_number_values(labels, rows, source))


def conflicts(keys: Sequence[bytes], strata: Sequence[Hashable]) -> int:
    """How many contents carry more than one label."""
    seen: dict[bytes, set[Hashable]] = {}
    for key, stratum in zip(keys, strata, strict=True):
        seen.setdefault(key, set()).add(stratum)
    return sum(len(labels) > 1 for labels in seen.values())


# ------------------------------------------------------------------------------------------ measuring


def _range(train: Examples) -> dict[str, float]:
    if isinstance(train, TextExamples):
        return {"lowest": 0.0, "highest": 0.0}
    some = train.take(torch.arange(min(len(train), 512)))[0][0]
    return {"lowest": float(some.min()), "highest": float(some.max())}


def _bytes(examples: Examples) -> int:
    if isinstance(examples, TextExamples):
        return examples.flat.nbytes + 16 * len(examples)
    return examples.inputs.nbytes + examples.targets.nbytes if isinstance(examples, TensorExamples) else 0


def _digest(train_keys: Sequence[bytes], train: Examples, held_keys: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for key in train_keys:
        digest.update(key)
    digest.update(train.targets.contiguous().numpy().tobytes())
    if isinstance(train, TextExamples):
        digest.update(train.flat.numpy().tobytes())  # the same texts are other data to another tokenizer
    for key in held_keys:
        digest.update(key)
    return digest.hexdigest()


def load_again(source: Any, preparation: Preparation, request: Request) -> Examples:
    """Read other data with the preparation of a run, for evaluation.

    raises: DataError where a column, a class or a shape does not fit
    """
    form = preparation.inputs
    fitted = form.columns if isinstance(form, Columns) else ()
    dropped = {c.name: c.policy for c in fitted if c.policy == "drop"}
    classes = preparation.answers.names if isinstance(preparation.answers, Classes) else None
    asked = replace(
        request,
        columns=(form.column,) if isinstance(form, TextFormat) else tuple(c.name for c in fitted) or None,
        reads_text=isinstance(form, TextFormat),
        image=form if isinstance(form, ImageFormat) else None,
        target=preparation.target or request.target,
        missing=dropped,
        classes=None,
    )
    rows_of = open_source(source, asked)
    labels = rows_of.labels
    rows, _ = _kept_rows(rows_of, labels, replace(asked, classes=classes if request.classes is not None else None))
    if not rows:
        raise DataError("no example is left to evaluate", why=f"{len(rows_of)} rows read, 0 after filters", file=rows_of.name)
    return _Part(rows_of, labels, (), rows).examples(form, preparation.answers)
