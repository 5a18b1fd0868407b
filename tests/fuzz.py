"""Small sound files and random damage in, the inputs that broke a reader out: anything but a result or a FromzeroError, soon.

python tests/fuzz.py --seconds 60 [--only csv,gguf] [--seed 7] [--keep FOLDER]      not collected by pytest; exit 1 where one broke
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from fromzero.data import ImageFormat, Request, load
from fromzero.data.conversations import read_conversations
from fromzero.data.images import read_image
from fromzero.data.language import load_corpus
from fromzero.data.table import read_parts, read_table
from fromzero.data.tokens import byte_pairs, encode
from fromzero.errors import FromzeroError
from fromzero.recipe.read import parse, read
from fromzero.sources import check_zip, read_member
from fromzero.weights import open_pretrained
from fromzero.weights.gguf import open_gguf
from fromzero.weights.tensors import open_safetensors, read_tensors

SECONDS = 5  # for one input
MEMORY = 2**30  # bytes beyond what the process has when it begins
HUGE = [struct.pack("<Q", 2**63), struct.pack("<Q", 2**62), b"\xff" * 8, b"\0" * 8, struct.pack(">I", 2**31), b"\x00\x01"]
TEXTS = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\t",
    b",",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    b"\xe2\x80\xa8",
]
TEXTS += [
    b"NaN",
    b"Infinity",
    b"1e999",
    b"-0",
    b"null",
    b"&a [*a]",
    b"*a",
    b"!!python/none x",
    b"<<: x",
    b"{{",
    b"%",
    b"__proto__",
    b"\\" * 999,
]

ROWS = "".join(f'{i * 1.5},{"abc"[i % 3]},"some ""text"" no {i}\nand more",{i % 2}\n' for i in range(12))
OBJECTS = [{"more": None, "x": i / 3, "word": "ab"[i % 2], "text": f'this is text {i} \\ " é', "y": i % 2} for i in range(12)]
TALKS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}], "tools": '[{"name": "f"}]'}
    for i in range(4)
]
TALKS += [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": [1]}'}]}]}]
RECIPE = """\
name: x
task: classify   # a comment
model: {from: mlp, hidden: [8, 4]}
data: &d {train: a.csv, hold_out: 0.2, classes: ['1', no], limit: {per_class: 3}}
optimizer: {name: sgd, lr: 1e-2, lr_scale: {"head.*": 10}}
schedule: {name: cosine, warmup: .1}
batch: 0x20
evaluate: {every: epoch}
"""


def _table(path: Path) -> object:
    read = read_table(path)
    for _ in read_parts(path):
        pass
    return load(Request(path, target=list(read.columns)[-1], skip_broken=2))


def _recipe(path: Path) -> object:
    parse(path.read_bytes(), str(path))
    return read(path)


def _zip(path: Path) -> object:
    return [read_member(path, name) for name in check_zip(path) if not name.endswith("/")]


def _tensors(path: Path) -> object:
    with suppress(FromzeroError):
        read_tensors(path)
    found = open_safetensors(path)
    return [found[name] for name in found]


def _gguf(path: Path) -> object:
    _, tensors = open_gguf(path)
    return [tensors[name] for name in tensors], open_pretrained(str(path))


def _tokenizer(path: Path) -> object:
    return encode(path.read_text(encoding="utf-8", errors="replace"), ["some text to encode"], special=True)


def _folder(path: Path) -> object:
    """A config.json beside sound weights."""
    (path.parent / "model.safetensors").write_bytes(save({"w": torch.ones(2)}))
    shutil.copy(path, path.parent / "tokenizer_config.json")
    return open_pretrained(str(path.parent))


def small_gguf() -> bytes:
    """A llama of one tensor, with a tokenizer, written by hand."""
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    entries = [(b"general.architecture", 8, text(b"llama")), (b"llama.block_count", 4, struct.pack("<I", 1))]
    entries += [(b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)), (b"tokenizer.ggml.model", 8, text(b"gpt2"))]
    entries += [(b"tokenizer.ggml.pre", 8, text(b"smollm"))]
    for key, number in (("embedding_length", 32), ("feed_forward_length", 32), ("attention.head_count", 2), ("context_length", 8)):
        entries.append((f"llama.{key}".encode(), 4, struct.pack("<I", number)))
    entries += [(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text(b"a") + text(b"b") + text(b"ab"))]
    entries += [(b"tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1) + text(b"a b"))]
    entries += [(b"tokenizer.ggml.token_type", 9, struct.pack("<IQ3i", 5, 3, 1, 1, 1))]
    tensor = text(b"token_embd.weight") + struct.pack("<I2QIQ", 2, 32, 3, 8, 0)  # Q8_0
    header = (
        b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(text(k) + struct.pack("<I", t) + v for k, t, v in entries) + tensor
    )
    return header + b"\0" * (-len(header) % 32) + b"\x01\x3c" * 51


def _bytes(write: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _parquet(buffer: Any) -> None:
    import polars

    polars.DataFrame(OBJECTS).write_parquet(buffer)


def _zipped(buffer: Any) -> None:
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.txt", "some text " * 20)
        archive.writestr("c.json", json.dumps(OBJECTS))


ARRAYS = {"x": torch.rand(6, 3), "y": torch.arange(6) % 2}
PIXELS = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
Reader = tuple[str, Callable[[], bytes], Callable[[Path], object]]
READERS: dict[str, Reader] = {  # name → (file name, a sound file, what reads it)
    "csv": ("f.csv", lambda: f"x,word,text,y\n{ROWS}".encode(), _table),
    "tsv": ("f.tsv", lambda: f"x\tword\ttext\ty\n{ROWS}".replace(",", "\t").replace("\nand", " and").encode(), _table),
    "jsonl": ("f.jsonl", lambda: "".join(json.dumps(row) + "\n" for row in OBJECTS).encode(), _table),
    "json": ("f.json", lambda: json.dumps(OBJECTS, indent=1).encode(), _table),
    "parquet": ("f.parquet", lambda: _bytes(_parquet), _table),
    "text": ("f.txt", lambda: "some text\r\nand é more".encode() * 20, lambda path: load_corpus(Request(str(path)))),
    "chat": (
        "f.jsonl",
        lambda: "".join(json.dumps(row) + "\n" for row in TALKS).encode(),
        lambda path: read_conversations(path, None, (Path(),)),
    ),
    "recipe": ("f.yaml", RECIPE.encode, _recipe),
    "npz": (
        "f.npz",
        lambda: _bytes(lambda buffer: np.savez(buffer, x=ARRAYS["x"].numpy(), y=ARRAYS["y"].numpy())),
        lambda path: load(Request(path)),
    ),
    "torch": ("f.pt", lambda: _bytes(lambda buffer: torch.save(ARRAYS, buffer)), lambda path: load(Request(path))),
    "arrays": ("f.safetensors", lambda: save(ARRAYS), lambda path: load(Request(path))),
    "safetensors": ("f.safetensors", lambda: save({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.int64)}), _tensors),
    "gguf": ("f.gguf", small_gguf, _gguf),
    "zip": ("f.zip", lambda: _bytes(_zipped), _zip),
    "tokenizer": ("f.json", lambda: byte_pairs(["some text", "and more text"], 300).encode(), _tokenizer),
    "folder": ("config.json", lambda: json.dumps({"model_type": "llama", "eos_token": {"content": "x"}, "auto_map": {}}).encode(), _folder),
    **{
        kind: (
            f"f.{kind}",
            lambda kind=kind: _bytes(lambda buffer: PIXELS.save(buffer, kind)),
            lambda path: read_image(path, ImageFormat(8, 8, 3)),
        )
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")
    },
}


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """The file with one to six wounds."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 6)):
        at, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 2, 4, 8, 40])
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            piece = draw.choice(HUGE)
            data[at : at + len(piece)] = piece
        elif kind == 4:
            data[at:at] = draw.choice(TEXTS) * draw.choice([1, 1, 2, 30])
        elif kind == 5:
            begin = draw.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + draw.choice([4, 40, 400])] * draw.choice([1, 2, 50])
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data[: 2**20])


@contextmanager
def bounded() -> Iterator[None]:
    """Memory that a hostile file could take is bounded here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def sound(name: str, folder: Path) -> bytes:
    """The bytes of a sound file, after they were read."""
    file, make, reader = READERS[name]
    (folder / file).write_bytes(make())
    reader(folder / file)
    return (folder / file).read_bytes()


def broke(name: str, data: bytes, folder: Path) -> str:
    """What a reader did with these bytes that it may not do; an empty text where it gave a result or refused them."""
    file, _, reader = READERS[name]
    place = folder / file
    place.write_bytes(data)

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        reader(place)
    except FromzeroError as error:
        said = str(error)
        return "" if error.code == 2 and 0 < len(said) < 20_000 else f"a message of {len(said)} characters, code {error.code}"
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return "".join(traceback.format_exception_only(error)).strip()[:300] + " at " + _where(error)
    finally:
        signal.alarm(0)
    return ""


def _where(error: BaseException) -> str:
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "fromzero" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", default=",".join(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that broke a reader")
    asked = parser.parse_args()
    names = asked.only.split(",")
    draw, end = random.Random(asked.seed), time.monotonic() + asked.seconds
    tried, found = Counter[str](), dict[str, Counter[str]]()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        whole = {name: sound(name, Path(folder)) for name in names}  # all libraries are loaded, and have taken their room, from here on
        stack.enter_context(bounded())
        while time.monotonic() < end:
            name = names[sum(tried.values()) % len(names)]
            data = mutated(whole[name], draw)
            tried[name] += 1
            if said := broke(name, data, Path(folder)):
                key = said if len(said) < 120 else said[:60] + "…" + said[-50:]
                if key not in found.setdefault(name, Counter()):
                    print(f"{name} input {tried[name]}: {said}\n    {len(data)} bytes, {data[:160]!r}", flush=True)
                    if asked.keep:
                        asked.keep.mkdir(parents=True, exist_ok=True)
                        (asked.keep / f"{name}-{tried[name]}-{READERS[name][0]}").write_bytes(data)
                found[name][key] += 1
    print("tried:", ", ".join(f"{name} {count}" for name, count in tried.items()))
    print("broke:", ", ".join(f"{name} {sum(kinds.values())} ({len(kinds)} kinds)" for name, kinds in found.items()) or "none")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
