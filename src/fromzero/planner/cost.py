"""Cost: facts in, predicted seconds and bytes out. Pure arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import replace

from fromzero.planner.values import Facts, Plan

_STATE = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}  # copies of the trained values that the optimizer keeps


def training_bytes(facts: Facts, optimizer: str, trainable: int, samples: int, width: int) -> int:
    """Weights, gradients, optimizer state and the activations of `samples` samples; width: bytes of a value."""
    kept = facts.model.parameters * width + trainable * width * (1 + _STATE[optimizer])
    return kept + samples * facts.model.activation_bytes * width // 4


def run_seconds(facts: Facts, steps: int, batch: int, evaluations: int, *, kept: bool = False) -> float | None:
    """Steps and evaluations at the measured pace; None where nothing was measured.  kept: the frozen part runs once an example"""
    seen = facts.measured
    if seen is None:
        return None
    if kept and seen.pass_seconds is not None and seen.kept_step_seconds is not None:
        once = (facts.data.train + facts.data.validation) * seen.pass_seconds
        return once + steps * seen.kept_step_seconds * batch / max(seen.batch, 1)
    batches = -(-facts.data.validation // max(seen.batch, 1))
    return steps * seen.step_seconds * batch / max(seen.batch, 1) + evaluations * batches * seen.evaluate_seconds


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
