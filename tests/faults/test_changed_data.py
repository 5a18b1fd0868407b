"""Fault 11: the data has changed since the run began. It is refused by file and row; who goes on does so knowingly."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero as fz
from fromzero.data import Contents, differences
from fromzero.data.contents import MOST, contents
from fromzero.report.jsonlines import read_events

Stop = Callable[..., fz.Planned]


def refused(runs: Path, **given: Any) -> list[str]:
    """What is said of the data, without the headline; the folder stays as it is."""
    before = {path: path.read_bytes() for path in (runs / "r").rglob("*") if path.is_file()}
    with pytest.raises(fz.DataError) as caught:
        fz.resume("r", runs=runs, quiet=True, **given)
    assert {path: path.read_bytes() for path in (runs / "r").rglob("*") if path.is_file()} == before
    headline, *said = map(str, caught.value.faults)
    assert "the data has changed since the run began" in headline and "--accept-changed-data" in headline
    return said


@pytest.fixture
def table(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> Path:
    """A run `r` that was stopped after 5 steps, and the table it learns from."""
    stopped_at(noise, tmp_path, 5)
    return tmp_path / "tiny.csv"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def rewrite(path: Path, rows: list[str]) -> None:
    path.write_text("\n".join(rows) + "\n")


# ------------------------------------------------------------------------------------- tables by row


def test_a_cell_a_label_or_a_validation_label_that_has_changed_is_named_by_row_and_line(table: Path) -> None:
    whole = lines(table)
    for row in (1, 17, 40, 64):
        for cell in (0, 2):
            cells = whole[row].split(",")
            cells[cell] = "9.5" if cell == 0 else {"a": "b", "b": "c", "c": "a"}[cells[2]]
            rewrite(table, [*whole[:row], ",".join(cells), *whole[row + 1 :]])
            assert refused(table.parent) == [f"{table}: row {row} (line {row + 1}) has changed"]


def test_new_and_missing_rows_are_named(table: Path) -> None:
    whole = lines(table)
    rewrite(table, [*whole, "1,1,a"])
    assert refused(table.parent) == [f"{table}: row 65 (line 66) is new"]
    rewrite(table, [*whole[:10], "1,1,a", "2,2,b", *whole[10:]])
    assert refused(table.parent) == [f"{table}: rows 10 to 11 are new"]
    rewrite(table, [*whole[:12], *whole[13:]])
    assert refused(table.parent) == [f"{table}: row 12 is gone"]
    rewrite(table, whole[:60])
    assert refused(table.parent) == [f"{table}: rows 60 to 64 are gone"]
    rewrite(table, [*whole[:5], "1,1,a", *whole[8:]])
    assert refused(table.parent) == [f"{table}: 1 rows stand where 3 stood, from row 5 (line 6) on"]


def test_rows_in_another_order_are_named(table: Path) -> None:
    whole = lines(table)
    swapped = [*whole]
    swapped[3], swapped[9] = whole[9], whole[3]
    rewrite(table, swapped)
    assert refused(table.parent) == [f"{table}: rows 3 and 9 were swapped"]
    rewrite(table, [*whole[:2], *reversed(whole[2:8]), *whole[8:]])
    assert refused(table.parent) == [f"{table}: rows 2 to 7 stand in another order"]


def test_of_many_changed_rows_the_first_are_named_and_the_others_counted(table: Path) -> None:
    whole = lines(table)
    rewrite(table, [whole[0], *(f"7{row}" for row in whole[1:21]), *whole[21:]])
    said = refused(table.parent)
    assert said[0].endswith("row 1 (line 2) has changed") and len(said) == 6 and said[-1].endswith("and 15 more rows"), said


def test_a_file_that_was_only_touched_or_copied_and_a_column_that_is_not_read_pass(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop
) -> None:
    table = tmp_path / "tiny.csv"
    rewrite(table, [f"{row},{'note' if number == 0 else number * number}" for number, row in enumerate(lines(table))])
    noise["data"] |= {"input": ["x", "y"]}
    whole = fz.run(fz.plan({**noise, "name": "whole"}, runs=tmp_path, probe=False), quiet=True)
    stopped_at(noise, tmp_path, 5)
    text = table.read_text()
    table.unlink()
    table.write_text(text.replace("\n", "\r\n").replace(",9\r", ",nine\r"))
    os.utime(table, (1, 1))
    done = fz.resume("r", runs=tmp_path, quiet=True)
    assert all(torch.equal(tensor, done.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    assert not json.loads((tmp_path / "r" / "plan.json").read_text())["changes"]


def test_a_changed_validation_file_is_named_and_not_the_training_file(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    held = tmp_path / "held.csv"
    rewrite(held, ["x,y,kind", *(f"{i / 7},{i},{'abc'[i % 3]}" for i in range(12))])
    noise["data"] |= {"validation": str(held)}
    stopped_at(noise, tmp_path, 5)
    rows = lines(held)
    rewrite(held, [*rows[:4], rows[4].replace("a", "b"), *rows[5:]])
    assert refused(tmp_path) == [f"{held}: row 4 (line 5) has changed"]


# ------------------------------------------------------------------------------------- going on anyway


def test_changed_data_is_gone_on_with_knowingly_and_noted_and_later_compared_with_that(table: Path) -> None:
    whole, folder = lines(table), table.parent / "r"
    rewrite(table, [*whole, "1,1,a", "2,2,b"])
    with pytest.raises(fz.NumbersError):
        fz.resume("r", "limits.seconds=1e-9", runs=table.parent, accept_changed_data=True, quiet=True)
    (said,) = (e["what"] for e in read_events(folder / "events.jsonl") if e["event"] == "Warned" and "data" in e["what"])
    assert said == f"goes on with changed data, as accepted, the epoch begun anew: {table}: rows 65 to 66 are new"
    noted = json.loads((folder / "plan.json").read_text())["changes"]
    assert noted[-1].endswith(f"step 5: {table}: rows 65 to 66 are new")
    rewrite(table, [*whole, "1,1,a", "3,3,c"])
    assert refused(table.parent) == [f"{table}: row 66 (line 67) has changed"]
    rewrite(table, [*whole, "1,1,a", "2,2,b"])
    done = fz.resume("r", "limits.seconds=none", runs=table.parent, quiet=True)
    assert done.result["status"] == "done" and json.loads((folder / "data.json").read_text())["sources"][0]["rows"] == 66


def test_fewer_rows_than_the_position_in_the_epoch_are_gone_on_with_from_its_beginning(table: Path) -> None:
    rewrite(table, lines(table)[:25])
    done = fz.resume("r", "epochs=9", runs=table.parent, accept_changed_data=True, quiet=True)
    steps = [e["samples"] for e in read_events(table.parent / "r" / "events.jsonl") if e["event"] == "StepDone"]
    assert done.result["status"] == "done" and done.result["steps"] > 5 and steps == sorted(steps)


def test_a_new_class_that_changes_the_model_is_refused_with_both_shapes_even_if_accepted(table: Path) -> None:
    rewrite(table, [*lines(table), "1,1,d", "2,2,d", "3,3,d"])
    assert refused(table.parent) == [f"{table}: rows 65 to 67 are new"]
    with pytest.raises(fz.SourceError, match=r"do not fit the model: .*\(3, 4\), not \(4, 4\)"):
        fz.resume("r", runs=table.parent, accept_changed_data=True, quiet=True)


# ------------------------------------------------------------------------------------- other kinds


def test_images_are_named_by_file(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    draw = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (6, 6), dtype=np.uint8)).save(path)

    photos = tmp_path / "photos"
    for number in range(20):
        picture(photos / ("cat", "dog")[number % 2] / f"{number}.png")
    stopped_at({**noise, "data": str(photos), "batch": 4}, tmp_path, 3)
    picture(photos / "cat" / "4.png")
    picture(photos / "dog" / "new.png")
    (photos / "cat" / "8.png").unlink()
    assert refused(tmp_path) == [f"{photos}: cat/4.png has changed", f"{photos}: cat/8.png is gone", f"{photos}: dog/new.png is new"]


def test_arrays_are_named_by_example_from_a_file_and_from_python(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    x, y = torch.randn(40, 2), torch.arange(40) % 3
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    stopped_at({**noise, "data": str(tmp_path / "a.npz")}, tmp_path, 2)
    changed = x.clone()
    changed[6, 1] += 1
    np.savez(tmp_path / "a.npz", x=changed.numpy(), y=y.numpy())
    assert refused(tmp_path) == [f"{tmp_path}/a.npz: example 7 has changed"]
    stopped_at({**noise, "data": {"train": (x, y)}, "name": "python"}, tmp_path, 2)
    with pytest.raises(fz.DataError, match="data given from Python: example 7 has changed"):
        fz.resume("python", runs=tmp_path, data=(changed, y), quiet=True)
    assert fz.resume("python", runs=tmp_path, data=(x.clone(), y), quiet=True).result["status"] == "done"


def test_documents_of_a_corpus_are_named(noise: dict[str, Any], tmp_path: Path, stopped_at: Stop) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for number in range(6):
        (books / f"{number}.txt").write_text(f"the {number} river and the cloud " * 20)
    model = {"from": "decoder", "width": 8, "heads": 2, "layers": 1, "context": 16}
    recipe = {"name": "r", "task": "language", "model": model, "batch": 4, "epochs": 2, "evaluate": {"samples": 0}, "report": ()}
    recipe["data"] = {"train": str(books), "tokenizer": "characters", "max_tokens": 16, "hold_out": 0.2}
    stopped_at(recipe, tmp_path, 2)
    (books / "3.txt").write_text("another river " * 40)
    assert refused(tmp_path) == [f"{books}: 3.txt has changed"]


def test_rows_of_text_are_compared_to_the_last_blank_and_a_tokenizer_is_told_from_the_rows(
    noise: dict[str, Any], tmp_path: Path, stopped_at: Stop
) -> None:
    table = tmp_path / "texts.csv"
    rewrite(table, ["text,topic", *(f"the {i} rivers of stone and a cloud,{'ab'[i % 2]}" for i in range(40))])
    from fromzero.data import tokens as tk

    made = tmp_path / "tokenizer.json"
    made.write_text(tk.byte_pairs(lines(table), 300))
    noise["model"] = {"from": "encoder", "width": 8, "heads": 2, "layers": 1}
    noise["data"] = {"train": str(table), "input": "text", "target": "topic", "tokenizer": str(made)}
    stopped_at(noise, tmp_path, 2)
    rows = lines(table)
    rewrite(table, [*rows[:8], rows[8].replace("the ", "the  "), *rows[9:]])
    assert refused(tmp_path) == [f"{table}: row 8 (line 9) has changed"]
    rewrite(table, rows)
    made.write_text(tk.byte_pairs([" ".join(reversed(line.split())) for line in rows], 300))
    (said,) = refused(tmp_path)
    assert said.startswith(f"{table}: every row is as it was, but what is made of them is not; the tokenizer, the chat template or")


def test_conversations_are_named_by_line(noise: dict[str, Any], tmp_path: Path) -> None:
    from fromzero.data.chat import _contents
    from fromzero.data.conversations import read_conversations

    path = tmp_path / "chats.jsonl"
    rows = [json.dumps({"prompt": f"what is {i}", "completion": f"it is {i}"}) for i in range(6)]
    path.write_text("\n\n".join(rows))
    then = _contents(read_conversations(str(path), None, (tmp_path,)))
    path.write_text("\n\n".join([*rows[:3], rows[3].replace("it is", "it was"), *rows[4:]]))
    (fault,) = differences(then, _contents(read_conversations(str(path), None, (tmp_path,))))
    assert str(fault) == f"{path}: conversation 4 (line 7) has changed"


# ------------------------------------------------------------------------------- bounds, older folders


def test_what_is_noted_of_very_many_rows_is_bounded_and_still_finds_the_place() -> None:
    rows = [str(number).encode() for number in range(2 * MOST + 5)]
    then = contents("big.csv", "row", rows)
    assert then.every == 3 and len(then.short) <= 8 * MOST
    rows[300_000] = b"other"
    (fault,) = differences(then, contents("big.csv", "row", rows))
    assert str(fault) == f"big.csv: differs first in rows 300,001 to 300,003 ({len(rows):,} in all, {len(rows):,} before)"


def test_the_digest_of_all_rows_vouches_where_the_short_ones_agree() -> None:
    then = contents("a.csv", "row", [b"1", b"2"])
    other = Contents(then.name, then.unit, then.rows, "another", then.every, then.short)
    assert [str(fault) for fault in differences(then, other)] == ["a.csv: has changed (2 rows)"]
    assert not differences(then, contents("elsewhere/a.csv", "row", [b"1", b"2"]))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("{"), lambda path: path.write_text('{"digest": "x"}')])
def test_a_folder_without_notes_of_its_rows_is_refused_by_the_digest_alone(table: Path, spoil: Callable[[Path], object]) -> None:
    spoil(table.parent / "r" / "data.json")
    text = table.read_text()
    rewrite(table, [*lines(table), "1,1,a"])
    assert "its digest differs from the one in plan.json; its rows were not noted" in refused(table.parent)[0]
    table.write_text(text)
    assert fz.resume("r", runs=table.parent, quiet=True).result["status"] == "done"
