"""Prediction: every kind of input, in parts and unpadded; what cannot be read is listed and the rest is done."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero as fz
from fromzero.use import inputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, one on texts and one on images"""
    folder = tmp_path_factory.mktemp("predict")
    rows = [f"{i / 40:.3f},{(7 * i % 40) / 40:.3f},{'red' if i % 3 else 'blue'},{'up' if i > 20 else 'down'}" for i in range(40)]
    (folder / "table.csv").write_text("\n".join(["x,y,colour,way", *rows]))
    texts = [f"{'the sun warms the hills of the harbour '[: 6 * (i % 5) + 8]} number {i},{'ab'[i % 2]}" for i in range(40)]
    (folder / "texts.csv").write_text("\n".join(["text,kind", *texts]))
    for i in range(12):
        (folder / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, dtype=np.uint8)).save(folder / "pictures" / "ab"[i % 2] / f"{i}.png")
    keys = {"task": "classify", "steps": 2, "report": ()}
    model = {"from": "encoder", "width": 16, "layers": 1, "heads": 2}
    column = {"train": str(folder / "texts.csv"), "input": "text", "target": "kind"}
    for name, own in {
        "table": {"model": {"from": "mlp", "hidden": [4]}, "data": {"train": str(folder / "table.csv"), "target": "way"}},
        "texts": {"model": model, "data": column},
        "pictures": {"model": {"from": "cnn", "channels": [4]}, "data": str(folder / "pictures")},
    }.items():
        fz.run(fz.plan({**keys, **own, "name": name}, runs=folder / "runs", probe=False), quiet=True)
    return folder


def predict(runs: Path, name: str, given: object) -> "fz.Predictions":
    return fz.predict(f"run:{name}", given, runs=runs / "runs")


def test_rows_of_a_table_that_cannot_be_read_are_listed_and_the_rest_is_done(runs: Path) -> None:
    (runs / "new.csv").write_text("colour,y,x\nred,0.5,0.1\nblue,many,0.2\nred,0.4,0.3\nred,1e300,0.4\n")
    found = predict(runs, "table", runs / "new.csv")
    assert [row.input.rpartition(":")[2] for row in found.rows] == ["2", "4"]
    assert [(fault.line, fault.key) for fault in found.faults] == [(3, "y"), (5, "y")]
    assert "'many' is not a number" in str(found.faults[0]) and "out of all range" in str(found.faults[1])
    alone = predict(runs, "table", {"x": [0.3], "y": [0.4], "colour": ["red"]})
    assert found.rows[1].probabilities == pytest.approx(alone.rows[0].probabilities, rel=1e-5)


def test_a_table_of_which_no_row_can_be_read_is_an_error_with_every_reason(runs: Path) -> None:
    with pytest.raises(fz.DataError) as caught:
        predict(runs, "table", {"x": ["a", "b"], "y": [0.1, 0.2], "colour": ["red", "red"]})
    assert [fault.line for fault in caught.value.faults] == [1, 2]


def test_standard_input_may_be_a_table_lines_of_json_texts_or_a_picture(runs: Path) -> None:
    csv = predict(runs, "table", io.BytesIO(b"x,y,colour\n0.1,0.2,red\n0.3,0.4,blue\n"))
    lines = predict(runs, "table", io.BytesIO(b'{"x": 0.1, "y": 0.2, "colour": "red"}\n{"x": 0.3, "y": 0.4, "colour": "blue"}\n'))
    assert [row.probabilities for row in csv.rows] == [row.probabilities for row in lines.rows] and csv.rows[0].input == "standard input:2"
    texts = predict(runs, "texts", io.BytesIO(b"[sic] the sun\n\nthe hills\n"))
    assert [row.input for row in texts.rows] == ["[sic] the sun", "the hills"]
    picture = predict(runs, "pictures", io.BytesIO((runs / "pictures" / "a" / "0.png").read_bytes()))
    assert picture.rows[0].input == "standard input"
    with pytest.raises(fz.DataError, match=r"standard input has no column 'x'|standard input.* x: has no column"):
        predict(runs, "table", io.BytesIO(b"y,colour\n0.2,red\n"))


def test_texts_of_any_length_come_back_in_their_order_with_what_each_has_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "TOKENS_AT_ONCE", 20)
    texts = ["the harbour", "a", "the sun warms the hills of the harbour and the boats", "hills of the sun", "the b"]
    found = predict(runs, "texts", [*texts, "  "])
    assert [row.input for row in found.rows] == texts and [fault.what for fault in found.faults] == ["is empty"]
    for row in found.rows:
        assert row.probabilities == pytest.approx(predict(runs, "texts", row.input).rows[0].probabilities, rel=1e-4)


def test_a_folder_of_images_is_read_in_parts_and_says_how_far_it_is(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "AT_ONCE", 5)
    (runs / "pictures" / "b" / "cut.png").write_bytes(b"\x89PNG nonsense")
    told: list[tuple[int, int]] = []
    found = fz.predict("run:pictures", runs / "pictures", runs=runs / "runs", told=lambda *both: told.append(both))
    assert len(found.rows) == 12 and told == [(5, 13), (10, 13), (13, 13)]
    assert len(found.faults) == 1 and "cut.png: is no image that can be read" in str(found.faults[0])
    alone = predict(runs, "pictures", found.rows[7].input).rows[0]
    assert found.rows[7].probabilities == pytest.approx(alone.probabilities, rel=1e-5)


def test_the_shell_reads_standard_input_and_writes_parquet(runs: Path) -> None:
    polars = pytest.importorskip("polars")
    command = [sys.executable, "-m", "fromzero", "predict", "run:table", "-", "--output", "out.parquet"]
    done = subprocess.run(command, cwd=runs, input=b"x,y,colour\n0.1,0.2,red\n0.3,no,blue\n", capture_output=True, check=False)
    assert done.returncode == 2 and b"left out: standard input:3 y: 'no' is not a number" in done.stderr
    frame = polars.read_parquet(runs / "out.parquet")
    assert frame.columns == ["input", "class", "probability", "p(down)", "p(up)"] and frame.height == 1
    wrong = subprocess.run([*command[:-1], "out.xls"], cwd=runs, input=b"x,y,colour\n0.1,0.2,red\n", capture_output=True, check=False)
    assert wrong.returncode == 2 and b".csv, .json, .jsonl or .parquet" in wrong.stderr
    shown = subprocess.run([*command[:6], "--json"], cwd=runs, input=b"x,y,colour\n0.1,0.2,red\n", capture_output=True, check=False)
    assert json.loads(shown.stdout)[0]["class"] in ("up", "down")


def test_prediction_leaves_no_graph_behind_and_the_model_in_eval_mode(runs: Path) -> None:
    grown = torch.is_grad_enabled()
    assert predict(runs, "table", {"x": [0.1], "y": [0.2], "colour": ["red"]}).rows and torch.is_grad_enabled() == grown
