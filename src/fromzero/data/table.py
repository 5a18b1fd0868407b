"""Tables: a CSV, TSV, JSON, JSON-lines or parquet file in, named columns of raw cells out.

Cells are text, numbers or None; nothing is guessed or filled here. Every fault carries its physical line,
and all faults of a file come at once. Knows no tensor.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fromzero.errors import DataError, Fault, MissingExtra, nearest

MISSING = frozenset(["", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "<NA>", "NaT", "?"])
MOST_FAULTS = 20  # shown; the rest is counted
MOST_DEPTH = 64  # of nested JSON
BLOCK = 2**20  # bytes of a text that are read at once
PART = 64  # rows of a table that are read at once: a row may be a book
# Brackets inside strings open nothing. A string that does not end goes to the end of the text, and nothing is tried twice.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_MOST_NAMES = 64  # of columns that some rows lack, among which a renamed one is looked for
_MANY_DIGITS = re.compile(r"\d{4301}")  # Python reads no longer one: it takes quadratic time
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_UNREAD = object()  # in place of a value whose fault was noted
_SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "bar": "|"}


@dataclass(frozen=True)
class Table:
    """columns: name → one cell a row.  lines: the physical line where each row begins.  left_out: rows that could not be read."""

    file: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    left_out: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        return f"{self.file}:{self.lines[row]}"

    def take(self, rows: Sequence[int]) -> Table:
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[i] for i in rows])


def read_table(path: Path, skip: int = 0) -> Table:
    """Read a table by its file's ending.

    skip:   how many bad lines are left out, and noted in the table
    raises: DataError with every bad line where there are more, or saying that the file is empty or of no known kind
    """
    table = next(_READERS[_suffix(path)](path, None, None, skip))
    if not table.columns or not len(table):
        raise DataError("has no rows", why=f"{len(table.columns)} columns, 0 rows", file=str(path))
    return table


def read_objects(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Fault]]:
    """The rows of the same files as (line, values by column), what is nested in JSON and parquet kept as it is; and the faults.

    raises: DataError where the file as a whole cannot be read
    """
    suffix, faults = _suffix(path), list[Fault]()
    rows: Iterable[tuple[int, dict[str, Any]]]
    if suffix in (".csv", ".tsv"):
        table = read_table(path)
        cells = zip(*table.columns.values(), strict=True)
        rows = [(line, dict(zip(table.columns, row, strict=True))) for line, row in zip(table.lines, cells, strict=True)]
    elif suffix == ".parquet":
        rows = enumerate((row for frame in _frames(path, None, None) for row in frame.to_dicts()), 1)
    elif suffix == ".json":
        value = _whole_json(path)
        if not isinstance(value, list):
            raise DataError("is no list of objects", mend="put [ ] around it", file=str(path))
        rows = _objects(path, enumerate(value, 1), faults)
    else:
        rows = json_lines(path, faults)
    found = list(rows)
    if not found and not faults:
        raise DataError("has no rows", file=str(path))
    return found, faults


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"is no table that can be read ('{path.suffix}')", file=str(path), mend=f"one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError("is empty (0 bytes)", file=str(path), mend="is the download or the export complete?")
    return suffix


def read_parts(path: Path, column: str | None = None) -> Iterator[Table]:
    """A table that may be larger than memory, some rows at a time; TSV and JSON come as a whole.

    column:  the one that is wanted: parquet files read no other
    raises:  as read_table; the bad lines when all are known, and no part from the first of them on
    """
    return _READERS[path.suffix.lower()](path, PART, column, 0)


def _parts(
    rows: Iterator[Any], count: int | None, faults: list[Fault], build: Callable[[list[Any]], Table], skip: int = 0
) -> Iterator[Table]:
    """`count` rows at a time, or all; faults come to be while rows are taken and a table is built."""
    part: list[Any] | None = None
    while part is None or len(part) == count:
        part = list(islice(rows, count))
        table = build(part)
        if len(faults) > skip:
            deque(rows, maxlen=0)  # the rest is read for its faults alone
        refuse(faults, skip)
        yield replace(table, left_out=tuple(faults))


def table_of(columns: Mapping[str, Iterable[Any]], *, name: str = "<table given from Python>") -> Table:
    """A Table from columns in Python, such as a dict of lists or what a data frame yields."""
    for key, values in columns.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
            shape = f" of shape {tuple(values.shape)}" if hasattr(values, "shape") else ""
            raise DataError(
                f"is {type(values).__name__}{shape}, not one cell a row", mend="give arrays as (inputs, targets)", file=name, key=str(key)
            )
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.  raises: as read_blocks"""
    return "".join(read_blocks(path, -1))


def read_blocks(path: Path, size: int = BLOCK) -> Iterator[str]:
    """The text of a UTF-8 file, `size` bytes at a time.  raises: DataError with line and byte of what is none, and the likely encoding"""
    decoder, line, end, data = codecs.getincrementaldecoder("utf-8-sig")(), 1, 0, b" "
    if not path.is_file() and path.exists():
        raise DataError("is no file but a folder, a pipe or a device", why="a pipe might never end", mend="name a file", file=str(path))
    try:
        with path.open("rb") as file:
            while data:
                data = file.read(size)
                if end == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError("is UTF-16 text", file=str(path), line=1, mend="save it as UTF-8")
                end += len(data)
                text = decoder.decode(data, final=not data)
                if "\0" in text:
                    line += text[: text.index("\0")].count("\n")
                    raise DataError("holds a NUL character", file=str(path), line=line, mend="is it a text file?")
                line += text.count("\n")
                if text:
                    yield text
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=str(path)) from None
    except UnicodeDecodeError as error:
        rest = bytes(error.object)  # what the decoder had not yet given: the end of the last block, and this one
        raise DataError(
            f"byte {end - len(rest) + error.start} is not UTF-8",
            file=str(path),
            line=line + rest[: error.start].count(b"\n"),
            mend=f"save it as UTF-8 (it looks like {_likely_encoding(rest)})",
        ) from None


def _lines(blocks: Iterable[str], newline: str) -> Iterator[str]:
    """Lines with their ends. newline: "" where \\n, \\r and \\r\\n end one (splitlines would cut at U+2028 too), "\\n" where that alone does."""
    rest = ""
    for block in blocks:
        *lines, rest = io.StringIO(rest + block, newline=newline).readlines()
        yield from lines
    if rest:
        yield rest


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


def _read_separated(path: Path, count: int | None, separator: str, skip: int) -> Iterator[Table]:
    if separator == "\t":
        text = read_text(path)
        records = _records(path, _lines([text], ""), separator, _quotes_are_text(text))
    else:
        records = _records(path, _lines(read_blocks(path), ""), separator)
    if (first := next(records, None)) is None:
        raise DataError("has no rows", file=str(path))
    header = [name.strip() for name in first[1]]
    if not header[0]:
        header[0] = "row"  # pandas writes no name for its index
    faults = _header_faults(path, header, separator)
    skip = 0 if faults else skip  # no row can be read by a header that is wrong

    def fitting() -> Iterator[tuple[int, list[str]]]:
        for row, (line, cells) in enumerate(records, 1):
            if len(cells) == len(header):
                yield line, cells
                continue
            what = f"row {row} has {len(cells)} cells, the header has {len(header)}"
            faults.append(Fault(what, mend="a separator inside a cell needs quotes around the cell", file=str(path), line=line))

    def build(part: list[tuple[int, list[str]]]) -> Table:
        return Table(str(path), {name: [cells[i] for _, cells in part] for i, name in enumerate(header)}, [line for line, _ in part])

    return _parts(fitting(), count, faults, build, skip)


def _records(path: Path, lines: Iterable[str], separator: str, quotes_are_text: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(first physical line, cells) of each record that is not blank. A quote that never ends is a fault, not a long cell."""
    csv.field_size_limit(16 * 2**20)  # a long text is no fault; the default stops at 128 KiB
    reader = csv.reader(lines, delimiter=separator, strict=True)
    if quotes_are_text:
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    begins = 1
    try:
        for cells in reader:
            if cells and any(cells):
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        why = "a cell that begins with a quote ends with one, and a quote inside it is written twice"
        raise DataError(f"has a quote that does not fit ({error})", why=why, file=str(path), line=begins) from None


def _quotes_are_text(text: str) -> bool:
    """Whether a TSV is written without quoting: each line has its share of tabs, and a cell begins with a quote and does not end with it.

    Read as quoting, such a cell would swallow the rows up to the next quote.
    """
    if '"' not in text:
        return False
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line]
    if any(line.count("\t") != lines[0].count("\t") for line in lines):
        return False
    whole = re.compile(r'"(?:[^"]|"")*"')
    return any(cell.startswith('"') and not whole.fullmatch(cell) for line in lines if '"' in line for cell in line.split("\t"))


def _header_faults(path: Path, header: list[str], separator: str) -> list[Fault]:
    faults = []
    doubled = sorted(name for name, count in Counter(header).items() if count > 1 and name)
    if doubled:
        faults.append(Fault(f"the header names a column twice: {', '.join(map(repr, doubled))}", mend="rename one", file=str(path), line=1))
    if len(header) == 1:
        for word, other in _SEPARATORS.items():
            if other != separator and header[0].count(other) >= 1:
                what = f"has one column, but its header holds {header[0].count(other)} {word}s"
                faults.append(
                    Fault(what, mend=f"save it separated by {'tabs' if separator == chr(9) else 'commas'}", file=str(path), line=1)
                )
    if "" in header:
        faults.append(Fault(f"column {header.index('') + 1} has no name in the header", mend="name it", file=str(path), line=1))
    return faults


def refuse(faults: Sequence[Fault], skip: int = 0) -> None:
    """raises: DataError with the first of the faults in the order of their lines, the others counted; nothing where `skip` allows them"""
    if len(faults) <= skip:
        return
    said = sorted(faults, key=lambda fault: fault.line)[:MOST_FAULTS]
    if len(faults) > MOST_FAULTS:
        said.append(Fault(f"and {len(faults) - MOST_FAULTS} more faults", file=said[0].file))
    if skip:
        said.append(Fault(f"{len(faults)} rows cannot be read", f"data.skip_broken allows {skip}", file=said[0].file))
    raise DataError(said)


# ---------------------------------------------------------------------------------------------- JSON


def _read_json_lines(path: Path, count: int | None, _: str | None, skip: int) -> Iterator[Table]:
    faults: list[Fault] = []
    return _parts(json_lines(path, faults), count, faults, lambda part: _from_objects(path, part, faults), skip)


def json_lines(path: Path, faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line that holds one, read as a stream; any other line is noted in `faults`."""
    return _objects(path, _json_values(path, faults), faults)


def _json_values(path: Path, faults: list[Fault]) -> Iterator[tuple[int, Any]]:
    begun = False
    for line, piece in enumerate(_lines(read_blocks(path), "\n"), 1):
        if not begun and (start := piece.lstrip()):
            begun = True
            if start.startswith("[") and not start.startswith("[["):
                raise DataError("is a JSON array, not one object a line", file=str(path), line=1, mend="name it .json")
        if piece.strip():
            yield line, parse_json(piece.removesuffix("\n"), path, line, faults)


def _objects(path: Path, values: Iterable[tuple[int, Any]], faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, value in values:
        if isinstance(value, dict):
            yield line, value
        elif value is not _UNREAD:
            faults.append(Fault(f"is {'null' if value is None else type(value).__name__}, not an object", file=str(path), line=line))


def _read_json(path: Path, skip: int) -> Iterator[Table]:
    faults, value = list[Fault](), _whole_json(path)
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        return iter([table_of(value, name=str(path))])
    if not isinstance(value, list):
        raise DataError("is neither a list of objects nor an object of columns", file=str(path))
    return _parts(_objects(path, enumerate(value, 1), faults), None, faults, lambda part: _from_objects(path, part, faults), skip)


def _whole_json(path: Path) -> Any:
    faults: list[Fault] = []
    value = parse_json(read_text(path), path, 1, faults)
    refuse(faults)
    return value


def parse_json(text: str, path: Path, line: int, faults: list[Fault]) -> Any:
    """The value of a text; what is too deep, doubled or no JSON is noted in `faults`."""
    if (at := _too_deep(text)) is not None:
        faults.append(_at(text, at, f"is nested more than {MOST_DEPTH} deep", path, line))
        return _UNREAD
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        what = f"holds half of a surrogate pair ({error.object[error.start]!r})"
        faults.append(
            Fault(what, why="it is no character and cannot be written again", mend="write the character itself", file=str(path), line=line)
        )
    except json.JSONDecodeError as error:
        faults.append(_at(text, error.pos, f"is not JSON ({error.msg})", path, line))
    except ValueError as error:
        if digits := _MANY_DIGITS.search(text):
            faults.append(_at(text, digits.start(), "holds a number of thousands of digits", path, line))
        else:
            faults.append(Fault(str(error)[:100], file=str(path), line=line))
    return _UNREAD


def _at(text: str, place: int, what: str, path: Path, line: int) -> Fault:
    """A fault at a character of a text that begins in `line`."""
    column = place - text.rfind("\n", 0, place)
    piece = text[max(place - 15, 0) : place + 15]
    return Fault(f"column {column} {what} near {piece!r}", file=str(path), line=line + text.count("\n", 0, place))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = min(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"names {doubled!r} twice")
    return found


def _too_deep(text: str) -> int | None:
    """Where the first bracket stands that is too deep inside others."""
    depth = 0
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return None  # as most lines are
    for mark in _STRING_OR_BRACKET.finditer(text):
        depth += _STEPS.get(mark[0], 0)
        if depth > MOST_DEPTH:
            return mark.start()
    return None


def _from_objects(path: Path, rows: list[tuple[int, dict[str, Any]]], faults: list[Fault]) -> Table:
    odd = {**_drifted(rows), **_renamed(rows)}
    faults += [replace(fault, file=str(path), line=line) for line, fault in odd.items()]
    rows = [(line, value) for line, value in rows if line not in odd]
    names = dict.fromkeys(name for _, value in rows for name in value)
    columns = {name: [_cell(value.get(name)) for _, value in rows] for name in names}
    return Table(str(path), columns, [line for line, _ in rows])


def _renamed(rows: list[tuple[int, dict[str, Any]]]) -> dict[int, Fault]:
    """Rows that have a column under a name that is nearly that of most rows, by line: every row has one of the two, and none both."""
    counts = Counter(name for _, value in rows for name in value)
    partial = [name for name, count in counts.items() if count < len(rows)]
    found: dict[int, Fault] = {}
    for name in partial if len(partial) <= _MOST_NAMES else ():
        near = nearest(name, [other for other in partial if 2 * counts[other] < len(rows) < 2 * counts[name]], count=3)
        if near and all((name in value) != any(other in value for other in near) for _, value in rows):
            for line, value in rows:
                other = next((other for other in near if other in value), None)
                if other is not None:
                    found[line] = Fault(f"has no '{name}', which other rows have", mend=f"is '{other}' the same?", key=name)
    return found


def _drifted(rows: list[tuple[int, dict[str, Any]]]) -> dict[int, Fault]:
    """Rows that hold a list or an object where most hold text or a number, by line."""
    plain, nested = Counter[str](), dict[str, list[tuple[int, Any]]]()
    for line, value in rows:
        for name, cell in value.items():
            if isinstance(cell, (list, dict)):
                nested.setdefault(name, []).append((line, cell))
            else:
                plain[name] += cell is not None
    return {
        line: Fault(f"is {type(cell).__name__}, in other rows text or a number", mend="correct the row", key=name)
        for name, cells in nested.items()
        if plain[name] > len(cells)
        for line, cell in cells
    }


def _read_parquet(path: Path, count: int | None, column: str | None) -> Iterator[Table]:
    for frame in _frames(path, count, column):
        yield table_of(frame.to_dict(as_series=False), name=str(path))


def _frames(path: Path, count: int | None, column: str | None) -> Iterator[Any]:
    """By slices of a lazy reading, which opens the row groups of the slice alone."""
    try:
        import polars
    except ImportError:
        raise MissingExtra("parquet files need polars", mend="pip install polars") from None
    begin, size = 0, 1
    while begin < size:
        try:
            scan = polars.scan_parquet(path)
            size = int(scan.select(polars.len()).collect().item())
            frame = (scan.select(column) if column else scan).slice(begin, count and 16 * count).collect()
        except (Exception, polars.exceptions.PanicException) as error:  # there is no one class for what a damaged file may raise
            raise DataError(f"is not a whole parquet file ({str(error)[:120]})", file=str(path)) from None
        yield frame
        begin += max(frame.height, 1)


# Each takes a path, how many rows at a time (None: all), the column that is wanted (None: all) and how many bad rows are left out.
_READERS: dict[str, Callable[[Path, int | None, str | None, int], Iterator[Table]]] = {
    ".csv": lambda path, count, _, skip: _read_separated(path, count, ",", skip),
    ".tsv": lambda path, count, _, skip: _read_separated(path, count, "\t", skip),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": lambda path, _, __, skip: _read_json(path, skip),
    ".parquet": lambda path, count, column, _: _read_parquet(path, count, column),
}
