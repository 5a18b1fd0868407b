"""Corpora larger than memory: the same tokens as in memory, made once, gone on with after a kill, in little memory."""

import json
import os
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fromzero.data import Request, TextAsked, corpus, corpus_again, language, load_corpus
from fromzero.data import tokens as tk
from fromzero.data.table import read_blocks, read_parts
from fromzero.errors import DataError
from fromzero.sources import locked

WORDS = [
    "the",
    "quick",
    "brown",
    "fox,",
    "jumps\n",
    "over",
    "12345",
    "lazy",
    "dogs.",
    "été",
    "你好世界",
    "don't",
    "stop!\n\n\n",
    "",
    "_x_",
    "=",
    "3;\t",
]


def text(seed: int, count: int) -> str:
    picks = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


DOCUMENTS = [text(i, 3 + 40 * (i % 7)) for i in range(60)] + [text(3, 123)]  # the last stands there already


def write(folder: Path, kind: str) -> str:
    path = folder / f"corpus.{kind}"
    if kind == "txt":
        path.write_text("".join(DOCUMENTS), encoding="utf-8")
    elif kind == "folder":
        path.mkdir()
        for i, document in enumerate([*DOCUMENTS, " \n"]):
            (path / f"{i:03}.txt").write_text(document, encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"n": i, "text": t}) + "\n\n" for i, t in enumerate([*DOCUMENTS, " "])))
    elif kind == "csv":
        polars.DataFrame({"n": range(61), "text": DOCUMENTS}).write_csv(path)
    else:
        polars.DataFrame({"n": range(61), "text": DOCUMENTS}).write_parquet(path, row_group_size=20)
    return str(path)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Sizes at which a small text has many blocks, segments and batches; a cache of its own."""
    monkeypatch.setattr(corpus, "SEGMENT", 400)
    monkeypatch.setattr(corpus, "BATCH", 3000)
    monkeypatch.setattr("fromzero.data.table.PART", 7)
    monkeypatch.setattr(language, "read_blocks", lambda file: read_blocks(file, 101))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def streamed(monkeypatch):
    monkeypatch.setattr(language, "IN_MEMORY", 0)


def everything(examples):
    (tokens, offsets), targets = examples.take(torch.arange(len(examples)))
    return tokens, offsets, targets


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(everything(ours), everything(theirs), strict=True))


def cached(tmp_path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((tmp_path / "cache").rglob("*")) if p.name in ("tokens", "rows") and p.is_file()}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["txt", "folder", "jsonl", "csv", "parquet"])
def test_a_streamed_corpus_has_the_tokens_of_one_in_memory(small, monkeypatch, tmp_path, kind, stream):
    asked = Request(write(tmp_path, kind), hold_out=0.2, seed=3, text=TextAsked("bpe", 300, 50, stream))
    theirs = load_corpus(asked)
    assert theirs.train.flat.dtype == torch.uint16 and not (tmp_path / "cache").exists() and theirs.facts.notes == ()
    streamed(monkeypatch)
    ours = load_corpus(asked)
    assert same(ours.train, theirs.train) and same(ours.validation, theirs.validation)
    assert ours.facts.text == theirs.facts.text and ours.facts.digest == theirs.facts.digest
    assert ours.facts.repeats + ours.facts.shared == theirs.facts.repeats + theirs.facts.shared
    assert ours.facts.repeats + len(ours.validation) > 0 and ours.facts.shared == 0
    assert "read as a stream" in ours.facts.notes[0] and ours.facts.bytes == 16 * (len(ours.train) + len(ours.validation))
    again = corpus_again(asked.train, ours.preparation.inputs, asked)
    assert int(again.lengths.sum()) >= int(ours.train.lengths.sum())


def test_a_long_document_is_cut_where_its_tokens_stay_the_same(monkeypatch):
    whole = "".join(DOCUMENTS)
    form = tk.byte_pairs(DOCUMENTS, 400)
    monkeypatch.setattr(corpus, "SEGMENT", 97)
    for size in (50, 97, 98, 10_000):
        blocks = [whole[i : i + size] for i in range(0, len(whole), size)]
        segments = [text for text, _ in corpus._segments(blocks)]
        assert "".join(segments) == whole and max(map(len, segments)) <= 97 and len(segments) > 100
        assert [*chain(*tk.encode(form, segments, special=False))] == tk.encode(form, [whole], special=False)[0]
    assert [len(text) for text, _ in corpus._segments(["你" * 200])] == [97, 97, 6]


KILLED = """
import os, signal, sys
from fromzero.data import Request, TextAsked, corpus, language, load_corpus
corpus.SEGMENT, corpus.BATCH, language.IN_MEMORY = 400, 3000, 0
encode, seen = corpus.tk.encode, []
def counted(tokenizer, texts, *, special):
    seen.append(len(texts))
    if len(seen) > 2:
        print(sum(seen[:2]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(tokenizer, texts, special=special)
corpus.tk.encode = counted
load_corpus(Request(sys.argv[1], hold_out=0, text=TextAsked("bpe", 300)))
"""


def test_what_was_finished_before_a_kill_is_kept_and_only_the_rest_is_made(small, monkeypatch, tmp_path):
    asked = Request(write(tmp_path, "jsonl"), hold_out=0, text=TextAsked("bpe", 300))
    streamed(monkeypatch)
    counts = count_encoded(monkeypatch)
    load_corpus(asked)
    undisturbed, total = cached(tmp_path), sum(counts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "other"))
    killed = subprocess.run([sys.executable, "-c", KILLED, asked.train], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tokens,) = [p for p in (tmp_path / "cache" / "other").rglob("tokens") if p.is_file()]
    with tokens.open("ab") as file, (tokens.parent / "rows.part").open("ab") as rows:
        file.write(b"half a shard")  # as a kill in the middle of a write leaves it
        rows.write(b"12345")
    counts.clear()
    load_corpus(asked)
    assert sum(counts) == total - int(killed.stdout) < total
    assert {"tokens": tokens.read_bytes(), "rows": (tokens.parent / "rows").read_bytes()} == undisturbed
    assert not (tokens.parent / "rows.part").exists()


def count_encoded(monkeypatch) -> list[int]:
    encode, counts = tk.encode, []

    def counted(tokenizer, texts, *, special):
        counts.append(len(texts))
        return encode(tokenizer, texts, special=special)

    monkeypatch.setattr(tk, "encode", counted)
    return counts


def test_a_second_call_reads_no_text_and_other_content_or_another_tokenizer_makes_other_files(small, monkeypatch, tmp_path):
    asked = Request(write(tmp_path, "folder"), hold_out=0.2, text=TextAsked("bpe", 300, 50))
    for file in Path(asked.train).iterdir():
        os.utime(file, (1e9, 1e9))
    streamed(monkeypatch)
    counts = count_encoded(monkeypatch)
    first = load_corpus(asked)
    counts.clear()
    with monkeypatch.context() as patched:
        patched.setattr(language, "read_blocks", None)
        patched.setattr(corpus, "digest_of", None)
        second = load_corpus(asked)
        load_corpus(Request(asked.train, hold_out=0.2, text=TextAsked("bpe", 300, 20, True)))  # pieces of another kind
    assert same(first.train, second.train) and not counts
    before = len(list((tmp_path / "cache").rglob("rows")))
    load_corpus(Request(asked.train, hold_out=0.2, text=TextAsked("bpe", 290)))
    between = len(list((tmp_path / "cache").rglob("rows")))
    (Path(asked.train) / "000.txt").write_text("another text than there was")
    third = load_corpus(asked)
    assert (before, between, len(list((tmp_path / "cache").rglob("rows")))) == (2, 4, 6) and counts
    assert third.facts.digest != first.facts.digest
    assert len(list((tmp_path / "cache" / "fromzero" / "tokens" / "files").iterdir())) == 1  # none for what changed a moment ago


def test_files_that_others_cut_are_made_again(small, monkeypatch, tmp_path):
    asked = Request(write(tmp_path, "txt"), hold_out=0, text=TextAsked("bpe", 300))
    streamed(monkeypatch)
    first = load_corpus(asked)
    (tokens,) = [p for p in (tmp_path / "cache").rglob("tokens") if p.is_file()]
    before = everything(first.train)
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert all(map(torch.equal, everything(load_corpus(asked).train), before))


def test_two_runs_do_not_write_the_same_files_at_once(small, monkeypatch, tmp_path):
    asked = Request(write(tmp_path, "txt"), hold_out=0, text=TextAsked("bpe", 300))
    streamed(monkeypatch)
    load_corpus(asked)
    (rows,) = (tmp_path / "cache").rglob("rows")
    rows.unlink()
    other = threading.Thread(target=load_corpus, args=(asked,))
    with locked(rows.parent):
        other.start()
        other.join(0.5)
        assert other.is_alive() and not rows.exists() and not rows.with_name("rows.part").exists()
    other.join()
    assert rows.exists()


def words(size: int) -> str:
    """One token a word of 60 letters and more."""
    vocabulary = {"[UNK]": 0, **{f"{i:x<60}": i for i in range(1, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())


MEASURED = """
import sys
from pathlib import Path
from fromzero.data import Request, TextAsked, corpus, language, load_corpus
corpus.SEGMENT, corpus.BATCH, language.IN_MEMORY = 2**14, 2**18, 0
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024  # ru_maxrss knows the parent's
asked = lambda path: Request(path, hold_out=0.1, text=TextAsked(Path(sys.argv[3]).read_text(), max_tokens=256))
load_corpus(asked(sys.argv[1]))
before = peak()
loaded = load_corpus(asked(sys.argv[2]))
loaded.train.take(__import__("torch").arange(64))
print(peak() - before, loaded.facts.text.tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [json.dumps({"text": " ".join(f"{1 + (i * 7 + j) % 999:x<60}" for j in range(80))}) + "\n" for i in range(1000)]
    paths = [tmp_path / "warm.jsonl", tmp_path / "big.jsonl", tmp_path / "t.json"]
    for path, content in zip(paths, ("".join(lines[:100]), "".join(lines) * 28, words(1000)), strict=True):
        path.write_text(content)
    size = paths[1].stat().st_size
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, tokens = map(int, done.stdout.split())
    assert size > 136e6 and tokens > 1_800_000 and grown < size / 3, (size, tokens, grown)


def test_ids_past_65535_are_kept_whole(small, monkeypatch, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" ".join(f"{i:x<60}" for i in (1, 69_999, 65_536, 2)))
    asked = Request(str(path), hold_out=0, text=TextAsked(words(70_000)))
    for _ in range(2):
        (tokens, _), targets = load_corpus(asked).train.take(torch.tensor([0]))
        assert tokens.tolist() == [1, 69_999, 65_536] and targets.tolist() == [69_999, 65_536, 2]
        streamed(monkeypatch)


def test_a_stream_predicts_every_token_but_its_first_across_documents_and_says_where_they_end(tmp_path):
    documents = ["abcd", "ef", "é", "hijklmn"]
    loaded = load_corpus(Request(documents, hold_out=0, text=TextAsked("characters", max_tokens=4, stream=True)))
    form = loaded.preparation.inputs
    tokens, offsets, targets = everything(loaded.train)
    assert tk.decode(form.tokenizer, [int(tokens[0]), *targets.tolist()]) == tk.END.join(documents)
    assert torch.equal(tokens[1:], targets[:-1]) and offsets.diff().tolist() == [4, 4, 4, 4]
    assert loaded.facts.notes == ("<|endoftext|> is a token more than the characters: it stands between documents",)
    apart = load_corpus(Request(documents, hold_out=0, text=TextAsked("characters", max_tokens=4)))
    assert everything(apart.train)[1].diff().tolist() == [3, 1, 4, 2] and apart.facts.notes == ()
    with pytest.raises(DataError, match=r"data\.tokenizer: the tokenizer has no token that ends a document; .*say data\.documents: apart"):
        load_corpus(Request(documents, hold_out=0, text=TextAsked(words(5), stream=True)))


@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_bytes_are_those_of_the_text_that_is_predicted(tokenizer):
    documents = ["été au soleil", "x", "你好 and more", "plain words here"]
    for stream in (False, True):
        loaded = load_corpus(Request(documents, hold_out=0, text=TextAsked(tokenizer, 256 + 1, 5, stream)))
        form = loaded.preparation.inputs.tokenizer
        first = [len(document[0].encode()) if tokenizer == "characters" else 1 for document in documents]
        if stream:
            expected = sum(len(document.encode()) for document in documents) - first[0]
        else:
            expected = sum(len(d.encode()) - n for d, n in zip(documents, first, strict=True))
        assert loaded.train.bytes == loaded.facts.text.bytes == expected, form


def test_faults_of_a_streamed_corpus_come_at_once_with_their_places(small, monkeypatch, tmp_path):
    lines = [json.dumps({"text": f"line {i} of the text"}) for i in range(40)]
    lines[11], lines[12], lines[30] = '{"text": broken}', "[1]", '{"text": "cut'
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    kept = tmp_path / "t.csv"
    kept.write_text("text,n\n" + "\n".join(f"words number {i},{i}" if i not in (9, 33) else "a,b,c" for i in range(40)))
    cut = tmp_path / "t.txt"
    cut.write_bytes(("line é\n" * 50).encode() + b"caf\xe9 \n" + b"more\n" * 50)
    nul = tmp_path / "n.txt"
    nul.write_bytes(b"line\n" * 30 + b"\0\n" * 100)
    for most in (2**20, 0):
        monkeypatch.setattr(language, "IN_MEMORY", most)
        with pytest.raises(DataError) as caught:
            load_corpus(Request(str(path)))
        assert [(f.file, f.line) for f in caught.value.faults] == [(str(path), 12), (str(path), 13), (str(path), 31)]
        assert "column 10 is not JSON" in caught.value.faults[0].what and "is list, not an object" in caught.value.faults[1].what
        with pytest.raises(DataError) as caught:
            load_corpus(Request(str(kept), columns=("text",)))
        assert [fault.line for fault in caught.value.faults] == [11, 35]
        with pytest.raises(DataError, match=r"t\.txt:51: byte 403 is not UTF-8; save it as UTF-8 \(it looks like latin-1\)"):
            load_corpus(Request(str(cut)))
        with pytest.raises(DataError, match=r"n\.txt:31: holds a NUL character"):
            load_corpus(Request(str(nul)))
        with pytest.raises(DataError, match=r"has no column 'story'.*the columns are n, text"):
            load_corpus(Request(write(tmp_path, "csv"), columns=("story",)))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(Request(str(tmp_path / "nothing")))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="too short"):
        load_corpus(Request(str(tmp_path / "blank"), hold_out=0, text=TextAsked("characters")))


def test_parts_of_a_table_are_the_table(small, tmp_path):
    from fromzero.data.table import read_table

    for kind in ("csv", "jsonl", "parquet"):
        path = Path(write(tmp_path, kind))
        parts, whole = list(read_parts(path)), read_table(path)
        assert len(parts) == {"csv": 9, "jsonl": 9, "parquet": 1}[kind]
        assert [cell for part in parts for cell in part.columns["text"]] == whole.columns["text"]
        if kind != "parquet":
            assert [line for part in parts for line in part.lines] == list(whole.lines)


def test_a_cache_that_cannot_be_written_is_named(small, monkeypatch, tmp_path):
    streamed(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\).*XDG_CACHE_HOME"):
        load_corpus(Request(write(tmp_path, "txt")))


def test_long_work_says_how_far_it_is(small, monkeypatch, tmp_path, capsys):
    streamed(monkeypatch)
    monkeypatch.setattr(corpus, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(corpus, "_SAY_SECONDS", 0.0)
    load_corpus(Request(write(tmp_path, "txt"), hold_out=0, text=TextAsked("bpe", 300)))
    said = capsys.readouterr().err
    for work in ("reading", "learning a tokenizer from", "tokens of"):
        assert f"{work} {tmp_path / 'corpus.txt'}: 0" in said and "of 0 million characters" in said


def test_a_tokenizer_is_learned_from_a_share_of_a_huge_corpus(small, monkeypatch):
    whole = load_corpus(Request(DOCUMENTS, hold_out=0, text=TextAsked("bpe", 400)))
    monkeypatch.setattr(corpus, "MOST_CHARACTERS_FOR_BPE", sum(map(len, DOCUMENTS)) // 3)
    some = load_corpus(Request(DOCUMENTS, hold_out=0, text=TextAsked("bpe", 400)))
    assert some.preparation.inputs.tokenizer != whole.preparation.inputs.tokenizer
    assert np.isclose(some.facts.text.tokens, whole.facts.text.tokens, rtol=0.1)
