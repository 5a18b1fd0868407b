"""What is written is a folder that transformers loads, with or without shards, whole or not at all."""

import json
import os
import stat

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fromzero.errors import SourceError
from fromzero.sources import cache, digest_of
from fromzero.weights import open_pretrained, write_folder

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "model_max_length": 64}


def tokenizer():
    letters = {"<|im_start|>": 0, "<|im_end|>": 1, **{letter: i for i, letter in enumerate("abcdefghi", start=2)}}
    made = Tokenizer(models.BPE(letters, [], unk_token=None))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made.to_str()


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 6_000, 1])
def test_transformers_opens_the_folder_and_so_do_we(tmp_path, tiny, shard_bytes):
    model = tiny("llama")
    tensors, config = model.state_dict(), model.config.to_dict()
    out = tmp_path / "deep" / "out"
    digests = write_folder(
        out, config, tensors, tokenizer=tokenizer(), special=SPECIAL, chat_template=TEMPLATE, generation={"eos_token_id": 1, "max_new_tokens": 7}, shard_bytes=shard_bytes
    )  # fmt: skip
    assert digests == {path.name: digest_of(path) for path in out.iterdir()}
    shards = sorted(name for name in digests if name.endswith(".safetensors"))
    assert len(shards) == {5_000_000_000: 1, 6_000: 15, 1: len(tensors)}[shard_bytes]
    if len(shards) > 1:
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        assert all(
            shard_bytes == 1 or sum(t.nbytes for t in load_file(out / shard).values()) <= max(6_000, 64 * 32 * 4) for shard in shards
        )
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert again.generation_config.max_new_tokens == 7
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words("abc<|im_end|>")["input_ids"] == [2, 3, 4, 1] and words.eos_token == words.pad_token == "<|im_end|>"
    assert words.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<|im_start|>ab<|im_end|>"
    found = open_pretrained(str(out))
    assert found.tensors.keys() == tensors.keys() and all(torch.equal(found.tensors[name], t) for name, t in tensors.items())
    assert (
        found.tokenizer == tokenizer() and found.chat_template == TEMPLATE and found.generation == {"eos_token_id": 1, "max_new_tokens": 7}
    )
    assert found.special == {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast"} and found.config["model_type"] == "llama"


def test_a_config_and_tensors_are_enough(tmp_path):
    digests = write_folder(tmp_path, {"model_type": "x"}, {"w": torch.ones(2)})
    assert digests.keys() == files(tmp_path) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("config", "key"), [({"dtype": "bfloat16"}, "dtype"), ({"torch_dtype": "bfloat16"}, "torch_dtype"), ({}, "torch_dtype")]
)
def test_the_config_says_of_what_kind_the_tensors_are(tmp_path, config, key):
    write_folder(tmp_path, config, {"n": torch.ones(1, dtype=torch.int64), "w": torch.ones(2)})
    assert json.loads((tmp_path / "config.json").read_text()) == {key: "float32"}


def test_an_older_model_in_the_folder_is_replaced_whole_and_other_files_stay(tmp_path):
    (tmp_path / "final.safetensors").write_text("mine")
    write_folder(tmp_path, {}, {f"w{i}": torch.ones(4) for i in range(3)}, tokenizer="{}", generation={"a": 1}, shard_bytes=16)
    assert len(files(tmp_path)) == 9
    write_folder(tmp_path, {}, {"w": torch.ones(4)})
    assert (
        files(tmp_path) == {"config.json", "model.safetensors", "final.safetensors"}
        and (tmp_path / "final.safetensors").read_text() == "mine"
    )


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_when_the_disk_is_full_the_older_model_is_still_there(tmp_path, monkeypatch, after):
    write_folder(tmp_path, {"v": 1}, {"w": torch.ones(4)}, tokenizer="{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writing, count = cache.writing_whole, []

    def full(path):
        count.append(path.name)
        if len(count) > after:
            raise OSError(28, "No space left on device")
        return writing(path)

    monkeypatch.setattr(cache, "writing_whole", full)
    monkeypatch.setattr("fromzero.weights.tensors.writing_whole", full)
    with pytest.raises(SourceError, match=r"cannot be written \(No space left on device\); free some space, or name another"):
        write_folder(tmp_path, {"v": 2}, {"w": torch.zeros(4)}, tokenizer="{}", special={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("most", range(3))  # the new model has two shards and an index before its config
def test_stopped_at_any_move_into_the_folder_there_is_no_config_without_its_weights(tmp_path, monkeypatch, most):
    write_folder(tmp_path, {"v": 1}, {"w": torch.ones(4)}, tokenizer="{}")
    replace, moves = os.replace, []

    def stopped(old, new):
        if os.path.dirname(new) == str(tmp_path):
            moves.append(new)
            if len(moves) > most:
                raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {"v": 2}, {f"w{i}": torch.ones(4) for i in range(2)}, shard_bytes=16)
    assert not (tmp_path / "config.json").exists() and not [name for name in files(tmp_path) if name.startswith(".new")]
    monkeypatch.setattr(os, "replace", replace)
    write_folder(tmp_path, {"v": 2}, {"w": torch.zeros(4)})
    assert json.loads((tmp_path / "config.json").read_text())["v"] == 2 and open_pretrained(str(tmp_path)).tensors["w"].sum() == 0


def test_files_are_as_readable_as_others_of_the_user(tmp_path):
    old = os.umask(0o022)
    try:
        write_folder(tmp_path / "out", {}, {"w": torch.ones(1)}, tokenizer="{}")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(SourceError, match=r"out: cannot be written \(File exists\)"):
        write_folder(tmp_path / "out", {}, {"w": torch.ones(1)})
