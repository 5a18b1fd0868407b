"""Faults 21 to 38, one row each, as a person meets them: the command ends with 2 and one message that names the place, without a traceback."""

import io
import json
import os
import pickle
import stat
import struct
import time
import zipfile
import zlib

import numpy as np
import polars
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import fromzero as fz
from fromzero.data import Request, load
from fromzero.data.conversations import read_conversations
from fromzero.data.language import load_corpus
from fromzero.data.table import read_table
from fromzero.data.template import template_digest
from fromzero.data.tokens import byte_pairs
from fromzero.errors import DataError
from fromzero.weights import open_pretrained
from fromzero.weights.tensors import check_fit
from tests.conftest import fromzero

TABLE = "task: classify\nmodel: mlp\nmetrics: auto\nbatch: 4\nsteps: 2\ncertificate: off\n"
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def jsonl(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def rows(**changed):
    """Twenty sound rows; changed: those of other content, by number from 1, as r17=…"""
    made = [{"x": (i * 7 % 20) / 3, "text": f"this is text number {i}", "y": "ab"[i % 2]} for i in range(20)]
    return jsonl([changed.get(f"r{i}", row) for i, row in enumerate(made, 1)])


def npz(**arrays):
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def zipped(entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression) as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("marker",)


def png(width, height):
    """The header of one, which is all that is needed to be refused"""
    Image.new("1", (1, 1)).save(buffer := io.BytesIO(), "PNG")
    whole = buffer.getvalue()
    header = whole[12:16] + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def picture(shade=0):
    Image.new("L", (4, 4), shade).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


LINK = zipfile.ZipInfo("x.npy")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
PAIR = {"x": np.random.default_rng(0).random((8, 3), np.float32), "y": np.arange(8) % 2}
ODD = {"r3": '{"x": 1', "r5": "[1]", "r6": '{"x": 1, "x": 2}', "r8": '{"x": ' + "[" * 99 + "}", "r9": '{"x": ' + "9" * 5000 + "}"}
FAULTS = {  # row and fault → files, what the recipe says of its data, what is said
    "21 malformed JSON lines": ({"d.jsonl": rows(**ODD)[:-9]}, "d.jsonl", ["d.jsonl:3: column 8 is not JSON", "d.jsonl:5: is list, not an object",
        "d.jsonl:6: names 'x' twice", "d.jsonl:8: column 70 is nested", "d.jsonl:9: column 7 holds a number of thousands", "d.jsonl:20: column"]),
    "21 an array named jsonl": ({"d.jsonl": b'[\n{"x": 1}]'}, "d.jsonl", ["d.jsonl:1: is a JSON array, not one object a line; name it .json"]),
    "22 a renamed key": ({"d.jsonl": rows(r17={"xx": 1, "text": "t", "y": "a"})}, "d.jsonl", ["d.jsonl:17 x: has no 'x'", "is 'xx' the same?"]),
    "22 a word in a column of numbers": ({"d.jsonl": rows(r17={"x": "oops", "text": "t", "y": "a"})}, "{train: d.jsonl, input: x, hold_out: 0}",
        ["d.jsonl:17 x: 'oops' is not a number; nearly all of the column are", "data.missing: {x: category}"]),
    "22 a list in a column of text": ({"d.jsonl": rows(r17={"x": 1, "text": ["t"], "y": "a"})}, "d.jsonl", ["d.jsonl:17 text: is list, in other"]),
    "23 another encoding": ({"d.csv": "x,y\n1,a\n2,价格\n".encode("gbk")}, "d.csv", ["d.csv:3: byte 10 is not UTF-8", "looks like gb18030"]),
    "24 a ragged table": ({"d.csv": b'x,y\n"1\n",a\n2,b,c\n'}, "d.csv", ["d.csv:4: row 2 has 3 cells, the header has 2", "needs quotes"]),
    "25 an empty file": ({"d.csv": b""}, "d.csv", ["d.csv: is empty (0 bytes)", "complete?"]),
    "25 no row left by the filters": ({"d.csv": b"x,z,y\n,1,a\n?,2,b\n"}, "{train: d.csv, input: [x, z], missing: {x: drop}}", ["no row is left; 2 rows"]),
    "25 an empty class folder": ({"p/cat/a.png": picture(), "p/dog/": b""}, "p", ["p/dog: class folder 'dog' has no image"]),
    "26 a label that training has not": ({"d.csv": b"x,y\n1,a\n5,b\n3,a\n9,b\n", "v.csv": b"x,y\n1,a\n2,B\n"}, "{train: d.csv, validation: v.csv}",
        ["v.csv:3: label 'B' is none of the 2 classes in training", "did you mean 'b'?"]),
    "27 an infinite cell": ({"d.csv": b"x,z,y\n1,3,a\ninf,4,b\n2,5,a\n"}, "{train: d.csv, missing: {x: error}, hold_out: 0}", ["d.csv:3 x: is inf"]),
    "28 a broken image": ({"p/cat/a.png": picture(), "p/dog/b.png": picture(1)[:-20], "p/dog/c.png": b"%PDF-1.4"}, "p",
        ["p/dog/c.png: is no image", "p/dog/b.png: is broken", "2 of 3 images are broken; data.skip_broken allows 0"]),
    "29 a huge image": ({"p/cat/a.png": png(20_000, 20_000), "p/dog/b.png": picture()}, "p", ["p/cat/a.png: is larger than any photograph"]),
    "32 a pipe": ({"p/cat/a.png": picture(), "p/cat/b.png": "pipe", "p/dog/c.png": "pipe"}, "p", ["p/dog: class folder 'dog' has no image"]),
    "34 a pickle in npz": ({"d.npz": npz(x=np.array([Bomb()], dtype=object), y=np.arange(1))}, "d.npz", ["d.npz: holds Python objects (a pickle)"]),
    "34 a pickle named csv": ({"d.csv": pickle.dumps(Bomb())}, "d.csv", ["d.csv:1: byte 0 is not UTF-8"]),
    "35 an archive that leads outside": ({"d.npz": zipped([("../x.npy", b"x")])}, "d.npz", ["d.npz: its entry '../x.npy' leads outside"]),
    "35 a link in an archive": ({"d.npz": zipped([(LINK, b"/etc/passwd")])}, "d.npz", ["its entry 'x.npy' is a link or a device"]),
    "35 a bomb": ({"d.npz": zipped([("x.npy", b"\0" * 50 * 2**20)], zipfile.ZIP_DEFLATED)}, "d.npz", ["would grow from", "to 52428800 bytes"]),
}  # fmt: skip
MODELS = {
    "34 code in weights": ({"w.pt": "bomb"}, "w.pt", ["w.pt: its pickle asks for posix.mkdir", "it was not tried"]),
    "36 a header of 2^63 bytes": ({"w.safetensors": struct.pack("<Q", 2**63) + b"{}"}, "w.safetensors", ["promises a header of 9,223,372"]),
    "36 counts of 2^63": ({"w.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)}, "w.gguf", ["w.gguf: promises 9,223,372", "byte 16 of 24"]),
    "37 a folder that asks for code": ({"m/config.json": b'{"model_type": "own", "auto_map": {"AutoModel": "modeling.Net"}}',
        "m/modeling.py": b"import os; os.mkdir('marker')", "m/model.safetensors": save({"w": torch.ones(2)})}, "m",
        ["model_type 'own'", "config.json asks for code of its own (auto_map", "which was not run"]),
}  # fmt: skip


def lay(root, files):
    for name, data in files.items():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if data == "pipe":
            os.mkfifo(path)
        elif data == "bomb":
            torch.save({"w": Bomb()}, path)
        elif not name.endswith("/"):
            path.write_bytes(data)


@pytest.mark.parametrize("fault", [*FAULTS, *MODELS])
def test_a_fault_ends_the_command_with_2_and_one_message_that_names_the_place(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files, source, said = {**FAULTS, **MODELS}[fault]
    lay(tmp_path, files)
    model = fault in MODELS
    text = f"task: classify\nmodel: {source}\ndata: d.csv\n" if model else f"{TABLE}data: {source}\n"
    (tmp_path / "r.yaml").write_text(text)
    if model:
        (tmp_path / "d.csv").write_text("x,z,y\n1,2,a\n2,4,b\n5,1,a\n7,3,b\n")
    done = fromzero("plan", "r.yaml", "--json", cwd=tmp_path)
    assert done.returncode == json.loads(done.stdout)["code"] == 2 and "Traceback" not in done.stderr
    for piece in said:
        assert piece in done.stderr, done.stderr
    assert not (tmp_path / "marker").exists()


def test_every_row_from_21_to_37_but_the_measured_ones_has_a_command_that_meets_it():
    met = {int(fault[:2]) for fault in (*FAULTS, *MODELS)}
    assert met == {*range(21, 38)} - {30, 31, 33}  # tests/use/test_added_tokens.py, below, tests/faults/test_recipe_keys.py


# 21


def test_as_many_bad_rows_as_allowed_are_left_out_and_listed_in_the_plan(tmp_path):
    lay(tmp_path, {"d.jsonl": rows(**ODD)})
    source = str(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match=r"5 rows cannot be read; data.skip_broken allows 4"):
        load(Request(source, skip_broken=4))
    facts = load(Request(source, skip_broken=5, hold_out=0.0)).facts
    assert facts.train == 15 and [note.split(": ")[:2][1][-2:] for note in facts.notes] == [":3", ":5", ":6", ":8", ":9"]
    planned = fz.plan({"task": "classify", "model": "mlp", "data": {"train": source, "skip_broken": 5}}, probe=False)
    assert "d.jsonl:3: column 8 is not JSON" in str(planned.plan)
    lay(tmp_path, {"d.jsonl": jsonl(["null", "[1]"])})
    with pytest.raises(DataError, match="has no rows"):
        load(Request(source, skip_broken=9))


def test_bad_rows_of_csv_conversations_and_validation_are_left_out_and_listed_too(tmp_path):
    lay(tmp_path, {"d.csv": b"x,z,y\n1,2,a\n2,b\n3,1,a\n4,5,b\n5,9,b\n", "v.csv": b"x,z,y\n8,2,a\n2\n9,1,b\n"})
    facts = load(Request(tmp_path / "d.csv", validation=tmp_path / "v.csv", skip_broken=1)).facts
    assert (facts.train, facts.validation) == (4, 2)
    assert "d.csv:3: row 2 has 2 cells" in facts.notes[0] and facts.notes[1].startswith("validation: broken, left out: ")
    lay(tmp_path, {"t.jsonl": jsonl([TALK, "{", {"messages": 3}, TALK])})
    read = read_conversations(tmp_path / "t.jsonl", None, (tmp_path,), skip=2)
    assert len(read.items) == 2 and [fault.line for fault in read.left_out] == [2, 3]
    with pytest.raises(DataError, match=r"2 rows cannot be read; data.skip_broken allows 1"):
        read_conversations(tmp_path / "t.jsonl", None, (tmp_path,), skip=1)


def test_a_wrong_header_is_no_row_that_may_be_left_out(tmp_path):
    lay(tmp_path, {"d.csv": b"x,x,y\n1,2,a\n2,3,b\n"})
    with pytest.raises(DataError, match="names a column twice"):
        read_table(tmp_path / "d.csv", skip=9)


def test_a_text_to_be_gone_on_with_takes_no_count_of_broken_rows(tmp_path):
    with pytest.raises(fz.RecipeError, match="a text to be gone on with is read whole"):
        fz.plan({"task": "language", "model": "lstm", "data": {"train": "t.txt", "skip_broken": 1}})


def test_quotes_that_do_not_end_before_many_brackets_take_no_time(tmp_path):
    lay(tmp_path, {"d.jsonl": b'{"x": "' + b'\\"' * 20_000 + b"[" * 100 + b'\n{"x": 1}\n'})
    started = time.monotonic()
    with pytest.raises(DataError, match=r"d.jsonl:1: column 7 is not JSON"):
        read_table(tmp_path / "d.jsonl")
    assert time.monotonic() - started < 3  # each quote looked for from the one before: 9 s


def test_a_tokenizer_is_learned_soon_from_a_text_that_nothing_breaks():
    started = time.monotonic()
    assert byte_pairs(["9" * 60_000], 8000)
    assert time.monotonic() - started < 5  # as one word: 11 s, and four times that for each doubling
    assert byte_pairs([text := "some words, and more of them " * 50], 300) == byte_pairs(text.splitlines(), 300)


# 22


def test_keys_that_only_look_alike_and_stand_together_are_columns(tmp_path):
    lay(tmp_path, {"d.jsonl": jsonl([{"x1": 1, "x12": i, "y": "a"} if i % 3 else {"x1": i, "y": "b"} for i in range(9)])})
    assert list(read_table(tmp_path / "d.jsonl").columns) == ["x1", "y", "x12"]


def test_a_number_where_text_was_is_named_by_its_line(tmp_path):
    lay(tmp_path, {"d.jsonl": rows(r17={"x": 1, "text": 5, "y": "a"}, r18={"x": 1, "text": " ", "y": "a"})})
    with pytest.raises(DataError) as caught:
        load(Request(tmp_path / "d.jsonl", columns=("text",), reads_text=True))
    assert [fault.line for fault in caught.value.faults] == [17, 18]
    assert "column 'text' is int 5, in other rows text" in str(caught.value) and "column 'text' is empty" in str(caught.value)


def test_a_column_with_one_slip_is_set_aside_with_its_line_and_read_as_names_where_asked(tmp_path):
    lay(
        tmp_path,
        {"d.csv": ("x,z,y\n" + "".join(f"{i * 1.5},{i % 7},{'ab'[i % 2]}\n" for i in range(40))).replace("\n24.0,", "\n24.O,").encode()},
    )
    facts = load(Request(tmp_path / "d.csv")).facts
    assert facts.set_aside["x"].startswith("holds numbers, but '24.O' at ") and facts.set_aside["x"].endswith("d.csv:18")
    assert "x" in load(Request(tmp_path / "d.csv", columns=("x", "z"), missing={"x": "category"})).facts.columns


# 23


def test_an_override_or_a_name_that_is_not_utf8_is_a_message_that_can_be_printed(tmp_path):
    lay(tmp_path, {"r.yaml": f"{TABLE}data: d.csv\n".encode()})
    done = fromzero("plan", "r.yaml", "data.train=" + os.fsdecode(b"\xff.csv"), cwd=tmp_path)
    assert done.returncode == 2 and "command line data.train: is not UTF-8 text" in done.stderr
    place = os.fsencode(tmp_path) + b"/\xff.csv"
    with open(place, "wb") as file:
        file.write(b"x,y\n1\n")
    with pytest.raises(DataError) as caught:
        load(Request(os.fsdecode(place)))
    assert str(caught.value).encode() and "has 1 cells" in str(caught.value)


# 26


def test_a_label_out_of_range_is_refused_with_all_counts_and_where_it_first_stands():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    y[16] = 99
    with pytest.raises(
        fz.PlanRefused, match=r"100 classes, the model 3 outputs.*\(0: \d+, 1: \d+, 2.*'99' stands 1 times, first at .*example 16"
    ):
        fz.train(model=torch.nn.Linear(4, 3), data=(x, y), quiet=True)


# 27


def test_the_columns_of_a_prediction_are_found_by_name_and_a_new_word_is_none_of_the_known(tmp_path):
    lay(
        tmp_path,
        {"d.csv": ("x,word,y\n" + "".join(f"{i},{'pq'[i % 3 == 0]},{'ab'[i % 2]}\n" for i in (3, 1, 7, 5, 2, 9, 4, 8, 6, 0))).encode()},
    )
    form = load(Request(tmp_path / "d.csv", hold_out=0.0)).preparation.inputs
    lay(tmp_path, {"a.csv": b"x,word\n3,q\n", "b.csv": b"word,more,x\nq,1,3\n", "c.csv": b"word,x\nnew,3\n", "e.csv": b"word,xs\nq,3\n"})
    first, other, new = (form.apply(read_table(tmp_path / f"{name}.csv"))[0].tolist() for name in "abc")
    assert first == other and sum(first[1:]) == 1 and sum(new[1:]) == 0 and "unseen → none of them" in str(form.columns[1])
    with pytest.raises(DataError, match=r"has no column 'x', which the model was trained with; is 'xs' the same\?"):
        form.apply(read_table(tmp_path / "e.csv"))


# 31


def test_repeats_and_texts_with_two_labels_are_counted_and_never_split(tmp_path):
    texts = [f"this is review number {i} of many" for i in range(100)]
    lines = [(text, i % 2) for i, text in enumerate(texts)] + [
        (f"{text} ", i % 2 if i >= 47 else 1 - i % 2) for i, text in enumerate(texts)
    ]
    lay(tmp_path, {"d.tsv": ("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in lines)).encode()})
    planned = fz.plan({"task": "classify", "model": "lstm", "data": {"train": str(tmp_path / "d.tsv"), "hold_out": 0.2}}, probe=False)
    data, said = planned.plan.facts.data, {finding.code: str(finding) for finding in planned.plan.findings}
    assert (data.repeats, data.conflicting, data.shared) == (100, 47, 0) and data.train + data.validation == 200
    assert "100 rows repeat an earlier one" in said["repeats"] and "47 inputs carry more than one label" in said["conflicting-labels"]


# 32


def test_of_a_folder_of_texts_pipes_hidden_files_and_links_to_nothing_are_left_out(tmp_path):
    lay(
        tmp_path,
        {"t/a.txt": b"some text " * 50, "t/deep/b.txt": b"more text " * 50, "t/._a.txt": b"\0\0", "t/c.txt": "pipe", "t/d.txt/": b""},
    )
    os.symlink("nowhere", tmp_path / "t" / "e.txt")
    os.symlink("..", tmp_path / "t" / "deep" / "loop")
    assert load_corpus(Request(str(tmp_path / "t"), hold_out=0.0)).facts.train == 2
    for name in ("t/c.txt", "t/d.txt"):
        with pytest.raises(DataError, match=r"is no file but a folder, a pipe or a device|holds no text"):
            load_corpus(Request(str(tmp_path / name)))


@pytest.mark.parametrize("key", ["data.tokenizer", "data.template"])
def test_a_pipe_in_place_of_any_other_file_is_not_waited_for(tmp_path, key):
    lay(tmp_path, {"p": "pipe", "t.jsonl": jsonl([TALK])})
    values = {"task": "chat" if key == "data.template" else "language", "model": "decoder", "data": {"train": str(tmp_path / "t.jsonl")}}
    values["data"] |= {key.split(".")[1]: str(tmp_path / "p")}
    with pytest.raises(DataError, match="a pipe or a device"):
        fz.plan(values, probe=False)


# 34


def test_a_zip_behind_a_pickle_does_not_make_the_pickle_a_torch_file(tmp_path):
    torch.save({"x": torch.ones(2), "y": torch.ones(2)}, buffer := io.BytesIO())
    lay(tmp_path, {"d.pt": pickle.dumps(Bomb(), 2) + buffer.getvalue()})
    assert zipfile.is_zipfile(tmp_path / "d.pt")
    with pytest.raises(fz.SourceError, match="is an old torch file or a bare pickle"):
        load(Request(tmp_path / "d.pt"))


def test_a_panic_of_the_library_that_reads_parquet_is_a_message(tmp_path, monkeypatch):
    def panic(_):
        raise polars.exceptions.PanicException("assertion failed: offset + length <= self.length")

    lay(tmp_path, {"d.parquet": b"PAR1"})
    monkeypatch.setattr(polars, "scan_parquet", panic)
    with pytest.raises(DataError, match=r"is not a whole parquet file \(assertion failed"):
        read_table(tmp_path / "d.parquet")


@pytest.mark.parametrize("protocol", [2, 3])
def test_what_the_pickle_of_data_asks_for_is_named_before_torch_reads_it(tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    torch.save({"x": Bomb(), "y": torch.ones(2)}, tmp_path / "d.pt", pickle_protocol=protocol)
    with pytest.raises(fz.SourceError, match=r"its pickle asks for posix.mkdir; that would run code; it was not tried"):
        load(Request(tmp_path / "d.pt"))


def test_data_of_a_terabyte_made_of_four_bytes_is_refused(tmp_path):
    torch.save({"x": torch.ones(1).expand(2**38), "y": torch.ones(1).expand(2**38)}, tmp_path / "d.pt")
    with pytest.raises(fz.SourceError, match=r"its 'x' of shape \(274877906944,\) would grow to 1,099,511,627,776 bytes"):
        load(Request(tmp_path / "d.pt"))


def test_examples_without_a_number_are_refused(tmp_path):
    lay(tmp_path, {"d.npz": npz(x=np.ones((4, 0), np.float32), y=np.arange(4) % 2)})
    with pytest.raises(DataError, match=r"its inputs have shape \(4, 0\): an example holds no number"):
        load(Request(tmp_path / "d.npz"))


# 36


def test_missing_and_extra_tensors_are_listed_with_the_nearest_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    lay(tmp_path, {"w.safetensors": save({"0.wieght": torch.ones(2, 3), "0.bias": torch.ones(2)})})
    with pytest.raises(fz.SourceError, match=r"missing 0.weight; extra 0.wieght; near: 0.weight ~ 0.wieght"):
        check_fit(model.state_dict(), open_pretrained(str(tmp_path / "w.safetensors")).tensors, file="w.safetensors")


# 38


def test_a_hostile_template_ends_the_command_with_2_and_the_hash_of_a_sound_one_stands_in_the_plan(tmp_path):
    lay(tmp_path, {"t.jsonl": jsonl([TALK] * 8), "bad.jinja": b"{% for a in range(10 ** 9) %}{% set x = cycler.__init__ %}{% endfor %}"})
    (tmp_path / "tokenizer.json").write_text(byte_pairs(["some text"], 300))
    (tmp_path / "good.jinja").write_text(sound := "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}")
    values = {"task": "chat", "model": {"from": "decoder", "width": 16, "layers": 1, "heads": 2, "context": 64}}
    values["data"] = {
        "train": str(tmp_path / "t.jsonl"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "template": str(tmp_path / "bad.jinja"),
    }
    with pytest.raises(DataError, match=r"data.template: the chat template") as caught:
        fz.plan(values, probe=False)
    assert caught.value.code == 2
    values["data"]["template"] = str(tmp_path / "good.jinja")
    assert template_digest(sound)[:12] in str(fz.plan(values, probe=False).plan)
