"""Fault 34: files that would run code when they are read. The marker that such code writes never appears."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from fromzero.data import Request, load
from fromzero.data.arrays import read_arrays
from fromzero.errors import SourceError, UserError


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code from the file was run"


def refused(path, *said, kind=SourceError):
    with pytest.raises(kind) as caught:
        load(Request(path))
    for piece in (path.name, *said):
        assert piece in str(caught.value)


def test_the_bomb_of_these_tests_goes_off_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()


def test_an_npz_with_object_arrays_is_refused(tmp_path, marker):
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(marker)], dtype=object), y=np.zeros(1))
    refused(tmp_path / "a.npz", "Python objects (a pickle)", "can run code", "save plain arrays")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_torch_file_that_asks_for_a_function_is_refused(tmp_path, marker, suffix, protocol):
    path = tmp_path / f"a{suffix}"
    torch.save({"x": torch.ones(4, 2), "y": torch.ones(4), "z": Bomb(marker)}, path, pickle_protocol=protocol)
    refused(path, "its pickle asks for", "it was not tried", "safetensors")


def test_a_function_named_by_remembered_strings_is_refused(tmp_path, marker):
    """Strings that look safe are put last, and the ones that count are fetched from the memo."""
    words = b"".join(b"\x8c" + bytes([len(w)]) + w + b"\x94" for w in (b"os", b"mkdir", b"collections", b"OrderedDict"))
    where = str(marker).encode()
    data = b"\x80\x04" + words + b"0000" + b"h\x00h\x01\x93" + b"\x8c" + bytes([len(where)]) + where + b"\x85R."
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3")
    refused(path, "its pickle asks for")
    pickle.loads(data)
    marker.rmdir()  # it would have gone off


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib", ".npy", ".ckpt", ".bin", ".PKL"])
def test_kinds_that_are_pickles_are_refused_by_name(tmp_path, marker, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    refused(path, f"is a {suffix.lower()} file, which can run code", "it was not tried", "npz, csv or safetensors")


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_another_name_is_refused(tmp_path, marker, suffix, protocol):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
    refused(path, kind=UserError)


@pytest.mark.parametrize("legacy", [True, False])
def test_torch_files_of_all_ages_under_another_name_are_refused(tmp_path, marker, legacy):
    whole = tmp_path / "b.pt"
    torch.save({"x": Bomb(marker)}, whole, _use_new_zipfile_serialization=not legacy)
    for suffix in (".npz", ".pt", ".safetensors", ".csv", ".parquet"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(whole.read_bytes())
        refused(path, kind=UserError)


def test_an_npz_named_pt_is_refused_and_a_pickle_inside_a_zip_is_not_opened(tmp_path, marker):
    np.savez(tmp_path / "n.npz", x=np.ones(2), y=np.ones(2))
    (tmp_path / "n.npz").rename(tmp_path / "n.pt")
    refused(tmp_path / "n.pt", "no torch file of plain tensors")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("x", pickle.dumps(Bomb(marker)))
        archive.writestr("y.npy", pickle.dumps(Bomb(marker)))
    refused(tmp_path / "z.npz", kind=UserError)
    with pytest.raises(UserError):
        read_arrays(tmp_path / "z.npz", "x", "x")


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "a.safetensors", "a.parquet"])
def test_a_file_damaged_anywhere_is_refused_or_read_but_never_a_traceback(tmp_path, name):
    import polars
    from safetensors.torch import save_file

    path, arrays = tmp_path / name, {"x": torch.arange(6.0).reshape(3, 2), "y": torch.tensor([0, 1, 0])}
    writers = {
        "a.npz": lambda: np.savez_compressed(path, x=arrays["x"], y=arrays["y"]),
        "a.pt": lambda: torch.save(arrays, path),
        "a.safetensors": lambda: save_file(arrays, path),
        "a.parquet": lambda: polars.DataFrame({"x": [1, 3, 4], "y": [0, 1, 0]}).write_parquet(path),
    }
    writers[name]()
    whole = path.read_bytes()
    step = max(1, len(whole) // 40)
    damaged = [whole[:n] for n in range(0, len(whole), step)] + [
        whole[:n] + b"\xff" * 4 + whole[n + 4 :] for n in range(0, len(whole), step)
    ]
    refusals = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            load(Request(path, hold_out=0.0))
        except UserError as error:
            refusals += name in str(error)
    assert refusals > len(damaged) // 3
