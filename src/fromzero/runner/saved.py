"""Saved models: a trained module and what is needed to use it in, a folder out, and back in one call.

model/model.json            how to build it, how its inputs and answers were prepared, digests
model/model.safetensors     the weights the run keeps (in several files where they are large)
model/final.safetensors     the last weights, where the kept ones are older
model/tokenizer.json        for text

A model of a published family is written under its published names with a config.json, so that others load the folder too;
what that family has no place for (a head on mean pooling) stands in rest.safetensors. Of a run with adapters only what learned
is written, in PEFT's two files; the base is found again by its source and compared by digest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fromzero.data import ChatFormat, Classes, ImageFormat, Numbers, Preparation, Soft, TextFormat
from fromzero.data.columns import Columns
from fromzero.data.sources import ArrayFormat
from fromzero.errors import ModelError, NumbersError, SourceError
from fromzero.models import FAMILIES, Blueprint, Family, seeded
from fromzero.models.families import TensorMap
from fromzero.runner.folder import no_run
from fromzero.sources.cache import write_whole
from fromzero.tuning import add_adapters, merge_adapters, new_head, tensors_digest
from fromzero.weights import check_fit, open_pretrained, read_tensors, to_ours, to_theirs, tokenizer_files, write_folder, write_tensors
from fromzero.weights.peft import PeftSettings, from_peft, read_peft, write_peft
from fromzero.weights.tensors import first_not_finite

VERSION = 1
MERGE_ERROR = 1e-5  # relative, on random rows; a float32 product in another order stays below
FINAL, TOKENIZER, REST = "final.safetensors", "tokenizer.json", "fromzero."
_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Columns, ImageFormat, ArrayFormat, TextFormat, ChatFormat, Classes, Numbers, Soft)
}


@dataclass(frozen=True)
class Adapted:
    """Adapters beside some Linears of a model. layers: their names → rows of their parts; options: of add_adapters;
    base, digest: where the frozen weights come from (empty: from nowhere else) and what they were; learned: whole tensors that trained."""

    layers: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    base: str
    digest: str
    learned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Design:
    """How a model is built. heads: (layer, outputs) in the order they were replaced; blueprint: None if it must be given."""

    name: str
    blueprint: Blueprint | None
    heads: tuple[tuple[str, int], ...] = ()
    adapted: Adapted | None = None

    @property
    def family(self) -> Family | None:
        return FAMILIES[self.blueprint.name] if self.blueprint is not None and self.blueprint.kind == "family" else None

    def names(self) -> TensorMap:
        """Which published tensors each of ours is made from; empty where others do not know such a model."""
        if self.family is None or self.blueprint is None:
            return {}
        return self.family.names(self.family.written(**self.blueprint.options), ())

    def published_layers(self, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Modules of ours → the published modules that their rows are."""
        names = self.names()
        return {layer: tuple(name.removesuffix(".weight") for name in names[f"{layer}.weight"][0]) for layer in layers}

    def build(self, given: nn.Module | None = None) -> nn.Module:
        """given: the module from Python, where the design cannot be written down.  returns: the module without adapters"""
        if given is not None:
            model = given
        elif self.blueprint is None:
            raise ModelError(
                f"{self.name} was given from Python and cannot be rebuilt from the run", mend="give it again: fz.load('run:…', model=Net())"
            )
        else:
            model = seeded(0, self.blueprint.build)
        for layer, outputs in self.heads:
            model = new_head(model, layer, outputs, linears=())
        return model


@dataclass(frozen=True)
class SavedModel:
    """What a model folder holds, without its weights."""

    design: Design
    preparation: Preparation
    task: str
    loss: str
    folder: Path
    weights: dict[str, str] = field(default_factory=dict)  # file → SHA-256
    published: dict[str, Any] = field(default_factory=dict)  # chat template, special tokens and the like, as they came
    plain: bool = False  # the tensors of a published family stand under our names all the same

    def load(self, given: nn.Module | None = None, *, merge: bool = False) -> nn.Module:
        """The module with the kept weights, in eval mode.

        merge:  put plain Linears in the place of adapters
        raises: SourceError, ModelError
        """
        adapted, own = self.design.adapted, self._own()
        model = self.design.build(given)
        if adapted is not None and adapted.base:
            fill(model, self._base(model.state_dict()), file=adapted.base, fresh=adapted.learned)
            kept = {name: tensor for name, tensor in model.state_dict().items() if name not in adapted.learned}
            if tensors_digest(kept) != adapted.digest:
                why = "adapters belong to the weights beside which they learned"
                raise SourceError("is no longer what it was when the run trained", why=why, file=adapted.base)
        if adapted is not None:
            add_adapters(model, adapted.layers, **adapted.options)
        model.to(dtype=next((t.dtype for t in own.values() if t.is_floating_point()), None))
        fill(model, own, file=str(self.folder), fresh=[n for n in model.state_dict() if n not in own] if adapted and adapted.base else ())
        if merge and (error := merge_adapters(model)) > MERGE_ERROR:
            raise ModelError(f"merged matrices differ by {error:.1e} from matrix and adapter", mend="load it unmerged")
        return model.eval()

    def _own(self) -> dict[str, Tensor]:
        """The tensors of the folder, under our names"""
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str | None] = {**self.weights} or {"model.safetensors": None}
        for name, sha256 in digests.items():
            if name.endswith(".safetensors") and name != FINAL:
                tensors.update(read_tensors(self.folder / name, sha256=sha256))
        family, adapted = self.design.family, self.design.adapted
        if family is None or self.plain:
            return tensors
        rest = {n.removeprefix(REST): t for n, t in tensors.items() if n.startswith(REST)}
        theirs = {n: t for n, t in tensors.items() if not n.startswith(REST)}
        if adapted is not None and adapted.base:
            settings, low, theirs = read_peft(self.folder)
            rest |= from_peft(low, settings, self.design.published_layers(adapted.layers), adapted.layers, file=str(self.folder))
        names = {ours: of for ours, of in family.names(self.config, ()).items() if set(of[0]) <= theirs.keys()}
        return to_ours(theirs, names, file=str(self.folder)) | rest

    def _base(self, state: Collection[str]) -> dict[str, Tensor]:
        """The frozen weights beside which adapters learned, from their source.  state: the names that the model has"""
        adapted, family, blueprint = self.design.adapted, self.design.family, self.design.blueprint
        assert adapted is not None
        if (Path(adapted.base) / "model.json").is_file():
            whole = read_model(Path(adapted.base)).load().state_dict()
            return {name: tensor for name, tensor in whole.items() if name not in adapted.learned}
        published = open_pretrained(adapted.base).tensors
        assert family is not None and blueprint is not None
        names = family.names(blueprint.options["config"], published.keys())
        wanted = {ours: of for ours, of in names.items() if ours in state and ours not in adapted.learned}
        return to_ours({name: published[name] for of in wanted.values() for name in of[0]}, wanted, file=adapted.base)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a published family, with the classes of this model."""
        assert self.design.blueprint is not None and self.design.family is not None
        config = self.design.family.written(**self.design.blueprint.options)
        if isinstance(self.preparation.answers, Classes):
            names = self.preparation.answers.names
            config |= {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
        return config


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, file: str, fresh: Sequence[str] = ()) -> None:
    """Put tensors into a module, strictly: each place is filled once, a tied one by either name; `fresh` ones stay as they are.

    raises: SourceError listing what is missing, extra or of another shape
    """
    state = model.state_dict()
    places = {t.data_ptr(): n for n, t in reversed(state.items())}  # the first name of a tied tensor
    wanted = {n: t for n, t in state.items() if n not in fresh and (n in tensors or places[t.data_ptr()] == n)}
    check_fit(wanted, tensors, file=file)
    with torch.no_grad():
        for name, place in wanted.items():
            place.copy_(tensors[name])


def begin_with(model: nn.Module, design: Design, folder: Path) -> None:
    """Fill a model's adapters from a folder in PEFT's format.  raises: SourceError where they are of another kind or shape"""
    assert design.adapted is not None
    settings, low, extra = read_peft(folder)
    asked = {key: design.adapted.options[key] for key in ("rank", "alpha", "rank_stabilised", "dora")}
    other = [f"{key} {getattr(settings, key)}, not {value}" for key, value in asked.items() if getattr(settings, key) != value]
    if other or extra:
        what = f"holds adapters of {'; '.join(other)}" if other else f"holds whole tensors too ({', '.join(list(extra)[:3])})"
        raise SourceError(what, mend="ask for the same in adapter", file=str(folder), key="adapter.start")
    layers = design.adapted.layers
    tensors = from_peft(low, settings, design.published_layers(layers), layers, file=str(folder))
    fill(model, tensors, file=str(folder), fresh=[name for name in model.state_dict() if name not in tensors])


def write_model(
    folder: Path, saved: SavedModel, kept: Mapping[str, Tensor], last: Mapping[str, Tensor] | None, *, infinite: Collection[str] = ()
) -> None:
    """Write weights first and the description last, so that a description is never without its weights.

    infinite:  tensors that hold infinities by design, such as masks
    raises:    NumbersError where another holds NaN or infinity; the folder is then as it was
    """
    if wrong := first_not_finite(kept, spared=infinite) or first_not_finite(last or {}, spared=infinite):
        raise NumbersError(
            wrong, why="a model with such weights says nothing, so it is not written", mend="train with a smaller optimizer.lr"
        )
    folder.mkdir(parents=True, exist_ok=True)
    family = saved.design.family
    inputs = asdict(saved.preparation.inputs)
    tokenizer = inputs.pop("tokenizer", None)
    adapted = saved.design.adapted
    if family is None or saved.plain or (adapted is not None and adapted.base):
        digests = _write_adapters(folder, saved, adapted, kept) if family and adapted else {}
        digests = digests or {"model.safetensors": write_tensors(folder / "model.safetensors", kept)}
        if tokenizer is not None:
            for name, text in tokenizer_files(tokenizer, saved.published.get("special"), saved.published.get("chat_template")).items():
                write_whole(folder / name, text.encode())
    else:
        names = {ours: theirs for ours, theirs in family.names(saved.config, ()).items() if ours in kept}
        digests = write_folder(folder, saved.config, to_theirs(kept, names), tokenizer=tokenizer, **saved.published)
        tied = {kept[n].data_ptr() for n in names if n in kept}
        rest = {REST + n: t for n, t in kept.items() if n not in names and t.data_ptr() not in tied}
        if rest:
            digests["rest.safetensors"] = write_tensors(folder / "rest.safetensors", rest)
    if last is not None:
        digests[FINAL] = write_tensors(folder / FINAL, last)
    values = {
        "version": VERSION,
        "task": saved.task,
        "loss": saved.loss,
        "design": asdict(saved.design),
        "preparation": {
            "inputs": {"kind": type(saved.preparation.inputs).__name__, **inputs},
            "answers": {"kind": type(saved.preparation.answers).__name__, **asdict(saved.preparation.answers)},
            "target": saved.preparation.target,
        },
        "published": saved.published,
        "plain": saved.plain,
        "weights": digests,
    }
    write_whole(folder / "model.json", json.dumps(values, indent=1).encode())
    if last is None:
        (folder / FINAL).unlink(missing_ok=True)  # of when the run was broken off


def _write_adapters(folder: Path, saved: SavedModel, adapted: Adapted, kept: Mapping[str, Tensor]) -> dict[str, str]:
    """PEFT's two files, and what its format has no place for in rest.safetensors."""
    of, hub, asked = saved.design.names(), re.fullmatch(r"(?:hf|ms):([\w.-]+/[\w.-]+)@(.*)", adapted.base), adapted.options
    settings = PeftSettings(
        asked["rank"],
        asked["alpha"],
        asked["rank_stabilised"],
        asked["dora"],
        asked["dropout"],
        base=hub[1] if hub else adapted.base,
        revision=hub[2] if hub and adapted.base.startswith("hf:") else "",
        transposed=any(how == "transpose" for _, how, _ in of.values()),
    )
    whole = to_theirs(kept, {name: of[name] for name in adapted.learned if name in of})
    digests = write_peft(folder, settings, kept, saved.design.published_layers(adapted.layers), adapted.layers, whole)
    rest = {REST + name: kept[name] for name in adapted.learned if name not in of}
    return digests | ({"rest.safetensors": write_tensors(folder / "rest.safetensors", rest)} if rest else {})


def read_model(folder: Path) -> SavedModel:
    """raises: SourceError where the folder is no model of ours"""
    path = folder / "model.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        parts = values["preparation"]
        if parts["inputs"]["kind"] in (TextFormat.__name__, ChatFormat.__name__):
            parts["inputs"]["tokenizer"] = (folder / TOKENIZER).read_text(encoding="utf-8")
        inputs, answers = (TypeAdapter(_KINDS[p.pop("kind")]).validate_python(p) for p in (parts["inputs"], parts["answers"]))
        design = TypeAdapter(Design).validate_python(values["design"])
        preparation = Preparation(inputs, answers, parts["target"])
        published, plain = values["published"], bool(values.get("plain"))
        return SavedModel(design, preparation, values["task"], values["loss"], folder, values["weights"], published, plain)
    except FileNotFoundError:
        raise SourceError(
            "holds no model (no model.json)", why=_foreign(folder), file=str(folder), mend="name a run's folder or run:NAME"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise SourceError(f"is no model description of ours ({type(error).__name__}: {str(error)[:120]})", file=str(path)) from None


def _foreign(folder: Path) -> str:
    """What a folder of another kind asks for, by name; nothing in it is imported."""
    config = folder / "config.json"
    if config.is_file() and "auto_map" in config.read_text(encoding="utf-8", errors="replace"):
        return f"{config} asks for code of its own (auto_map); it was not run"
    code = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    return f"it brings code ({', '.join(code[:3])}), which was not run" if code else ""


def find_model(source: str, runs: Path) -> Path:
    """`run:NAME`, a run's folder or its model folder → the model folder.

    A folder outside the runs is opened only if its model needs no code of its own.
    """
    if source.startswith("run:"):
        name = source.removeprefix("run:")
        folder = runs / name
        if not folder.is_dir() or "/" in name or name in ("", ".", ".."):
            raise no_run(runs, name, key="model")
        if not (folder / "model" / "model.json").exists():
            raise SourceError(f"run '{name}' has not saved a model yet", mend=f"fromzero resume {name}", key="model")
        return folder / "model"
    folder = Path(source)
    model = folder if (folder / "model.json").exists() else folder / "model" if (folder / "model" / "model.json").exists() else folder
    if runs.resolve() not in model.resolve().parents and (model / "model.json").exists():
        blueprint = read_model(model).design.blueprint
        if blueprint is not None and blueprint.kind in ("code", "hub"):
            raise SourceError(
                f"its model.json runs Python code ({blueprint.name})",
                why="code of a folder outside your runs is not run",
                mend=f"if you trust it, move the run into {runs}",
                file=str(model),
            )
    return model
