"""The GGUF container and its quantised blocks: against the gguf package, which wrote the files."""

import struct

import gguf
import numpy as np
import pytest
import torch

from fromzero.errors import SourceError
from fromzero.weights.blocks import KINDS, dequantise
from fromzero.weights.gguf import open_gguf


@pytest.mark.parametrize("number", KINDS)
def test_blocks_of_random_bytes_have_the_reference_values_to_the_last_bit(number):
    assert len(KINDS) == 11
    name, values, width, _ = KINDS[number]
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (values, width))
    raw = np.random.default_rng(number).integers(0, 256, (500, width), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random halves are NaN and infinite too
        theirs = np.ascontiguousarray(gguf.quants.dequantize(raw.reshape(1, -1), kind)).reshape(-1)
    ours = dequantise(torch.from_numpy(raw.copy()).reshape(-1), number).float().numpy()
    assert ours.shape == (500 * values,)
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert (same | (np.isnan(ours) & np.isnan(theirs))).all() and same.mean() > 0.5


@pytest.mark.parametrize("number", [2, 3, 6, 7, 8])
def test_quantising_and_reading_back_comes_close(number):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType(number)
    raw = torch.from_numpy(gguf.quants.quantize(values, kind).copy()).reshape(-1)
    assert np.abs(dequantise(raw, number).reshape(4, 64).numpy() - values).max() < 0.35


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.gguf"


def make(path, *, alignment=None, tensors=True):
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in [
        ("uint8", 200),
        ("int8", -3),
        ("uint16", 60000),
        ("int16", -300),
        ("uint32", 2**32 - 1),
        ("int32", -5),
        ("uint64", 2**63),
        ("int64", -(2**40)),
    ]:
        getattr(writer, f"add_{kind}")(f"n.{kind}", value)
    writer.add_float32("n.f32", 1e-5)
    writer.add_float64("n.f64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("n.text", "é你🙂")
    writer.add_array("n.texts", ["a", "", "ß"])
    writer.add_array("n.floats", [0.5, -2.0])
    writer.add_array("n.ints", [1, -1])
    if tensors:
        writer.add_tensor("odd", np.arange(3, dtype=np.float32))
        writer.add_tensor("half", np.ones((2, 3), np.float16))
        writer.add_tensor(
            "packed",
            gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_values_of_every_kind_and_tensors_are_read(path, alignment):
    meta, tensors = open_gguf(make(path, alignment=alignment))
    assert {key: value for key, value in meta.items() if key.startswith("n.")} == {
        "n.uint8": 200, "n.int8": -3, "n.uint16": 60000, "n.int16": -300, "n.uint32": 2**32 - 1, "n.int32": -5, "n.uint64": 2**63, "n.int64": -(2**40),
        "n.f32": 1e-5, "n.f64": 0.1, "n.bool": True, "n.text": "é你🙂", "n.texts": ["a", "", "ß"], "n.floats": [0.5, -2.0], "n.ints": [1, -1],
    }  # fmt: skip
    assert tensors.shapes == {"odd": (3,), "half": (2, 3), "packed": (3, 64)}
    assert tensors["odd"].tolist() == [0, 1, 2] and tensors["half"].dtype == torch.float16
    assert torch.allclose(tensors["packed"], torch.ones(3, 64), atol=0.01)
    tensors["odd"].add_(1)
    assert tensors["odd"].tolist() == [0, 1, 2]  # what is read is the reader's own


# ------------------------------------------------------------------------------------------- hostile files


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def number(key, value, form="I", kind=4):
    return text(key) + struct.pack(f"<I{form}", kind, value)


def tensor(name, shape, kind=0, offset=0, dims=None):
    dims = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dims, *shape, kind, offset)


def packed(entries=(), tensors=(), data=b"\0" * 64, version=3, counts=None):
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE = {
    "2^60 entries in 49 bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + b"\0" * 25, "promises 1,152,921,504,606,846,976 entries of metadata"),
    "2^60 tensors": (packed(counts=(2**60, 0)), "promises 1,152,921,504,606,846,976 tensors"),
    "empty": (b"", "cannot be read"),
    "three bytes": (b"GGU", "ends too early: 4 bytes"),
    "another name": (b"GGML" + b"\0" * 60, "is no GGUF file of version 2 or 3"),
    "version 1": (packed(version=1), "is no GGUF file of version 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is no GGUF file of version 2 or 3, little-endian"),
    "cut": (packed()[:10], "ends too early: 8 bytes"),
    "a key of 2^62 bytes": (packed([struct.pack("<Q", 2**62) + b"\0" * 8]), "promises 4,611,686,018,427,387,904 bytes of text"),
    "a text of 2^62 bytes": (packed([text("k") + struct.pack("<IQ", 8, 2**62)]), "promises 4,611,686,018,427,387,904 bytes of text"),
    "a list of 2^62 numbers": (packed([text("k") + struct.pack("<IIQ", 9, 5, 2**62)]), "promises 4,611,686,018,427,387,904 numbers in a list"),
    "a list of 2^62 texts": (packed([text("k") + struct.pack("<IIQ", 9, 8, 2**62)]), "promises 4,611,686,018,427,387,904 texts in a list"),
    "lists in lists": (packed([text("k") + struct.pack("<IIQ", 9, 9, 1) * 5]), "a kind that is not read (9, 9)"),
    "an unknown kind": (packed([text("k") + struct.pack("<IQ", 77, 0)]), "a kind that is not read (77, 77)"),
    "a key twice": (packed([number("k", 1), number("k", 2)]), "has the key 'k' twice"),
    "no UTF-8": (packed([text(b"\xff\xfe") + struct.pack("<II", 4, 1)]), "a text that is no UTF-8"),
    "alignment 0": (packed([number("general.alignment", 0)]), "general.alignment: has an alignment that is no power of two"),
    "alignment 48": (packed([number("general.alignment", 48)]), "no power of two"),
    "alignment 2^30": (packed([number("general.alignment", 2**30)]), "no power of two up to 65,536"),
    "alignment 32.0": (packed([number("general.alignment", 32.0, "f", 6)]), "no power of two"),
    "alignment in words": (packed([text("general.alignment") + struct.pack("<I", 8) + text("32")]), "no power of two"),
    "a tensor twice": (packed(tensors=[tensor("t", (4,)), tensor("t", (4,), offset=32)]), "t: stands twice"),
    "no dimensions": (packed(tensors=[tensor("t", ())]), "t: has 0 dimensions"),
    "2^31 dimensions": (packed(tensors=[tensor("t", (4,), dims=2**31)]), "t: has 2147483648 dimensions"),
    "no size": (packed(tensors=[tensor("t", (0,))]), "t: cannot have shape (0,)"),
    "2^63 values": (packed(tensors=[tensor("t", (2**62, 2))]), "t: cannot have shape (2, 4611686018427387904)"),
    "2^64 and more": (packed(tensors=[tensor("t", (2**63,) * 4)]), "t: cannot have shape"),
    "a broken block": (packed(tensors=[tensor("t", (33,), kind=2)]), "t: cannot have shape (33,) as Q4_0"),
    "an odd offset": (packed(tensors=[tensor("t", (4,), offset=3)]), "t: cannot have shape (4,) as F32 at offset 3"),
    "an offset of 2^62": (packed(tensors=[tensor("t", (4,), offset=2**62)]), "t: lies in bytes"),
    "outside": (packed(tensors=[tensor("t", (17,))]), "t: lies in bytes 64 to 132, outside or over another tensor"),
    "overlap": (packed(tensors=[tensor("t", (16,)), tensor("u", (4,), offset=32)]), "u: lies in bytes"),
    "an unknown quantisation": (packed(tensors=[tensor("t", (256,), kind=10)]), "t: is of ggml's kind 10, which is not read; read are F32, F16, Q4_0"),
    "a cut description": (packed(tensors=[tensor("t", (4,))[:-9]], data=b"", counts=(1, 0))[:48], "ends too early"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused_with_the_byte(path, what):
    assert len(HOSTILE) == 34
    data, said = HOSTILE[what]
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_gguf(path)
    assert "m.gguf" in str(caught.value) and said in str(caught.value)


def test_the_harmless_ones_of_these_are_read(path):
    path.write_bytes(packed([number("k", 7)], [tensor("t", (4, 4)), tensor("u", (32,), kind=8, offset=64)], b"\0" * 128))
    meta, tensors = open_gguf(path)
    assert meta == {"k": 7} and tensors["t"].sum() == 0 and tensors["u"].shape == (32,)


def test_a_nan_in_a_quantised_block_is_named_when_it_is_read(path):
    path.write_bytes(packed([], [tensor("t", (32,), kind=8)], struct.pack("<e", float("nan")) + b"\1" * 62))
    with pytest.raises(SourceError, match=r"m.gguf t: 32 of its 32 values are NaN or infinite"):
        open_gguf(path)[1]["t"]
