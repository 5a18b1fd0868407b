"""Make: a recipe and facts in, a plan out. Pure: no file is read, no weight allocated, no clock looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fromzero.data import TextFacts, count_batches
from fromzero.errors import Fault, PlanRefused, RecipeError
from fromzero.optim import lr_multiplier
from fromzero.planner.cost import corrected, disk, memory, peak_bytes, run_seconds, trained_values
from fromzero.planner.cut import NO_CUT, Cut, choose_cut
from fromzero.planner.values import Choice, Facts, Finding, Plan, TrainRow
from fromzero.planner.ways import alternatives, choose_way, score_rows
from fromzero.planner.xray import findings
from fromzero.recipe.schema import BatchTokens, Recipe
from fromzero.report.summary import format_bytes

COMPILE_PAYS = 600.0  # seconds of a run on cuda above which compiling is taken to pay


def make(recipe: Recipe, facts: Facts) -> Plan:
    """Decide how. The plan may carry findings of severity error; `refuse` turns those into an exception."""
    data = facts.data
    batch, batch_tokens, steps_per_epoch = _batch(recipe, facts)
    asked = recipe.steps or _epochs(recipe, facts) * steps_per_epoch
    steps = max(1, round(asked))
    every = steps_per_epoch if recipe.evaluate.every == "epoch" else recipe.evaluate.every
    evaluations = math.ceil(steps / every) if data.validation else 0
    trainable, precision = trained_values(facts), _precision(recipe, facts)
    attention, adapters = _attention(facts), _lowrank(recipe, facts)
    prefix, cut = _prefix(recipe, facts, steps, again=steps > steps_per_epoch)
    chosen = choose_way(recipe, facts, batch, cut.bytes)
    compiled = _compile(recipe, facts, steps)
    rows, threads = score_rows(recipe, facts, batch), _threads(recipe, facts)
    choices = (
        Choice("device", facts.machine.device, _device_reason(recipe, facts)),
        threads,
        Choice("allocator", "keeps freed memory" if facts.machine.keeps_memory else "as it is", _allocator_reason(facts)),
        precision,
        *(choice for choice in (prefix, attention, adapters, compiled) if choice is not None),
        *chosen.choices,
        *([Choice("scores", f"{rows} rows", "of trained tokens at once; all scores of a batch are never in memory")] if rows else []),
    )
    written = disk(recipe, facts)
    trouble = [*_no_step(recipe, facts, asked, steps_per_epoch), *chosen.trouble, *_no_disk(facts, sum(written.values()))]
    seconds = run_seconds(recipe, facts, steps, evaluations, chosen.way)
    plan = Plan(
        recipe=recipe,
        facts=facts,
        device=facts.machine.device,
        threads=int(threads.value),
        keep_memory=facts.machine.keeps_memory,
        precision=str(precision.value),
        attention=str(attention.value) if attention else "",
        prefix=cut.module,
        kept_in=cut.place,
        lowrank=str(adapters.value) if adapters else "",
        batch=batch,
        batch_tokens=batch_tokens,
        micro_batch=chosen.micro_batch,
        micro_tokens=chosen.micro_tokens,
        score_rows=rows,
        judged=chosen.way.judged,
        checkpointed=chosen.way.checkpointed,
        compiled=compiled is not None and compiled.value == "on",
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        evaluate_every=every,
        grade="",
        choices=choices,
        trains=_trains(recipe, facts),
        trainable_parameters=trainable,
        alternatives=tuple(alternatives(recipe, facts, chosen, batch, steps)),
        findings=(*([] if trainable else [_nothing_trains(facts)]), *trouble, *findings(recipe, facts)),
        seconds=seconds,
        disk=written,
        memory=memory(recipe, facts, chosen.way),
        predicted_seconds=sum(seconds.values()) if seconds else None,
        predicted_peak_bytes=max(peak_bytes(recipe, facts, chosen.way), facts.measured.planning_bytes if facts.measured else 0),
    )
    return corrected(replace(plan, grade=_grade(plan)))


def _threads(recipe: Recipe, facts: Facts) -> Choice:
    asked, there = recipe.limits.threads, facts.machine.threads
    return (
        Choice("threads", there, "every core this process may use")
        if asked == "auto"
        else Choice("threads", min(asked, there), "limits.threads")
    )


def _grade(plan: Plan) -> str:
    """How equal the plan's way is to the plain one: by what it does, and by what the certificate measured."""
    seen = plan.facts.measured
    certificate = seen.certificate if seen is not None else None
    if plan.precision == "bf16":
        return "precision"
    shown = certificate is not None and certificate.tensor == "" and plan.fast_ways == ("checkpointing",)
    return "bitwise" if shown or not plan.fast_ways else "reordered"


def _nothing_trains(facts: Facts) -> Finding:
    what, mend = "the model has no parameters", "give it layers that learn"
    if facts.model.parameters:
        what, mend = "every parameter is frozen", "leave the head free, or set freeze: none"
    return Finding("error", "nothing-trains", what, "no step could change anything", mend)


def _no_step(recipe: Recipe, facts: Facts, asked: float, steps_per_epoch: int) -> Iterator[Finding]:
    """Where no step would be made, or none that moves a weight.  asked: steps, before they are rounded"""
    if round(asked) < 1:
        key = "tokens" if recipe.tokens is not None else "epochs"
        what = f"{key}: {getattr(recipe, key):g} comes to {asked:.2g} steps, which is none"
        why = f"an epoch of {facts.data.train} training examples has {steps_per_epoch}"
        yield Finding("error", "no-step", what, why, f"set steps: 1, or epochs: {math.ceil(100 / steps_per_epoch) / 100:g} or more")
    still, scales = set(facts.frozen.parameters), recipe.optimizer.lr_scale
    free = [name for layer in facts.model.layers for name in layer.tensors if name not in still]
    if free and not any(lr_multiplier(name, scales) for name in free):
        what = f"optimizer.lr_scale multiplies the learning rate of all {len(free)} tensors that train by 0"
        yield Finding("error", "no-step", what, "no step could change anything", "leave one of them above 0")
    steps, warmup = max(1, round(asked)), recipe.schedule.warmup
    if warmup > max(steps, 1):
        what = f"schedule.warmup: {warmup:g} steps, and the run has {steps}"
        why = f"the learning rate ends at {steps / (round(warmup) + 1):.0%} of what is asked for"
        yield Finding("warning", "long-warmup", what, why, "set schedule.warmup: 0.1, a share of the steps, or train longer")


def _no_disk(facts: Facts, needed: int) -> Iterator[Finding]:
    if facts.disk_bytes and needed > facts.disk_bytes:
        what = f"checkpoints and model need {format_bytes(needed)} on the disk, {format_bytes(facts.disk_bytes)} are free"
        yield Finding("error", "disk", what, "the run would stop when it saves", "make room, set save.keep: 1, or --runs on another disk")


def refuse(plan: Plan) -> Plan:
    """The plan itself, or PlanRefused with every finding that forbids the run."""
    if plan.errors:
        raise PlanRefused([Fault(found.what, found.why, found.mend) for found in plan.errors])
    return plan


def _trains(recipe: Recipe, facts: Facts) -> tuple[TrainRow, ...]:
    still = set(facts.frozen.parameters)
    rows = []
    for layer in facts.model.layers:
        if not layer.tensors:
            continue
        free = [p for p in layer.tensors if p not in still]
        lr = recipe.optimizer.lr * lr_multiplier(free[0], recipe.optimizer.lr_scale) if free else 0.0
        rows.append(TrainRow(layer.name, layer.kind, sum(layer.tensors.values()), bool(free), lr))
    return tuple(rows)


def _device_reason(recipe: Recipe, facts: Facts) -> str:
    if recipe.limits.device != "auto":
        return "limits.device"
    return "there is one" if facts.machine.device == "cuda" else "no cuda device here"


def _allocator_reason(facts: Facts) -> str:
    if facts.machine.keeps_memory:
        return "each step takes the same blocks again; spares their page faults, changes no number"
    return "only glibc on a CPU can be told to keep what is freed"


def _precision(recipe: Recipe, facts: Facts) -> Choice:
    if recipe.precision == "auto":
        has = facts.machine.bf16
        return Choice("precision", "bf16" if has else "float32", f"precision: auto, and the device has {'' if has else 'no fast '}bf16")
    return Choice("precision", recipe.precision, "the recipe's")


def _attention(facts: Facts) -> Choice | None:
    """The path of attention over documents end to end; a fast one only while the certificate shows it equal to the plain one."""
    if not facts.model.attends:
        return None
    fast = "varlen" if facts.machine.device == "cuda" else "documents"
    return _unless_refused(facts, "attention", fast, "fused, for all documents of one length at once")


def _lowrank(recipe: Recipe, facts: Facts) -> Choice | None:
    """The path of adapters, as with attention."""
    asked = recipe.adapter
    if asked is None:
        return None
    if asked.dropout:
        return Choice("adapters", "plain", "adapter.dropout acts on their inputs alone")
    if asked.base != "full" or asked.name == "dora":
        what = f"adapter.{'base' if asked.base != 'full' else 'name'}: two thin products beside each matrix"
        return Choice("adapters", "plain", what)
    return _unless_refused(facts, "adapters", "merged", "W + s·B·A once a step, one product a layer")


def _compile(recipe: Recipe, facts: Facts, steps: int) -> Choice | None:
    """Whether the model's code is compiled; nothing to say where nobody asked and it is not known to pay."""
    asked, seen = recipe.limits.compile, facts.measured
    pays = facts.machine.device == "cuda" and seen is not None and steps * seen.step_seconds > COMPILE_PAYS
    if asked == "never" or (asked == "auto" and not pays):
        return None
    if seen is not None and seen.no_compile:
        return Choice("compile", "off", f"it fails: {seen.no_compile}")
    why = "limits.compile" if asked == "always" else "a long run on cuda wins back the minutes that compiling takes; not measured"
    choice = _unless_refused(facts, "compile", "on", why)
    return choice if choice.value == "on" else replace(choice, value="off")


def _prefix(recipe: Recipe, facts: Facts, steps: int, *, again: bool) -> tuple[Choice | None, Cut]:
    """As `choose_cut`, unless the certificate found that steps which begin there compute something else."""
    cut = choose_cut(recipe, facts, steps, again=again)
    if not cut.module:
        return Choice("frozen part", "run each time", cut.why) if cut.why else None, cut
    choice = _unless_refused(facts, "frozen part", "kept", cut.why)
    return (choice, cut) if choice.value == "kept" else (replace(choice, value="run each time"), NO_CUT)


def _unless_refused(facts: Facts, name: str, fast: str, what: str) -> Choice:
    """The fast way, unless the certificate found that it computes something else."""
    certificate = None if facts.measured is None else facts.measured.certificate
    if certificate is not None and name in certificate.refused:
        return Choice(
            name, "plain", f"{fast} was refused: gradients {certificate.refused[name]:.1e} apart, {certificate.bound:.1e} allowed"
        )
    return Choice(name, fast, what)


def _batch(recipe: Recipe, facts: Facts) -> tuple[int, int | None, int]:
    """Samples a step, tokens a step where the recipe counts those, and steps an epoch."""
    count, text, asked = facts.data.train, facts.data.text, recipe.batch
    if isinstance(asked, BatchTokens):
        seen = _text_of(text, "batch.tokens")
        steps = count_batches(seen.tokens, seen.longest, asked.tokens)
        return math.ceil(count / steps), asked.tokens, steps
    batch = count if asked == "all" else min(asked, count)
    return batch, None, max(1, math.ceil(count / batch))


def _epochs(recipe: Recipe, facts: Facts) -> float:
    if recipe.tokens is not None:
        return recipe.tokens / _text_of(facts.data.text, "tokens").tokens
    return recipe.epochs or 10


def _text_of(text: TextFacts | None, key: str) -> TextFacts:
    if text is None:
        raise RecipeError("counts tokens, but the data is no text", mend="count samples: batch: 64, epochs: 10", key=key)
    return text
