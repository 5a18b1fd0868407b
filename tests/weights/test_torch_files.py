"""torch's files become safetensors in a child that can do nothing else, once; then they come from the cache."""

import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fromzero.errors import SourceError
from fromzero.weights import open_pretrained, torch_files
from fromzero.weights.torch_files import open_torch


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fromzero" / "tensors"


@pytest.fixture
def conversions(monkeypatch):
    """The paths that were converted, without a child."""
    paths = []

    def convert(path, made, seconds):
        paths.append(path.name)
        found = torch.load(path, weights_only=True)
        save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, made)

    monkeypatch.setattr(torch_files, "_convert", convert)
    return paths


TIED = torch.arange(6.0).reshape(2, 3)
TENSORS = {
    "a": TIED,
    "b": TIED,
    "turned": TIED.T,
    "count": torch.tensor(7),
    "none": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_both_ages_are_read_bit_for_bit_also_nested_ones(tmp_path, cache, zipped):
    path = tmp_path / "w.pth"
    whole = (
        {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": OrderedDict(TENSORS, note="x", weight=torch.nn.Parameter(TIED))}
        if zipped
        else TENSORS
    )
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    found, wanted = open_torch(path), TENSORS | ({"weight": TIED} if zipped else {})
    assert found.file == str(path) and found.shapes == {name: tuple(t.shape) for name, t in wanted.items()}
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted.items())
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


def test_a_file_is_converted_once_by_its_content(tmp_path, conversions):
    torch.save(TENSORS, tmp_path / "w.pt")
    (tmp_path / "again.bin").write_bytes((tmp_path / "w.pt").read_bytes())
    assert open_torch(tmp_path / "w.pt")["a"].sum() == 15 and open_torch(tmp_path / "again.bin")["a"].sum() == 15
    assert conversions == ["w.pt"]
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    assert open_torch(tmp_path / "w.pt")["a"].sum() == 1 and conversions == ["w.pt", "w.pt"]


def test_shards_of_torch_are_read_by_their_index(tmp_path, conversions):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    found = open_pretrained(str(tmp_path)).tensors
    assert found.shapes == {"a": (2,), "b": (3,)} and found["b"].sum() == 3 and len(conversions) == 2


def test_safetensors_is_taken_where_both_are_there(tmp_path, conversions):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert open_pretrained(str(tmp_path)).tensors["a"].sum() == 0 and conversions == []


def test_nothing_half_made_is_kept(tmp_path, cache, monkeypatch):
    torch.save(TENSORS, tmp_path / "w.pt")
    monkeypatch.setattr(torch_files, "_convert", lambda path, made, seconds: made.write_bytes(b"\1" * 50))
    with pytest.raises(SourceError, match="is no whole safetensors file"):
        open_torch(tmp_path / "w.pt")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "refused"), [("2.9.1+cu126", True), ("2.10.0", False), ("2.13.0+cpu", False), ("3.0.0a0+git12", False)]
)
def test_a_torch_with_a_known_hole_in_its_reader_is_not_used(tmp_path, conversions, monkeypatch, version, refused):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", version)
    if refused:
        with pytest.raises(SourceError, match=r"w.pt: is not read with torch 2.9.1\+cu126 \(CVE-2026-24747\); pip install 'torch>=2.10'"):
            open_torch(tmp_path / "w.pt")
    else:
        assert open_torch(tmp_path / "w.pt")["a"].sum() == 1


def test_a_child_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "w.pt")

    def run(command, **options):
        assert command[:2] == [sys.executable, "-I"] and options["timeout"] == 120
        assert not {"HF_TOKEN", "PYTHONPATH"} & options["env"].keys()
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SourceError, match=r"w.pt: could not be read within 120 s; take the model as safetensors"):
        open_torch(tmp_path / "w.pt")


def test_a_zip_bomb_is_refused_before_a_child_is_started(tmp_path, conversions):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"x")
        archive.writestr("w/data/0", b"\0" * 50_000_000)
    with pytest.raises(SourceError, match="'w/data/0' would grow from"):
        open_torch(tmp_path / "w.pt")
    assert conversions == []


GIVES_UP = """
import os, runpy, socket, subprocess, sys, types
for name in ("torch", "safetensors", "safetensors.torch"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["safetensors.torch"].save = None
made = open(sys.argv[2], "wb")
runpy.run_path(sys.argv[1])["give_up"](1000)
made.write(b"what is open stays so"); made.flush()
def denied(what):
    try:
        what()
    except (OSError, MemoryError) as error:
        return type(error).__name__
print(denied(lambda: open(sys.argv[2] + "2", "w")), denied(socket.socket), denied(lambda: subprocess.run(["true"])),
      denied(lambda: bytearray(3 * 2**30)), denied(lambda: made.write(b"x" * 2**25) and made.flush()), denied(lambda: bytearray(2**20)))
"""


def test_the_child_gives_up_files_sockets_processes_and_memory(tmp_path):
    pytest.importorskip("resource", reason="no limits on this platform")
    script = Path(torch_files.__file__).with_name("unpickle.py")
    done = subprocess.run(
        [sys.executable, "-I", "-c", GIVES_UP, str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "MemoryError", "OSError", "None"], done.stderr
    assert (tmp_path / "out").read_bytes().startswith(b"what is open stays so") and not (tmp_path / "out2").exists()
