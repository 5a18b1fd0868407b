"""Show: a plan in, the tree that a person reads out, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from fromzero.planner.values import Alternative, Choice, Plan
from fromzero.report.summary import format_bytes, format_count, format_seconds

WIDTH = 80
_SIGNS = {"error": "✗", "warning": "!", "note": "·"}


def show(plan: Plan) -> str:
    """The plan in the order of the data, each choice with its reason; then what trains, and what was found."""
    recipe, facts = plan.recipe, plan.facts
    data, chosen = facts.data, {c.name: c for c in plan.choices}
    lines = [f"plan for {recipe.name or 'run'}: {recipe.task} with {facts.model.name}"]
    shape = "text" if data.text is not None else "×".join(map(str, data.input_shape))
    lines += _node(
        "read",
        f"{data.source}: {format_count(data.train)} to learn from, {format_count(data.validation)} to measure on; inputs {shape}",
        _held(plan),
    )
    lines += _text(plan)
    lines += [part for said in (data.chat.lines() if data.chat else ()) for part in _wrapped(said, "│    ")]
    if data.columns:
        lines += [part for name, what in data.columns.items() for part in _wrapped(f"{name}: {what}", "│    ")]
    if data.classes is not None:
        few = ", ".join(f"{n} ({c})" for n, c in list(data.train_counts.items())[:10])
        lines += _wrapped(f"{len(data.classes)} classes: {few}{' …' if len(data.classes) > 10 else ''}", "│    ")
    model = facts.model
    lines += _node(
        "model",
        f"{format_count(model.parameters)} parameters, of which {format_count(plan.trainable_parameters)} train",
        f"{format_bytes(model.activation_bytes)} kept per sample for the backward pass",
    )
    lines += _node("stages", *_stages(plan))
    lines += _node("loss", recipe.loss_name, "the recipe's" if recipe.loss else f"usual for {recipe.task}")
    lines += _node(
        "batch",
        f"{format_count(plan.batch)} samples a step"
        if plan.batch_tokens is None
        else f"about {format_count(plan.batch_tokens)} tokens a step",
        "gradient descent: the whole training set" if recipe.batch == "all" else "the recipe's",
    )
    for name in ("device", "threads", "allocator", "precision", "compile", "frozen part"):
        lines += _choice(chosen.get(name), _cost(plan, "frozen part", "frozen part") if name == "frozen part" else "")
    lines += _node("step", f"{format_count(plan.steps)} of them, forward and backward", _cost(plan, "step", "activations", "gradients"))
    for name in ("micro_batch", "checkpointing", "attention", "adapters", "scores"):
        lines += _choice(chosen.get(name))
    spec = recipe.optimizer
    clipped = f"clip {recipe.clip:g}" if recipe.clip else "no clipping"
    lines += _node("update", f"{spec.name}, lr {spec.lr:g}, {recipe.schedule.name}; {clipped}", _cost(plan, "update", "optimizer"))
    lines += _node(
        "length", f"{format_count(plan.steps)} steps = {plan.epochs:.4g} epochs of {format_count(plan.steps_per_epoch)}", _ending(plan)
    )
    lines += _node("evaluate", f"{format_count(facts.data.validation)} examples each time", _cost(plan, "evaluate", "evaluation"))
    lines += _node("save", f"{format_bytes(sum(plan.disk.values()))} on the disk", _parts(plan.disk))
    lines += _node("equality", plan.grade, _equality(plan))
    peak = f", peak memory {predicted_peak(plan)}" if plan.predicted_peak_bytes is not None else ""
    lines += _wrapped(f"predicted: {predicted_time(plan)}{peak}", "└─ ", hang_with="     ")
    lines += _wrapped(f"memory: {_parts(plan.memory)}; measured beyond that: {_beyond(plan)}", "     ")
    if plan.alternatives:
        lines += ["", "not taken"]
        for other in plan.alternatives:
            lines += _wrapped(f"· {other.name}: {_price(other)}{other.why_not}", "  ", hang=4)
    lines += ["", *_table(plan)]
    if plan.findings:
        lines += ["", "findings"]
        for finding in plan.findings:
            lines += _wrapped(f"{_SIGNS[finding.severity]} {finding}", "  ", hang=4)
    return "\n".join(lines)


def predicted_time(plan: Plan) -> str:
    """`4 min 10 s (3 min 40 s to 5 min 2 s)`"""
    seconds = plan.predicted_seconds
    return "not measured" if seconds is None else format_seconds(seconds) + _between(plan.predicted_seconds_between, format_seconds)


def predicted_peak(plan: Plan) -> str:
    """`1.4 GB (1.3 to 1.5 GB)`; empty where nothing was measured"""
    peak = plan.predicted_peak_bytes
    return "" if peak is None else format_bytes(peak) + _between(plan.predicted_bytes_between, format_bytes)


def _between(ends: tuple[float, float] | None, written: Callable[[float], str]) -> str:
    """The unit stands once where both ends have the same; nothing where both read alike."""
    if ends is None or written(ends[0]) == written(ends[1]):
        return ""
    low, high = written(ends[0]).split(), written(ends[1]).split()
    alike = len(low) == len(high) == 2 and low[1] == high[1]
    return f" ({' '.join(low[:1] if alike else low)} to {' '.join(high)})"


def _choice(choice: Choice | None, cost: str = "") -> list[str]:
    if choice is None:
        return []
    return _node(choice.name, str(choice.value), "; ".join(part for part in (choice.reason, choice.price, cost) if part))


def _cost(plan: Plan, seconds: str, *memory: str) -> str:
    """What a part of a run takes: of its time, and of the memory at the highest moment."""
    parts = [format_seconds(plan.seconds[seconds])] if plan.seconds.get(seconds) else []
    return ", ".join(parts + [f"{name} {format_bytes(plan.memory[name])}" for name in memory if plan.memory.get(name)])


def _parts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(value)}" for name, value in values.items() if value)


def _beyond(plan: Plan) -> str:
    seen = plan.facts.measured
    return "nothing was measured" if seen is None else format_bytes(max((plan.predicted_peak_bytes or 0) - sum(plan.memory.values()), 0))


def _price(other: Alternative) -> str:
    """More or less than the plan, of time and memory, where it is known"""
    parts = [] if other.seconds is None else [f"{'+' if other.seconds >= 0 else '−'}{format_seconds(abs(other.seconds))}"]
    parts += [] if not other.bytes else [f"{'+' if other.bytes >= 0 else '−'}{format_bytes(abs(other.bytes))}"]
    return ", ".join(parts) + "; " if parts else ""


def _equality(plan: Plan) -> str:
    """What the grade means, and what the certificate measured."""
    meaning = {
        "bitwise": "the plain way itself" if not plan.fast_ways else "every bit as in the plain way",
        "reordered": "only the order of float additions differs from the plain way",
        "precision": "the recipe asked for it",
    }[plan.grade]
    seen = plan.facts.measured
    if plan.recipe.certificate == "off":
        return f"{meaning}; not checked: certificate: off"
    if seen is None or seen.certificate is None:
        return f"{meaning}; not checked yet"
    found = seen.certificate
    apart = "equal bit for bit" if not found.tensor else f"gradients {found.error:.1e} apart, {found.bound:.1e} allowed"
    took = f"checked on {found.samples} samples against {found.plain} in {format_seconds(seen.seconds)}, trial steps included"
    return f"{meaning}; {took}: {apart}"


def _stages(plan: Plan) -> tuple[str, str]:
    """Where the model can be cut: what `freeze: {through: …}` may name."""
    names = plan.facts.model.stages
    if not names:
        return "not found", plan.facts.model.no_stages
    few = names if len(names) <= 6 else (*names[:3], "…", *names[-2:])
    return f"{len(names)} in a row", ", ".join(few)


def _text(plan: Plan) -> list[str]:
    data, seen = plan.recipe.data, plan.facts.data.text
    if seen is None:
        return []
    return _node(
        "tokens",
        f"{format_count(seen.tokens)} in train, {format_count(seen.vocabulary)} different ones; the longest example has {format_count(seen.longest)}",
        "the model's own tokenizer" if data.tokenizer == "auto" else f"data.tokenizer: {data.tokenizer}",
    )


def _node(name: str, value: str, reason: str) -> list[str]:
    return _wrapped(f"{name}: {value}  ({reason})" if reason else f"{name}: {value}", "├─ ", hang_with="│    ")


def _wrapped(text: str, first: str, *, hang: int = 0, hang_with: str = "") -> list[str]:
    rest = hang_with or (first if not hang else " " * hang)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [first]


def _held(plan: Plan) -> str:
    if plan.recipe.data.validation is not None:
        return "validation from its own source"
    if plan.recipe.task == "language":
        return f"hold_out {plan.recipe.data.hold_out:g}: the end of one text, or some of several by distinct content"
    return f"hold_out {plan.recipe.data.hold_out:g}, stratified, by distinct content, seed {plan.recipe.seed}"


def _ending(plan: Plan) -> str:
    kept = "the last weights are kept" if plan.recipe.evaluate.keep == "last" else "the weights with the lowest validation loss are kept"
    return f"measured every {format_count(plan.evaluate_every)}; {kept}"


def _table(plan: Plan) -> list[str]:
    name_width = min(max([len(r.layer) for r in plan.trains] + [5]), 30)
    lines = [f"{'layer':<{name_width}}  {'kind':<16}{'parameters':>14}  trains"]
    rows = plan.trains if len(plan.trains) <= 24 else (*plan.trains[:10], None, *plan.trains[-10:])
    for row in rows:
        if row is None:
            lines.append(f"… {len(plan.trains) - 20} more")
            continue
        state = f"lr {row.lr:g}" if row.trains else "frozen"
        lines.append(f"{row.layer[-name_width:]:<{name_width}}  {row.kind:<16}{format_count(row.parameters):>14}  {state}")
    return lines
