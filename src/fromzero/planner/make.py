"""Make: a recipe and facts in, a plan out. Pure: no file is read, no weight allocated, no clock looked at."""

from __future__ import annotations

import math

from fromzero.data import TextFacts, count_batches
from fromzero.errors import Fault, PlanRefused, RecipeError
from fromzero.optim import lr_multiplier
from fromzero.planner.cost import run_seconds, training_bytes
from fromzero.planner.cut import choose_cut
from fromzero.planner.values import Choice, Facts, Finding, Plan, TrainRow
from fromzero.planner.xray import findings
from fromzero.recipe.schema import BatchTokens, Recipe
from fromzero.report.summary import format_bytes

_WIDTH = {"float32": 4, "float64": 8, "bf16": 4}  # bytes of a master weight
PATH_ERROR = 1e-4  # relative; float32 sums in another order stay far below
SCORE_BYTES = 2**26  # of scores over a vocabulary at once: rows enough for full speed, and never a whole batch of a large vocabulary
PIECE_TOKENS = 768  # at once, where adapters learn: larger pieces take more memory and were no faster on a CPU
_SHARE = 0.8  # of the free memory


def make(recipe: Recipe, facts: Facts) -> Plan:
    """Decide how. The plan may carry findings of severity error; `refuse` turns those into an exception."""
    data = facts.data
    batch, batch_tokens, steps_per_epoch = _batch(recipe, facts)
    steps = recipe.steps or max(1, round(_epochs(recipe, facts) * steps_per_epoch))
    every = steps_per_epoch if recipe.evaluate.every == "epoch" else recipe.evaluate.every
    evaluations = math.ceil(steps / every) if data.validation else 0
    trains = _trains(recipe, facts)
    still = set(facts.frozen.parameters)
    trainable = sum({p: n for layer in facts.model.layers for p, n in layer.tensors.items() if p not in still}.values())
    precision, precision_choice = _precision(recipe, facts)
    micro, micro_choice, trouble = _micro_batch(recipe, facts, batch, trainable, precision)
    pieces = _piece_tokens(recipe, facts, batch, micro)
    rows = _score_rows(recipe, facts, batch)
    attention, why = _attention(facts)
    lowrank, merged = _lowrank(recipe, facts)
    prefix, kept_in, why_prefix = _prefix(recipe, facts, steps, batch, again=steps > steps_per_epoch)
    threads = facts.machine.threads if recipe.limits.threads == "auto" else min(recipe.limits.threads, facts.machine.threads)
    choices = (
        Choice("device", facts.machine.device, _device_reason(recipe, facts)),
        Choice("threads", threads, "limits.threads" if recipe.limits.threads != "auto" else "every core this process may use"),
        Choice("allocator", "keeps freed memory" if facts.machine.keeps_memory else "as it is", _allocator_reason(facts)),
        precision_choice,
        *([Choice("attention", attention, why)] if attention else []),
        *([Choice("frozen part", "kept" if prefix else "run each time", why_prefix)] if why_prefix else []),
        *([Choice("adapters", lowrank, merged)] if lowrank else []),
        micro_choice
        if pieces is None
        else Choice("micro_batch", f"{pieces} tokens", f"of at most {_worst(recipe, facts, batch)} a step; one division"),
        *([Choice("scores", f"{rows} rows", "of trained tokens at once; all scores of a batch are never in memory")] if rows else []),
    )
    found = [*([] if trainable else [_nothing_trains(facts)]), *trouble, *findings(recipe, facts)]
    plain = micro >= batch and pieces is None and rows is None and lowrank != "merged" and not prefix
    return Plan(
        recipe=recipe,
        facts=facts,
        device=facts.machine.device,
        threads=threads,
        keep_memory=facts.machine.keeps_memory,
        precision=precision,
        attention=attention,
        prefix=prefix,
        kept_in=kept_in,
        lowrank=lowrank,
        batch=batch,
        batch_tokens=batch_tokens,
        micro_batch=micro,
        micro_tokens=pieces,
        score_rows=rows,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        evaluate_every=every,
        grade="precision" if precision == "bf16" else "bitwise" if plain else "reordered",
        choices=choices,
        trains=trains,
        trainable_parameters=trainable,
        findings=tuple(found),
        predicted_seconds=run_seconds(facts, steps, batch, evaluations, kept=bool(prefix)),
        predicted_peak_bytes=facts.measured.peak_bytes if facts.measured else None,
    )


def _nothing_trains(facts: Facts) -> Finding:
    what, mend = "the model has no parameters", "give it layers that learn"
    if facts.model.parameters:
        what, mend = "every parameter is frozen", "leave the head free, or set freeze: none"
    return Finding("error", "nothing-trains", what, "no step could change anything", mend)


def refuse(plan: Plan) -> Plan:
    """The plan itself, or PlanRefused with every finding that forbids the run."""
    errors = [Fault(f.what, f.why, f.mend) for f in plan.findings if f.severity == "error"]
    if errors:
        raise PlanRefused(errors)
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


def _precision(recipe: Recipe, facts: Facts) -> tuple[str, Choice]:
    if recipe.precision == "auto":
        chosen = "bf16" if facts.machine.bf16 else "float32"
        return chosen, Choice(
            "precision", chosen, "precision: auto, and the device " + ("has bf16" if facts.machine.bf16 else "has no fast bf16")
        )
    return recipe.precision, Choice("precision", recipe.precision, "the recipe's")


def _attention(facts: Facts) -> tuple[str, str]:
    """The path of attention over documents end to end, and why; a fast one only while trial steps show it equal to the plain one."""
    if not facts.model.attends:
        return "", ""
    fast = "varlen" if facts.machine.device == "cuda" else "documents"
    return _fast_if_equal(facts, fast, "fused, for all documents of one length at once")


def _lowrank(recipe: Recipe, facts: Facts) -> tuple[str, str]:
    """The path of adapters, as with attention."""
    asked = recipe.adapter
    if asked is None:
        return "", ""
    if asked.dropout:
        return "plain", "adapter.dropout acts on their inputs alone"
    if asked.base != "full" or asked.name == "dora":
        return "plain", f"adapter.{'base' if asked.base != 'full' else 'name'}: two thin products beside each matrix"
    return _fast_if_equal(facts, "merged", "W + s·B·A once a step, one product a layer")


def _prefix(recipe: Recipe, facts: Facts, steps: int, batch: int, *, again: bool) -> tuple[str, str, str]:
    """As `choose_cut`, but only while trial steps show loss and gradients from there equal to those of the whole."""
    cut, place, why = choose_cut(recipe, facts, steps, batch, again=again)
    if not cut:
        return "", "", why
    chosen, why = _fast_if_equal(facts, "kept", why)
    return (cut, place, why) if chosen == "kept" else ("", "", why.replace("the kept path", f"begun at {cut}, a step"))


def _fast_if_equal(facts: Facts, fast: str, what: str) -> tuple[str, str]:
    error = None if facts.measured is None else facts.measured.path_errors.get(fast)
    if error is None:
        return fast, f"{what}; not yet compared with the plain path"
    if error > PATH_ERROR:
        return "plain", f"the {fast} path differs by {error:.1e} of the largest gradient"
    return fast, f"{what}; loss and gradients within {error:.1e} of the plain path, measured here"


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


def _worst(recipe: Recipe, facts: Facts, batch: int) -> int:
    """Most tokens that a batch can have."""
    longest = facts.data.text.longest if facts.data.text else 0
    return 2 * recipe.batch.tokens + longest if isinstance(recipe.batch, BatchTokens) else batch * longest


def _piece_tokens(recipe: Recipe, facts: Facts, batch: int, micro: int) -> int | None:
    """Most tokens at once, where a batch of text may be cut and gains by it."""
    text, may_not = facts.data.text, facts.model.random or facts.model.coupled
    if text is None or may_not or not facts.model.token_bytes or micro < batch or recipe.adapter is None:
        return None
    most = max(PIECE_TOKENS, text.longest)
    return most if _worst(recipe, facts, batch) > most else None


def _score_rows(recipe: Recipe, facts: Facts, batch: int) -> int | None:
    if not recipe.predicts_tokens or facts.model.foreign:
        return None
    vocabulary = facts.model.output_shape[-1] if facts.model.output_shape else 1
    rows = max(16, SCORE_BYTES // (4 * vocabulary))
    return rows if rows < max(_worst(recipe, facts, batch), 4096) else None


def _micro_batch(recipe: Recipe, facts: Facts, batch: int, trainable: int, precision: str) -> tuple[int, Choice, list[Finding]]:
    """The most samples at once that fit, within limits.micro_batch; the whole batch where it may not be cut."""
    width = _WIDTH[precision]
    limit = facts.machine.memory_bytes * _SHARE if recipe.limits.memory == "auto" else recipe.limits.memory
    name = recipe.optimizer.name
    base = training_bytes(facts, name, trainable, 0, width) + facts.data.bytes
    sample = max(1, training_bytes(facts, name, trainable, 1, width) - training_bytes(facts, name, trainable, 0, width))
    fits = int((limit - base) // sample)
    asked = batch if recipe.limits.micro_batch == "auto" else recipe.limits.micro_batch
    micro = max(1, min(batch, asked, fits))
    price = f"about {format_bytes(base + micro * sample)}"
    if fits < 1:
        needed = base + sample
        return (
            1,
            Choice("micro_batch", 1, "nothing fits", price),
            [
                Finding(
                    "error",
                    "memory",
                    f"one sample needs about {format_bytes(needed)}, the limit is {format_bytes(int(limit))}",
                    mend=f"raise limits.memory to {math.ceil(needed / 1e6)}MB, or take a smaller model",
                )
            ],
        )
    if micro >= batch:
        return batch, Choice("micro_batch", batch, "the whole batch fits", price), []
    why = "limits.micro_batch" if micro == asked else "limits.memory"
    coupled = [layer for layer in facts.model.coupled if layer not in facts.frozen.layers]
    if coupled or facts.model.random:
        what = (
            f"{coupled[0]} mixes the samples of a batch (BatchNorm)"
            if coupled
            else "the model draws random numbers in training (dropout), which cutting would change"
        )
        error = Finding(
            "error",
            "batch-not-cut",
            f"a batch of {batch} would be cut into pieces of {micro} ({why}), but {what}",
            "the plan never changes the mathematics",
            f"set batch: {micro}, raise {why}, or take these layers out",
        )
        return batch, Choice("micro_batch", batch, "may not be cut", price), [error]
    return micro, Choice("micro_batch", micro, f"{why}: {math.ceil(batch / micro)} pieces a step, one division", price), []
