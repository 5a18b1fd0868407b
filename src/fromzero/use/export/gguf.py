"""gguf: a decoder in, one file that llama.cpp runs out, and a Modelfile with which Ollama takes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fromzero.data.tokens as tk
from fromzero.errors import ModelError
from fromzero.models import Decoder
from fromzero.models.decoder import DecoderConfig
from fromzero.models.layers.rotary import Rope, frequencies
from fromzero.runner.start import Start, build_published
from fromzero.sources.cache import write_whole
from fromzero.use.export.compare import Compared, absent, compare, nats, same
from fromzero.use.export.subject import Subject
from fromzero.use.llama import INSTALL, LlamaCpp, installed
from fromzero.weights import open_pretrained, to_theirs
from fromzero.weights.gguf_names import ARCHITECTURES, ROTARY_FACTORS, laid_out, to_gguf
from fromzero.weights.gguf_tokenizer import tokenizer_to_gguf
from fromzero.weights.gguf_writer import write_gguf

OPENS = "llama-cli -m FOLDER/model.gguf, or ollama create NAME -f FOLDER/Modelfile"
FILE = "model.gguf"
NUMBERS = ("f16", "f32", "q8_0", "q4_0")
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # as llama.cpp counts them
# What is lost at most: relative to the largest score, and in nats of the mean next-token loss. By fromzero, and by llama.cpp, which
# rounds what it multiplies with F16 and quantised matrices too.
BOUNDS = {"f32": (1e-4, 1e-3), "f16": (5e-3, 1e-2), "q8_0": (5e-2, 5e-2), "q4_0": (5e-1, 5e-1)}
LLAMA_CPP = {"f32": (1e-3, 1e-3), "f16": (1e-2, 1e-2), "q8_0": (1e-1, 1e-1), "q4_0": (5e-1, 5e-1)}


def refusal(subject: Subject) -> str:
    model, family = subject.model, subject.design.name if subject.design.blueprint is None else subject.design.blueprint.name
    if not isinstance(model, Decoder) or subject.reads != "language":
        return "it is no language model that fromzero writes itself"
    if _architecture(family) is None:
        return f"the names of {family} in GGUF are not known here; they are of {', '.join((*ARCHITECTURES, 'mistral'))}"
    if subject.start.tokenizer is None:
        return "it has no tokenizer, without which llama.cpp opens nothing"
    windows = {layer.window for layer in model.config.layers if layer.window is not None and layer.window < model.config.context}
    if windows:
        return f"its layers see {min(windows)} of {model.config.context} tokens, which llama.cpp does not do for this architecture"
    rope = model.ropes[0] if model.ropes else None
    if len(model.ropes) > 1 or any(layer.rope is not rope for layer in model.config.layers) or (rope and _scaled(rope, family) is None):
        return "its rotary positions are stretched in a way that the file has no words for"
    return ""


def write(subject: Subject, folder: Path) -> list[Compared]:
    model, start, numbers = subject.model, subject.start, subject.numbers
    assert isinstance(model, Decoder) and start.tokenizer is not None and subject.design.blueprint is not None
    kind = _architecture(subject.design.blueprint.name)
    assert kind is not None
    state = model.state_dict()
    published = to_theirs(state, {ours: of for ours, of in subject.design.names().items() if ours in state})
    made = to_gguf(published, kind, (model.config.heads, model.config.kv_heads))
    scaling, factors = _scaled(model.ropes[0], kind) or ({}, None) if model.ropes else ({}, None)
    if factors is not None:
        made[ROTARY_FACTORS] = (factors, None)
    shapes = {name: tuple(tensor.shape[::-1] if change == "T" else tensor.shape) for name, (tensor, change) in made.items()}
    meta = {"general.architecture": kind, "general.name": Path(subject.source).name.removeprefix("run:"), "general.quantization_version": 2}
    meta |= {"general.file_type": _FILE_TYPES[numbers], **_sizes(model.config, kind)}
    meta |= {f"{kind}.{key}": value for key, value in scaling.items()}
    ids, ends = _special(start)
    meta |= tokenizer_to_gguf(start.tokenizer, model.config.vocabulary, ids, ends, subject.texts)
    meta |= {"tokenizer.chat_template": start.template} if start.template else {}
    write_gguf(folder / FILE, meta, shapes, {n: _kind(n, s, numbers) for n, s in shapes.items()}, lambda name: laid_out(*made[name]))
    write_whole(folder / "Modelfile", _modelfile(start, model.config.context).encode())
    return [_read_back(subject, folder / FILE), _by_llama_cpp(subject, folder / FILE)]


def _architecture(family: str) -> str | None:
    return "llama" if family == "mistral" else family if family in ARCHITECTURES else None


def _sizes(config: DecoderConfig, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"context_length": config.context, "embedding_length": config.width, "feed_forward_length": config.hidden}
    found |= {"block_count": len(config.layers), "attention.head_count": config.heads}
    if kind == "gpt2":
        found["attention.layer_norm_epsilon"] = float(config.norm_eps)
    else:
        found |= {"attention.head_count_kv": config.kv_heads, "attention.layer_norm_rms_epsilon": float(config.norm_eps)}
        found |= {"attention.key_length": config.head_width, "attention.value_length": config.head_width, "vocab_size": config.vocabulary}
    return {f"{kind}.{key}": value for key, value in found.items()}


def _scaled(rope: Rope, family: str) -> tuple[dict[str, Any], Tensor | None] | None:
    """The words for a rope, and llama 3's factors of its frequencies; None for one that these do not describe"""
    width, found = 2 * len(rope.frequencies), rope.frequencies
    if rope.far or rope.magnitude != 1 or rope.interleaved:
        return None
    base = float(f"{(found[1] / found[0]) ** (-width / 2):.7g}") if width > 2 else 10_000.0
    ratios = torch.tensor(frequencies(base, width), dtype=torch.float64) / torch.tensor(found, dtype=torch.float64)
    words: dict[str, Any] = {"rope.freq_base": base, "rope.dimension_count": width}
    if torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5):
        factor = float(ratios[0])
        scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        return words | (scaling if not math.isclose(factor, 1, rel_tol=1e-5) else {}), None
    return (words, ratios.float()) if family == "llama" else None


def _kind(name: str, shape: tuple[int, ...], numbers: str) -> str:
    """Vectors and positions stay whole; what words are made of and read by loses less; rows that are no whole blocks become halves."""
    if len(shape) == 1 or name in ("position_embd.weight", ROTARY_FACTORS):
        return "F32"
    if numbers.startswith("q") and shape[-1] % 32:
        return "F16"
    return "Q8_0" if numbers == "q4_0" and name in ("token_embd.weight", "output.weight") else numbers.upper()


def _special(start: Start) -> tuple[dict[str, int], tuple[bool, bool]]:
    """The ids of special tokens, and whether bos and eos stand around a text"""
    assert start.tokenizer is not None
    named = {
        ours: start.special.get(f"{theirs}_token", "")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
    }
    ids = {name: one[0] for name, text in named.items() if text and len(one := tk.encode(start.tokenizer, [text], special=False)[0]) == 1}
    if "eos" not in ids and (end := tk.end_id(start.tokenizer)) is not None:
        ids["eos"] = end
    if other := [token for token in start.stops if token != ids.get("eos")]:
        ids["eot" if "eos" in ids else "eos"] = other[0]
    before, after = tk.frame(start.tokenizer)
    for name, around in (("bos", before), ("eos", after)):
        if around and (len(around) > 1 or around[0] != ids.setdefault(name, around[0])):
            raise ModelError(
                f"its tokenizer puts {around} around a text", why="llama.cpp puts one bos before and one eos after it, or none"
            )
    return ids, (bool(before), bool(after))


def _modelfile(start: Start, context: int) -> str:
    """Ollama takes the chat template from the file; what ends an answer is said again, because it does not take that from everywhere."""
    assert start.tokenizer is not None
    stops = sorted(tk.texts_of(start.tokenizer, start.stops))
    return "\n".join([f"FROM ./{FILE}", f"PARAMETER num_ctx {context}", *(f'PARAMETER stop "{text}"' for text in stops)]) + "\n"


def _read_back(subject: Subject, path: Path) -> Compared:
    found = open_pretrained(str(path))
    again = build_published(found, {}, per_token=True)[0].eval()
    if found.tokenizer is None:
        raise ModelError("the tokenizer in the file cannot be read back", why=str(found.extras.get("no tokenizer")), file=str(path))
    also = same("fromzero", "tokens", subject.tokens(subject.texts), tk.encode(found.tokenizer, subject.texts, special=False))
    with torch.no_grad():
        scores = again(*subject.inputs)
    return _measured("fromzero", subject, scores, BOUNDS[subject.numbers], also)


def _measured(reader: str, subject: Subject, scores: Tensor, bounds: tuple[float, float], also: str) -> Compared:
    """Scores, and the loss of the next token, which is what lost digits cost"""
    parts = list(scores.split([len(document) for document in subject.documents]))
    lost = nats(subject.documents, parts) - nats(subject.documents, subject.each)
    if not abs(lost) <= bounds[1]:
        why = f"{bounds[1]:g} nats are allowed for {subject.numbers}; the file was not kept"
        raise ModelError(f"{reader}: its next-token loss differs by {lost:+.4f} nats", why=why, mend="export it as f16, or as f32")
    return compare(reader, subject.said, scores, bound=bounds[0], also=f"{also}; next-token loss {lost:+.5f} nats ({bounds[1]:g} allowed)")


def _by_llama_cpp(subject: Subject, path: Path) -> Compared:
    if not installed():
        return absent("llama.cpp", INSTALL)
    theirs = LlamaCpp(path, room=max(len(document) for document in subject.documents) + 64, whole=True, every=True)
    ours = subject.tokens(subject.texts)
    also = same("llama.cpp", "tokens", ours, [theirs.tokens(text) for text in subject.texts])
    if subject.numbers == "f32":
        prompt, wanted = subject.continuation()
        also += ", " + same("llama.cpp", "greedy continuation", wanted, theirs.go_on(prompt, len(wanted)))
    scores = torch.cat([theirs.scores(document.tolist()) for document in subject.documents])
    return _measured("llama.cpp", subject, scores, LLAMA_CPP[subject.numbers], also)
