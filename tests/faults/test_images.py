"""Faults 28 and 29: images that are broken, huge or odd."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fromzero.data import ImageFormat, Request, load
from fromzero.data.images import MOST_PIXELS, image_header, read_image
from fromzero.errors import DataError

COLOUR, GREY = ImageFormat(1, 2, 3), ImageFormat(1, 2, 1)


def png(width, height, bits=8, kind=0):
    """A PNG that is a header alone, with a checksum that fits."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def jpeg(seed=0, side=32):
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def folder(root, broken=None, per_class=3):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.jpg").write_bytes(jpeg(i + (name == "dog") * 10))
    for name, data in (broken or {}).items():
        (root / name).write_bytes(data)
    return root


def refused(action, *said):
    with pytest.raises(DataError) as caught:
        action()
    for piece in said:
        assert piece in str(caught.value)
    return caught.value


# 28: broken


@pytest.mark.parametrize("tenths", range(10))
def test_a_jpeg_cut_anywhere_is_refused_by_name(tmp_path, tenths):
    path, whole = tmp_path / "cut.jpg", jpeg()
    path.write_bytes(whole[: len(whole) * tenths // 10])
    refused(lambda: read_image(path, ImageFormat(32, 32, 3)), "cut.jpg", "empty (0 bytes)" if tenths == 0 else "is", "data.skip_broken")


@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.gif", "p.tif", "p.webp"])
@pytest.mark.parametrize(
    "data", [b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n", b"just text\n", b"\x80\x04\x95.", b"GIF89a", b"II*\0\xff\xff\xff\xff", b"\x89PNG\r\n\x1a\n"]
)
def test_another_file_named_like_an_image_is_refused(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    refused(lambda: image_header(path), name, "no image that can be read", "remove it")


def test_all_broken_images_come_at_once_with_what_is_allowed(tmp_path):
    root = folder(tmp_path / "d", {"cat/a.jpg": b"", "cat/b.jpg": b"%PDF", "dog/c.jpg": jpeg()[:400]})
    error = refused(lambda: load(Request(root)), "a.jpg", "b.jpg", "3 of 9 images are broken", "data.skip_broken allows 0")
    assert len(error.faults) == 4


def test_as_many_broken_images_as_allowed_are_left_out_and_noted(tmp_path):
    root = folder(tmp_path / "d", {"cat/a.jpg": b"", "cat/b.jpg": b"%PDF", "dog/c.jpg": jpeg()[:700]})
    loaded = load(Request(root, skip_broken=3, hold_out=0.0))
    assert loaded.facts.train == 6
    assert sum("broken, left out" in note for note in loaded.facts.notes) == 3
    assert any("a.jpg (is empty (0 bytes))" in note for note in loaded.facts.notes)
    refused(lambda: load(Request(root, skip_broken=2)), "3 of 9 images are broken", "allows 2")


@pytest.mark.parametrize("data", [b"", jpeg()[:700]])
def test_a_class_whose_images_are_all_broken_does_not_vanish(tmp_path, data):
    root = folder(tmp_path / "d", {f"dog/{i}.jpg": data for i in range(3)})
    refused(lambda: load(Request(root, skip_broken=9)), "class 'dog' has no image that can be read", "3 broken images")


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path):
    root = folder(tmp_path / "d", {f"{c}/{i}.jpg": b"" for c in ("cat", "dog") for i in range(3)})
    refused(lambda: load(Request(root, skip_broken=99)), "has no image that can be read")


# 29: huge


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 9_500), (8_000, 6_251)])
def test_a_bomb_is_refused_from_its_header(tmp_path, width, height, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    for read in (image_header, lambda p: read_image(p, GREY)):
        refused(lambda read=read: read(path), "bomb.png", f"the limit is {MOST_PIXELS:,}", "scale it down first")


# 29: odd


def saved(tmp_path, image, name="i.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(path, form):
    return read_image(path, form).permute(1, 2, 0).squeeze(0).tolist()  # of one row


def row(values, mode, dtype=np.uint8):
    return Image.fromarray(np.array([values], dtype=dtype)).convert(mode) if mode else Image.fromarray(np.array([values], dtype=dtype))


def test_grey_and_colour_are_converted_exactly(tmp_path):
    grey = saved(tmp_path, row([0, 200], ""))
    assert pixels(grey, GREY) == [[0], [200]]
    assert pixels(grey, COLOUR) == [[0] * 3, [200] * 3]
    colour = saved(tmp_path, row([[255, 0, 0], [10, 20, 30]], ""))
    assert pixels(colour, COLOUR) == [[255, 0, 0], [10, 20, 30]]
    assert pixels(colour, GREY) == [[76], [18]]  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B


def test_alpha_is_laid_over_white(tmp_path):
    path = saved(tmp_path, row([[10, 20, 30, 0], [10, 20, 30, 255]], ""))
    assert pixels(path, COLOUR) == [[255] * 3, [10, 20, 30]]
    half = saved(tmp_path, row([[0, 0, 0, 128], [0, 0, 0, 255]], ""))
    assert pixels(half, COLOUR) == [[127] * 3, [0] * 3]
    grey = Image.merge("LA", [row([50, 50], ""), row([0, 255], "")])
    assert pixels(saved(tmp_path, grey), GREY) == [[255], [50]]


def test_a_palette_gives_its_colours_and_its_clear_entry_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(saved(tmp_path, image), COLOUR) == [[255, 0, 0], [0, 0, 255]]
    assert pixels(saved(tmp_path, image, transparency=0), COLOUR) == [[255] * 3, [0, 0, 255]]
    assert pixels(saved(tmp_path, image, transparency=b"\x00\xff"), COLOUR) == [[255] * 3, [0, 0, 255]]


def test_one_bit_is_black_and_white(tmp_path):
    assert pixels(saved(tmp_path, row([0, 255], "1")), GREY) == [[0], [255]]


@pytest.mark.parametrize(("name", "dtype"), [("i.png", np.uint16), ("i.tif", np.uint16), ("i.tif", np.int32), ("i.pgm", np.uint16)])
def test_sixteen_bits_become_eight_by_one_scale_even_where_the_image_is_dark(tmp_path, name, dtype):
    assert pixels(saved(tmp_path, row([0, 65535], "", dtype), name), GREY) == [[0], [255]]
    assert pixels(saved(tmp_path, row([32768, 257], "", dtype), name), COLOUR) == [[128] * 3, [1] * 3]
    assert pixels(saved(tmp_path, row([0, 200], "", dtype), name), GREY) == [[0], [1]]


@pytest.mark.parametrize(("values", "dtype"), [([0.0, 1.0], np.float32), ([0, 70_000], np.int32), ([-1, 0], np.int32)])
def test_pixels_of_no_stated_range_are_refused(tmp_path, values, dtype):
    path = saved(tmp_path, row(values, "", dtype), "i.tif")
    refused(lambda: read_image(path, GREY), "i.tif", "its pixels", "8 or 16 bits")


def test_cmyk_goes_through_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "i.tif")
    assert pixels(path, COLOUR) == [[255, 0, 0]] * 2
    shown = pixels(saved(tmp_path, Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "i.jpg", quality=100), COLOUR)[0]
    assert shown[0] > 250 and max(shown[1:]) < 5


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 1), c) for c in ((255, 0, 0), (0, 255, 0))]
    assert pixels(saved(tmp_path, frames[0], "i.gif", save_all=True, append_images=frames[1:]), COLOUR) == [[255, 0, 0]] * 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation):
    upright = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
    back = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(back[orientation])), exif=exif)
    assert image_header(path)[0] == (2, 3)
    assert read_image(path, ImageFormat(2, 3, 1))[0].tolist() == upright.tolist()


def test_damaged_exif_is_refused_or_ignored_but_never_a_traceback(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(tmp_path, Image.new("L", (2, 1), 9), "i.jpg", exif=exif).read_bytes()
    at = data.index(b"Exif\0\0") + 6
    for i in range(at, at + 26):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(data[:i] + b"\xff" + data[i + 1 :])
        try:
            image_header(path)
        except DataError as error:
            assert path.name in str(error)


def test_one_pixel_is_an_image(tmp_path):
    assert read_image(saved(tmp_path, Image.new("L", (1, 1), 7)), ImageFormat(1, 1, 1)).tolist() == [[[7]]]
    assert read_image(saved(tmp_path, Image.new("L", (1, 1), 7)), ImageFormat(2, 3, 1)).unique().tolist() == [7]


def test_different_sizes_are_refused_with_the_counts_and_resized_where_asked(tmp_path):
    root = folder(tmp_path / "d", {"cat/9.jpg": jpeg(side=16)})
    refused(lambda: load(Request(root)), "2 sizes: 32×32 (6), 16×16 (1)", "size: 32")
    loaded = load(Request(root, image=ImageFormat(8, 8, 1)))
    assert loaded.facts.input_shape == (1, 8, 8)
    (inputs,), _ = loaded.train.take(torch.tensor([0]))
    assert inputs.dtype == torch.float32 and 0 <= float(inputs.min()) <= float(inputs.max()) <= 1
