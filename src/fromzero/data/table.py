"""Tables: a CSV, TSV, JSON, JSON-lines or parquet file in, named columns of raw cells out.

Cells are text, numbers or None; nothing is guessed or filled here. Every fault carries its physical line,
and all faults of a file come at once. Knows no tensor.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fromzero.errors import DataError, Fault, MissingExtra

MISSING = frozenset(["", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "?"])
MOST_FAULTS = 20  # shown; the rest is counted
MOST_DEPTH = 64  # of nested JSON
_SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "bar": "|"}


@dataclass(frozen=True)
class Table:
    """columns: name → one cell a row.  lines: the physical line where each row begins."""

    file: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        return f"{self.file}:{self.lines[row]}"

    def take(self, rows: Sequence[int]) -> Table:
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        return Table(self.file, columns, [self.lines[i] for i in rows])


def read_table(path: Path) -> Table:
    """Read a table by its file's ending.

    raises: DataError with every bad line, or saying that the file is empty or of no known kind
    """
    readers: dict[str, Callable[[Path], Table]] = {
        ".csv": lambda p: _read_separated(p, ","),
        ".tsv": lambda p: _read_separated(p, "\t"),
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"is no table that can be read ('{path.suffix}')", file=str(path), mend=f"one of {', '.join(readers)}")
    if path.stat().st_size == 0:
        raise DataError("is empty (0 bytes)", file=str(path), mend="is the download or the export complete?")
    table = readers[path.suffix.lower()](path)
    if not table.columns or not len(table):
        raise DataError("has no rows", why=f"{len(table.columns)} columns, 0 rows", file=str(path))
    return table


def table_of(columns: dict[str, Iterable[Any]], *, name: str = "<table given from Python>") -> Table:
    """A Table from columns in Python, such as a dict of lists or what a data frame yields."""
    cells = {str(key): [_cell(v) for v in values] for key, values in columns.items()}
    lengths = {key: len(values) for key, values in cells.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"its columns have different lengths: {lengths}", file=name)
    return Table(name, cells, range(1, max(lengths.values(), default=0) + 1))


def missing(cell: Any) -> bool:
    """Whether a cell says nothing: None, NaN, or one of the usual words for it."""
    if isinstance(cell, str):
        return cell.strip() in MISSING
    return cell is None or (isinstance(cell, float) and cell != cell)


def _cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(value, bool):
        return str(value).lower()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is UTF-16 text", file=str(path), line=1, mend="save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        likely = _likely_encoding(data)
        raise DataError(f"byte {error.start} is not UTF-8", file=str(path), line=line, mend=f"save it as UTF-8 (it looks like {likely})") from None
    if "\0" in text:
        raise DataError("holds a NUL character", file=str(path), line=text[: text.index("\0")].count("\n") + 1, mend="is it a text file?")
    return text


def _likely_encoding(data: bytes) -> str:
    for encoding in ("gb18030", "latin-1"):
        try:
            decoded = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "latin-1" or re.search(r"[\u4e00-\u9fff]", decoded):
            return encoding
    return "another encoding"


# ---------------------------------------------------------------------------------- separated values


def _read_separated(path: Path, separator: str) -> Table:
    text = _text(path)
    csv.field_size_limit(16 * 2**20)  # a long text is no fault; the default stops at 128 KiB
    records = list(_records(path, text, separator))
    if not records:
        raise DataError("has no rows", file=str(path))
    (_, header), body = records[0], records[1:]
    header = [name.strip() for name in header]
    faults = _header_faults(path, header, separator)
    for line, cells in body:
        if len(cells) != len(header):
            what = f"has {len(cells)} cells, the header has {len(header)}"
            faults.append(Fault(what, mend="a separator inside a cell needs quotes around the cell", file=str(path), line=line))
    _raise(faults)
    columns = {name: [cells[i] for _, cells in body] for i, name in enumerate(header)}
    return Table(str(path), dict(columns), [line for line, _ in body])


def _records(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(first physical line, cells) of each record that is not blank. A quote that never ends is a fault, not a long cell."""
    lines = text.splitlines(keepends=True) if "\r" not in text else re.findall(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+", text)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells and any(cells):
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        why = "a cell that begins with a quote ends with one, and a quote inside it is written twice"
        raise DataError(f"has a quote that does not fit ({error})", why=why, file=str(path), line=begins) from None


def _header_faults(path: Path, header: list[str], separator: str) -> list[Fault]:
    faults = []
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        faults.append(Fault(f"the header names a column twice: {', '.join(map(repr, doubled))}", mend="rename one", file=str(path), line=1))
    if len(header) == 1:
        for word, other in _SEPARATORS.items():
            if other != separator and header[0].count(other) >= 1:
                what = f"has one column, but its header holds {header[0].count(other)} {word}s"
                faults.append(Fault(what, mend=f"save it separated by {'tabs' if separator == chr(9) else 'commas'}", file=str(path), line=1))
    if "" in header:
        number = header.index("") + 1
        if number > 1 or header.count("") > 1:
            faults.append(Fault(f"column {number} has no name in the header", file=str(path), line=1))
        else:
            header[0] = "row"  # what pandas writes for an index
    return faults


def _raise(faults: list[Fault]) -> None:
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], Fault(f"and {len(faults) - MOST_FAULTS} more faults", file=faults[0].file)]
    if faults:
        raise DataError(faults)


# ---------------------------------------------------------------------------------------------- JSON


def _read_json_lines(path: Path) -> Table:
    text = _text(path)
    if text.lstrip().startswith("[") and not text.lstrip().startswith("[["):
        raise DataError("is a JSON array, not one object a line", file=str(path), line=1, mend="name it .json")
    rows: list[tuple[int, Any]] = []
    faults: list[Fault] = []
    for line, piece in enumerate(text.split("\n"), 1):
        if piece.strip():
            value = _parse_json(piece, path, line, faults)
            rows.append((line, value))
    return _from_objects(path, rows, faults)


def _read_json(path: Path) -> Table:
    faults: list[Fault] = []
    value = _parse_json(_text(path), path, 1, faults)
    _raise(faults)
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        return table_of(value, name=str(path))
    if not isinstance(value, list):
        raise DataError("is neither a list of objects nor an object of columns", file=str(path))
    return _from_objects(path, list(enumerate(value, 1)), faults)


def _parse_json(text: str, path: Path, line: int, faults: list[Fault]) -> Any:
    if _depth(text) > MOST_DEPTH:
        faults.append(Fault(f"is nested more than {MOST_DEPTH} deep", file=str(path), line=line))
        return None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        piece = text[max(error.pos - 15, 0) : error.pos + 15]
        what = f"column {error.colno} is not JSON ({error.msg}) near {piece!r}"
        faults.append(Fault(what, file=str(path), line=line + error.lineno - 1))
    except ValueError as error:
        faults.append(Fault(str(error)[:100], file=str(path), line=line))
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    doubled = sorted({key for key in keys if keys.count(key) > 1})
    if doubled:
        raise ValueError(f"names {doubled[0]!r} twice")
    return dict(pairs)


def _depth(text: str) -> int:
    deepest = depth = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _from_objects(path: Path, rows: list[tuple[int, Any]], faults: list[Fault]) -> Table:
    names: dict[str, None] = {}
    for line, value in rows:
        if isinstance(value, dict):
            names.update(dict.fromkeys(value))
        elif value is not None:
            faults.append(Fault(f"is {type(value).__name__}, not an object", file=str(path), line=line))
    _raise(faults)
    columns = {name: [_cell(value.get(name)) for _, value in rows] for name in names}
    return Table(str(path), columns, [line for line, _ in rows])


def _read_parquet(path: Path) -> Table:
    try:
        import polars
    except ImportError:
        raise MissingExtra("parquet files need polars", mend="pip install polars") from None
    try:
        frame = polars.read_parquet(path)
    except (polars.exceptions.PolarsError, OSError) as error:
        raise DataError(f"is not a whole parquet file ({str(error)[:120]})", file=str(path)) from None
    return table_of(frame.to_dict(as_series=False), name=str(path))
