"""hf: and ms: sources: huggingface_hub against a small hub on loopback, and modelscope as a stub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

import pytest

from fromzero.errors import MissingExtra, SourceError
from fromzero.sources import fetch_hub

CARDS = {"config.json": b"{}", "tokenizer.json": b"{1}", "1_Pooling/config.json": b"{2}", "chat_template.jinja": b"{3}"}
OTHERS = {
    "README.md": b"r",
    "modeling_x.py": b"raise SystemExit",
    "onnx/model.onnx": b"o",
    "flax_model.msgpack": b"f",
    "tf/model.safetensors": b"t",
}
MAIN, OLD = "a" * 40, "b" * 40
REPOSITORIES = {
    "o/whole": {MAIN: {**CARDS, **OTHERS, "model.safetensors": b"new", "pytorch_model.bin": b"p"}, OLD: {**CARDS, "model.safetensors": b"old"}},
    "o/sharded": {MAIN: {**CARDS, "model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2", "model.safetensors.index.json": b"i"}},
    "o/torch": {MAIN: {**CARDS, **OTHERS, "pytorch_model.bin": b"p"}},
    "o/gguf": {MAIN: {"README.md": b"r", "m.Q4_K_M.gguf": b"4", "m.Q8_0.gguf": b"8"}},
    "o/adapter": {MAIN: {**OTHERS, "adapter_config.json": b"c", "adapter_model.safetensors": b"a", "tokenizer.json": b"{1}"}},
    "o/older": {MAIN: {"adapter_config.json": b"c", "adapter_model.bin": b"b"}},
    "o/empty": {MAIN: {"README.md": b"r"}},
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.asked.append(f"{self.command} {path} {self.headers.get('Authorization', '')}")
        parts = path.removeprefix("api/models/").split("/")
        name, verb, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision", parts[3:] or ["main"]
        if name == "o/gated":
            return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        if name == "o/denied":
            return self.answer(403, b"{}")
        if name == "o/broken":
            return self.answer(418, b"{}")
        if name not in REPOSITORIES:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        commit = {"main": MAIN, "v1": OLD, MAIN: MAIN, OLD: OLD}.get(rest[0])
        files = REPOSITORIES[name].get(commit)
        if files is None:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if verb == "revision":
            body = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": file} for file in files],
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        if verb == "tree":
            body = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for file, data in files.items()
            ]
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        data = files.get("/".join(rest[1:]))
        if data is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(5)


SCRIPT = """
import json, sys
from pathlib import Path
from fromzero.errors import FromzeroError
from fromzero.sources import fetch_hub
found = {}
for source in sys.argv[1:]:
    try:
        path, origin = fetch_hub(source)
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.read_text()
        found[source] = [files, origin]
    except FromzeroError as error:
        found[source] = str(error)
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def asked(hub, cache, *sources, **environment):
    """What a process of its own finds: huggingface_hub reads the environment when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT, *sources], env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


SOURCES = [
    "hf:o/whole",
    "hf:o/whole@v1",
    f"hf:o/whole@{OLD}",
    "hf:o/whole@v9",
    "hf:o/sharded",
    "hf:o/torch",
    "hf:o/gguf",
    "hf:o/gguf/m.Q8_0.gguf",
]
SOURCES += [
    "hf:o/adapter",
    "hf:o/older",
    "hf:o/gguf/*Q4_K_M.gguf",
    "hf:o/gguf/*.gguf",
    "hf:o/gguf/no.gguf",
    "hf:o/empty",
    "hf:o/nothing",
    "hf:o/gated",
    "hf:o/denied",
    "hf:o/broken",
]


@pytest.fixture(scope="module")
def found(hub, cache):
    Hub.asked.clear()
    return asked(hub, cache, *SOURCES, HF_TOKEN="hf_secret")


def test_only_what_is_needed_is_brought_and_the_commit_is_named(found):
    assert found["hf:o/whole"] == [sorted([*CARDS, "model.safetensors"]), f"hf:o/whole@{MAIN}"]
    assert found["hf:o/sharded"][0] == sorted([*CARDS, *(name for name in REPOSITORIES["o/sharded"][MAIN] if "model" in name)])
    brought = {line.split("/resolve/")[1].split("/", 1)[1].split(" ")[0] for line in Hub.asked if "/resolve/" in line}
    assert (
        not brought & {"README.md", "modeling_x.py", "onnx/model.onnx", "flax_model.msgpack", "tf/model.safetensors"} and len(brought) > 8
    )
    assert all(line.endswith(" Bearer hf_secret") for line in Hub.asked)


def test_a_revision_is_a_tag_or_a_commit(found):
    assert found["hf:o/whole@v1"][1] == found[f"hf:o/whole@{OLD}"][1] == f"hf:o/whole@{OLD}"
    assert found["hf:o/whole@v9"] == "hf:o/whole has no revision 'v9'; name a branch, a tag or a commit"


def test_torch_files_come_only_where_there_is_no_safetensors(found):
    assert "pytorch_model.bin" not in found["hf:o/whole"][0]
    assert found["hf:o/torch"][0] == sorted([*CARDS, "pytorch_model.bin"])


def test_an_adapter_comes_with_its_config_and_its_tokenizer(found):
    assert found["hf:o/adapter"] == [["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], f"hf:o/adapter@{MAIN}"]
    assert found["hf:o/older"] == [["adapter_config.json", "adapter_model.bin"], f"hf:o/older@{MAIN}"]


def test_one_file_is_named_or_found_by_a_glob(found):
    assert found["hf:o/gguf/m.Q8_0.gguf"] == ["8", f"hf:o/gguf/m.Q8_0.gguf@{MAIN}"]
    assert found["hf:o/gguf/*Q4_K_M.gguf"] == ["4", f"hf:o/gguf/m.Q4_K_M.gguf@{MAIN}"]
    assert found["hf:o/gguf/*.gguf"] == "hf:o/gguf has 2 files that match '*.gguf'; one file is named as hf:o/gguf/FILE.gguf"
    assert found["hf:o/gguf/no.gguf"] == "hf:o/gguf has 0 files that match 'no.gguf'; one file is named as hf:o/gguf/FILE.gguf"


def test_what_is_not_to_be_had_is_said_with_its_mend(found):
    nothing = " has no model.safetensors and no pytorch_model.bin; one file is named as "
    assert (
        found["hf:o/gguf"] == f"hf:o/gguf{nothing}hf:o/gguf/FILE.gguf" and found["hf:o/empty"] == f"hf:o/empty{nothing}hf:o/empty/FILE.gguf"
    )
    assert found["hf:o/nothing"] == "hf:o/nothing does not exist, or is private; check the name; for a private one set HF_TOKEN"
    assert found["hf:o/gated"] == "hf:o/gated is gated; accept its terms at https://huggingface.co/o/gated, and set HF_TOKEN"
    assert found["hf:o/denied"] == "hf:o/denied may not be read (HTTP 403); set HF_TOKEN to a token that may"
    assert found["hf:o/broken"].startswith("hf:o/broken is not whole in the cache, and the hub answered with HTTP 418; check the network")


def test_offline_what_is_in_the_cache_is_opened_and_the_rest_says_why_not(hub, cache, found):
    Hub.asked.clear()
    again = asked(hub, cache, "hf:o/whole", "hf:o/torch", "hf:o/gguf/m.Q8_0.gguf", "hf:o/other", HF_HUB_OFFLINE="1")
    assert Hub.asked == []
    assert all(again[source] == found[source] for source in ("hf:o/torch", "hf:o/gguf/m.Q8_0.gguf"))
    assert again["hf:o/whole"][1] == f"hf:o/whole@{MAIN}"
    assert again["hf:o/other"] == "hf:o/other is not whole in the cache, and HF_HUB_OFFLINE is set; unset it to fetch"


def test_a_hub_that_cannot_be_reached_is_as_good_as_offline(cache, found):
    again = asked("http://127.0.0.1:9", cache, "hf:o/whole", "hf:o/other")
    assert again["hf:o/whole"][1] == f"hf:o/whole@{MAIN}"
    assert (
        again["hf:o/other"]
        == "hf:o/other is not whole in the cache, and the hub cannot be reached; check the network; HF_ENDPOINT sets a mirror"
    )


@pytest.mark.parametrize(
    "source", ["hf:owner", "hf:", "hf:/a/b", "hf:a/b/../c", "hf:a/b@", "ms:a", "hf:a/b/../../etc/passwd", "hf:a/b//etc/passwd", "hf:a b/c"]
)
def test_what_is_no_source_of_a_hub_is_refused_with_an_example(source):
    with pytest.raises(SourceError, match=rf"'{source}' is no model of a hub; write hf:owner/name, hf:owner/name@revision or"):
        fetch_hub(source)


# ------------------------------------------------------------------------------------------- ModelScope


def test_modelscope_is_asked_for_the_same_files(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision, allow_patterns))
        if name == "o/no":
            raise ConnectionError("404 o/no\nlong text")
        if "pytorch_model.bin" in allow_patterns:
            Path(tmp_path, "pytorch_model.bin").write_text("p")
        if "m.gguf" in allow_patterns:
            Path(tmp_path, "m.gguf").write_text("g")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert fetch_hub("ms:o/n@v2") == (tmp_path, "ms:o/n@v2")
    assert [call[:2] for call in calls] == [("o/n", "v2")] * 2 and "config.json" in calls[0][2] and "model.safetensors" in calls[0][2]
    assert fetch_hub("ms:o/n/m.gguf") == (tmp_path / "m.gguf", "ms:o/n/m.gguf@master")
    with pytest.raises(SourceError, match=r"^ms:o/no could not be fetched \(ConnectionError: 404 o/no\); check the name"):
        fetch_hub("ms:o/no")


def test_without_modelscope_the_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtra, match="ms: sources need the package modelscope; pip install modelscope"):
        fetch_hub("ms:o/n")
