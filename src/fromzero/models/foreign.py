"""Foreign: models that fromzero does not write itself in, modules that are called like ours out.

The one place that meets transformers, timm and torch.hub, each only when such a model is asked for. A config.json and tensors
come in as values: no file of theirs is opened here, and no code that lies beside weights is run. Only torch.hub runs a
repository's code, by its nature; that the recipe trusts it is for the runner to see to.
Dims: B documents or images, N tokens end to end, C documents of one length, T positions, V vocabulary, K outputs.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.errors import FromzeroError, MissingExtra, ModelError, SourceError
from fromzero.models.families import Config
from fromzero.models.layers.documents import documents_of

Pixel = float | Sequence[float]  # one number, or one a channel
_EXTRAS = {"transformers": "'fromzero[hub]'", "timm": "timm torchvision"}
Misfit = tuple[list[str], list[str], list[str]]  # tensors that are missing, extra, of another shape


class Foreign(nn.Module):
    """A model of transformers, called as ours are; how it attends is its own affair. Without padding and masks: documents of
    one length that stand side by side run together, the others apart.

    theirs:     the model as transformers makes it
    per_token:  it scores the next token of each; else one row a document or an image
    mean, std:  of the pixels that it was trained on
    built_by:   the library, and what becomes of pixels
    """

    mean: Tensor
    std: Tensor

    def __init__(self, theirs: Any, per_token: bool, mean: Pixel, std: Pixel) -> None:
        super().__init__()
        self.theirs, self.per_token = theirs, per_token
        self.context = max(getattr(theirs.config, "max_position_embeddings", 0) or 0, 0) or math.inf  # some say -1
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)
        self.built_by = f"transformers {importlib.import_module('transformers').__version__}"
        if theirs.main_input_name == "pixel_values":
            told = ", for want of a preprocessor_config.json" if mean == 0.5 else ""
            self.built_by += f", which gets (pixels - {mean}) / {std}{told}"
        theirs.config.use_cache = False  # it would keep every layer's keys and values
        if getattr(theirs.config, "pad_token_id", 0) is None:
            theirs.config.pad_token_id = -1  # no token at all: with None, their classifiers take one document at a time

    def forward(self, inputs: Tensor, offsets: Tensor | None = None) -> Tensor:
        """inputs: (N,) int64 with offsets (B + 1,), or images (B, 3, H, W) in [0, 1].  returns: (N, V) per token, else (B, K)

        raises: ShapeError as documents_of does; ModelError where a document is longer than the model has positions
        """
        if offsets is None:
            scores: Tensor = self.theirs(pixel_values=(inputs - self.mean) / self.std).logits
            return scores
        documents = documents_of(inputs, offsets)
        if documents.longest > self.context:
            said = f"a document has {documents.longest} tokens, the model reads {self.context}"
            raise ModelError(said, mend="cut the documents with data.max_tokens", key="data.max_tokens")
        rows = []
        for group, part in zip(documents.groups, inputs.split([g.count * g.length for g in documents.groups]), strict=True):
            scores = self.theirs(input_ids=part.view(group.count, group.length)).logits  # (C, T, V) or (C, K)
            rows.append(scores.flatten(0, 1) if self.per_token else scores)
        return torch.cat(rows)


def foreign_reads(kind: str) -> str:
    """text or image; empty for a model_type that transformers does not know, or only for other tasks.  raises: MissingExtra"""
    text = kind in _classes("CAUSAL_LM") or kind in _classes("SEQUENCE_CLASSIFICATION")
    return "text" if text else "image" if kind in _classes("IMAGE_CLASSIFICATION") else ""


def pixel_scale(card: Mapping[str, Any]) -> dict[str, Pixel]:
    """mean and std for pixels in [0, 1], as a preprocessor_config.json has them; none where there is no such file."""
    scaled = "image_mean" in card and card.get("do_normalize", True)
    return {"mean": card["image_mean"], "std": card["image_std"]} if scaled else {"mean": 0.0, "std": 1.0} if card else {}


def build_foreign(kind: str, *, config: Config, per_token: bool, mean: Pixel = 0.5, std: Pixel = 0.5) -> Foreign:
    """With fresh weights.  raises: ModelError, MissingExtra"""
    make, described = _chosen(config, per_token)
    with _blame(kind, quiet=True):
        return Foreign(make(described), per_token, mean, std)


def load_foreign(
    tensors: Mapping[str, Tensor], *, config: Config, per_token: bool, fresh: bool = False, mean: Pixel = 0.5, std: Pixel = 0.5
) -> tuple[Foreign, Misfit]:
    """With published weights in float32, and what of them does not fit.

    transformers' own from_pretrained puts them in, because it renames and joins the tensors of older files; it is given tensors
    and no folder, so that it opens nothing, fetches nothing, and all it gets went through our readers.

    fresh:    the head may be missing or of another shape, and another head in the file is left out
    raises:   ModelError where the config cannot be built, or the model sees the token that it has to predict
    """
    make, described = _chosen(config, per_token)
    with _blame(make.__name__, quiet=True):
        own = {
            name: tensor.clone() for name, tensor in tensors.items()
        }  # transformers takes them as they are; a reader may give the same again
        asked = {"config": described, "state_dict": own, "torch_dtype": torch.float32}
        theirs, notes = make.from_pretrained(None, **asked, ignore_mismatched_sizes=True, output_loading_info=True)
    model, body = Foreign(theirs, per_token, mean, std), f"{theirs.base_model_prefix}."
    if per_token:
        with torch.no_grad():
            one, other = (model(torch.tensor([0, second]), torch.tensor([0, 2]))[0] for second in (1, 2))
        if (one - other).abs().max() > 1e-5 * one.abs().max():
            raise ModelError(f"{make.__name__} sees the tokens after each one too", mend="it can classify, not predict", key="model")
    before = "" if any(name.startswith(body) for name in tensors) else body  # a file of the body alone does not name it

    def counts(name: str) -> bool:
        return not fresh or (name.startswith(body) and "pooler." not in name)

    missing = [name for name in sorted(notes["missing_keys"]) if counts(name)]
    extra = [name for name in sorted(notes["unexpected_keys"]) if counts(before + name)]
    return model, (missing, extra, [f"{n} is {tuple(a)}, not {tuple(b)}" for n, a, b in sorted(notes["mismatched_keys"]) if counts(n)])


@dataclass(frozen=True)
class Opened:
    """A folder of ours as transformers opens it.  tokenizer: None where the folder has none"""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def scores(self, inputs: Sequence[Tensor]) -> Tensor:
        """What it says of texts, each (T,) int64, or of one batch of pixels.  returns: (N, V) per token, (N, D) of a body, (B, K)"""
        with _blame("what transformers opened"):
            if self.model.main_input_name == "pixel_values":
                scores: Tensor = self.model(pixel_values=inputs[0]).logits
                return scores
            said = [self.model(document[None]) for document in inputs]
            rows = [one.logits if "logits" in one else one.last_hidden_state for one in said]
            return torch.cat([row[0] if row.dim() == 3 else row for row in rows])

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def go_on(self, prompt: Sequence[int], most: int) -> list[int]:
        """The greedy continuation, read token by token with what the model keeps of those before; no token ends it."""
        made: list[int] = []
        unread, kept = list(prompt), None
        with _blame("what transformers opened"):
            while len(made) < most:
                said = self.model(torch.tensor([unread]), past_key_values=kept, use_cache=True)
                unread, kept = [int(said.logits[0, -1].argmax())], said.past_key_values
                made += unread
        return made


def opened_by_transformers(folder: Path, task: str, *, base: Path | None = None) -> Opened:
    """task: CausalLM | SequenceClassification | ImageClassification | empty for a body.  base: of a folder with an adapter, through peft"""
    with _blame(f"{folder}, opened by transformers,", quiet=True):
        library = importlib.import_module("transformers")
        make = getattr(library, f"AutoModelFor{task}" if task else "AutoModel")
        theirs = make.from_pretrained(base or folder, dtype=torch.float32, local_files_only=True)
        if base is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft calls parts of transformers by older names
                theirs = importlib.import_module("peft").PeftModel.from_pretrained(theirs, folder)
        has = (folder / "tokenizer_config.json").is_file()
        return Opened(theirs.eval(), library.AutoTokenizer.from_pretrained(folder, local_files_only=True) if has else None)


def hub_name(source: str, folders: Sequence[Path]) -> str:
    """`hub:OWNER/REPOSITORY[:REF]/ENTRY` without the prefix; of `hub:./FOLDER/ENTRY` the folder's whole path.  raises: SourceError"""
    repository, _, entry = source.removeprefix("hub:").rpartition("/")
    if repository.startswith((".", "/", "~")):
        there = [path for folder in folders if ((path := folder / Path(repository).expanduser()) / "hubconf.py").is_file()]
        repository = str(there[0].resolve()) if there else ""
    if "/" not in repository or not entry:
        mend = "write hub:OWNER/REPOSITORY/ENTRY, hub:OWNER/REPOSITORY:REF/ENTRY, or hub:./FOLDER/ENTRY of a folder with a hubconf.py"
        raise SourceError(f"'{source}' is no entry of a repository", mend=mend, key="model")
    return f"{repository}/{entry}"


def build_hub(name: str, /, **options: Any) -> nn.Module:
    """name: as hub_name gives it. Runs the repository's hubconf.py; the mean and std of pixels are for the caller to see to.

    raises: SourceError where the repository is not to be had, ModelError where its code fails or gives no module
    """
    repository, _, entry = name.rpartition("/")
    source = "local" if Path(repository).is_absolute() else "github"
    with _blame(f"hub:{name}"):
        made = torch.hub.load(repository, entry, source=source, trust_repo=True, verbose=False, **options)
        if not isinstance(made, nn.Module):
            raise TypeError(f"it gives {type(made).__name__}, not a torch.nn.Module")
        return made


def build_timm(name: str, /, **options: Any) -> nn.Module:
    """With fresh weights; the mean and std of pixels are for the caller to see to.  raises: ModelError, MissingExtra"""
    with _blame(f"timm:{name}"):
        made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False, **options)
        return made


FOREIGN: dict[str, Callable[..., nn.Module]] = {"foreign": build_foreign, "hub": build_hub, "timm": build_timm}


def _classes(task: str) -> Mapping[str, Any]:
    """The names of transformers' classes for a task, by model_type"""
    with _blame("a model that fromzero does not write"):
        found: Mapping[str, Any] = vars(importlib.import_module("transformers.models.auto.modeling_auto"))[
            f"MODEL_FOR_{task}_MAPPING_NAMES"
        ]
        return found


def _chosen(config: Config, per_token: bool) -> tuple[Any, Any]:
    """The class of transformers that a config.json and the task ask for, and transformers' value of that config."""
    kind = str(config["model_type"])
    task = "CAUSAL_LM" if per_token else f"{'IMAGE' if foreign_reads(kind) == 'image' else 'SEQUENCE'}_CLASSIFICATION"
    names = _classes(task).get(kind, ())
    if not names:
        raise ModelError(f"transformers has no {task.lower()} of model_type '{kind}'", mend="another task, or another model", key="model")
    names = (names,) if isinstance(names, str) else names  # a few have several; their config.json says which
    with _blame(f"a model of model_type '{kind}'", quiet=True):
        library = importlib.import_module("transformers")
        make = getattr(library, next((name for name in config.get("architectures") or () if name in names), names[0]))
        described = library.AutoConfig.for_model(**config)
        described = described if isinstance(described, make.config_class) else described.get_text_config()  # of more, the text part
        described._attn_implementation = described._experts_implementation = None  # a kernel named there would be fetched, and run
    return make, described


@contextmanager
def _blame(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn what others raise into our errors.  quiet: without their reports on standard error, of which ours say what matters"""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING if quiet else before)
    try:
        with redirect_stderr(io.StringIO()) if quiet else nullcontext():
            yield
    except FromzeroError:
        raise
    except Exception as error:  # code of others: anything can happen
        said = f"{what} cannot be built: {type(error).__name__}: {str(error).strip()[:300]}"
        if isinstance(error, ImportError):
            missing = (error.name or "").partition(".")[0]
            raise MissingExtra(said, mend=f"pip install {_EXTRAS.get(missing, missing)}", key="model") from error
        if isinstance(error, OSError) or "internet" in str(error):
            raise SourceError(said, mend="check the network, or name a copy on this machine: hub:./FOLDER/ENTRY", key="model") from error
        raise ModelError(said, key="model") from error
    finally:
        logging.disable(before)
