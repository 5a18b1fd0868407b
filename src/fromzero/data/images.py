"""Images: a folder of classes or a file in, uint8 pixels out. Every mode is converted on purpose, nothing by accident.

A folder's tree: one folder a class, images inside at any depth. Hidden files and files of other kinds are left out
by rule and counted; links that lead back are not followed. Dims: C channels, H height, W width.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fromzero.errors import DataError, Fault

ENDINGS = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"])
GREY_MODES = frozenset(["L", "1", "I;16", "I;16B", "I", "LA"])  # as Pillow calls them; become one channel where all images are so
MOST_PIXELS = 50_000_000  # read from the header, before anything is decoded


@dataclass(frozen=True)
class ImageFormat:
    """What every image becomes: height, width in pixels; channels 1 (grey) or 3 (colours)."""

    height: int
    width: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)


@dataclass(frozen=True)
class ImageTree:
    """paths and the class of each; left_out counts files that are no images, by reason."""

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    left_out: dict[str, int]


def find_images(root: Path) -> ImageTree:
    """Walk an image folder.  raises: DataError where it has no class folder, or a class has no image"""
    left: Counter[str] = Counter()
    paths: list[Path] = []
    labels: list[str] = []
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        found = len([p for p in root.iterdir() if p.suffix.lower() in ENDINGS])
        why = f"{found} images lie in the folder itself" if found else "it has no folders inside"
        raise DataError(
            "is no image folder", why=why, mend="put the images of each class into a folder named like the class", file=str(root)
        )
    empty = []
    for name in classes:
        inside = walk_images(root / name, left, outside=[root / other for other in classes if other != name])
        if not inside:
            shown = printable(name)
            empty.append(
                Fault(f"class folder '{shown}' has no image", mend="add some, or remove the folder", file=printable(str(root / name)))
            )
        paths += inside
        labels += [printable(name)] * len(inside)
    if empty:
        raise DataError(empty)
    return ImageTree(root, tuple(paths), tuple(labels), dict(left))


def walk_images(folder: Path, left: Counter[str], outside: Iterable[Path] = ()) -> list[Path]:
    """Image files below a folder, sorted; each folder entered once, whatever links lead to it.

    A link to a folder around this one, or to one of `outside` (the other classes), is not followed: what lies
    there is not of this class.
    """
    found: list[Path] = []
    real = folder.resolve()
    seen = {_identity(path) for path in [*folder.absolute().parents, *real.parents, *outside]} - {_identity(folder)}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=lambda _: left.update(["folders that cannot be read"])):
        at = _identity(Path(here))
        if at in seen:
            folders.clear()
            left["links that lead back"] += 1
            continue
        seen.add(at)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(here) / name
            if name.startswith("."):
                left["hidden files"] += 1
            elif path.suffix.lower() not in ENDINGS:
                left["files of other kinds"] += 1
            elif not path.is_file():
                left["links to nothing, pipes and devices"] += 1
            else:
                found.append(path)
    return found


def _identity(path: Path) -> tuple[int, int]:
    """What stays the same by whatever name a folder is reached; (0, 0) if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def printable(name: str) -> str:
    """A file's name as valid text; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def image_header(path: Path) -> tuple[tuple[int, int], str]:
    """((height, width) as it will be seen, mode) from the header alone.  raises: DataError, before decoding"""
    with _opened(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        except Exception as error:  # Pillow names no one class for what a broken file may raise
            raise _broken(path, error) from None
        return ((width, height) if turned else (height, width)), image.mode


def _opened(path: Path) -> Image.Image:
    shown = printable(str(path))
    if not path.is_file() and path.exists():
        raise DataError("is no file", why="a pipe or a device might never end", mend="name an image", file=shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image = Image.open(path)
    except Image.DecompressionBombError:
        raise DataError(
            "is larger than any photograph", why=f"the limit is {MOST_PIXELS:,} pixels", mend="scale it down first", file=shown
        ) from None
    except FileNotFoundError:
        raise DataError("has vanished since the folder was listed", file=shown) from None
    except Exception as error:
        empty = path.is_file() and path.stat().st_size == 0
        what = "is empty (0 bytes)" if empty else f"is no image that can be read ({type(error).__name__})"
        raise DataError(what, mend="remove it, or let data.skip_broken leave some out", file=shown) from None
    if image.size[0] * image.size[1] > MOST_PIXELS:
        image.close()
        raise DataError(
            f"has {image.size[0]:,} × {image.size[1]:,} pixels", why=f"the limit is {MOST_PIXELS:,}", mend="scale it down first", file=shown
        )
    return image


def read_image(path: Path, form: ImageFormat) -> Tensor:
    """Decode one image as the run's format wants it.

    Turned as its EXIF says; the first frame of an animation; alpha laid over white; 16-bit greys scaled to 8 bits;
    palette and CMYK through RGB; then resized (bilinear, antialiased) where the size differs. Pixels that are floats,
    or whole numbers beyond 16 bits, are refused: nothing says which of them is white.

    returns:  (C, H, W) uint8
    raises:   DataError with the path and the reason
    """
    try:
        with _opened(path) as image:
            image.load()
            plain = _plain(ImageOps.exif_transpose(image), "L" if form.channels == 1 else "RGB")
    except DataError:
        raise
    except Exception as error:
        raise _broken(path, error) from None
    if plain.size != (form.width, form.height):
        plain = plain.resize((form.width, form.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(plain, dtype=np.uint8)
    return torch.from_numpy(pixels[None].copy() if form.channels == 1 else pixels.transpose(2, 0, 1).copy())


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"is broken ({error or type(error).__name__})", mend="remove it, or let data.skip_broken leave some out", file=printable(str(path))
    )


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values: np.ndarray[Any, Any] = np.asarray(image, dtype=np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels go from {values.min():.0f} to {values.max():.0f}; save it with 8 or 16 bits")
        image = Image.fromarray((values / 257.0).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, clear)
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    return image.convert(mode)
