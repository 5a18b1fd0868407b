"""Any bytes are read or refused by every reader, soon and in bounded memory; what is written reads back the same.

The readers and the damage are those of tests/fuzz.py, which tries more of it for longer.
"""

import csv
import json
import random
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fromzero.data.table import read_table
from fromzero.recipe.read import check, from_values, parse, write
from fromzero.recipe.schema import METRICS
from fromzero.use.write import write_rows
from fromzero.weights.tensors import open_safetensors, read_tensors, write_tensors
from tests.fuzz import READERS, bounded, broke, mutated, sound

FEW = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_there_are_as_many_readers_as_kinds_of_files():
    assert len(READERS) == 23


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_any_damage_to_a_file_is_read_or_refused(name, tmp_path):
    whole = sound(name, tmp_path)
    draw = random.Random(zlib.crc32(name.encode()))
    with bounded():
        for _ in range(25):
            data = mutated(whole, draw)
            assert broke(name, data, tmp_path) == "", data


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_much_damage_to_a_file_is_read_or_refused(name, tmp_path):
    whole = sound(name, tmp_path)
    with bounded():
        for seed in range(400):
            data = mutated(whole, random.Random(seed))
            assert broke(name, data, tmp_path) == "", data


BEGINNINGS = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"PK\x03\x04",
    b"GGUF\x03\0\0\0",
    b"PAR1",
    b"x,y\n",
    b'{"',
    b"task: ",
    b"\x80\x02",
    b"\xff\xd8\xff",
]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
@settings(FEW, max_examples=12)
@given(begin=st.sampled_from(BEGINNINGS), rest=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name, tmp_path, begin, rest):
    assert broke(name, begin + rest, tmp_path) == ""


# ------------------------------------------------------------------------------ what is written reads back the same

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
plain = st.one_of(st.none(), texts, st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))


@settings(FEW, max_examples=60)
@given(
    values=st.fixed_dictionaries(
        {
            "task": st.just("classify"),
            "model": st.one_of(
                names, st.fixed_dictionaries({"from": names, "hidden": st.lists(st.integers(1, 9), max_size=3), "note": texts})
            ),
            "data": st.fixed_dictionaries(
                {"train": names},
                optional={
                    "classes": st.lists(names, min_size=1, max_size=4),
                    "missing": st.dictionaries(texts, st.sampled_from(["median", "drop"]), max_size=3),
                    "target": names.filter(lambda name: name != "none"),
                },
            ),
        },
        optional={
            "optimizer": st.fixed_dictionaries(
                {"name": st.just("sgd"), "lr": st.floats(1e-12, 1e12), "lr_scale": st.dictionaries(texts, st.floats(0, 9))}
            ),
            "metrics": st.lists(st.sampled_from(METRICS["classify"]), max_size=2),
            "batch": st.integers(1, 2**80),
            "seed": st.integers(0, 2**63 - 1),
            "epochs": st.floats(1e-300, 1e300),
            "clip": st.none() | st.floats(1e-9, 1e9),
        },
    )
)
def test_a_recipe_of_any_values_reads_back_the_same(values):
    recipe = from_values(values)
    assert check(parse(write(recipe).encode(), "r.yaml")) == recipe


KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@settings(FEW, max_examples=40)
@given(
    kinds=st.dictionaries(texts, st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 3), max_size=4)), min_size=1, max_size=5),
    notes=st.dictionaries(texts, texts, max_size=2),
)
def test_tensors_of_any_name_kind_and_shape_read_back_the_same(kinds, notes, tmp_path):
    tensors = {name: torch.randint(0, 2, shape).to(kind) for name, (kind, shape) in kinds.items() if name != "__metadata__"}
    digest = write_tensors(tmp_path / "t.safetensors", tensors, notes)
    for found in (read_tensors(tmp_path / "t.safetensors", sha256=digest), open_safetensors(tmp_path / "t.safetensors")):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def rows_of(data, columns, cells):
    drawn = data.draw(st.lists(st.tuples(*[cells] * len(columns)), min_size=1, max_size=5))
    return [dict(zip(columns, row, strict=True)) for row in drawn]


@settings(FEW, max_examples=60)
@given(columns=st.lists(texts, min_size=1, max_size=4, unique=True), data=st.data())
def test_rows_of_json_lines_of_any_text_and_number_read_back_the_same(columns, data, tmp_path):
    rows = rows_of(data, columns, plain)
    write_rows(tmp_path / "t.jsonl", rows)
    table = read_table(tmp_path / "t.jsonl")
    assert list(table.columns) == columns and list(table.lines) == list(range(1, len(rows) + 1))
    assert [dict(zip(columns, cells, strict=True)) for cells in zip(*table.columns.values(), strict=True)] == rows


@settings(FEW, max_examples=60)
@given(columns=st.lists(names, min_size=2, max_size=4, unique=True), data=st.data())
def test_predictions_of_any_text_read_back_from_csv_the_same(columns, data, tmp_path):
    rows = rows_of(data, columns, texts.filter(lambda text: "\0" not in text))
    rows = [row for row in rows if any(row.values())] or [dict.fromkeys(columns, "x")]  # a line without a word is a blank line
    write_rows(tmp_path / "t.csv", rows)
    table = read_table(tmp_path / "t.csv")
    assert [dict(zip(columns, cells, strict=True)) for cells in zip(*table.columns.values(), strict=True)] == rows
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    write_rows(tmp_path / "t.json", rows)
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == rows
