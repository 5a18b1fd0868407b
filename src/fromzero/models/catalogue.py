"""Catalogue: a model's name or a person's own class in, a module out, with what is needed to build it again.

Nothing here knows weights or data: shapes come in as numbers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import fromzero.models.efficientnet as efficientnet
import fromzero.models.vit as vit
from fromzero.devices.generators import lent
from fromzero.errors import ModelError, did_you_mean
from fromzero.models.cnn import CNN
from fromzero.models.decoder_families import DECODERS, decoder_config
from fromzero.models.decoder_families import SIZES as DECODER_SIZES
from fromzero.models.efficientnet import EfficientNetLite0
from fromzero.models.encoder_families import ENCODERS, encoder_config
from fromzero.models.encoder_families import SIZES as ENCODER_SIZES
from fromzero.models.families import Family
from fromzero.models.foreign import FOREIGN
from fromzero.models.mlp import MLP
from fromzero.models.resnet import ResNet
from fromzero.models.rnn import RNN
from fromzero.models.vit import ViT
from fromzero.models.written import build_written, describe_written


def _sized(make: Callable[..., Any], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Callable[..., Any]]:
    return {name: partial(make, **size) for name, size in sizes.items()}


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "rnn": partial(RNN, cell="rnn"),
    "lstm": partial(RNN, cell="lstm"),
    "gru": partial(RNN, cell="gru"),
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (18, 34, 50, 101, 152)},
    "efficientnet-lite0": EfficientNetLite0,
    **_sized(ViT, vit.SIZES),
}
TEXT_MODELS: dict[
    str, Callable[..., dict[str, Any]]
] = {  # each makes the config.json of a family, so that others can load what was trained
    "encoder": encoder_config,
    **_sized(encoder_config, ENCODER_SIZES),
    "decoder": decoder_config,
    **_sized(decoder_config, DECODER_SIZES),
}
FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, "vit": vit.FAMILY, "efficientnet-lite0": efficientnet.FAMILY}


@dataclass(frozen=True)
class Sizes:
    """What the data asks of a model. inputs: shape of a sample; vocabulary: tokens of text; per_token: an output for each of them."""

    inputs: tuple[int, ...]
    outputs: int
    vocabulary: int | None = None
    per_token: bool = False


@dataclass(frozen=True)
class Blueprint:
    """How a module is built: kind is catalogue (a name), family (a published config), code (a class in source text),
    written (layer by layer), or by others: foreign (a published config that transformers knows), hub or timm (a name of theirs)."""

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    code: str = ""  # the Python source that holds the class
    tree: Any = None  # for written: the layers

    def build(self) -> nn.Module:
        """raises: ModelError where the class is not there or does not take the options"""
        if self.kind == "written":
            return build_written(self.tree)
        if self.kind in FOREIGN:
            return FOREIGN[self.kind](self.name, **self.options)
        make: Callable[..., nn.Module]
        if self.kind == "family":
            make = FAMILIES[self.name].build
        else:
            make = MODELS[self.name] if self.kind == "catalogue" else _class_in(self.code, self.name)
        module: nn.Module = _call(make, self.name, self.options)
        return module


def blueprint_of_name(name: str, sizes: Sizes, options: Mapping[str, Any]) -> Blueprint:
    """A catalogue model sized from the data."""
    if name not in (*MODELS, *TEXT_MODELS):
        mend = (
            did_you_mean(name, (*MODELS, *TEXT_MODELS))
            or f"the catalogue has {', '.join((*MODELS, *TEXT_MODELS))}; your own class is FILE.py:CLASS, an earlier run is run:NAME"
        )
        raise ModelError(f"no model is called '{name}'", mend=mend, key="model")
    plain = {k: _listed(v) for k, v in options.items()}
    recurrent = name in ("rnn", "lstm", "gru")
    if name in TEXT_MODELS:
        if sizes.vocabulary is None:
            raise ModelError(f"{name} reads text, the data has inputs of shape {sizes.inputs}", mend="mlp takes any shape", key="model")
        if sizes.per_token and name.startswith("encoder"):
            raise ModelError(
                f"{name} sees the tokens after each one too", mend="the next token is predicted by decoder or lstm", key="model"
            )
        config = _call(TEXT_MODELS[name], name, {"vocabulary": sizes.vocabulary, **plain}, dict)
        return blueprint_of_config(config, {} if sizes.per_token else {"outputs": sizes.outputs})
    if sizes.vocabulary is not None and not recurrent:
        raise ModelError(
            f"{name} takes numbers, the data is text", mend=f"{', '.join(TEXT_MODELS)}, rnn, lstm or gru read text", key="model"
        )
    asked: dict[str, Any] = {"outputs": sizes.outputs}
    asked |= {"inputs": list(sizes.inputs)} if sizes.vocabulary is None else {"vocabulary": sizes.vocabulary}
    asked |= {"per": "token"} if sizes.per_token else {}
    return Blueprint("catalogue", name, {**plain, **asked})


def blueprint_of_config(config: Mapping[str, Any], options: Mapping[str, Any]) -> Blueprint:
    """A published model, by the model_type of its config.json."""
    return Blueprint("family", str(config["model_type"]), {"config": dict(config), **options})


def blueprint_of_file(path: Path, name: str, options: Mapping[str, Any]) -> Blueprint:
    """A class in a person's own file; the file's text is kept, so that a run can be opened after the file has changed."""
    try:
        code = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot be read ({error})", file=str(path), key="model") from None
    try:
        classes = [node.name for node in ast.parse(code).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    except SyntaxError as error:
        raise ModelError(f"is not Python: {error.msg}", file=str(path), line=error.lineno or 0, key="model") from None
    if name not in classes:
        raise ModelError(
            f"has no class '{name}'",
            mend=did_you_mean(name, classes) or f"it has {', '.join(classes) or 'none'}",
            file=str(path),
            key="model",
        )
    return Blueprint("code", name, {k: _listed(v) for k, v in options.items()}, code=code)


def blueprint_of_object(value: Any, options: Mapping[str, Any]) -> Blueprint | None:
    """A class or a module given from Python; None where it cannot be described (it then must be given again)."""
    if isinstance(value, nn.Module):
        tree = describe_written(value)
        if tree is not None:
            return Blueprint("written", type(value).__name__, tree=tree)
        value = type(value)
    code = _source_of(value)
    return Blueprint("code", value.__qualname__, dict(options), code=code) if code else None


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _source_of(kind: type) -> str:
    """The definitions of the file or notebook cell that holds a class: imports, classes, functions, constants."""
    try:
        if kind.__module__ == "__main__" or "." in kind.__qualname__:
            source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
        else:
            source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        try:
            source = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n" + inspect.getsource(kind)
        except (OSError, TypeError):
            return ""
    body = [node for node in ast.parse(source).body if _defines(node)]
    names = [node.name for node in body if isinstance(node, ast.ClassDef)]
    return ast.unparse(ast.Module(body, [])) if kind.__qualname__ in names else ""


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)):
        return True
    return isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.Tuple, ast.List, ast.Dict))


def _class_in(code: str, name: str) -> Callable[..., nn.Module]:
    key = f"fromzero_user_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    module = sys.modules.get(key)
    if module is None:
        spec = importlib.util.spec_from_loader(key, loader=None)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            exec(compile(code, f"<model {name}>", "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[key]
            raise ModelError(f"the file of {name} fails when it is read: {type(error).__name__}: {error}", key="model") from error
    found: Callable[..., nn.Module] = getattr(module, name)
    return found


def _call(make: Callable[..., Any], name: str, options: Mapping[str, Any], gives: type = nn.Module) -> Any:
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):
        accepted = {}  # type: ignore[assignment]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = [key for key in options if key not in accepted]
    if unknown and not open_ended:
        known = [key for key in accepted if key not in ("inputs", "outputs", "vocabulary", "per")]
        raise ModelError(
            f"{name} has no option '{unknown[0]}'",
            mend=did_you_mean(unknown[0], known) or f"its options: {', '.join(known) or 'none'}",
            key=f"model.{unknown[0]}",
        )
    try:
        made = make(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be built: {error}", key="model") from error
    if not isinstance(made, gives):
        raise ModelError(f"{name} gives {type(made).__name__}, not a torch.nn.Module", key="model")
    return made


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build with the random states set to `seed`, and put them back."""
    with lent(seed):
        return build()
