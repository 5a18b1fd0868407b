"""Faults 34 to 37 for weights: files that run code, hostile archives, crafted headers, folders that bring code.

What a file asks for is never done, whatever it is called; headers are compared with the file before anything is made of
them; and every refusal is one SourceError that names the file.
"""

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fromzero.errors import SourceError
from fromzero.weights import open_pretrained
from fromzero.weights.gguf import open_gguf
from fromzero.weights.tensors import open_safetensors

BOUNDED = settings(max_examples=120, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code from the file was run"


def refused(path, *said):
    with pytest.raises(SourceError) as caught:
        open_pretrained(str(path))
    for piece in (path.name, *said):
        assert piece in str(caught.value)


# ------------------------------------------------------------------------------------------- 34: code in a pickle


def test_the_bomb_of_these_tests_goes_off_when_it_is_unpickled(tmp_path):
    torch.save({"w": Bomb(tmp_path / "proof")}, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize(("suffix", "zipped"), [(".pt", True), (".bin", False)])
def test_a_torch_file_that_asks_for_a_function_is_refused_with_what_it_asked_for(tmp_path, marker, cache, suffix, zipped):
    path = tmp_path / f"w{suffix}"
    torch.save({"w": torch.ones(2), "state_dict": {"v": Bomb(marker)}}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "its pickle asks for posix.mkdir", "that would run code; it was not tried", "take the model as safetensors")
    assert not list(cache.rglob("*.safetensors")) and not list(cache.rglob("tmp*"))


def test_a_bare_pickle_named_as_a_torch_file_is_refused(tmp_path, marker):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    refused(path, "its pickle asks for posix.mkdir", "it was not tried")


def test_a_tensor_of_a_terabyte_made_of_four_bytes_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1).expand(2**38)}, path)
    assert path.stat().st_size < 5000
    refused(path, "is no torch file of plain tensors", "allocate")


def test_a_torch_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"epoch": 3}, path)
    refused(path, "is no torch file of plain tensors", "it holds no dictionary of tensors")


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".PKL"])
def test_kinds_that_are_pickles_are_refused_by_name(tmp_path, marker, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    refused(path, f"is no file of weights that is read ({suffix.lower()})", "a pickle can run code; it was not tried", "read are .gguf")


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".zip", ".tar"])
@pytest.mark.parametrize("kind", ["bare", "zipped", "old", "zip", "tar"])
def test_a_pickle_under_another_name_or_inside_an_archive_is_refused(tmp_path, marker, suffix, kind):
    path, bare = tmp_path / f"w{suffix}", pickle.dumps(Bomb(marker))
    if kind == "bare":
        path.write_bytes(bare)
    elif kind in ("zipped", "old"):
        torch.save({"w": Bomb(marker)}, path, _use_new_zipfile_serialization=kind == "zipped")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("pytorch_model.bin", bare)
    else:
        with tarfile.open(path, "w") as archive:
            entry = tarfile.TarInfo("storages")
            entry.size = len(bare)
            archive.addfile(entry, io.BytesIO(bare))
    refused(path)


# ------------------------------------------------------------------------------------------- 35: archives


@pytest.mark.parametrize(("name", "said"), [("../evil", "leads outside the archive"), ("w/data.pkl", "stands twice")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_torch_zip_with_hostile_entries_is_refused_with_the_entry(tmp_path, name, said):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"x")
        archive.writestr(name, b"x")
    refused(path, repr(name), said)


# ------------------------------------------------------------------------------------------- 36: crafted weights


def test_forty_nine_bytes_that_promise_two_to_the_sixty_entries_are_refused_at_once(tmp_path):
    path = tmp_path / "w.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + b"\0" * 25)
    assert path.stat().st_size == 49
    started = time.monotonic()
    refused(path, "promises 1,152,921,504,606,846,976 entries of metadata", "before byte 24 of 49")
    assert time.monotonic() - started < 0.5


def test_a_header_of_two_to_the_sixty_bytes_is_refused_at_once(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path, "promises a header of 1,152,921,504,606,846,976 bytes, the file has 10")


def test_a_nan_in_the_weights_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"fine": torch.ones(3), "layer.weight": torch.tensor([1.0, float("nan")])}))
    found = open_pretrained(str(path)).tensors
    assert found["fine"].sum() == 3
    with pytest.raises(SourceError, match=r"w.safetensors layer.weight: 1 of its 2 values are NaN or infinite"):
        dict(found)


@pytest.fixture
def small():
    """Memory that a hostile header could take is bounded while such a test runs."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def reads_or_refuses(path, data, opener):
    """Only ever tensors or a SourceError that names the file, and soon."""
    path.write_bytes(data)
    try:
        tensors = opener(path)
        for name in tensors:
            tensors[name].numel()
        return True
    except SourceError as error:
        assert path.name in str(error) and len(str(error)) < 2000
        return False


numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30]), st.floats(), st.booleans(), st.none()
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F64", "BOOL", "F4", "", 3]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)
headers = st.dictionaries(st.text(max_size=4), st.one_of(entries, st.none(), st.lists(numbers)), max_size=4)


@BOUNDED
@given(header=headers, length=st.one_of(st.none(), st.integers(0, 2**64 - 1)), rest=st.binary(max_size=64))
def test_any_safetensors_header_is_read_or_refused(tmp_path, small, header, length, rest):
    text = json.dumps(header).encode()
    reads_or_refuses(tmp_path / "w.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + rest, open_safetensors)


@BOUNDED
@given(data=st.data())
def test_any_damage_to_a_safetensors_file_is_harmless(tmp_path, small, data):
    whole = bytearray(save({"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.int64)}))
    damage(data, whole)
    reads_or_refuses(tmp_path / "w.safetensors", bytes(whole), open_safetensors)


def damage(data, whole):
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**62)])))
        whole[at : at + len(piece)] = piece
    del whole[data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole)))) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small whole GGUF file of a llama with a tokenizer."""
    path = tmp_path_factory.mktemp("g") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 8,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "head_count": 2,
        "head_count_kv": 1,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    for name, shape in {"token_embd": (4, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "output_norm": (32,)}.items():
        raw = np.ones(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else None
        writer.add_tensor(f"{name}.weight", raw if kind is None else gguf.quants.quantize(raw, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def whole_model(path):
    return open_pretrained(str(path)).tensors


def test_the_file_that_is_damaged_below_is_sound(tmp_path, model):
    assert reads_or_refuses(tmp_path / "w.gguf", model, whole_model)
    assert open_pretrained(str(tmp_path / "w.gguf")).tokenizer is not None


@BOUNDED
@given(data=st.data())
def test_any_damage_to_a_gguf_file_is_harmless(tmp_path, small, model, data):
    whole = bytearray(model)
    damage(data, whole)
    reads_or_refuses(tmp_path / "w.gguf", bytes(whole), whole_model)


def test_every_number_in_a_gguf_header_may_be_huge(tmp_path, small, model):
    """Every eight bytes of the header in turn become 2^62, 2^64 - 1, 0 and cut the file."""
    start = model.index(b"output_norm.weight") + 60
    refusals = 0
    for at in range(4, start, 3):
        for piece in (struct.pack("<Q", 2**62), b"\xff" * 8, b"\0" * 8):
            refusals += not reads_or_refuses(tmp_path / "w.gguf", model[:at] + piece + model[at + 8 :], whole_model)
        refusals += not reads_or_refuses(tmp_path / "w.gguf", model[:at], whole_model)
    assert refusals > start


@BOUNDED
@given(rest=st.binary(max_size=200), counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)))
def test_any_bytes_after_the_name_are_read_or_refused(tmp_path, small, rest, counts):
    reads_or_refuses(tmp_path / "w.gguf", b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest, lambda path: open_gguf(path)[1])


# ------------------------------------------------------------------------------------------- 37: code in a folder


def test_a_folder_that_asks_for_code_is_opened_without_it(tmp_path, marker, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "modeling_x.Net"}}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}, "tokenizer_class": "T"})
    )
    for name in ("modeling_x.py", "tokenization_x.py", "__init__.py", "conftest.py"):
        (tmp_path / name).write_text(f"import os; os.mkdir({str(marker)!r})")
    (tmp_path / "model.safetensors").write_bytes(save({"w": torch.ones(2)}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = open_pretrained(".")
    assert found.tensors["w"].sum() == 2 and found.config["auto_map"] and found.special["tokenizer_class"] == "T"


def test_weights_beside_hostile_modules_are_converted_without_them(tmp_path, marker, monkeypatch):
    """The child starts in the same folder, and does not import what lies there."""
    for name in ("torch.py", "safetensors.py", "io.py", "sitecustomize.py", "usercustomize.py"):
        (tmp_path / name).write_text(f"import os; os.mkdir({str(marker)!r})")
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert open_pretrained(".").tensors["w"].sum() == 2
