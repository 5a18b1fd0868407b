"""Make: a recipe and facts in, a plan out. Pure: no file is read, no weight allocated, no clock looked at."""

from __future__ import annotations

import math

from fromzero.errors import Fault, PlanRefused
from fromzero.optim import lr_multiplier
from fromzero.planner.cost import run_seconds, training_bytes
from fromzero.planner.values import Choice, Facts, Finding, Plan, TrainRow
from fromzero.planner.xray import findings
from fromzero.recipe.schema import Recipe
from fromzero.report.summary import format_bytes

_WIDTH = {"float32": 4, "float64": 8, "bf16": 4}  # bytes of a master weight
ATTENTION_ERROR = 1e-4  # relative; float32 sums in another order stay far below
_SHARE = 0.8  # of the free memory


def make(recipe: Recipe, facts: Facts) -> Plan:
    """Decide how. The plan may carry findings of severity error; `refuse` turns those into an exception."""
    data = facts.data
    batch = data.train if recipe.batch == "all" else min(recipe.batch, data.train)
    steps_per_epoch = max(1, math.ceil(data.train / batch))
    steps = recipe.steps or max(1, round((recipe.epochs or 10) * steps_per_epoch))
    every = steps_per_epoch if recipe.evaluate.every == "epoch" else recipe.evaluate.every
    evaluations = math.ceil(steps / every) if data.validation else 0
    trains = _trains(recipe, facts)
    still = set(facts.frozen.parameters)
    trainable = sum({p: n for layer in facts.model.layers for p, n in layer.tensors.items() if p not in still}.values())
    precision, precision_choice = _precision(recipe, facts)
    micro, micro_choice, trouble = _micro_batch(recipe, facts, batch, trainable, precision)
    attention, why = _attention(facts)
    threads = facts.machine.threads if recipe.limits.threads == "auto" else min(recipe.limits.threads, facts.machine.threads)
    choices = (
        Choice("device", facts.machine.device, _device_reason(recipe, facts)),
        Choice("threads", threads, "limits.threads" if recipe.limits.threads != "auto" else "every core this process may use"),
        Choice("allocator", "keeps freed memory" if facts.machine.keeps_memory else "as it is", _allocator_reason(facts)),
        precision_choice,
        *([Choice("attention", attention, why)] if attention else []),
        micro_choice,
    )
    found = [*trouble, *findings(recipe, facts)]
    if not trainable:
        found.insert(
            0,
            Finding(
                "error",
                "nothing-trains",
                "every parameter is frozen" if facts.model.parameters else "the model has no parameters",
                "no step could change anything",
                "leave the head free, or set freeze: none" if facts.model.parameters else "give it layers that learn",
            ),
        )
    return Plan(
        recipe=recipe,
        facts=facts,
        device=facts.machine.device,
        threads=threads,
        keep_memory=facts.machine.keeps_memory,
        precision=precision,
        attention=attention,
        batch=batch,
        micro_batch=micro,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        evaluate_every=every,
        grade="precision" if precision == "bf16" else "bitwise" if micro >= batch else "reordered",
        choices=choices,
        trains=trains,
        trainable_parameters=trainable,
        findings=tuple(found),
        predicted_seconds=run_seconds(facts, steps, batch, evaluations),
        predicted_peak_bytes=facts.measured.peak_bytes if facts.measured else None,
    )


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
    seen = facts.measured
    if seen is None or seen.attention_error is None:
        return fast, "fused, for all documents of one length at once; not yet compared with the plain path"
    if seen.attention_error > ATTENTION_ERROR:
        return "plain", f"the {fast} path differs by {seen.attention_error:.1e} of the largest gradient"
    return fast, f"fused; loss and gradients within {seen.attention_error:.1e} of the plain path, measured here"


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
