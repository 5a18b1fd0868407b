"""SIGTERM and Ctrl-C in every phase of a run: it ends at the next step's end, saved, with its own exit code; a second one ends it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One process that has imported everything forks a child for each case. In a child one function is slow and says when it is entered;
# then the signals are sent. What was stopped goes on in a second child, and is compared with a run that was left alone.
SCRIPT = """
import contextlib, importlib.util, json, os, signal, sys, time
from pathlib import Path
import torch
import fromzero as fz
import fromzero.cli
from fromzero.planner import cut
from fromzero.runner import checkpoint, execute, judge, loop, prefix, probe, samples

spec = importlib.util.spec_from_file_location("kill", sys.argv[1])
kill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill)
cut.LOST_SECONDS, prefix.LEAST_SECONDS, probe.ENOUGH_SECONDS = 1e9, 1e9, 0.0
torch.set_num_threads(1)
# phase: (recipe, where the function is, its name, the call of it that is slow)
SLOW = {
    "planning": ("language", probe, "_steps", 1),
    "frozen part": ("encoder", prefix, "reads_at", 4),
    "first texts": ("language", samples, "generate", 1),
    "training": ("language", loop, "gradient_norm", 2),
    "evaluation": ("language", judge.Judge, "measure", 1),
    "texts": ("language", samples, "generate", 2),
    "saving": ("language", checkpoint, "write_tensors", 2),
    "ending": ("language", execute, "write_model", 1),
}

def child(arguments, said, phase=None, writes=None, seconds=0.0):
    pid = os.fork()
    if pid:
        return pid
    if phase is not None:
        _, place, name, which = SLOW[phase]
        whole, calls = getattr(place, name), 0

        def slow(*given, **named):
            nonlocal calls
            calls += 1
            if calls == which:
                os.write(writes, b".")
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    time.sleep(0.01)
            return whole(*given, **named)

        def begun(*given, **named):  # from here on calls count: trial steps are over
            setattr(place, name, slow)
            return execute_whole(*given, **named)

        if phase == "planning":
            setattr(place, name, slow)
        else:
            execute_whole, execute.execute = execute.execute, begun
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = ["fromzero", *arguments]
    try:
        fromzero.cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    sys.stderr.flush(), sys.stdout.flush()
    os._exit(code)

def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

found = {}
for recipe in ("language", "encoder"):  # here, so that the children find everything imported
    fz.run(fz.plan(recipe + ".yaml", runs="whole"), quiet=True)
for phase, sent in json.loads(sys.argv[2]):
    key = f"{phase} {sent}"
    recipe, runs = SLOW[phase][0], key.replace(" ", "_")
    reads, writes = os.pipe()
    pid = child(["train", recipe + ".yaml", "--runs", runs], "said", phase, writes, 0.3 if len(sent) == 1 else 60.0)
    os.close(writes)
    os.read(reads, 1)
    began = time.monotonic()
    for number in sent:
        os.kill(pid, number)
        time.sleep(0.1)
    found[key] = {"code": code_of(pid), "seconds": time.monotonic() - began, "said": Path("said").read_text()}
    run = Path(runs) / recipe
    found[key]["run"] = (run / "recipe.yaml").is_file()
    found[key]["steps"] = sorted(int(p.name[5:]) for p in run.glob("checkpoints/step-*") if not p.suffix)
    if found[key]["run"] and found[key]["code"]:
        found[key]["resumed"] = code_of(child(["resume", recipe, "--runs", runs], "said"))
        found[key]["differences"] = [d for d in kill.differences(run, Path("whole") / recipe) if "predicted" not in d]
print(json.dumps(found))
"""
TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)
Cases = list[tuple[str, list[int]]]
FEW: Cases = [("planning", [TERM]), ("frozen part", [INT]), ("saving", [TERM]), ("evaluation", [INT, TERM])]
ALL: Cases = [
    *(
        (phase, [number])
        for number in (TERM, INT)
        for phase in ("planning", "frozen part", "first texts", "training", "evaluation", "texts", "saving")
    ),
    ("ending", [TERM]),
    ("training", [TERM, TERM]),
    ("evaluation", [INT, TERM]),
    ("saving", [TERM, INT]),
]


def carried_out(cases: Cases, folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    lines = [f"there was {'rain and wind' if i % 2 else 'soup and bread'} number {i},{'weather' if i % 2 else 'food'}" for i in range(40)]
    (folder / "topics.csv").write_text("\n".join(["text,topic", *lines]) + "\n")
    every = "certificate: off\nbatch: 16\nsteps: 6\nsave: {every: 2}\nlimits: {threads: 1}\nreport: []\n"
    (folder / "language.yaml").write_text(
        "task: language\nmodel: {from: decoder, width: 16, layers: 1, heads: 2, context: 16}\nevaluate: {every: 3, samples: 1}\n"
        "data: {train: corpus.txt, tokenizer: characters, max_tokens: 16, hold_out: 0.2}\n" + every
    )
    (folder / "encoder.yaml").write_text(
        "task: classify\nmodel: {from: encoder, width: 16, layers: 2, heads: 2, dropout: 0.1}\nfreeze: {through: blocks.0}\n"
        "data: {train: topics.csv, hold_out: 0.2, tokenizer: bpe, vocabulary: 300}\n" + every
    )
    kill = Path(__file__).resolve().parents[2] / "benchmarks" / "kill.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", SCRIPT, str(kill), json.dumps(cases)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_signal_ends_any_phase_with_its_code_and_the_run_goes_on_to_the_same_bits(cases: Cases, tmp_path: Path) -> None:
    found = carried_out(cases, tmp_path)
    assert len(found) == len(cases)
    for phase, sent in cases:
        check(found[f"{phase} {sent}"], phase, sent)


def check(case: dict[str, Any], phase: str, sent: list[int]) -> None:
    assert "Traceback" not in case["said"] and "bug" not in case["said"], case["said"]
    if phase == "ending":  # the last step is taken: what is left to write is written
        assert case["code"] == 0
        return
    assert case["code"] == 128 + sent[-1], case["said"]
    if phase == "planning":
        assert not case["run"] and "interrupted; what was saved before is whole" in case["said"]
        return
    assert case["resumed"] == 0 and case["differences"] == []
    steps = {"frozen part": 0, "first texts": 0, "training": 2, "evaluation": 3, "texts": 3, "saving": 2}[phase]
    if len(sent) == 2:
        assert case["seconds"] < 30, "it was to last for a minute"
        assert case["steps"] == ([2] if phase == "evaluation" else []) and "interrupted; what was saved before is whole" in case["said"]
    elif steps:
        assert case["steps"][-1] == steps
        assert f"stopped after step {steps} of 6, saved; fromzero resume" in case["said"]
    else:
        assert case["steps"] == [] and "stopped before step 1 of 6, nothing new was to be saved; fromzero resume" in case["said"]
