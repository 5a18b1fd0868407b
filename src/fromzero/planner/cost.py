"""Cost: facts and one way to carry out a step in, predicted seconds and bytes out. Pure arithmetic on what was counted and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fromzero.models import StageFacts
from fromzero.planner.values import Facts, Plan
from fromzero.recipe.schema import BatchTokens, Recipe

STATE = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}  # copies of the trained values that the optimizer keeps
WIDTH = {"float32": 4, "float64": 8, "bf16": 4, "auto": 4}  # bytes of a master weight
_SCORES = 3  # times that a row of scores is in memory: itself, its softmax, its gradient
_BACKWARD = 2  # forward passes that a backward pass costs: one product for the inputs' gradient, one for the weights'
LOOP_SECONDS = 2e-4  # of a step's own bookkeeping: its numbers are looked at, and its event is written and heard
JUDGED = (256, 4096)  # samples, and tokens of text, at once where nothing is kept for a backward pass


@dataclass(frozen=True)
class Way:
    """How a step is carried out.

    units:         most samples at once, or tokens of a model that reads text
    rows:          most rows of scores over a vocabulary at once
    checkpointed:  stages of which only the input is kept; they run again in the backward pass
    kept:          bytes of what the frozen part says, where that is computed once; else 0
    judged:        most samples or tokens at once where nothing is kept for a backward pass
    """

    units: int
    rows: int = 0
    checkpointed: tuple[str, ...] = ()
    kept: int = 0
    judged: int = 0


def memory(recipe: Recipe, facts: Facts, way: Way) -> dict[str, int]:
    """Bytes at the highest moment of a run, by what they are for."""
    width, learned = WIDTH[recipe.precision], trained_values(facts)
    scores = way.rows * width * _SCORES * facts.model.output_shape[-1] if way.rows else 0
    activations = way.units * unit_bytes(recipe, facts, way) + _again(facts, way) * way.units
    moments = (
        {"gradients": learned * width, "activations": activations, "scores": scores},
        {"gradients": learned * width, "evaluation": _judged_at_once(facts, way) * judged_bytes(facts) * width // 4},
    )
    return {
        "process": facts.held_bytes,
        "weights": facts.model.parameters * width,
        "optimizer": learned * width * STATE[recipe.optimizer.name],
        "best weights": learned * width if recipe.evaluate.keep == "best" and facts.data.validation else 0,
        "frozen part": way.kept,
        **max(moments, key=lambda moment: sum(moment.values())),
    }


def _judged_at_once(facts: Facts, way: Way) -> int:
    """No more than there are, where nothing but the validation data is"""
    return way.judged if facts.reads_text or way.kept else min(way.judged, facts.data.validation)


def judged_bytes(facts: Facts) -> int:
    """What a sample or token holds where nothing is kept for a backward pass: what a layer reads, and what it makes of it."""
    return 2 * facts.model.widest


def peak_bytes(recipe: Recipe, facts: Facts, way: Way) -> int:
    """Bytes at the highest moment of a run; what trial steps needed beyond the count is added."""
    return sum(memory(recipe, facts, way).values()) + (0 if facts.measured is None else facts.measured.beyond_bytes)


def trained_values(facts: Facts) -> int:
    """How many values learn; a tied one counts once."""
    still = set(facts.frozen.parameters)
    return sum({p: n for layer in facts.model.layers for p, n in layer.tensors.items() if p not in still}.values())


def learned_stages(facts: Facts) -> tuple[StageFacts, ...]:
    """The stages from the first that learns on, and what lies outside all: what lies before keeps nothing for a backward pass."""
    still, costs = set(facts.frozen.parameters), facts.model.costs
    free = {p for layer in facts.model.layers if layer.name != facts.model.head for p in layer.tensors if p not in still}
    inside = {p: place for place, cost in enumerate(costs) if cost.name for p in free if p.startswith(f"{cost.name}.")}
    first = 0 if free - set(inside) else min(inside.values(), default=max(len(costs) - 1, 0))
    return costs[first:]


def rows_at_once(recipe: Recipe, rows: int | None, units: int) -> int:
    """Most rows of scores over the vocabulary at once.  rows: what they are limited to, if they are"""
    return rows or (min(units, JUDGED[1]) if recipe.predicts_tokens else 0)


def unit_bytes(recipe: Recipe, facts: Facts, way: Way) -> int:
    """What a sample or token keeps for the backward pass; at least 1."""
    held = sum(c.given if c.name in way.checkpointed else c.kept for c in learned_stages(facts))
    return max(1, held * WIDTH[recipe.precision] // 4)


def _again(facts: Facts, way: Way) -> int:
    """What a sample or token of the largest checkpointed stage keeps while that runs again."""
    return max((c.kept for c in facts.model.costs if c.name in way.checkpointed), default=0)


def batch_units(recipe: Recipe, facts: Facts, batch: int) -> int:
    """Samples of the largest batch, or tokens of a model that reads text."""
    if not facts.reads_text or facts.data.text is None:
        return batch
    longest = facts.data.text.longest
    return facts.largest or (2 * recipe.batch.tokens + longest if isinstance(recipe.batch, BatchTokens) else batch * longest)


def step_seconds(facts: Facts, way: Way, chosen: Way, units: int) -> float | None:
    """Seconds of a step this way, from those of the chosen way; None where nothing was measured.  units: of a step"""
    seen = facts.measured
    if seen is None:
        return None
    more = -(-units // way.units) - -(-units // chosen.units)
    again = share_again(facts, way.checkpointed) - share_again(facts, chosen.checkpointed)
    one = seen.kept_step_seconds if way.kept and seen.kept_step_seconds is not None else seen.step_seconds
    return one + more * seen.piece_seconds + again * seen.gradient_seconds


def share_again(facts: Facts, checkpointed: tuple[str, ...]) -> float:
    """What running stages again adds to a forward and a backward pass, as a share of these."""
    learned = learned_stages(facts)
    whole = sum(c.flops for c in facts.model.costs) + _BACKWARD * sum(c.flops for c in learned)
    return sum(c.flops for c in learned if c.name in checkpointed) / max(whole, 1)


def frozen_gain(facts: Facts, through: int) -> float:
    """How many times faster a step is where the stages up to this place stand still and run once an example."""
    costs = facts.model.costs
    now = sum(c.flops for c in costs) + _BACKWARD * sum(c.flops for c in learned_stages(facts))
    then = (1 + _BACKWARD) * sum(c.flops for c in costs[through + 1 :])
    return now / max(then, 1)


def run_seconds(recipe: Recipe, facts: Facts, steps: int, evaluations: int, way: Way) -> dict[str, float]:
    """Seconds of a run by what they are for; empty where nothing was measured."""
    seen = facts.measured
    if seen is None:
        return {}
    if way.kept and seen.pass_seconds is not None and seen.kept_step_seconds is not None:
        once = (facts.data.train + facts.data.validation) * seen.pass_seconds
        return {
            "frozen part": once,
            "step": steps * (seen.kept_step_seconds + LOOP_SECONDS),
            "evaluate": evaluations * seen.evaluate_seconds * seen.kept_step_seconds / seen.step_seconds,
        }
    samples = (evaluations + 1 if recipe.task == "language" else 2) * seen.sample_seconds
    return {
        "fetch": steps * seen.fetch_seconds,
        "step": steps * (seen.step_seconds - seen.fetch_seconds - seen.update_seconds),
        "update": steps * (seen.update_seconds + LOOP_SECONDS),
        "evaluate": evaluations * seen.evaluate_seconds + samples,
    }


def disk(recipe: Recipe, facts: Facts) -> dict[str, int]:
    """Bytes that a run leaves on the disk: its checkpoints, one more while a new one is written, and its model."""
    width, learned = WIDTH[recipe.precision], trained_values(facts)
    one = learned * width * (1 + STATE[recipe.optimizer.name] + (recipe.evaluate.keep == "best" and facts.data.validation > 0))
    alone = recipe.adapter is not None  # adapters are saved without their base
    return {"checkpoints": one * (recipe.save.keep + 1), "model": (learned if alone else facts.model.parameters) * width}


def corrected(plan: Plan) -> Plan:
    """The plan with its predictions scaled by what earlier runs on this machine say, and what they lie between; nothing else changes."""
    seen, seconds, peak = plan.facts.record, plan.predicted_seconds, plan.predicted_peak_bytes
    if seen is not None and seconds is not None:
        low, high = seconds * seen.seconds_low, seconds * seen.seconds_high
        plan = replace(plan, predicted_seconds=seconds * seen.seconds_ratio, predicted_seconds_between=(low, high))
    if seen is not None and peak is not None:
        least, most = round(peak * seen.bytes_low), round(peak * seen.bytes_high)
        plan = replace(plan, predicted_peak_bytes=round(peak * seen.bytes_ratio), predicted_bytes_between=(least, most))
    return plan
