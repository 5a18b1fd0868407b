"""llama: a GGUF file and tokens in, what llama.cpp says of them out. The one place that meets llama-cpp-python; knows no text."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fromzero.errors import MissingExtra, ModelError
from fromzero.models.decoder import room_for
from fromzero.models.scores import Outside

INSTALL = "pip install 'fromzero[llama]'"
ROOM = 2048  # tokens that it has memory for at first; longer texts get the next power of two


def installed() -> bool:
    return find_spec("llama_cpp") is not None


def library() -> Any:
    """raises: MissingExtra"""
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:  # the last two where what it was compiled for is not this machine
        why = f"llama-cpp-python cannot be imported ({str(error)[:200]})"
        raise MissingExtra("llama.cpp is not installed", why=why, mend=INSTALL, key="engine") from error


class LlamaCpp(Outside):
    """A file as llama.cpp runs it on the CPU, with as many threads as torch takes. What it has read of a text it does not read again.

    room:   tokens that it has memory for at first
    whole:  it keeps the keys and values of what it has read in float32, not in half of it
    every:  `scores` can be asked for; it takes the room times the vocabulary in memory
    raises: ModelError for a file that llama.cpp does not open; MissingExtra
    """

    def __init__(self, path: Path, *, room: int = ROOM, whole: bool = False, every: bool = False) -> None:
        super().__init__()
        self._library, self._path, self._every = library(), path, every
        self._kept = {"type_k": 0, "type_v": 0} if whole else {}  # 0 is float32, and 1, float16, is what it does by itself
        self._open(room)
        self.context: int = self._library.llama_model_n_ctx_train(self._theirs.model)

    def following(self, ids: Sequence[int]) -> Tensor:
        if len(ids) > self._room:
            self._open(room_for(len(ids)))
        pairs = enumerate(zip(self._ids, ids[:-1], strict=False))  # the last one is read in any case, for what it says
        self._read(ids, next((i for i, (a, b) in pairs if a != b), min(len(self._ids), len(ids) - 1)))
        said = self._library.llama_get_logits_ith(self._theirs.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(said, shape=(self._theirs.n_vocab(),)).copy())

    def scores(self, ids: Sequence[int]) -> Tensor:
        """The scores that follow each token, for which it is read anew.  returns: (T, V)"""
        self._read(ids, 0)
        return torch.from_numpy(self._theirs.scores[: len(ids)].copy())

    def tokens(self, text: str) -> list[int]:
        return list(self._theirs.tokenize(text.encode(), add_bos=False, special=True))

    def go_on(self, prompt: Sequence[int], most: int) -> list[int]:
        """The greedy continuation; no token ends it"""
        ids = list(prompt)
        while len(ids) < len(prompt) + most:
            ids.append(int(self.following(ids).argmax()))
        return ids[len(prompt) :]

    def _open(self, room: int) -> None:
        self._room, self._ids = room, list[int]()
        asked = {"n_ctx": room, "n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads(), **self._kept}
        try:
            with redirect_stderr(io.StringIO()):  # it warns of a room that it has rounded up itself
                self._theirs = self._library.Llama(str(self._path), logits_all=self._every, verbose=False, **asked)
        except ValueError as error:
            raise ModelError("llama.cpp does not open it", why=str(error), mend="--engine fromzero", file=str(self._path)) from None

    def _read(self, ids: Sequence[int], known: int) -> None:
        """known: so many of its tokens were read and stay"""
        self._ids = self._ids[:known]
        self._theirs.n_tokens = known
        self._theirs.eval(ids[known:])
        self._ids = list(ids)
