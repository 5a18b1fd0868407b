"""GGUF files that fromzero writes: byte for byte the reference's blocks, read by the gguf package, by us, and cut into the same tokens."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fromzero.data import tokens as tk
from fromzero.errors import ModelError, SourceError
from fromzero.weights.blocks import KINDS, WRITTEN, dequantise, quantise
from fromzero.weights.gguf import open_gguf
from fromzero.weights.gguf_names import laid_out, to_gguf
from fromzero.weights.gguf_tokenizer import gguf_tokenizer, tokenizer_to_gguf
from fromzero.weights.gguf_writer import write_gguf

TEXTS = ["The 1234 foxes don't jump; naïve café", "  two\n\n\tspaces", "東京 🎉 Ünï"]


@pytest.mark.parametrize("number", WRITTEN)
def test_blocks_are_the_references_to_the_last_byte(number):
    assert [KINDS[n][0] for n in WRITTEN] == ["F32", "F16", "Q4_0", "Q8_0"]
    values = np.random.default_rng(number).standard_normal((50, 64)).astype(np.float32)
    values[0] = 0
    values[1, :32] = np.arange(32) / 2 - 8  # halves, which are rounded away from zero
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType(number))
    ours = quantise(torch.from_numpy(values), number)
    assert ours.numpy().tobytes() == np.ascontiguousarray(theirs).tobytes()
    assert (dequantise(ours, number).float().reshape(50, 64) - torch.from_numpy(values)).abs().max() < 0.6


def test_the_gguf_package_reads_what_is_written(tmp_path):
    values = {"odd": torch.arange(3.0), "half": torch.ones(2, 3), "packed": torch.randn(3, 64), "four": torch.randn(5, 32)}
    kinds = {"odd": "F32", "half": "F16", "packed": "Q8_0", "four": "Q4_0"}
    meta = {"general.architecture": "llama", "n": 7, "x": 1e-5, "yes": True, "texts": ["é你", ""], "ints": [1, -2], "floats": [0.5, -2.0]}
    write_gguf(tmp_path / "m.gguf", meta, {n: tuple(t.shape) for n, t in values.items()}, kinds, values.__getitem__)
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {field: theirs.get_field(field).contents() for field in ("n", "yes", "texts", "ints", "floats")} == {
        key: meta[key] for key in ("n", "yes", "texts", "ints", "floats")
    }
    assert {t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors} == {
        name: (kinds[name], tuple(values[name].shape)) for name in values
    }
    found, tensors = open_gguf(tmp_path / "m.gguf")
    assert found == meta
    assert torch.equal(tensors["odd"], values["odd"]) and (tensors["packed"] - values["packed"]).abs().max() < 0.03


def test_llamas_rows_are_put_in_pairs_as_the_converter_does(tmp_path, tiny, written):
    model = tiny("llama", num_key_value_heads=2)
    theirs = open_gguf(written(tmp_path / "m.gguf", model))[1]
    ours = to_gguf(model.state_dict(), "llama", (4, 2))
    assert ours.keys() == set(theirs)
    assert all(torch.equal(laid_out(*ours[name]), theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "gpt2"])
def test_the_names_and_layouts_of_other_architectures_are_the_converters_too(tmp_path, tiny, written, kind):
    model = tiny(kind)
    theirs = open_gguf(written(tmp_path / "m.gguf", model))[1]
    ours = to_gguf(model.state_dict(), kind, (4, 2))
    assert ours.keys() == set(theirs) and all(torch.equal(laid_out(*ours[name]), theirs[name]) for name in theirs)


def test_a_tensor_that_has_no_word_is_named():
    with pytest.raises(SourceError, match=r"model\.layers\.0\.self_attn\.strange\.weight: has no word in GGUF; llama has none"):
        to_gguf({"model.layers.0.self_attn.strange.weight": torch.ones(2, 2)}, "llama", (1, 1))


def byte_level(cut: str) -> str:
    """A trained tokenizer, with another way of cutting text put in its place"""
    made = Tokenizer.from_str(tk.byte_pairs(TEXTS * 3, 330))
    if cut == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return made.to_str()


@pytest.mark.parametrize("cut", ["gpt-2", "smollm"])
def test_a_byte_level_tokenizer_is_described_and_made_again(cut):
    tokenizer = tk.add_tokens(byte_level(cut), ["<|im_end|>"])
    rows = tk.vocabulary_size(tokenizer) + 3
    meta = tokenizer_to_gguf(tokenizer, rows, {"eos": 0}, (False, False), TEXTS)
    assert meta["tokenizer.ggml.pre"] == cut and meta["tokenizer.ggml.eos_token_id"] == 0
    assert meta["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]" and meta["tokenizer.ggml.token_type"][-1] == 5
    assert meta["tokenizer.ggml.token_type"][meta["tokenizer.ggml.tokens"].index("<|im_end|>")] == 3
    again, why = gguf_tokenizer(meta)
    assert not why
    assert tk.encode(again, [*TEXTS, "a<|im_end|>b"], special=False) == tk.encode(tokenizer, [*TEXTS, "a<|im_end|>b"], special=False)


def test_sentencepieces_merges_become_scores():
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "▁a"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a")]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    meta = tokenizer_to_gguf(made.to_str(), len(names), {"bos": 1, "eos": 2}, (True, False), ["ab a b", "c"])
    assert meta["tokenizer.ggml.model"] == "llama" and meta["tokenizer.ggml.add_bos_token"] is True
    assert [meta["tokenizer.ggml.scores"][names.index(t)] for t in ("ab", "▁ab", "▁a", "a")] == [-1.0, -2.0, -3.0, 0.0]


@pytest.mark.parametrize("wrong", ["characters", "words"])
def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(wrong):
    tokenizer = tk.characters(TEXTS)
    if wrong == "words":
        parts = json.loads(tk.byte_pairs(TEXTS, 300))
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, parts["pre_tokenizer"]]}
        tokenizer = json.dumps(parts)
    with pytest.raises(ModelError, match=r"is of no kind that GGUF names; .*; byte-level BPE that cuts text as GPT-2"):
        tokenizer_to_gguf(tokenizer, 10, {}, (False, False), TEXTS)
