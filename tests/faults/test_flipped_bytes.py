"""A checkpoint that is no longer as it was written: noticed by file, with what was noted and what is there; the one before is taken."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fromzero as fz
from fromzero.report.events import StepDone
from fromzero.report.jsonlines import read_events
from fromzero.runner import checkpoint

FILES = ["best.safetensors", "manifest.json", "optimizer.safetensors", "progress.json", "weights.safetensors"]


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 2 and 3"""
    job = tiny().steps(2)
    job.save(tmp_path / "c")
    job.steps(1).save(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c" / "step-3").iterdir()) == FILES
    return tmp_path / "c"


def flip(two: Path, *, every: int) -> int:
    flipped = 0
    for name in FILES:
        path = two / "step-3" / name
        whole = path.read_bytes()
        places = [*range(0, len(whole), every), len(whole) - 1]
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            step, skipped = checkpoint.find(two)
            assert step == two / "step-2" and list(skipped) == [two / "step-3"], (name, place)
            said = skipped[two / "step-3"]
            assert said.startswith(f"{name} "), (name, place, said)
            if name != "manifest.json":
                noted, found = (hashlib.sha256(data).hexdigest()[:16] for data in (whole, changed))
                assert said == f"{name} has changed since it was written: its SHA-256 is {found}…, noted was {noted}…"
        path.write_bytes(whole)
        assert checkpoint.find(two) == (two / "step-3", {})
        flipped += len(places)
    return flipped


def test_a_flipped_bit_in_any_file_is_noticed_by_name_with_both_digests(two: Path) -> None:
    assert flip(two, every=101) >= 85


@pytest.mark.slow
def test_a_flipped_bit_in_any_byte_of_any_file_is_noticed_by_name(two: Path) -> None:
    assert flip(two, every=1) >= 8_500


def test_a_file_cut_or_gone_is_noticed_by_name_with_both_sizes(two: Path) -> None:
    seen = 0
    for name in FILES:
        path = two / "step-3" / name
        whole = path.read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 1, None):
            path.unlink() if size is None else path.write_bytes(whole[:size])
            step, skipped = checkpoint.find(two)
            assert step == two / "step-2"
            said = skipped[two / "step-3"]
            if size is None:
                assert said == f"{name} is missing"
            elif name == "manifest.json":
                assert said == f"manifest.json is no whole manifest ({size} bytes)"
            else:
                assert said == f"{name} has {size} bytes, {len(whole)} were written"
            seen += 1
        path.write_bytes(whole)
    assert seen == 20 and checkpoint.find(two) == (two / "step-3", {})


def test_a_manifest_that_says_something_else_in_good_order_is_noticed(two: Path) -> None:
    path = two / "step-3" / "manifest.json"
    values = json.loads(path.read_text())
    for change in ({"data": "0" * 64}, {"step": 4}, {"format": 1}, {"format": 9}, {"sha256": None}, {"files": {}}, {"files": [1]}):
        path.write_text(json.dumps({**values, **change}, indent=1))
        assert checkpoint.find(two)[1][two / "step-3"].startswith("manifest.json "), change
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "sha256"}, indent=1))
    assert "noted was nothing" in checkpoint.find(two)[1][two / "step-3"]


def test_a_checkpoint_that_is_gone_is_missed_by_the_pointer(two: Path) -> None:
    shutil.rmtree(two / "step-3")
    assert checkpoint.find(two) == (two / "step-2", {two / "step-3": "latest names it, and it is not there"})
    (two / "latest").write_bytes(b"\xff../../etc")
    assert checkpoint.find(two) == (two / "step-2", {})


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rows.csv").write_text("a,b,kind\n" + "".join(f"{i % 7},{i % 5},{'odd' if i % 2 else 'even'}\n" for i in range(60)))
    data, limits = {"train": str(tmp_path / "rows.csv"), "target": "kind"}, {"threads": 1}
    model = {"from": "mlp", "hidden": [4], "dropout": 0.2}
    values = {"task": "classify", "model": model, "data": data, "batch": 8, "steps": 16, "save": {"every": 3, "keep": 2}}
    return {**values, "limits": limits, "report": []}


def stopped(recipe: dict[str, Any], runs: Path, at: int) -> Path:
    """A run that ends at a step, as if the machine had lost its power; its last two checkpoints are there."""

    def die(event: object) -> None:
        if isinstance(event, StepDone) and event.step == at:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fz.run(fz.plan({**recipe, "name": "part"}, runs=runs, probe=False), quiet=True, observers=[die])
    return runs / "part"


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_as_if_nothing_had_happened(
    recipe: dict[str, Any], tmp_path: Path, equal: Callable[..., bool]
) -> None:
    whole = fz.run(fz.plan({**recipe, "name": "whole"}, runs=tmp_path, probe=False), quiet=True)
    run = stopped(recipe, tmp_path, 11)
    damaged = run / "checkpoints" / "step-9" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (run / "checkpoints" / "step-12.tmp-4711").mkdir()  # and a save had begun
    (run / "model").mkdir()
    unfinished = [run / ".page.html.k3x_09ab", run / "model" / ".model.safetensors.plklgj_i"]  # as a file has before it is whole
    for path in unfinished:
        path.write_bytes(b"half")
    part = fz.resume("part", runs=tmp_path, quiet=True)
    assert all((tensor == part.model.state_dict()[name]).all() for name, tensor in whole.model.state_dict().items())
    same = ("steps", "train", "validation", "kept_step")
    assert {key: whole.result[key] for key in same} == {key: part.result[key] for key in same}
    events = read_events(run / "events.jsonl")
    said = [f"{event['what']}; {event['mend']}" for event in events if event["event"] == "Warned" and "step-" in event["what"]]
    assert len(said) == 3 and all(what.endswith("; training goes on from step-6") for what in said)
    assert said[0].startswith("step-9 was skipped: optimizer.safetensors has changed since it was written: its SHA-256 is ")
    assert said[1].startswith("step-12.tmp-4711, left by a save that did not end, was removed")
    assert said[2].startswith("step-9 was set aside as step-9.aside; the next save removes it")
    assert [event["step"] for event in events if event["event"] == "Started"] == [0, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-12", "step-15"]
    assert not any(path.exists() for path in unfinished)
    told = [event["what"] for event in events if event["event"] == "Warned" and "left by a run that was killed" in event["what"]]
    assert [what.partition(",")[0] for what in told] == [path.name for path in unfinished]


def test_where_no_checkpoint_is_whole_nothing_is_trained_and_nothing_is_touched(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = stopped(recipe, tmp_path, 11)
    (run / "checkpoints" / "step-9" / "weights.safetensors").write_bytes(b"")
    (run / "checkpoints" / "step-6" / "progress.json").unlink()
    before = sorted(str(path) for path in (run / "checkpoints").rglob("*"))
    with pytest.raises(fz.SourceError) as caught:
        fz.resume("part", runs=tmp_path, quiet=True)
    said = str(caught.value)
    assert "part: has no whole checkpoint to go on from" in said and "fromzero train its recipe.yaml starts anew" in said
    assert "step-9 was skipped: weights.safetensors has 0 bytes" in said and "step-6 was skipped: progress.json is missing" in said
    assert before == sorted(str(path) for path in (run / "checkpoints").rglob("*")) and not (run / "model").exists()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(fz.SourceError, match="has no whole checkpoint to go on from"):
        fz.resume("part", runs=tmp_path, quiet=True)
