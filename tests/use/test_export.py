"""An exported folder computes what the model computes, for us and for its own program, or is not kept."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fromzero as fz
from fromzero.errors import MissingExtra, ModelError, UserError
from fromzero.runner.probe_inputs import FILE, MOST_BYTES, MOST_TOKENS, read_probe
from fromzero.use.export import FORMATS, gguf, hf, onnx, program
from fromzero.use.export import weights as weights_format
from fromzero.use.export.compare import compare, same
from fromzero.use.export.onnx import UNSEEN
from fromzero.weights import read_tensors, write_tensors
from tests.use.conftest import BLUE, FRANCE, PARIS, SKY, turns


@pytest.fixture(scope="module")
def adapted(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with one of adapters beside the talker"""
    place = tmp_path_factory.mktemp("adapted")
    rows = [{"messages": turns(FRANCE, PARIS)}, {"messages": turns(SKY, BLUE)}]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "learned",
        "task": "chat",
        "model": str(talker),
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(place / "chats.jsonl"), "hold_out": 0},
        "optimizer": {"name": "adamw", "lr": 0.05},
        "batch": 2,
        "steps": 4,
    }
    fz.train(recipe, runs=place / "runs", quiet=True)
    return place / "runs"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.csv, and runs of which one tells kinds apart and one says a number"""
    place, draw = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    lines = ["kind,island,bill,mass,sex"]
    for row in range(90):
        mass = "" if row % 7 == 0 else str(draw.integers(2700, 6000))
        lines.append(f"{'abc'[row % 3]},{draw.choice(['x', 'y', 'z'])},{draw.uniform(30, 60):.1f},{mass},{draw.choice(['m', 'f', ''])}")
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    for name, task, target in (("kinds", "classify", "kind"), ("bills", "regress", "bill")):
        data = {"train": str(place / "table.csv"), "target": target}
        fz.train({"name": name, "task": task, "data": data, "model": "mlp", "epochs": 2}, runs=place / "runs", quiet=True)
    return place


class Own(nn.Module):
    """A person's own module, with a dimension that depends on the batch"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(1)).relu() * x.mean()


class Branching(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(1)) if float(x.sum()) > 0 else -self.inner(x.flatten(1))


# ------------------------------------------------------------------------------------------- what is compared


def test_a_run_keeps_a_few_inputs_and_what_its_kept_weights_say_of_them(tables: Path, adapted: Path) -> None:
    folder = tables / "runs" / "kinds" / "model"
    probe = read_probe(folder)
    assert probe is not None and len(probe.inputs[0]) == 8
    with torch.no_grad():
        assert torch.allclose(fz.load("run:kinds", runs=tables / "runs")(*probe.inputs)[probe.rows], probe.outputs, atol=1e-6)
    chats = read_probe(adapted / "learned" / "model")
    assert chats is not None and int(chats.inputs[1].diff().max()) <= MOST_TOKENS
    assert all(path.stat().st_size < 2 * MOST_BYTES + 10_000 for path in (folder / FILE, adapted / "learned" / "model" / FILE))


def test_weights_that_no_longer_say_what_the_run_noted_are_not_exported(tables: Path, tmp_path: Path) -> None:
    path = tables / "runs" / "bills" / "model" / FILE
    whole = path.read_bytes()
    tensors = read_tensors(path)
    write_tensors(path, {**tensors, "outputs": tensors["outputs"] * 1.01})
    try:
        with pytest.raises(ModelError, match=r"'run:bills', opened again, computes something else than the model: it differs by 9.9e-03"):
            fz.export("run:bills", tmp_path / "out", to="torch", runs=tables / "runs")
    finally:
        path.write_bytes(whole)
    assert not list(tmp_path.iterdir())


def test_a_run_without_kept_inputs_is_compared_on_made_up_ones_and_says_so(talker: Path, tmp_path: Path) -> None:
    found = fz.export(str(talker), tmp_path / "out")
    assert found.inputs == "2 made-up inputs: none were kept with it"
    assert found.compared[0].difference == 0.0 and (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert "compared on 2 made-up inputs" in str(found)


def test_what_differs_is_named_with_its_place_and_shape() -> None:
    assert same("r", "tokens", [[1, 2]], [[1, 2]]) == "the same tokens"
    with pytest.raises(
        ModelError, match=r"r gives another tokens: from place 1 on \[4\], not \[2, 3\]; the file was not kept; please report"
    ):
        same("r", "tokens", [1, 2, 3], [1, 4])
    with pytest.raises(ModelError, match=r"r gives outputs of shape \(2,\), the model \(3,\); a file that computes something else"):
        compare("r", torch.zeros(3), torch.zeros(2))
    with pytest.raises(ModelError, match="differs by nan"):
        compare("r", torch.ones(2), torch.tensor([1.0, float("nan")]))


# ------------------------------------------------------------------------------------------- adapters


def test_what_adapters_learned_stands_in_plain_matrices_that_transformers_loads(adapted: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = fz.export("run:learned", tmp_path / "out", runs=adapted)
    assert [one.reader for one in found.compared] == ["fromzero", "transformers"] and all(one.difference < 1e-5 for one in found.compared)
    assert found.compared[1].also == "the same tokens, the same greedy continuation" and found.inputs == "2 examples of its run"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(found.folder).eval()
    ours = fz.load("run:learned", runs=adapted)
    ids = torch.arange(20)
    with torch.no_grad():
        assert torch.allclose(ours(ids, torch.tensor([0, 20])), theirs(ids[None]).logits[0], atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": FRANCE}], add_generation_prompt=True, return_dict=True)
    ends = theirs.generation_config.eos_token_id  # which the talker's own cards did not name
    said = theirs.generate(torch.tensor([asked["input_ids"]]), max_new_tokens=60, do_sample=False, eos_token_id=ends)
    assert int(said[0, -1]) in ends  # it stops by itself
    assert not list(tmp_path.glob(".out-*"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own call below
def test_adapters_apart_are_opened_by_the_peft_library_beside_their_base(adapted: Path, talker: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    found = fz.export("run:learned", tmp_path / "out", to="peft", merged=False, runs=adapted)
    assert [one.reader for one in found.compared][-1] == "peft" and all(one.difference < 1e-5 for one in found.compared)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(talker), found.folder).eval()
    ids = torch.arange(20)
    with torch.no_grad():
        ours = fz.load("run:learned", runs=adapted)(ids, torch.tensor([0, 20]))
        assert torch.allclose(ours, theirs(ids[None]).logits[0], atol=1e-4)


@pytest.mark.parametrize(
    ("to", "merged", "said"),
    [
        ("peft", True, "peft does not hold plain matrices; each format holds one of the two; for plain matrices: --to hf, gguf, onnx"),
        ("gguf", False, "gguf does not hold adapters; each format holds one of the two; for adapters: --to peft"),
    ],
)
def test_a_format_that_does_not_hold_what_is_asked_names_those_that_do(
    adapted: Path, tmp_path: Path, to: str, merged: bool, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fz.export("run:learned", tmp_path / "out", to=to, merged=merged, runs=adapted)


# ------------------------------------------------------------------------------------------- what is not kept


def halved(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(module.parameters()).mul_(0.5)
    return module


@pytest.mark.parametrize("to", ["hf", "peft", "gguf", "onnx", "torch", "safetensors"])
def test_a_file_that_computes_something_else_is_not_kept(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Each format's own reader is given other weights; what it says must be found to differ."""
    assert to in FORMATS and len(FORMATS) == 6
    if to == "onnx" and find_spec("onnxruntime") is None:
        pytest.skip("NOT CHECKED: onnxruntime is not installed")
    from fromzero.use.export import peft

    if to in ("hf", "peft", "gguf"):
        place = {"hf": hf, "peft": peft, "gguf": gguf}[to]
        build = place.build_published
        monkeypatch.setattr(place, "build_published", lambda *a, **k: (halved((made := build(*a, **k))[0]), made[1]))
    elif to == "safetensors":
        write = weights_format.write_model
        monkeypatch.setattr(
            weights_format, "write_model", lambda f, s, state, last: write(f, s, {n: t * 0.5 for n, t in state.items()}, last)
        )
    else:
        make = program.program
        place = program if to == "torch" else onnx

        def spoiled(made: object) -> object:
            other = make(made)
            for name in other.state_dict:
                other.state_dict[name].data.mul_(0.5)
            return other

        monkeypatch.setattr(place, "program", spoiled)
    with pytest.raises(
        ModelError, match=r"computes something else than the model: it differs by .*not kept|next-token loss differs by .*not kept"
    ):
        fz.export("run:learned", tmp_path / "out", to=to, runs=adapted, **({"numbers": "f32"} if to == "gguf" else {}))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_anything_is_written(adapted: Path, tables: Path, tmp_path: Path) -> None:
    for to, said in (
        ("onxn", r"'onxn' is no format of export; did you mean 'onnx'\?"),
        ("zip", "there is hf, peft, gguf, onnx, torch, safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            fz.export("run:learned", tmp_path / "out", to=to, runs=adapted)
    with pytest.raises(UserError, match=r"gguf has no numbers 'q8'; did you mean 'q8_0'\?"):
        fz.export("run:learned", tmp_path / "out", to="gguf", numbers="q8", runs=adapted)
    with pytest.raises(UserError, match="hf has no numbers 'f16'; only gguf has a choice"):
        fz.export("run:learned", tmp_path / "out", numbers="f16", runs=adapted)
    with pytest.raises(ModelError, match="cannot become peft: it was not trained with adapters; it can become onnx, torch, safetensors"):
        fz.export("run:kinds", tmp_path / "out", to="peft", runs=tables / "runs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something"):
        fz.export("run:learned", tmp_path / "full", runs=adapted)
    with pytest.raises(ModelError, match="no weights"):
        fz.export("mlp", tmp_path / "out", runs=adapted)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_old_word_for_hf_goes_on_working_and_says_the_new_one(talker: Path, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="export --to transformers is now export --to hf"):
        assert fz.export(str(talker), tmp_path / "out", to="transformers").to == "hf"


# ------------------------------------------------------------------------------------------- programs and graphs


def test_a_program_takes_batches_of_any_size_without_fromzero(tables: Path, tmp_path: Path) -> None:
    found = fz.export("run:kinds", tmp_path / "out", to="torch", runs=tables / "runs")
    assert found.compared[0].difference < 1e-6
    theirs, ours = torch.export.load(tmp_path / "out" / "model.pt2").module(), fz.load("run:kinds", runs=tables / "runs")
    width = ours.body[0].in_features
    for rows in (1, 2, 33):
        x = torch.randn(rows, width)
        with torch.no_grad():
            assert torch.allclose(theirs(x), ours(x), atol=1e-6)


def test_a_module_given_from_python_becomes_a_program_and_one_that_looks_at_values_is_refused(tmp_path: Path) -> None:
    data = (torch.rand(24, 2, 3), torch.arange(24) % 3)
    for kind in (Own, Branching):
        fz.train(
            {"name": kind.__name__.lower(), "task": "classify", "model": kind(), "data": data, "steps": 2},
            runs=tmp_path / "runs",
            quiet=True,
        )
    found = fz.export("run:own", tmp_path / "out", to="torch", runs=tmp_path / "runs", model=Own())
    assert found.compared[0].difference < 1e-5
    with pytest.raises(ModelError, match=r"torch.export cannot follow the model: .*what depends on values"):
        fz.export("run:branching", tmp_path / "no", to="torch", runs=tmp_path / "runs", model=Branching())
    assert not (tmp_path / "no").exists()


def test_a_graph_of_a_table_takes_its_cells_as_they_stand_in_the_file(tables: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="NOT CHECKED: onnxruntime is not installed")
    for name, output in (("kinds", "probabilities"), ("bills", "values")):
        found = fz.export(f"run:{name}", tmp_path / name, to="onnx", runs=tables / "runs")
        assert all(one.difference < 1e-5 for one in found.compared)
        session = runtime.InferenceSession(tmp_path / name / "model.onnx")
        notes = session.get_modelmeta().custom_metadata_map
        columns = json.loads(notes["columns"])
        lines = (tables / "table.csv").read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:40]]
        numbers = np.array([[float(row[c]) if row[c] else np.nan for c in columns["numbers"]] for row in rows])
        words = {column: [word or "" for word in known] for column, known in columns["categories"].items()}
        codes = np.array([[known.index(row[c]) if row[c] in known else UNSEEN for c, known in words.items()] for row in rows])
        said = session.run([output], {"numbers": numbers, "categories": codes})[0]
        cells = {column: [row[column] or None for row in rows] for column in rows[0]}
        wanted = fz.predict(f"run:{name}", cells, runs=tables / "runs").rows
        if name == "kinds":
            assert json.loads(notes["classes"]) == ["a", "b", "c"]
            assert np.allclose(said, [list(row.probabilities.values()) for row in wanted], atol=1e-5)
        else:
            assert np.allclose(said[:, 0], [row.answer for row in wanted], rtol=1e-5)


def test_without_onnx_the_extra_is_named(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(onnx.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed; .*; pip install 'fromzero\[export\]'"):
        fz.export("run:kinds", tmp_path / "out", to="onnx", runs=tables / "runs")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- gguf


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("numbers", gguf.NUMBERS)
def test_each_kind_of_numbers_stays_within_its_bound_and_says_what_it_costs(adapted: Path, tmp_path: Path, numbers: str) -> None:
    found = fz.export("run:learned", tmp_path / "out", to="gguf", numbers=numbers, runs=adapted)
    assert [one.bound for one in found.compared] == [
        gguf.BOUNDS[numbers][0],
        gguf.LLAMA_CPP[numbers][0] if find_spec("llama_cpp") else BOUND_OF_NONE,
    ]
    assert "the same tokens; next-token loss" in found.compared[0].also
    assert (
        fz.chat(str(tmp_path / "out" / "model.gguf"), turns(SKY)) == fz.chat("run:learned", turns(SKY), runs=adapted) or numbers == "q4_0"
    )
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert said.startswith("FROM ./model.gguf\nPARAMETER num_ctx 160\n") and 'PARAMETER stop "<|im_end|>"' in said
    if find_spec("llama_cpp") is None:
        pytest.skip("NOT CHECKED by llama.cpp: llama-cpp-python is not installed; read back by fromzero alone")
    assert found.compared[1].difference is not None


BOUND_OF_NONE = 1e-4  # printed for a reader that is not installed


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_llama_cpp_answers_through_the_template_in_the_file_as_chat_does(adapted: Path, tmp_path: Path) -> None:
    llama = pytest.importorskip("llama_cpp", reason="NOT CHECKED: llama-cpp-python is not installed")
    fz.export("run:learned", tmp_path / "out", to="gguf", numbers="f32", runs=adapted)
    theirs = llama.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=160, verbose=False, n_threads=1)
    said = theirs.create_chat_completion(turns(SKY), temperature=0, max_tokens=30)["choices"][0]
    ours = fz.chat("run:learned", turns(SKY), runs=adapted).replace("\ufffd", "")  # llama-cpp-python leaves out bytes that are no text
    assert said["message"]["content"].strip() == ours and said["finish_reason"] == "stop"


# ------------------------------------------------------------------------------------------- safetensors, card


def test_safetensors_under_our_names_are_opened_by_fz_load_and_predict(adapted: Path, tables: Path, tmp_path: Path) -> None:
    fz.export("run:learned", tmp_path / "chat", to="safetensors", runs=adapted)
    assert set(read_tensors(tmp_path / "chat" / "model.safetensors")) == set(fz.load("run:learned", runs=adapted, merge=True).state_dict())
    assert fz.chat(str(tmp_path / "chat"), turns(SKY)) == fz.chat("run:learned", turns(SKY), runs=adapted)
    fz.export("run:kinds", tmp_path / "table", to="safetensors", runs=tables / "runs")
    both = [fz.predict(source, tables / "table.csv", runs=tables / "runs").rows for source in ("run:kinds", str(tmp_path / "table"))]
    assert both[0] == both[1] and len(both[0]) == 90


def test_the_card_says_what_the_run_noted_and_what_was_compared(tables: Path, tmp_path: Path) -> None:
    import yaml

    found = fz.export("run:kinds", tmp_path / "out", to="torch", runs=tables / "runs")
    _, front, body = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "pytorch", "tags": ["fromzero"], "pipeline_tag": "tabular-classification"}
    result = json.loads((tables / "runs" / "kinds" / "result.json").read_text())
    assert f"| accuracy | {result['validation']['accuracy']:.6g} |" in body and f"- {found.compared[0]}" in body
    assert "table.csv: " in body and str(tables) not in body.split("```yaml")[0] and "licence" in body.splitlines()[-1]
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["model"] == {"from": "mlp"}


def test_the_shell_writes_a_folder_and_prints_how_far_it_is_off(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fromzero.cli import app

    app(["export", str(talker), str(tmp_path / "b"), "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert said["to"] == "hf" and said["compared"][0] == {"reader": "fromzero", "difference": 0.0, "bound": 1e-4, "also": ""}
    with pytest.warns(FutureWarning, match="export --output is now export FOLDER"):
        app(["export", str(talker), "--output", str(tmp_path / "c")], standalone_mode=False)
    assert "open it: transformers: from_pretrained(FOLDER)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        app(["export", str(talker)], standalone_mode=False)
    assert caught.value.code == 2 and "export writes one new folder; 0 were named; fromzero export" in capsys.readouterr().err
