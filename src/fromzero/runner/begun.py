"""Begun: a run that begins in, what its folder says of it out; that folder and the run as it goes on in, what has changed since out.

recipe.yaml, plan.json, environment.txt and data.json say what the run is carried out with now. plan.json also holds the recipe that it
was started with (`begun`), and every change since (`changes`).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fromzero.data import Contents, Loaded, differences
from fromzero.data.opening import find_path
from fromzero.errors import DataError, Fault, RecipeError, SourceError, UserError
from fromzero.optim import follows_length, lr_factor
from fromzero.planner.values import Plan
from fromzero.recipe.changes import changes, shown
from fromzero.recipe.read import Written, check, given_again, write
from fromzero.recipe.schema import OwnLoss, Recipe
from fromzero.report.events import Warned
from fromzero.runner.assemble import Place
from fromzero.runner.folder import RESULT, read_result, saved_steps
from fromzero.runner.lock import held
from fromzero.runner.progress import Progress
from fromzero.sources.cache import digest_of, write_whole

PLAN, DATA, ENVIRONMENT = "plan.json", "data.json", "environment.txt"
_VERSIONS = ("fromzero", "torch")  # whose change may change a bit
_CONTENTS = TypeAdapter(tuple[Contents, ...])
LENGTH = frozenset(["epochs", "steps", "tokens"])
ACCEPT = "--accept-changed-data (accept_changed_data=True in Python)"


@dataclass(frozen=True)
class Begun:
    """What a run's folder says.

    recipe, begun:  as JSON holds them, now and when it was started.  began_at: Unix seconds
    place:          where relative paths of the recipe start.  changes: in words, oldest first
    """

    folder: Path
    recipe: dict[str, Any]
    begun: dict[str, Any]
    began_at: float
    place: Path
    steps: int
    facts: dict[str, Any]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Going:
    """How a run goes on. recipe: dotted key → then, now;  data: what has changed in it, and was accepted;  others: files and versions
    done_at: the step after which it was done already; None where it was not"""

    begun: Begun
    recipe: Mapping[str, tuple[Any, Any]]
    data: tuple[Fault, ...]
    others: tuple[str, ...]
    done_at: int | None


def describe(folder: Path, plan: Plan, loaded: Loaded, place: Place, earlier: Begun | None = None, changed: Sequence[str] = ()) -> None:
    """Write what is run: recipe, data, environment, plan.

    earlier:  of a run that goes on.  changed: since then, in words
    """
    made = plan.as_json()
    beside = str(place.folders[0].resolve())
    begun, began_at, before = (earlier.begun, earlier.began_at, earlier.changes) if earlier else (made["recipe"], time.time(), ())
    history = {"begun": begun, "began_at": began_at, "changes": [*before, *changed]}
    write_whole(folder / DATA, json.dumps(_data(plan, loaded, place)).encode())
    write_whole(folder / ENVIRONMENT, ("\n".join(_environment()) + "\n").encode())
    write_whole(folder / PLAN, json.dumps({**made, "place": beside, **history}, indent=1).encode())
    write_whole(folder / "recipe.yaml", write(plan.recipe).encode())  # last: with it the folder is a run, which can go on


def _data(plan: Plan, loaded: Loaded, place: Place) -> dict[str, Any]:
    files = [path for source in loaded.contents if (path := Path(source.name)).is_file()]
    return {
        "digest": loaded.facts.digest,
        "files": {
            str(path.resolve()): {"bytes": path.stat().st_size, "sha256": digest_of(path)} for path in [*files, *_code(plan.recipe, place)]
        },
        "sources": [{**asdict(source), "lines": ()} for source in loaded.contents],
    }


def _code(recipe: Recipe, place: Place) -> list[Path]:
    """Files of the person's own whose code the run executes."""
    sources = [recipe.model.source, recipe.loss.function if isinstance(recipe.loss, OwnLoss) else None]
    return [find_path(source.rpartition(":")[0], place.folders) for source in sources if isinstance(source, str) and ".py:" in source]


def _environment() -> dict[str, None]:
    """Lines, each once"""
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}", f"command {' '.join(sys.argv[:4])}"]
    found = [distribution.metadata for distribution in importlib.metadata.distributions()]  # parsed anew at each access
    return dict.fromkeys([*lines, *sorted(f"{about['Name']}=={about['Version']}" for about in found if about["Name"])])


def read_begun(folder: Path) -> Begun:
    """raises: SourceError where plan.json is not whole"""
    try:
        noted = json.loads((folder / PLAN).read_text())
        return Begun(
            folder=folder,
            recipe=dict(noted["recipe"]),
            begun=dict(noted.get("begun", noted["recipe"])),
            began_at=float(noted.get("began_at", 0.0)),
            place=Path(noted["place"]),
            steps=int(noted["steps"]),
            facts=dict(noted["facts"]),
            changes=tuple(noted.get("changes", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SourceError("has no whole plan.json", mend="train its recipe.yaml anew", file=str(folder)) from None


def refuse_done(begun: Begun, recipe: Mapping[str, tuple[Any, Any]]) -> None:
    """raises: UserError for a run that is done, where nothing has changed in its recipe"""
    if not recipe and (done_at := _done_at(begun)) is not None:
        raise UserError(
            f"run '{begun.folder.name}' is done after {done_at} steps",
            mend=f"to train on from it, use model: run:{begun.folder.name} in a recipe, or make it longer: epochs=…",
        )


def _done_at(begun: Begun) -> int | None:
    result = read_result(begun.folder)
    return int(result["steps"]) if result.get("status") == "done" else None


def go_on(begun: Begun, recipe: Mapping[str, tuple[Any, Any]], plan: Plan, loaded: Loaded, place: Place, *, accepted: bool) -> Going:
    """Compare the data, the person's own code and the versions with what the folder says of them.

    recipe:   what has changed in it
    accepted: whether changed data may be gone on with
    raises:   DataError naming what has changed in the data
    """
    noted = _noted_data(begun)
    data = tuple(_changed_data(begun.facts.get("data", {}).get("digest", ""), noted, loaded))
    if data and not accepted:
        first = Fault(
            "the data has changed since the run began",
            why="the rest of the run would learn from other examples, in another order",
            mend=f"put the old data back, or go on knowingly: {ACCEPT}",
            file=loaded.facts.source,
        )
        raise DataError([first, *data])
    code = {str(path.resolve()): digest_of(path) for path in _code(plan.recipe, place)}
    others = [f"{path} has changed" for path, sha256 in code.items() if noted["files"].get(path, {}).get("sha256", sha256) != sha256]
    return Going(begun, recipe, data, (*others, *_other_versions(begun.folder)), _done_at(begun))


def _noted_data(begun: Begun) -> dict[str, Any]:
    """What data.json says; nothing where it is not there or is not of the data that the run is carried out with."""
    try:
        noted = json.loads((begun.folder / DATA).read_text())
        if noted["digest"] == begun.facts["data"]["digest"]:
            return {"files": dict(noted["files"]), "sources": _CONTENTS.validate_python(noted["sources"])}
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass
    return {"files": {}, "sources": ()}


def _changed_data(digest: str, noted: Mapping[str, Any], loaded: Loaded) -> Iterator[Fault]:
    """By row where they were noted, else by file; else that something has."""
    sources: Sequence[Contents] = noted["sources"]
    found = [fault for then, now in zip(sources, loaded.contents, strict=False) for fault in differences(then, now)]
    if not found and len(sources) not in (0, len(loaded.contents)):
        found = [Fault(f"came from {len(sources)} sources, comes from {len(loaded.contents)}", file=loaded.facts.source)]
    if found or loaded.facts.digest == digest:
        yield from found
        return
    if sources:
        what = "every row is as it was, but what is made of them is not"
        yield Fault(what, "the tokenizer, the chat template or fromzero's reading of them is another", file=loaded.facts.source)
    else:
        yield Fault("its digest differs from the one in plan.json", "its rows were not noted", file=loaded.facts.source)


def _other_versions(folder: Path) -> Iterator[str]:
    try:
        then = dict(line.split("==", 1) for line in (folder / ENVIRONMENT).read_text().splitlines() if "==" in line)
    except OSError:
        return
    for name in _VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):  # run from its source
            if then.get(name, now := importlib.metadata.version(name)) != now:
                yield f"{name}: {then[name]} → {now}"


def refuse_no_way_on(going: Going, plan: Plan, progress: Progress) -> None:
    """raises: UserError where the length asked for is reached already; SourceError where a done run has no checkpoint of its end"""
    name, step = going.begun.folder.name, progress.step
    if going.done_at is not None and step != going.done_at:
        raise SourceError(
            f"has no checkpoint of its end, step {going.done_at}; {f'the newest is of step {step}' if step else 'there is none at all'}",
            why="a run is made longer from where it ended",
            mend=f"save.every: epoch keeps one the next time; to train on from its weights: model: run:{name} in a new recipe",
            file=str(going.begun.folder),
        )
    _refuse_nothing_left(going, plan, progress)


def go_on_with(going: Going, plan: Plan, loaded: Loaded, place: Place, progress: Progress) -> Iterator[Warned]:
    """Write what has changed into the folder, and say it. The epoch underway begins anew where its examples are not what they were."""
    name, step = going.begun.folder.name, progress.step
    if going.data:
        progress.index = 0
    said = [f"{key}: {shown(then)} → {shown(now)}" for key, (then, now) in going.recipe.items()]
    if said:
        yield Warned(f"goes on with another recipe from step {step}: {'; '.join(said)}")
    if plan.steps != going.begun.steps:
        yield from _other_rates(going.begun.steps, plan, step, name)
    if going.data:
        said += map(str, going.data)
        yield Warned(f"goes on with changed data, as accepted, the epoch begun anew: {' | '.join(map(str, going.data))}")
    if going.others:
        said += going.others
        yield Warned(
            f"not as it was when the run began: {'; '.join(going.others)}", "the rest of the run may not be what it would have been"
        )
    if said:
        (going.begun.folder / RESULT).unlink(missing_ok=True)  # a run that was done is so no longer, whatever happens now
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        describe(going.begun.folder, plan, loaded, place, going.begun, [f"{at}, step {step}: {what}" for what in said])


def _refuse_nothing_left(going: Going, plan: Plan, progress: Progress) -> None:
    stop_after, done = plan.recipe.evaluate.stop_after, going.done_at is not None
    if progress.step >= plan.steps and (done or LENGTH & going.recipe.keys()):
        raise UserError(
            f"would have {plan.steps} steps, and has taken {progress.step}", mend="ask for more", file=str(going.begun.folder), key="steps"
        )
    if done and stop_after is not None and progress.without_gain >= stop_after:
        raise UserError(
            f"{progress.without_gain} evaluations were without a gain, and it stops after {stop_after}",
            mend="evaluate.stop_after=none, or more",
            file=str(going.begun.folder),
            key="evaluate.stop_after",
        )


def _other_rates(before: int, plan: Plan, step: int, name: str) -> Iterator[Warned]:
    """What another length does to a schedule that follows it."""
    schedule = plan.recipe.schedule.model_dump(exclude={"name"})
    shape = plan.recipe.schedule.name
    if not follows_length(shape, **schedule):
        return
    was, now = (plan.recipe.optimizer.lr * lr_factor(shape, min(step, total), total, **schedule) for total in (before, plan.steps))
    yield Warned(
        f"schedule {shape} runs over {plan.steps} steps now, not {before}: step {step + 1} is taken at a rate of {now:.3g}, not {was:.3g}; "
        f"the {step} steps before it keep theirs, so that this is not a run of {plan.steps} steps from the start",
        f"model: run:{name} in a new recipe has a schedule of its own",
    )


def started_from(recipe: Recipe, place: Path, runs: Path) -> Path | None:
    """The newest run that was started from this recipe, with relative paths from the same folder, and that no process holds.

    One that left nothing to go on from does not count.
    """
    found: list[tuple[float, Path]] = []
    for folder in runs.iterdir() if runs.is_dir() else []:
        if saved_steps(folder) or read_result(folder).get("status") == "done":
            try:
                begun = read_begun(folder)
                if begun.place == place.resolve() and not changes(once_more(begun.begun, recipe), recipe) and not held(folder):
                    found.append((begun.began_at, folder))
            except (SourceError, RecipeError):  # of another version, or no run
                continue
    return max(found)[1] if found else None


def once_more(values: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """A recipe as plan.json holds it, with what was given from Python as another has it.  raises: RecipeError for one of another version"""
    model, data = recipe.given
    held_model, held_data = (str(values.get(key)).count("<given from Python") for key in ("model", "data"))
    return check(Written(given_again(values, model if held_model else None, data if held_data else None)))
