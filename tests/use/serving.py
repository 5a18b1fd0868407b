"""What the tests of the server share: small models of each kind, a server in this process, and one in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.weights import to_theirs, write_folder
from tests.use.conftest import FRANCE, TEMPLATE

pytest.importorskip("starlette", reason="NOT CHECKED: the server needs starlette")
pytest.importorskip("uvicorn", reason="NOT CHECKED: the server needs uvicorn")

HI = [{"role": "user", "content": "hi"}]
LONG = 20_000  # tokens that the random model reads: more than any answer may have


def random_talker(folder: Path, *, template: str = TEMPLATE, context: int = LONG) -> Path:
    """A chat model that has learned nothing; its answers go on until they are stopped"""
    made = Tokenizer.from_str(tk.byte_pairs([FRANCE], 290))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer = made.to_str()
    config = decoder_config(vocabulary=tk.vocabulary_size(tokenizer), width=16, layers=1, heads=2, context=context)
    torch.manual_seed(0)
    tensors = to_theirs(DECODERS["llama"].build(config).state_dict(), DECODERS["llama"].names(config, ()))
    write_folder(folder, config, tensors, tokenizer=tokenizer, special={"eos_token": tk.END}, chat_template=template)
    return folder


def trained_predictors(place: Path, *only: str) -> Path:
    """Runs that classify a table, regress one, classify images and texts"""
    draw = random.Random(0)
    rows = [(draw.choice("ab"), draw.uniform(0, 1)) for _ in range(60)]
    (place / "t.csv").write_text("kind,size,price\n" + "".join(f"{k},{s:.3f},{2 * s:.3f}\n" for k, s in rows))
    (place / "w.csv").write_text("text,kind\n" + "".join(f"rain and wind {i},wet\nbread and tea {i},dry\n" for i in range(20)))
    for name, shade in (("dark", 30), ("light", 220)):
        (place / "images" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(np.full((8, 8), shade + number, dtype=np.uint8)).save(place / "images" / name / f"{number}.png")
    common = {"report": (), "limits": {"threads": 1}, "steps": 60, "batch": 16, "optimizer": {"lr": 0.05}}
    for name, keys in (
        ("kinds", {"task": "classify", "model": "mlp", "data": {"train": str(place / "t.csv"), "target": "kind"}}),
        ("prices", {"task": "regress", "model": "mlp", "data": {"train": str(place / "t.csv"), "target": "price"}}),
        ("shades", {"task": "classify", "model": "mlp", "data": str(place / "images")}),
        ("weather", {"task": "classify", "model": {"from": "gru", "width": 8}, "data": {"train": str(place / "w.csv"), "target": "kind"}}),
    ):
        if name in only or not only:
            fz.run(fz.plan({"name": name, **keys, **common}, runs=place / "runs", probe=False), quiet=True)
    return place / "runs"


def random_encoder(folder: Path) -> Path:
    import transformers

    tokenizer = tk.byte_pairs(["some words of a text"], 280)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=tk.vocabulary_size(tokenizer), **shape)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


@contextlib.contextmanager
def in_process(source: str, runs: Path = Path("runs"), *, keys: tuple[bytes, ...] = (), **limits: Any) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from fromzero.use.serve.app import make_app
    from fromzero.use.serve.limits import Limits
    from fromzero.use.serve.opened import open_model

    opened, _ = open_model(source, runs)
    app = make_app(opened, Limits(**limits), keys)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        client.gate, client.opened = app, opened
        yield client


class Server:
    """A server in a process of its own, on a free port of this machine. It is ended with the test, whatever happens."""

    def __init__(self, source: Path, *, key_file: Path | None = None, **limits: Any) -> None:
        code = (
            "import sys, json, torch; from pathlib import Path; torch.set_num_threads(1)\n"
            "from fromzero.use.serve.server import Limits, serve_model\n"
            "import time; from fromzero.models.together import Batch; step = Batch.step\n"
            "Batch.step = lambda self: (time.sleep(0.003), step(self))[1]\n"  # as a model takes that is not tiny
            "source, key_file, limits = json.loads(sys.argv[1])\n"
            "say = lambda line: print(line, file=sys.stderr, flush=True)\n"
            "key_file = key_file and Path(key_file)\n"
            "print(json.dumps(serve_model(source, Path('runs'), host='127.0.0.1', port=0, key_file=key_file, limits=Limits(**limits), say=say)))\n"
        )
        given = json.dumps([str(source), key_file and str(key_file), limits])
        self._start([sys.executable, "-c", code, given], source.parent)

    @classmethod
    def typed(cls, *words: str, cwd: Path) -> Server:
        """`fromzero serve …` as a person types it, on a free port"""
        made = cls.__new__(cls)
        made._start([sys.executable, "-m", "fromzero", "serve", *words, "--port", "0"], cwd)
        return made

    def _start(self, command: list[str], cwd: Path) -> None:
        self.log = cwd / f"server-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd)
        until = time.monotonic() + 180  # on a machine that others use too
        while not (found := re.search(r"at http://127.0.0.1:(\d+)", self.said())):
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.05)
        self.port = int(found[1])
        self.address = f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def ask(self, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = None if value is None else json.dumps(value)
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def measure(self, name: str) -> float:
        _, page = self.ask("GET", "/metrics")
        found = re.search(rf"^fromzero_{re.escape(name)} (\S+)$", page, re.MULTILINE)
        assert found, page
        return float(found[1])

    def memory(self) -> tuple[float, int]:
        """(resident megabytes, threads)"""
        page = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", page)[1]) / 1024, int(re.search(r"Threads:\s+(\d+)", page)[1])  # type: ignore[index]

    def stop(self, number: int = signal.SIGTERM) -> int:
        os.kill(self.process.pid, number)
        return self.process.wait(30)

    def still_answers(self, name: str) -> None:
        assert self.ask("GET", "/health")[0] == 200
        status, body = self.ask("POST", "/v1/chat/completions", {"model": name, "messages": HI, "max_tokens": 3, "temperature": 0})
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 3, body
