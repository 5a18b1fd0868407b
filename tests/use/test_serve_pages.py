"""The curl examples of the pages, read out of them and typed into a shell: each is answered as it should be, and none is left out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fromzero as fz
from fromzero.data import tokens as tk
from fromzero.use.speak import open_speaker
from tests.house.test_docs import random_penguins, without_answers
from tests.use.serving import Server, random_encoder, trained_predictors

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "README.zh.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
curl = pytest.mark.skipif(shutil.which("curl") is None, reason="NOT CHECKED: the pages' examples need curl")


@dataclass(frozen=True)
class Example:
    """One command, as it is printed. body: what it sends, JSON or a file's name"""

    text: str
    route: str
    body: Any

    @property
    def kind(self) -> str:
        """What it shows: an example of the same route with other fields is another one"""
        return f"{self.route} {' '.join(self.body) if isinstance(self.body, dict) else self.body}"


def examples(page: str) -> list[Example]:
    """raises: AssertionError where a curl stands anywhere else than at the begin of a command in a block, and would not be run"""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        command = ""
        for line in block.splitlines(keepends=True):
            command += line
            if command.endswith("\\\n"):
                continue
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # a quote is open
                continue
            if words[:1] == ["curl"]:
                route = next(word for word in words if "://" in word).split("/", 3)[3]
                data = next((after for word, after in pairwise(words) if word in ("-d", "--data-binary")), "")
                found.append(Example(command, f"/{route}", data if data[:1] in ("@", "") else json.loads(data)))
            command = ""
    assert len(found) == len(re.findall(r"\bcurl\s+(?:-|\S*\d:\d|\S*://|\S*localhost)", page)), "a curl that no test reads"
    return found


def chat(sent: Any, said: str, source: str) -> None:
    answer, speaker = json.loads(said), open_speaker(source, Path("runs"))
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == len(speaker.encode_turns(sent["messages"]))
    assert 1 <= answer["usage"]["completion_tokens"] <= sent["max_tokens"]


def streamed(sent: Any, said: str, source: str) -> None:
    lines = said.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["object"] for event in events} == {"text_completion"} and "".join(event["choices"][0]["text"] for event in events)
    ends = [event["choices"][0]["finish_reason"] for event in events]
    assert set(ends[:-1]) == {None} and ends[-1] in ("stop", "length") and len(events) > 1


def predicted(sent: Any, said: str, source: str) -> None:
    answer = json.loads(said)
    given = Path(sent[1:]) if isinstance(sent, str) else sent["rows"]
    ours = fz.predict(source, given).rows
    assert [(row["class"], row["probability"]) for row in answer["rows"]] == [(row.answer, row.probabilities[row.answer]) for row in ours]
    assert len(ours) == (10 if sent == "@new.csv" else 1) and answer["task"] == "classify"


def embedded(sent: Any, said: str, source: str) -> None:
    tokenizer, vectors = (Path(source) / "tokenizer.json").read_text(), [one["embedding"] for one in json.loads(said)["data"]]
    for ids, vector in zip(tk.encode(tokenizer, sent["input"], special=True), vectors, strict=True):
        with torch.no_grad():
            assert vector == pytest.approx(fz.load(source)(torch.tensor(ids), torch.tensor([0, len(ids)]))[0].tolist(), abs=1e-6)


Check = Callable[[Any, str, str], None]
KNOWN: dict[str, tuple[str, Check]] = {  # what an example shows → the model that it needs, and what its answer must be
    "/v1/chat/completions model messages max_tokens": ("talker", chat),
    "/v1/completions model prompt max_tokens stream": ("talker", streamed),
    "/v1/predict rows": ("run:penguins", predicted),
    "/v1/predict @new.csv": ("run:penguins", predicted),
    "/v1/predict @photo.png": ("run:shades", predicted),
    "/v1/embeddings model input": ("bert", embedded),
}


def test_every_curl_example_of_a_page_is_one_that_is_run_and_stands_there_once() -> None:
    kinds = {page.name: [example.kind for example in examples(page.read_text(encoding="utf-8"))] for page in PAGES}
    assert len(PAGES) > 10 and all(len(set(one)) == len(one) for one in kinds.values())
    assert {kind for one in kinds.values() for kind in one} == KNOWN.keys()
    assert kinds["README.md"] == kinds["README.zh.md"] and sorted(kinds["serve.md"]) == sorted(KNOWN)


def test_a_new_example_is_read_with_its_fields_and_one_that_hides_is_an_error() -> None:
    with_field = 'curl http://127.0.0.1:8080/v1/completions -H \'Content-Type: application/json\' \\\n  -d \'{"model": "m",\n "n": 2}\'\n'
    (found,) = examples(f"a\n```sh\nls 'a b'  # it's\n{with_field}```\n")
    assert found.text == with_field and found.kind == "/v1/completions model n" not in KNOWN
    for hidden in ("then `curl http://127.0.0.1:8080/health`", "```sh\necho | curl -N http://127.0.0.1:8080/health\n```\n"):
        with pytest.raises(AssertionError, match="no test reads"):
            examples(hidden)


@pytest.fixture(scope="module")
def place(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples are about: models of each kind, new.csv and photo.png"""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(talker, folder / "talker")
    random_encoder(folder / "bert")
    trained_predictors(folder, "shades")
    shutil.copy(folder / "images" / "dark" / "0.png", folder / "photo.png")
    (folder / "penguins.csv").write_text(random_penguins())
    (folder / "new.csv").write_text(without_answers(random_penguins()))
    (folder / "r.yaml").write_text(fz.new(str(folder / "penguins.csv")))  # the recipe of the README
    recipe = fz.read(folder / "r.yaml", "epochs=2", "limits.threads=1", "report=[]")
    fz.run(fz.plan(recipe, runs=folder / "runs", beside=folder, probe=False), quiet=True)
    return folder


@curl
@pytest.mark.parametrize("source", sorted({source for source, _ in KNOWN.values()}))
def test_the_curl_examples_of_the_pages_are_answered_as_typed(source: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the address and the model's name are others"""
    monkeypatch.chdir(place)
    (place / ".curlrc").write_text('silent\nshow-error\nwrite-out = "\\n%{http_code} %{content_type}"\n')
    found = [example for page in PAGES for example in examples(page.read_text(encoding="utf-8")) if KNOWN[example.kind][0] == source]
    assert found
    with Server.typed(source, cwd=place) as server:
        for example in found:
            command = re.sub(r"127\.0\.0\.1:8080", f"127.0.0.1:{server.port}", example.text)
            command = re.sub(r'"model": "[^"]*"', f'"model": "{source}"', command)
            done = subprocess.run(
                ["bash", "-c", command], cwd=place, env={**os.environ, "CURL_HOME": str(place)}, capture_output=True, text=True, timeout=60
            )
            said, _, status = done.stdout.rpartition("\n")
            kind = "text/event-stream" if isinstance(example.body, dict) and example.body.get("stream") else "application/json"
            assert (done.returncode, done.stderr, status) == (0, "", f"200 {kind}"), (example.text, done)
            KNOWN[example.kind][1](example.body, said, source)
        assert server.stop() == 0
