"""Fault 32: folders with links, pipes, odd names and files that vanish."""

import json
import os

import pytest
from PIL import Image

from fromzero.data import Request, load
from fromzero.data import sources as data_sources
from fromzero.data.images import find_images
from fromzero.errors import DataError


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "my pictures"
    for shade, name in enumerate(("cat", "big dog")):
        for i in range(3):
            picture(root / name / f"no {i}.png", shade * 100 + i)
    return root


def picture(path, shade):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.new("L", (4, 4), shade).save(file, "PNG")


def counted(root):
    tree = find_images(root)
    return {name: tree.labels.count(name) for name in sorted(set(tree.labels))}, tree.left_out


def test_spaces_in_names_are_nothing_special(root):
    assert counted(root) == ({"big dog": 3, "cat": 3}, {})


@pytest.mark.parametrize("target", ["..", ".", "../..", "/", "../big dog", "../cat"])
def test_a_link_that_leads_back_is_not_followed_and_no_class_takes_anothers_images(root, target):
    (root / "cat" / "link").symlink_to(target)
    counts, left = counted(root)
    assert counts == {"big dog": 3, "cat": 3}
    assert left == {"links that lead back": 1}


def test_a_link_to_itself_is_no_class(root):
    (root / "loop").symlink_to("loop")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    assert counted(root) == ({"big dog": 3, "cat": 3}, {"links to nothing, pipes and devices": 1})


def test_a_class_may_be_a_link_to_a_folder_elsewhere(root, tmp_path):
    picture(tmp_path / "elsewhere" / "a.png", 5)
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert counted(root)[0] == {"big dog": 3, "cat": 3, "fox": 1}


def test_a_folder_linked_twice_is_entered_once(root, tmp_path):
    picture(tmp_path / "elsewhere" / "a.png", 5)
    for name in ("one", "two"):
        (root / "cat" / name).symlink_to(tmp_path / "elsewhere")
    assert counted(root) == ({"big dog": 3, "cat": 4}, {"links that lead back": 1})


def test_hidden_and_other_files_are_left_out_and_counted(root):
    for name in (".DS_Store", "._no 1.png", "notes.txt", "Thumbs.db"):
        (root / "cat" / name).write_bytes(b"x")
    picture(root / "cat" / ".thumbs" / "a.png", 1)
    picture(root / ".cache" / "a.png", 1)
    assert counted(root) == ({"big dog": 3, "cat": 3}, {"hidden files": 2, "files of other kinds": 2})
    assert "2 hidden files left out" in load(Request(root)).facts.notes


@pytest.mark.parametrize("kind", ["image in a class", "the source"])
def test_a_pipe_does_not_hang(root, kind):
    path = root / "cat" / "pipe.png" if kind == "image in a class" else root.parent / "pipe.csv"
    os.mkfifo(path)
    if kind == "the source":
        with pytest.raises(DataError, match="neither a file nor a folder"):
            load(Request(path))
    else:
        assert counted(root)[1] == {"links to nothing, pipes and devices": 1}


def test_names_that_are_not_utf8_are_read_and_shown_as_valid_text(root):
    picture(os.fsencode(root) + b"/caf\xe9/\xff.png", 9)
    picture(os.fsencode(root) + b"/caf\xe9/\xfe.png", 10)
    loaded = load(Request(root, hold_out=0.0))
    assert loaded.facts.classes == ("big dog", "caf\\xe9", "cat")
    json.dumps(loaded.facts.classes, ensure_ascii=False).encode()
    with open(os.fsencode(root) + b"/caf\xe9/\xff.png", "wb"):
        pass
    with pytest.raises(DataError) as caught:
        load(Request(root))
    assert "caf\\xe9/\\xff.png: is empty" in str(caught.value).encode().decode()


def test_an_empty_class_folder_of_any_name_is_refused(root):
    os.mkdir(os.fsencode(root) + b"/\xff")
    (root / "newt").mkdir()
    with pytest.raises(DataError) as caught:
        find_images(root)
    assert "class folder 'newt' has no image" in str(caught.value) and "class folder '\\xff'" in str(caught.value).encode().decode()


def test_a_folder_without_classes_says_what_it_found(root):
    with pytest.raises(DataError, match="3 images lie in the folder itself; put the images of each class"):
        load(Request(root / "cat"))


def test_a_file_that_vanishes_after_the_listing_is_named(root, monkeypatch):
    def header(path, real=data_sources.image_header):
        found = real(path)
        if path.name == "no 1.png" and path.parent.name == "cat":
            path.unlink()
        return found

    tree = find_images(root)
    (root / "big dog" / "no 2.png").unlink()
    monkeypatch.setattr(data_sources, "image_header", header)
    with pytest.raises(DataError) as caught:
        data_sources.ImageRows(tree, None, 0)
    assert "big dog/no 2.png: has vanished since the folder was listed" in str(caught.value)
    assert "cat/no 1.png: cannot be read (No such file or directory)" in str(caught.value)


@pytest.mark.parametrize("name", ["n" * 5000, "d/" * 3000 + "f.csv", "a\0b"])
def test_a_path_too_long_or_impossible_is_not_found_rather_than_a_traceback(tmp_path, name):
    with pytest.raises(DataError, match="is no file, folder or named set"):
        load(Request(name, folders=(tmp_path,)))


def test_a_label_fault_shows_a_name_that_is_not_utf8_as_valid_text(root, tmp_path):
    picture(os.fsencode(tmp_path) + b"/held/fox/\xff.png", 9)
    with pytest.raises(DataError) as caught:
        load(Request(root, validation=tmp_path / "held"))
    assert "fox/\\xff.png: label 'fox' is none of the 2 classes" in str(caught.value).encode().decode()
