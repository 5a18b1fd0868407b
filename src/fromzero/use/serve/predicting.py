"""The body of a request in, predictions or embeddings out, by a model that does not speak. Knows no HTTP.

Dims: N tokens end to end, B documents, D width.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import fromzero.data.tokens as tk
from fromzero.data import TextFormat
from fromzero.data.columns import Columns
from fromzero.errors import DataError, ModelError
from fromzero.models.encoder import Encoder
from fromzero.runner.saved import SavedModel
from fromzero.use.predict import Prediction, predict
from fromzero.use.serve.asked import Embedding, Rows, check, check_finite, read_json
from fromzero.use.serve.limits import MOST_ROWS
from fromzero.use.serve.refusal import Refused

FILES = {"text/csv": ".csv", "text/tab-separated-values": ".tsv"}
FILES |= {"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp", "image/bmp": ".bmp", "image/tiff": ".tif"}
AT_ONCE = 16  # documents that an encoder reads together


@dataclass(frozen=True)
class Predictor:
    """A run that was trained to classify or to regress."""

    saved: SavedModel
    model: nn.Module

    def answer(self, kind: str, body: bytes) -> dict[str, Any]:
        """kind: the body's content type.  raises: Refused, DataError with what is wrong, cells by line and column"""
        if kind == "application/json":
            found = predict(self.saved, self.model, self._rows(check(Rows, read_json(body)).rows))
        elif kind in FILES:
            if body.count(b"\n") > MOST_ROWS:
                raise Refused(400, f"the body has more than {MOST_ROWS} lines", mend="send it in parts, or use fromzero predict")
            with TemporaryDirectory() as folder:
                path = Path(folder) / f"body{FILES[kind]}"
                path.write_bytes(body)
                try:
                    found = predict(self.saved, self.model, path)
                except DataError as error:
                    raise DataError([replace(fault, file="body") for fault in error.faults]) from None
        else:
            raise Refused(415, f"a body of type '{kind[:60]}' is not read", mend=f"send application/json, {', '.join(FILES)}")
        return {"task": self.saved.task, "rows": [_row(one) for one in found.rows]}

    def _rows(self, rows: Sequence[Any]) -> Any:
        """raises: Refused for rows that are not what the model was trained on"""
        form = self.saved.preparation.inputs
        if isinstance(form, (Columns, TextFormat)):
            texts = isinstance(form, TextFormat) and isinstance(rows[0], str)
            for number, row in enumerate(rows):
                if not isinstance(row, str if texts else dict):
                    kinds = "a text" if texts else "an object of cells by column"
                    raise Refused(400, f"is {type(row).__name__}, not {kinds}", param=f"rows[{number}]")
                if isinstance(row, dict):
                    check_finite(row, f"rows[{number}]")
            return list(rows)
        try:
            return np.asarray(rows, dtype=np.float32)
        except (ValueError, TypeError, OverflowError):
            raise Refused(400, "rows are no arrays of numbers of one shape", why=f"the model takes {form.shape}", param="rows") from None


def _row(one: Prediction) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    if one.probabilities is None:
        return {"values": {name: number(value) for name, value in (one.values or {}).items()}}
    shares = {name: number(share) for name, share in one.probabilities.items()}
    return {"class": one.answer, "probability": shares.get(str(one.answer)), "probabilities": shares}


@dataclass(frozen=True)
class Embedder:
    """A published encoder. Text in, one vector of D numbers out."""

    model: Encoder
    tokenizer: str

    def answer(self, asked: Embedding) -> dict[str, Any]:
        texts = [one for one in asked.input if isinstance(one, str)]
        encoded = iter(tk.encode(self.tokenizer, texts, special=True))
        documents = [next(encoded) if isinstance(one, str) else one for one in asked.input]
        known, most = tk.vocabulary_size(self.tokenizer), self.model.config.context
        for number, ids in enumerate(documents):
            if len(ids) > most:
                raise Refused(400, f"has {len(ids)} tokens, the model reads {most}", mend="shorten it", param=f"input[{number}]")
            if not 0 <= min(ids, default=-1) <= max(ids, default=-1) < known:
                raise Refused(400, f"has an id that is none of the {known} tokens, or none at all", param=f"input[{number}]")
        vectors = [vector for begin in range(0, len(documents), AT_ONCE) for vector in self._read(documents[begin : begin + AT_ONCE])]
        data = [{"object": "embedding", "index": i, "embedding": _written(v, asked.encoding_format)} for i, v in enumerate(vectors)]
        read = sum(map(len, documents))
        return {"object": "list", "data": data, "model": asked.model, "usage": {"prompt_tokens": read, "total_tokens": read}}

    @torch.no_grad()
    def _read(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        device = next(self.model.parameters()).device
        tokens = torch.tensor([token for ids in documents for token in ids], device=device)  # (N,)
        offsets = torch.tensor([0, *map(len, documents)], device=device).cumsum(0)  # (B + 1,)
        vectors: list[list[float]] = self.model(tokens, offsets).float().cpu().tolist()  # (B, D)
        return vectors


def _written(vector: Sequence[float], form: str) -> Any:
    """base64 is of little-endian float32, as OpenAI's client asks for it unless told otherwise."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else list(vector)


def headless(model: nn.Module, source: str) -> Encoder:
    """raises: ModelError for what gives scores of classes, or is no encoder of ours"""
    if not isinstance(model, Encoder):
        raise ModelError(
            f"'{source}' is no encoder that is written here", why="its outputs may be anything", mend="docs/models.md lists them"
        )
    if not isinstance(model.head, nn.Identity):
        raise ModelError(f"'{source}' ends in scores of classes that it does not name", mend="train it on data of yours, and serve the run")
    return model
