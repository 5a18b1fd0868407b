"""A run of this version, stopped half-way → tests/runner/released/VERSION: recipe, plan, data and one checkpoint of a few kB.

python tests/runner/released/make.py        once for each release; what is there already is never written anew
"""

import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import fromzero as fz
from fromzero.report.events import StepDone

HERE = Path(__file__).resolve().parent
STOPPED_AT = 6
RECIPE = """
name: old
task: classify
model: {from: mlp, hidden: [4]}
data: {train: rows.csv, target: kind}
optimizer: {lr: 0.02}
batch: 8
steps: 12
limits: {threads: 1}
report: []
"""


def rows() -> str:
    lines = [f"{a},{(a * b) % 7},{'odd' if (a + b) % 2 else 'even'}" for a in range(8) for b in range(5)]
    return "\n".join(["a,b,kind", *lines]) + "\n"


def main() -> None:
    target = HERE / fz.__version__
    if target.exists():
        raise SystemExit(f"{target} is there already")

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("rows.csv").write_text(rows())
        Path("old.yaml").write_text(RECIPE)
        with suppress(fz.Interrupted):
            fz.run(fz.plan("old.yaml"), observers=[stop])
        run, kept = Path("runs/old"), target / "old"
        shutil.copytree(run / "checkpoints", kept / "checkpoints")
        shutil.copy("rows.csv", target)
        shutil.copy(run / "recipe.yaml", kept)
        (kept / "plan.json").write_text((run / "plan.json").read_text().replace(str(Path(folder).resolve()), "."))


if __name__ == "__main__":
    main()
