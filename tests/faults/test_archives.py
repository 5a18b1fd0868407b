"""Fault 35: archives that lead outside, hide links, repeat names, grow without end or are damaged."""

import stat
import warnings
import zipfile

import pytest

from fromzero.errors import SourceError
from fromzero.sources import archives, check_zip, read_member


def make(path, *entries, compression=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of doubled names
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in entries:
                archive.writestr(name, data)
    return path


def linked(name, kind):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (kind | 0o777) << 16
    return entry


def refused(path, *said, read=check_zip):
    with pytest.raises(SourceError) as caught:
        read(path)
    for piece in (path.name, *said):
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/etc/evil", "..\\evil.txt", "C:\\evil.txt", "C:evil", "\\\\host\\evil", ".."]
)
def test_an_entry_that_leads_outside_is_named(tmp_path, name):
    path = make(tmp_path / "z.zip", ("fine.txt", "x"), (name, "x"))
    refused(path, repr(name), "leads outside the archive", "not to be trusted")
    refused(path, "leads outside", read=lambda p: read_member(p, "fine.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["z.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_link_or_device_is_named(tmp_path, kind):
    refused(make(tmp_path / "z.zip", (linked("data.csv", kind), "/etc/passwd")), "'data.csv'", "is a link or a device")


def test_a_doubled_name_is_refused(tmp_path):
    refused(make(tmp_path / "z.zip", ("a.txt", "1"), ("a.txt", "2")), "'a.txt'", "stands twice")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = make(tmp_path / "z.zip", ("big.csv", b"0" * 50_000_000))
    assert path.stat().st_size < 60_000
    refused(path, "'big.csv'", "would grow from", "50000000 bytes")
    refused(path, "would grow", read=lambda p: read_member(p, "big.csv"))


def test_many_small_bombs_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 2**30)
    monkeypatch.setattr(archives, "MOST_RATIO", 10**9)
    path = make(tmp_path / "z.zip", ("a", b"0" * 2**20))
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    monkeypatch.setattr(archives, "MOST_BYTES", size - 1)
    refused(path, "'a'", "over 0 GiB")


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    refused(make(tmp_path / "z.zip", *((str(i), "") for i in range(4))), "holds 4 files, more than 3")


def test_an_encrypted_entry_is_refused(tmp_path):
    path = make(tmp_path / "z.zip", ("a.txt", "abc"))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "'a.txt'", "is encrypted")


def test_an_entry_that_promises_fewer_bytes_than_it_holds_is_refused(tmp_path):
    path = make(tmp_path / "z.zip", ("a.txt", b"abcdefgh" * 10))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = (8).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "'a.txt'", read=lambda p: read_member(p, "a.txt"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damage_anywhere_is_refused_or_harmless_but_never_a_traceback(tmp_path, compression):
    content = bytes(range(256)) * 2
    path = make(tmp_path / "z.zip", ("a.bin", content), compression=compression)
    whole, refusals = path.read_bytes(), 0
    for data in [whole[:n] for n in range(0, len(whole), 7)] + [
        whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :] for n in range(0, len(whole), 3)
    ]:
        path.write_bytes(data)
        try:
            assert read_member(path, "a.bin") == content
        except SourceError as error:
            refusals += 1
            assert "z.zip" in str(error)
    assert refusals > 100


def test_a_member_that_is_not_there_brings_the_nearest(tmp_path):
    path = make(tmp_path / "z.zip", ("data/iris.csv", "x"), ("folder/", ""))
    refused(path, "no file 'data/irs.csv' inside", "did you mean 'data/iris.csv'?", read=lambda p: read_member(p, "data/irs.csv"))
    refused(path, "no file 'folder/' inside", read=lambda p: read_member(p, "folder/"))


def test_a_sound_archive_gives_its_bytes(tmp_path):
    path = make(tmp_path / "z.zip", ("data/iris.csv", b"x,y\n"), ("..two.dots", b""))
    assert read_member(path, "data/iris.csv") == b"x,y\n"
    assert list(check_zip(path)) == ["data/iris.csv", "..two.dots"]


def test_no_zip_at_all_is_refused(tmp_path):
    (tmp_path / "z.zip").write_bytes(b"hello")
    refused(tmp_path / "z.zip", "is not a whole zip archive", "fetch it again")
