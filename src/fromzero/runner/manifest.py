"""Manifests: the files of a folder in, a note of every byte of them out; and back: what is no longer as it was noted. Knows no tensor."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fromzero.sources.cache import digest_of, write_whole

MANIFEST = "manifest.json"
FORMAT = 2  # 1, of fromzero 0.1.0: no digest of the manifest itself, nothing of the run that wrote it, best.safetensors without its prefix
_UNKNOWN = "0" * 64  # stands for the manifest's own digest while that is taken


def write_manifest(folder: Path, digests: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Note files that are written.  digests: of what each was to hold, not of what the disk says it holds; values: noted beside them"""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    said = {"format": FORMAT, **values, "versions": _versions(), "files": files, "sha256": _UNKNOWN}
    text = json.dumps(said, indent=1).encode()
    write_whole(folder / MANIFEST, _with_own(text, _UNKNOWN, hashlib.sha256(text).hexdigest()))


def _with_own(text: bytes, old: str, new: str) -> bytes:
    """The manifest with its own digest, the last in it, put in or taken out"""
    before, _, after = text.rpartition(old.encode())
    return before + new.encode() + after


def _versions() -> dict[str, str]:
    try:
        ours = importlib.metadata.version("fromzero")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        ours = "not installed"
    return {"fromzero": ours, "torch": str(torch.__version__), "python": platform.python_version()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """raises: OSError; ValueError saying what is wrong with it"""
    text = (folder / MANIFEST).read_bytes()
    try:
        values = json.loads(text)
        listed = dict(values["files"])
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is no whole manifest ({len(text)} bytes)") from None
    own = str(values.get("sha256") or "nothing")
    if ("sha256" in values or values.get("format", 1) != 1) and (found := _digest_without(text, own)) != own:
        raise ValueError(f"{MANIFEST} {_changed(found, own)}")
    return {**values, "format": values.get("format", 1), "files": listed}


def _digest_without(text: bytes, own: str) -> str:
    return hashlib.sha256(_with_own(text, own, _UNKNOWN)).hexdigest()


def wrong_with(folder: Path) -> str:
    """The first thing that is not as the manifest says, by file; empty where all is."""
    try:
        for name, noted in read_manifest(folder)["files"].items():
            path, size, digest = folder / name, noted["bytes"], noted["sha256"]
            if not path.is_file():
                return f"{name} is missing"
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes, {size} were written"
            if (is_now := digest_of(path)) != digest:
                return f"{name} {_changed(is_now, digest)}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    except (KeyError, TypeError):
        return f"{MANIFEST} does not describe its files"
    return ""


def _changed(found: str, noted: str) -> str:
    return f"has changed since it was written: its SHA-256 is {found[:16]}…, noted was {noted[:16]}…"
