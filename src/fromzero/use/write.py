"""Writing: rows of predictions in, a CSV, JSON or parquet file or a table for the terminal out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fromzero.errors import MissingExtra, UserError
from fromzero.sources.cache import write_whole

WIDTH = 80


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """raises: UserError where the ending is not known"""
    if path.suffix == ".json":
        text = json.dumps(list(rows), indent=1, ensure_ascii=False)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif path.suffix == ".parquet":
        write_whole(path, _parquet(rows))
        return
    else:
        mend = ".csv, .json, .jsonl or .parquet"
        raise UserError(f"'{path.suffix}' is no ending that predictions are written to", mend=mend, file=str(path))
    write_whole(path, text.encode())


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        import polars
    except ImportError:
        raise MissingExtra("parquet files need polars", mend="pip install polars") from None
    buffer = io.BytesIO()
    polars.DataFrame(list(rows), infer_schema_length=None).write_parquet(buffer)
    return buffer.getvalue()


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns: input, then answer and probability, or the values."""
    names = [n for n in rows[0] if not n.startswith("p(")]
    cells = [[f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(n), *(len(line[i]) for line in cells)) for i, n in enumerate(names)]
    room = WIDTH - sum(widths[1:]) - 2 * (len(names) - 1)
    widths[0] = max(min(widths[0], room), 8)
    lines = [names, *cells]
    return "\n".join("  ".join(_fit(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _fit(cell: str, width: int) -> str:
    return f"{cell:<{width}}" if len(cell) <= width else "…" + cell[-(width - 1) :]
