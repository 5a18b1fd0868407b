"""Write tests/golden/plans/*.json: what was looked up and measured for each shipped recipe, once, and the plan that follows from it.

    python tests/golden/write_plans.py TEXTS

texts: the folder of banking77_train.csv, banking77_test.csv and tinyshakespeare.txt. The facts stand for a described machine; a
change of the planner that is meant changes the plans, and this writes them anew: with --facts the facts too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from pydantic import TypeAdapter

import fromzero as fz
from fromzero.planner.make import make
from fromzero.planner.values import Facts

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
TEXTS = ("banking77_train.csv", "banking77_test.csv", "tinyshakespeare.txt")


def written(name: str) -> Path:
    return HERE / "plans" / f"{name}.json"


def planned(recipe: fz.Recipe, facts: Facts) -> dict[str, object]:
    """The plan alone: recipe and facts stand beside it."""
    values = make(recipe, facts).as_json()
    return json.loads(json.dumps({key: value for key, value in values.items() if key not in ("recipe", "facts")}))


def look(name: str, runs: Path) -> Facts:
    return fz.plan(fz.read(f"{name}.yaml"), runs=runs, beside=Path()).plan.facts


def main() -> None:
    texts, anew = Path(sys.argv[1]).resolve(), "--facts" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(shutil.copytree(RECIPES, Path(folder) / "recipes"))
        for name in TEXTS:
            shutil.copy(texts / name, name)
        for number in range(48):
            shade = Image.new("RGB", (150, 150), (number * 5, 255 - number * 5, 90 + number % 2 * 90))
            Path("photos", "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            shade.save(f"photos/{'ab'[number % 2]}/{number}.png")
        runs = Path("runs")
        for path in sorted(Path().glob("*.yaml")):
            name, recipe = path.stem, fz.read(path)
            if name == "digits-finetune" and anew:
                fz.run(fz.plan("digits.yaml", runs=runs, beside=Path()), quiet=True)
            if anew or not written(name).is_file():
                values = TypeAdapter(Facts).dump_python(look(name, runs), mode="json")
                facts = json.loads(json.dumps(values).replace(f"{Path().absolute()}/", ""))
            else:
                facts = json.loads(written(name).read_text())["facts"]
            plan = planned(recipe, TypeAdapter(Facts).validate_python(facts))
            written(name).write_text(json.dumps({"plan": plan, "facts": facts}, ensure_ascii=False) + "\n")
            print(name, flush=True)


if __name__ == "__main__":
    main()
