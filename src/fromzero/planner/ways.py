"""Ways: a recipe, facts and a batch in; the cheapest way to carry out its step within memory out, and the ways that were not taken.

Pure. A batch is whole where it fits. Else it is cut, or some stages keep only their input and run again: what costs less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fromzero.errors import listed
from fromzero.planner.cost import (
    JUDGED,
    WIDTH,
    Way,
    batch_units,
    frozen_gain,
    judged_bytes,
    learned_stages,
    memory,
    peak_bytes,
    rows_at_once,
    share_again,
    step_seconds,
)
from fromzero.planner.values import Alternative, Choice, Facts, Finding
from fromzero.recipe.schema import Recipe
from fromzero.report.summary import format_bytes, format_count

SCORE_BYTES = 2**26  # of scores over a vocabulary at once: rows enough for full speed, and never a whole batch of a large vocabulary
PIECE_TOKENS = 768  # at once, where adapters learn: larger pieces take more memory and were no faster on a CPU
_SHARE = 0.8  # of the free memory


@dataclass(frozen=True)
class Chosen:
    """The way of a step, the samples and tokens of its pieces, what to say of it, and what forbids it."""

    way: Way
    micro_batch: int
    micro_tokens: int | None
    choices: tuple[Choice, ...]
    trouble: tuple[Finding, ...] = ()


def memory_limit(recipe: Recipe, facts: Facts) -> int:
    """Most bytes that the process may hold."""
    free = facts.held_bytes + int(facts.machine.memory_bytes * _SHARE)
    return free if recipe.limits.memory == "auto" else int(recipe.limits.memory)


def choose_way(recipe: Recipe, facts: Facts, batch: int, kept: int) -> Chosen:
    """The cheapest way that stays within memory.  kept: bytes of the frozen part's results, where they are kept"""
    whole, least = batch_units(recipe, facts, batch), facts.data.text.longest if facts.reads_text and facts.data.text else 1
    limit = memory_limit(recipe, facts)
    plain = Way(whole, rows_at_once(recipe, score_rows(recipe, facts, batch), whole), kept=kept)
    plain = replace(plain, judged=_judged(recipe, facts, plain, least, limit))
    asked = recipe.limits.micro_batch
    most = min(whole, least * asked) if asked != "auto" else whole
    no_cut = facts.may_not_be_cut
    if facts.reads_text and recipe.adapter is not None and not no_cut:
        most = min(most, max(PIECE_TOKENS, least))
    if no_cut and most < whole:
        return _refused(recipe, facts, batch, plain, f"limits.micro_batch: {asked}", no_cut)
    first = replace(plain, units=most)
    if peak_bytes(recipe, facts, first) <= limit:
        return _said(recipe, facts, batch, whole, first, limited=False)
    cut = None if no_cut else _cut(recipe, facts, first, least, limit)
    ways = [way for way in (cut, _checkpointed(recipe, facts, first, limit)) if way is not None]
    if not ways:
        smallest = replace(plain, units=whole if no_cut else least, checkpointed=may_run_again(facts))
        return _refused(recipe, facts, batch, smallest, "", no_cut)
    way = min(ways, key=lambda one: (step_seconds(facts, one, plain, whole) or 0.0, one.checkpointed))
    return _said(recipe, facts, batch, whole, way, limited=way.units < most)


def score_rows(recipe: Recipe, facts: Facts, batch: int) -> int | None:
    """Most rows of scores over the vocabulary at once; None where a batch never has more."""
    if not recipe.predicts_tokens or facts.model.foreign:
        return None
    vocabulary = facts.model.output_shape[-1] if facts.model.output_shape else 1
    rows = max(16, SCORE_BYTES // (4 * vocabulary))
    return rows if rows < max(batch_units(recipe, facts, batch), JUDGED[1]) else None


def _judged(recipe: Recipe, facts: Facts, way: Way, least: int, limit: int) -> int:
    """Samples or tokens at once in an evaluation: the usual number, or what fits"""
    usual, one = max(JUDGED[facts.reads_text], least), judged_bytes(facts) * WIDTH[recipe.precision] // 4
    base = peak_bytes(recipe, facts, replace(way, units=0, rows=0))
    return max(least, min(usual, (limit - base) // max(one, 1)))


def _cut(recipe: Recipe, facts: Facts, way: Way, least: int, limit: int) -> Way | None:
    """The most at once that fits, at least `least`."""
    base = peak_bytes(recipe, facts, replace(way, units=0))
    one = memory(recipe, facts, replace(way, units=2**20)).get("activations", 0) / 2**20
    fits = min(way.units, int((limit - base) / max(one, 1)))
    while fits >= least and peak_bytes(recipe, facts, replace(way, units=fits)) > limit:
        fits -= max(1, fits // 64)
    return replace(way, units=fits) if fits >= least else None


def may_run_again(facts: Facts) -> tuple[str, ...]:
    """Stages that say the same when they run twice: none whose statistics would be counted twice."""
    live = [layer for layer in facts.model.coupled if layer not in facts.frozen.layers]
    return tuple(
        cost.name
        for cost in learned_stages(facts)
        if cost.name and cost.kept > cost.given and not any(layer == cost.name or layer.startswith(f"{cost.name}.") for layer in live)
    )


def _checkpointed(recipe: Recipe, facts: Facts, way: Way, limit: int) -> Way | None:
    """With the fewest operations done twice: stages that save the most bytes for each come first."""
    costs = {cost.name: cost for cost in facts.model.costs}
    saves = sorted(may_run_again(facts), key=lambda name: (costs[name].given - costs[name].kept) / max(costs[name].flops, 1))
    for count in range(1, len(saves) + 1):
        tried = replace(way, checkpointed=tuple(name for name in facts.model.stages if name in saves[:count]))
        if peak_bytes(recipe, facts, tried) <= limit:
            return tried
    return None


def _refused(recipe: Recipe, facts: Facts, batch: int, smallest: Way, asked: str, no_cut: str) -> Chosen:
    """Nothing fits, or what was asked for may not be."""
    needed, limit = peak_bytes(recipe, facts, smallest), memory_limit(recipe, facts)
    if asked:
        what = f"a batch of {batch} would be cut into pieces of {recipe.limits.micro_batch} ({asked}), but {no_cut}"
        mend = f"set batch: {recipe.limits.micro_batch}, raise limits.micro_batch, or take these layers out"
        finding = Finding("error", "batch-not-cut", what, "the plan never changes the mathematics", mend)
    else:
        parts = memory(recipe, facts, smallest)
        sums = " + ".join(f"{name} {format_bytes(value)}" for name, value in parts.items() if 20 * value > needed - facts.held_bytes)
        who = f"a batch of {batch}" if no_cut else "one sample"
        raised = f"raise limits.memory to {math.ceil(needed / 1e6)}MB" if recipe.limits.memory != "auto" else "use a machine with more"
        smaller = _fitting_batch(recipe, facts, batch, smallest, limit) if no_cut else 0
        finding = Finding(
            "error",
            "memory",
            f"{who} needs about {format_bytes(needed)} ({sums}), the limit is {format_bytes(limit)}",
            f"it may not be cut: {no_cut}" if no_cut else "nothing smaller can be trained on",
            f"{raised}, or {f'set batch: {smaller}' if smaller else 'take a smaller model'}",
        )
    return Chosen(smallest, batch, None, (Choice("micro_batch", batch, "may not be" if asked else "nothing fits"),), (finding,))


def _fitting_batch(recipe: Recipe, facts: Facts, batch: int, way: Way, limit: int) -> int:
    """The largest batch that would fit whole; 0 where none does."""
    each = way.units / batch
    return next((few for few in range(batch - 1, 0, -1) if peak_bytes(recipe, facts, replace(way, units=int(few * each) + 1)) <= limit), 0)


def _said(recipe: Recipe, facts: Facts, batch: int, whole: int, way: Way, *, limited: bool) -> Chosen:
    """The way as the plan's numbers and choices."""
    text, price = facts.reads_text, f"about {format_bytes(peak_bytes(recipe, facts, way))} in all"
    pieces = math.ceil(whole / way.units)
    why = "limits.memory" if limited and recipe.limits.memory != "auto" else "free memory" if limited else "limits.micro_batch"
    asked = recipe.limits.micro_batch
    samples = min(batch if asked == "auto" else min(batch, asked), batch if text else way.units)
    tokens = way.units if text and way.units < whole else None
    if pieces == 1:
        choice = Choice("micro_batch", batch, "the whole batch fits", price)
    elif text:
        choice = Choice("micro_batch", f"{way.units} tokens", f"of at most {format_count(whole)} a step; one division", price)
    else:
        choice = Choice("micro_batch", samples, f"{why}: {pieces} pieces a step, one division", price)
    stages = way.checkpointed
    again = Choice(
        "checkpointing",
        f"{len(stages)} stages",
        f"only what they read is kept ({listed(stages, 4)}), and they run again",
        f"+{share_again(facts, stages):.0%} of forward and backward",
    )
    return Chosen(way, samples, tokens, (choice, *([again] if stages else [])))


def alternatives(recipe: Recipe, facts: Facts, chosen: Chosen, batch: int, steps: int) -> Iterator[Alternative]:
    """What else could have been done, each with its price and why it was not."""
    way, whole, limit = chosen.way, batch_units(recipe, facts, batch), memory_limit(recipe, facts)
    unit = "tokens" if facts.reads_text else "samples"
    now, seconds_now = peak_bytes(recipe, facts, way), step_seconds(facts, way, way, whole)

    def priced(name: str, other: Way, why: str) -> Alternative:
        needs, seconds = peak_bytes(recipe, facts, other), step_seconds(facts, other, way, whole)
        more = None if seconds is None or seconds_now is None else steps * (seconds - seconds_now)
        return Alternative(name, f"exceeds {format_bytes(limit)}" if needs > limit else why, more, needs - now)

    if way.units < whole:
        yield priced(f"whole batches of up to {format_count(whole)} {unit}", replace(way, units=whole), "no faster, and more memory")
    elif whole > 1 and not way.kept and not facts.may_not_be_cut:
        yield priced(f"pieces of {format_count(-(-whole // 2))} {unit}", replace(way, units=-(-whole // 2)), "memory is enough")
    again = may_run_again(facts)
    if again and not way.kept and len(again) > len(way.checkpointed):
        yield priced("checkpointing every stage", replace(way, checkpointed=again), "memory is enough")
    if recipe.precision == "float32":
        has = facts.machine.bf16
        yield Alternative("bf16", "needs precision: auto" if has else f"this {facts.machine.device} has no fast bf16")
    stages = facts.model.stages
    if recipe.adapter is None and recipe.freeze.nothing and len(stages) > 2:
        for place in sorted({len(stages) // 2, len(stages) - 2}):
            gain = min(frozen_gain(facts, place), 100.0)
            name = f"freeze: {{through: {stages[place]}}}"
            yield Alternative(f"{name}, up to {gain:.3g} times faster a step", "other mathematics: yours to choose")
