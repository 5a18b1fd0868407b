"""Catalogue: a model's name or a person's own class in, a module out, with what is needed to build it again.

Nothing here knows weights or data: shapes come in as numbers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fromzero.errors import ModelError, did_you_mean
from fromzero.models.cnn import CNN
from fromzero.models.mlp import MLP
from fromzero.models.written import build_written, describe_written

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
}


@dataclass(frozen=True)
class Blueprint:
    """How a module is built: kind is catalogue (a name), code (a class in source text) or written (layer by layer)."""

    kind: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    code: str = ""  # the Python source that holds the class
    tree: Any = None  # for written: the layers

    def build(self) -> nn.Module:
        """raises: ModelError where the class is not there or does not take the options"""
        if self.kind == "catalogue":
            return _call(MODELS[self.name], self.name, self.options)
        if self.kind == "written":
            return build_written(self.tree)
        return _call(_class_in(self.code, self.name), self.name, self.options)


def blueprint_of_name(name: str, inputs: Sequence[int], outputs: int, options: Mapping[str, Any]) -> Blueprint:
    """A catalogue model sized from the data."""
    if name not in MODELS:
        mend = (
            did_you_mean(name, MODELS)
            or f"the catalogue has {', '.join(MODELS)}; your own class is FILE.py:CLASS, an earlier run is run:NAME"
        )
        raise ModelError(f"no model is called '{name}'", mend=mend, key="model")
    sized = {"inputs": list(inputs), "outputs": outputs}
    return Blueprint("catalogue", name, {**{k: _listed(v) for k, v in options.items()}, **sized})


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


def _call(make: Callable[..., nn.Module], name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        accepted = inspect.signature(make).parameters
    except (TypeError, ValueError):
        accepted = {}  # type: ignore[assignment]
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = [key for key in options if key not in accepted]
    if unknown and not open_ended:
        known = [key for key in accepted if key not in ("inputs", "outputs")]
        raise ModelError(
            f"{name} has no option '{unknown[0]}'",
            mend=did_you_mean(unknown[0], known) or f"its options: {', '.join(known) or 'none'}",
            key=f"model.{unknown[0]}",
        )
    try:
        module = make(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be built: {error}", key="model") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} gives {type(module).__name__}, not a torch.nn.Module", key="model")
    return module


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build with torch's random state set to `seed`, and put the state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
