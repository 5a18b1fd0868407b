"""Every cell of the table in docs/export.md: a model of each kind is written and compared, or refused with what does apply."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

import fromzero as fz
from fromzero.data import Classes, ImageFormat, Numbers, Preparation, Soft, TextFormat
from fromzero.data import tokens as tk
from fromzero.data.columns import fit_columns
from fromzero.data.sources import ArrayFormat
from fromzero.data.table import table_of
from fromzero.errors import ModelError
from fromzero.models import FAMILIES, Blueprint, blueprint_of_config, seeded
from fromzero.runner.probe_inputs import FILE
from fromzero.runner.saved import Design, SavedModel, write_model
from fromzero.use.export import FORMATS
from fromzero.use.export.compare import BOUND

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
NEEDED = {"onnx": ("onnxruntime", "onnxscript"), "hf": ("transformers",), "gguf": ("llama_cpp",)}
TEXTS = ["Once upon a time there were 1234 foxes.", "Paris, naïvely: 東京!"] * 4
TOKENIZER = tk.byte_pairs(TEXTS, 300)
V = tk.vocabulary_size(TOKENIZER)
DECODER = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER |= {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {"sliding_window": 64, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64},
    "mistral": {"sliding_window": None},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
ENCODER = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
ENCODER |= {"max_position_embeddings": 80, "type_vocab_size": 2, "pad_token_id": 1}
DISTIL = {"vocab_size": V, "max_position_embeddings": 80, "dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert", "modernbert": "ModernBert"}
STEMS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "smollm3": "SmolLM3"}
STEMS |= {"gemma2": "Gemma2", "gemma3_text": "Gemma3", "glm4": "Glm4", "olmo2": "Olmo2", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}
NAMES = Classes(("cat", "dog", "owl"))
ROWS = {"bill": [1.5, 2.5, None, 9.0], "mass": [100, 250, 300, 275], "island": ["x", "y", "z", "x"], "sex": ["m", "f", None, "m"]}
QUICK = [
    (name, to) for name in ("llama", "mlp on a table, classes") for to in FORMATS if (name, to) != ("llama", "onnx")
]  # the others are slow together


def table() -> dict[str, dict[str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").split("## What becomes what")[1].split("##")[0].splitlines() if "|" in line]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


TABLE = table()
CELLS = [pytest.param(m, to, id=f"{m}-{to}", marks=[] if (m, to) in QUICK else pytest.mark.slow) for m, row in TABLE.items() for to in row]


def config_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A published config, and the options that it is built with"""
    kind, _, part = name.partition(", ")
    if kind not in CLASSES:
        sizes = {key: value for key, value in DECODER.items() if kind != "gpt2" or key.endswith(("_id", "vocab_size"))}
        sizes |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} if kind == "gpt2" else {}
        config = {"model_type": kind, **sizes, **MORE.get(kind, {}), "tie_word_embeddings": kind in ("gpt2", "llama")}
        config["architectures"] = ["GPT2LMHeadModel" if kind == "gpt2" else f"{STEMS[kind]}ForCausalLM"]
        return {key: value for key, value in config.items() if value is not None or key.endswith("_id")}, {"outputs": 3} if part else {}
    config = {"model_type": kind, **(DISTIL if kind == "distilbert" else ENCODER)}
    if part == "classifier":
        return {**config, "architectures": [f"{CLASSES[kind]}ForSequenceClassification"]}, {"outputs": 3, "pooling": "pooler"}
    return {**config, "architectures": [f"{CLASSES[kind]}Model"]}, {"outputs": 3} if "head" in part else {}


def design_of(name: str) -> tuple[Design, Preparation, str]:
    """How a model of a row of the table is built, how its inputs are prepared, and its task"""
    rows = table_of({key: list(values) for key, values in ROWS.items()}, name="rows")
    columns = fit_columns(rows, list(ROWS), {})
    image = Preparation(ImageFormat(32, 32, 3), NAMES)
    if " on a table" in name:
        answers = NAMES if "classes" in name else Numbers(("mass",), (4.0,), (2.0,))
        options = {"inputs": (columns.width,), "outputs": answers.width}
        return (
            Design("mlp", Blueprint("catalogue", "mlp", options)),
            Preparation(columns, answers),
            "classify" if answers is NAMES else "regress",
        )
    if name.endswith(" on vectors"):
        cell = name.split()[0]
        return (
            Design(cell, Blueprint("catalogue", cell, {"inputs": (7, 5), "outputs": 3})),
            Preparation(ArrayFormat((7, 5)), NAMES),
            "classify",
        )
    if name == "lstm on text":
        return (
            Design("lstm", Blueprint("catalogue", "lstm", {"vocabulary": V, "outputs": 3})),
            Preparation(TextFormat(TOKENIZER), NAMES),
            "classify",
        )
    if name in ("vit-tiny", "cnn", "resnet18", "efficientnet-lite0"):
        options = {"inputs": (3, 32, 32), "outputs": 3, **({"depth": 2, "patch": 8} if name == "vit-tiny" else {})}
        return Design(name, Blueprint("catalogue", name, options)), image, "classify"
    config, options = config_of(name)
    answers = NAMES if options else Soft(())
    return (
        Design(config["model_type"], blueprint_of_config(config, options)),
        Preparation(TextFormat(TOKENIZER), answers),
        "classify" if options else "language",
    )


def saved(name: str, folder: Path, tokenizer: str = TOKENIZER, **keys: Any) -> Path:
    """A model with random weights, in its norms and statistics too, as a run saves one.  keys: of its config.json"""
    design, preparation, task = design_of(name)
    if keys or tokenizer != TOKENIZER:
        config, options = config_of(name)
        design = Design(design.name, blueprint_of_config({**config, **keys}, options))
        preparation = Preparation(TextFormat(tokenizer), preparation.answers)
    model = seeded(0, design.build)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2)
    if name == "bert, body":
        task = "embed"
    loss = "cross_entropy" if task != "regress" else "mse"
    write_model(folder, SavedModel(design, preparation, task, loss, folder), model.state_dict(), None)
    return folder


def test_the_table_has_every_family_and_the_formats_that_are_not_of_adapters() -> None:
    assert len(TABLE) == 31 and len(CELLS) == 155
    assert all(list(row) == [name for name, form in FORMATS.items() if not form.adapters] for row in TABLE.values())
    assert {name.partition(",")[0] for name in TABLE} >= {*FAMILIES} - {"vit"}
    assert sum(cell == "yes" for row in TABLE.values() for cell in row.values()) == 114
    assert {cell for row in TABLE.values() for cell in row.values()} == {"yes", "no"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("name", "to"), CELLS)
def test_a_cell_of_the_table_is_what_happens(name: str, to: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "model")
    assert not (folder / FILE).exists()
    if TABLE[name][to] == "no":
        with pytest.raises(ModelError, match=f"cannot become {to}: .*; it can become") as caught:
            fz.export(str(folder), tmp_path / "out", to=to)
        offered = re.search(r"can become ([\w, ]+)$", str(caught.value))[1].split(", ")  # type: ignore[index]
        assert offered == [column for column, cell in TABLE[name].items() if cell == "yes"]
        assert not (tmp_path / "out").exists()
        return
    if absent := [package for package in NEEDED.get(to, ()) if find_spec(package) is None and package != "llama_cpp"]:
        pytest.skip(f"NOT CHECKED: {', '.join(absent)} is not installed")
    found = fz.export(str(folder), tmp_path / "out", to=to)
    assert found.compared and found.bytes > 1000 and "made-up" in found.inputs
    for one in found.compared:
        assert one.difference is None or one.difference < (BOUND if to != "gguf" else one.bound), str(one)
    if "llama_cpp" in NEEDED.get(to, ()) and find_spec("llama_cpp") is None:
        pytest.skip("NOT CHECKED by llama.cpp: llama-cpp-python is not installed; read back by fromzero alone")
    assert all(one.difference is not None for one in found.compared)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}], ids=lambda rope: rope["rope_type"])
def test_stretched_rotary_positions_are_written_as_llama_cpp_turns_them(rope: dict[str, Any], tmp_path: Path) -> None:
    found = fz.export(str(saved("llama", tmp_path / "model", rope_parameters=rope)), tmp_path / "out", to="gguf", numbers="f32")
    assert found.compared[0].difference < 1e-5
    if find_spec("llama_cpp") is None:
        pytest.skip("NOT CHECKED by llama.cpp: llama-cpp-python is not installed; read back by fromzero alone")
    assert found.compared[1].difference < 1e-4


FRAMED = Tokenizer.from_str(TOKENIZER)
FRAMED.post_processor = processors.TemplateProcessing(single="<|endoftext|> <|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mistral", {"sliding_window": 16}, "its layers see 16 of 64 tokens, which llama.cpp does not do for this architecture"),
        ("llama", {"rope_parameters": YARN}, "its rotary positions are stretched in a way that the file has no words for"),
        ("qwen2", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}, "stretched in a way"),
        (
            "llama",
            {"tokenizer": FRAMED.to_str()},
            r"its tokenizer puts \[0, 0\] around a text; llama.cpp puts one bos before and one eos after",
        ),
        ("llama", {"tokenizer": tk.characters(TEXTS)}, "its tokenizer is of no kind that GGUF names"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_refused(name: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        fz.export(str(saved(name, tmp_path / "model", **options)), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
