"""hf: a model of a published family in, a folder that transformers' from_pretrained loads out."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.models import FAMILIES, Decoder
from fromzero.models.encoder import Encoder
from fromzero.models.families import TensorMap
from fromzero.models.foreign import opened_by_transformers
from fromzero.models.vit import ViT, written_vit
from fromzero.runner.start import build_published
from fromzero.sources.cache import write_whole
from fromzero.use.export.compare import Compared, absent, compare, same
from fromzero.use.export.subject import Subject
from fromzero.weights import open_pretrained, to_theirs, write_folder

OPENS = "transformers: from_pretrained(FOLDER)"


def refusal(subject: Subject) -> str:
    model = subject.model
    if isinstance(model, ViT):
        return ""
    if subject.design.family is None or not isinstance(model, (Decoder, Encoder)):
        return "it is of no family whose tensors have published names in transformers"
    classifies = str(_config(subject).get("architectures")).endswith("ForSequenceClassification']")
    if isinstance(model, Encoder) and isinstance(model.head, nn.Linear) and not classifies:
        return f"its head reads the {model.pooling} of a text, which no class of transformers does (model: {{pooling: pooler}} would)"
    if left := [name for name in model.state_dict() if name not in _names(subject)]:
        return f"its family has no place for {', '.join(left[:3])}"
    return ""


def write(subject: Subject, folder: Path) -> list[Compared]:
    names, state = _names(subject), subject.model.state_dict()
    tensors = to_theirs(state, {ours: theirs for ours, theirs in names.items() if ours in state})
    start = subject.start
    write_folder(folder, _config(subject), tensors, tokenizer=start.tokenizer, **(start.accompanying if subject.inputs[1:] else {}))
    if isinstance(subject.model, ViT):
        write_whole(folder / "preprocessor_config.json", json.dumps(_pixels(subject.model), indent=2).encode())
    again = build_published(open_pretrained(str(folder)), {}, per_token=subject.reads == "language")[0].eval()
    with torch.no_grad():
        found = [compare("fromzero", subject.said, again(*subject.inputs))]
    if find_spec("transformers") is None:
        return [*found, absent("transformers")]
    return [*found, _by_transformers(subject, folder)]


def _by_transformers(subject: Subject, folder: Path) -> Compared:
    """What transformers says when it opens the folder: of a body without a head the state of each token is compared."""
    model, reader = subject.model, "transformers"
    if isinstance(model, ViT):
        theirs = opened_by_transformers(folder, "ImageClassification")
        pixels = (subject.inputs[0] - model.embedding.mean) / model.embedding.std
        return compare(reader, subject.said, theirs.scores([pixels]))
    if isinstance(model, Encoder) and not isinstance(model.head, nn.Linear):
        with torch.no_grad():
            wanted = model.states(*subject.inputs)
        return compare(reader, wanted, opened_by_transformers(folder, "").scores(subject.documents), also="the states of all tokens")
    theirs = opened_by_transformers(folder, "CausalLM" if subject.reads == "language" else "SequenceClassification")
    also = []
    if theirs.tokenizer is not None and subject.start.tokenizer is not None:
        ours = subject.tokens(subject.texts)
        also.append(same(reader, "tokens", ours, [theirs.tokens(text) for text in subject.texts]))
    if subject.reads == "language":
        prompt, wanted_ids = subject.continuation()
        also.append(same(reader, "greedy continuation", wanted_ids, theirs.go_on(prompt, len(wanted_ids))))
    return compare(reader, subject.said, theirs.scores(subject.documents), also=", ".join(also))


def _names(subject: Subject) -> TensorMap:
    config = _config(subject)
    return FAMILIES[config["model_type"]].names(config, ())


def _config(subject: Subject) -> dict[str, Any]:
    design, model = subject.design, subject.model
    if isinstance(model, ViT):
        config = written_vit(model)
    else:
        assert design.family is not None and design.blueprint is not None
        config = design.family.written(**design.blueprint.options)
    if names := subject.classes:
        config |= {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}
    return config


def _pixels(model: ViT) -> dict[str, Any]:
    channels, height, width = model.embedding.shape

    def each(scale: Tensor) -> list[float]:
        return [float(value) for value in scale.flatten().expand(channels)]

    size = {"height": height, "width": width}
    kind = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "resample": 2}
    return {
        **kind,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": each(model.embedding.mean),
        "image_std": each(model.embedding.std),
    }
