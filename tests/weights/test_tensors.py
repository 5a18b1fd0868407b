"""safetensors in and out: what a header promises is checked, tensors are read when asked for, shards agree with their index."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from fromzero.errors import SourceError
from fromzero.weights import check_fit, read_tensors, write_tensors
from fromzero.weights.tensors import Tensors, open_safetensors, open_shards, read_json

KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
TENSORS = {f"t{i}": (torch.arange(12) % 2).reshape(3, 4).to(kind) for i, kind in enumerate(KINDS)} | {
    "none": torch.zeros(0, 5),
    "one": torch.tensor(3.0),
}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path, *said, read=open_safetensors):
    with pytest.raises(SourceError) as caught:
        read(path)
    for piece in (path.name, *said):
        assert piece in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_every_kind_of_tensor_is_read_back_bit_for_bit(path):
    save_file(TENSORS, path)
    found = open_safetensors(path)
    assert found.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()} and len(found) == 12
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_only_what_is_asked_for_is_read():
    read = []

    def reader(name):
        read.append(name)
        return torch.ones(2)

    found = Tensors("f", {"a": (2,), "b": (2,)}, reader)
    assert "a" in found and "c" not in found and list(found) == ["a", "b"] and len(found) == 2 and found.shapes["b"] == (2,)
    assert found.get("c") is None and read == []
    assert found["b"].sum() == 2 and read == ["b"]
    with pytest.raises(KeyError):
        found["c"]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_nan_or_infinity_anywhere_is_named_when_the_tensor_is_read(path, kind, value):
    for at in range(67):
        tensor = torch.ones(67, dtype=kind)
        tensor[at] = value
        with pytest.raises(SourceError, match=r"f w: 1 of its 67 values are NaN or infinite; fetch it again"):
            Tensors("f", {"w": (67,)}, lambda name, tensor=tensor: tensor)["w"]
    save_file({"fine": torch.ones(3), "w": tensor}, path)
    found = open_safetensors(path)
    assert found["fine"].sum() == 3
    with pytest.raises(SourceError, match=r"a.safetensors w: 1 of its 67"):
        found["w"]


GOOD = packed({"w": entry()}, b"\0" * 4)
DAMAGED = {
    "empty": (b"", "byte 0 promises a header of 0 bytes, the file has 0"),
    "cut in its length": (GOOD[:5], "the file has 5"),
    "cut in its header": (GOOD[:20], "the file has 20"),
    "cut in its data": (GOOD[:-1], "lies in bytes 0 to 4 of 3"),
    "giant header": (struct.pack("<Q", 2**63) + b"{}", "promises a header of 9,223,372,036,854,775,808 bytes"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0", "is no whole safetensors file"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "no JSON": (packed(b"{nonsense"), "header that is no JSON object, bytes 8 to 17"),
    "a list": (packed([]), "header that is no JSON object"),
    "deep": (packed(b"[" * 100_000), "header that is no JSON object"),
    "a long number": (packed(b'{"w":' + b"9" * 5000 + b"}"), "header that is no JSON object"),
    "a name twice": (packed(b'{"w":%s,"w":%s}' % (2 * (json.dumps(entry()).encode(),)), b"\0" * 4), "a name stands twice"),
    "no description": (packed({"w": 3}), "a.safetensors w: its tensor is not described"),
    "an extra key": (packed({"w": {**entry(), "x": 1}}, b"\0" * 4), "is not described"),
    "an unknown kind": (packed({"w": entry(dtype="F4")}, b"\0" * 4), "is not described, or of a kind that is not read"),
    "a list as kind": (packed({"w": entry(dtype=["F32"])}, b"\0" * 4), "is not described, or of a kind that is not read"),
    "a negative size": (packed({"w": entry(shape=(-1,))}, b"\0" * 4), "shape or offsets that are no counts"),
    "a float size": (packed({"w": entry(shape=(1.0,))}, b"\0" * 4), "shape or offsets that are no counts"),
    "a true size": (packed({"w": entry(shape=(True,))}, b"\0" * 4), "shape or offsets that are no counts"),
    "2^63": (packed({"w": entry(shape=(2**63,))}, b"\0" * 4), "shape or offsets that are no counts"),
    "2^62 four times": (packed({"w": entry(shape=(2**62,) * 4)}, b"\0" * 4), "needs"),
    "many dimensions": (packed({"w": entry(shape=(1,) * 17)}, b"\0" * 4), "shape or offsets that are no counts"),
    "three offsets": (packed({"w": {**entry(), "data_offsets": [0, 4, 4]}}, b"\0" * 4), "is given bytes [0, 4, 4]"),
    "backwards": (packed({"w": {**entry(shape=(0,)), "data_offsets": [4, 0]}}, b"\0" * 4), "is given bytes [4, 0]"),
    "too small a place": (packed({"w": entry(shape=(2,))}, b"\0" * 4), "needs 8 bytes for [2], and is given bytes [0, 4]"),
    "overlap": (packed({"v": entry(), "w": entry(2, 6)}, b"\0" * 6), "w: lies in bytes 2 to 6 of 6, where 4 comes next"),
    "the same place": (packed({"v": entry(), "w": entry()}, b"\0" * 4), "w: lies in bytes 0 to 4 of 4, where 4 comes next"),
    "a hole": (packed({"v": entry(), "w": entry(8, 12)}, b"\0" * 12), "w: lies in bytes 8 to 12 of 12, where 4 comes next"),
    "outside": (packed({"w": entry(0, 8, (2,))}, b"\0" * 4), "w: lies in bytes 0 to 8 of 4"),
    "bytes at the end": (packed({"w": entry()}, b"\0" * 7), "has 3 bytes that are of no tensor, from byte"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_header_that_promises_what_is_not_there_is_refused_before_any_parser_sees_it(path, what, monkeypatch):
    data, said = DAMAGED[what]
    path.write_bytes(data)
    monkeypatch.setattr("fromzero.weights.tensors.safe_open", None)
    monkeypatch.setattr("fromzero.weights.tensors.load", None)
    refused(path, said)
    refused(path, said, read=read_tensors)


def test_there_are_thirty_ways_of_damage_and_the_undamaged_file_is_read(path):
    assert len(DAMAGED) == 30
    path.write_bytes(GOOD)
    assert open_safetensors(path)["w"].tolist() == [0] and read_tensors(path)["w"].tolist() == [0]


def test_a_header_longer_than_the_limit_is_refused_without_being_read(path, monkeypatch):
    monkeypatch.setattr("fromzero.weights.tensors.MOST_HEADER", 10)
    path.write_bytes(GOOD)
    refused(path, "promises a header of")


# ------------------------------------------------------------------------------------------- several files


@pytest.fixture
def shards(tmp_path):
    """Two shards and their index, and a way of writing the index otherwise."""
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "s1.safetensors")
    save_file({"c": torch.ones(1, 4)}, tmp_path / "s2.safetensors")
    where = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"

    def write(**changes):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {k: v for k, v in (where | changes).items() if v is not None}}))
        return index

    return write


def test_shards_are_read_as_one(shards):
    found = open_shards(shards())
    assert found.shapes == {"a": (2,), "b": (3,), "c": (1, 4)}
    assert found["c"].tolist() == [[1] * 4] and "b" in found


@pytest.mark.parametrize(
    "name", ["../s1.safetensors", "/etc/passwd", "x/../../s1.safetensors", "..", ".", "", "no.safetensors", "..\\s1.safetensors"]
)
def test_a_shard_outside_the_folder_or_not_there_is_named(shards, name):
    refused(shards(b=name), repr(name), "is no file in its own folder", read=open_shards)


@pytest.mark.parametrize(("changes", "name"), [({"b": "s2.safetensors"}, "b"), ({"d": "s1.safetensors"}, "d"), ({"b": None}, "b")])
def test_an_index_that_does_not_agree_with_its_shards_is_refused(shards, changes, name):
    refused(shards(**changes), f"does not agree with its files on {name}", "each tensor stands in one file", read=open_shards)


def test_a_tensor_in_two_shards_is_refused(shards, tmp_path):
    save_file({"c": torch.ones(1, 4), "a": torch.ones(2)}, tmp_path / "s2.safetensors")
    refused(shards(), "does not agree with its files on a", read=open_shards)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", "[" * 100_000, "\xff"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    refused(path, read=open_shards)


def test_json_is_limited_in_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    assert read_json(tmp_path / "config.json") == {}
    monkeypatch.setattr("fromzero.weights.tensors.MOST_JSON", 50)
    refused(tmp_path / "config.json", "larger than 50 bytes", read=read_json)


# ------------------------------------------------------------------------------------------- our own files


def test_what_is_written_is_read_by_the_digest_it_was_given(path):
    digest = write_tensors(path, TENSORS, {"format": "pt"})
    assert all(torch.equal(tensor, read_tensors(path, sha256=digest)[name]) for name, tensor in TENSORS.items())
    assert load_file(path).keys() == TENSORS.keys() and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(SourceError, match="has changed since it was written"):
        read_tensors(path, sha256="0" * 64)
    with pytest.raises(SourceError, match="cannot be read"):
        read_tensors(path.with_name("no"))


def test_tied_and_strided_tensors_are_written_each_as_it_looks(path):
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors(path, {"a": base, "b": base, "turned": base.T, "row": base[1]})
    found = read_tensors(path)
    assert torch.equal(found["a"], found["b"]) and torch.equal(found["turned"], base.T) and found["row"].tolist() == [3, 4, 5]


def test_a_misfit_lists_missing_extra_and_other_shapes_with_the_nearest_names():
    wanted = {"head.weight": torch.ones(2), "body": torch.ones(3)}
    check_fit(wanted, dict(wanted), file="f")
    with pytest.raises(SourceError) as caught:
        check_fit(wanted, {"head.weigth": torch.ones(2), "body": torch.ones(4)}, file="f")
    for piece in ("f: ", "missing head.weight", "extra head.weigth", "body is (4,), not (3,)", "near: head.weight ~ head.weigth"):
        assert piece in str(caught.value)


def test_saved_bytes_that_our_checks_pass_are_what_the_library_writes():
    from io import BytesIO

    from fromzero.weights.tensors import read_header

    data = save(TENSORS, metadata={"format": "pt"})
    assert read_header(BytesIO(data), len(data), "f") == {name: tuple(t.shape) for name, t in TENSORS.items()}
