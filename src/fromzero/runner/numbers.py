"""Numbers: the loss and the gradient of a step in; nothing out, or the warning of a step that is skipped, or the error that stops a
run before its weights are touched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fromzero.errors import NumbersError, listed
from fromzero.report.events import Warned
from fromzero.runner.assemble import Job
from fromzero.runner.before import Before
from fromzero.runner.pieces import pieces
from fromzero.runner.progress import Progress
from fromzero.runner.regions import carry_out
from fromzero.runner.step import judged
from fromzero.tuning import moving_state
from fromzero.weights.tensors import first_not_finite

SHOWN = 8  # examples of a batch that are named


def gradient_norm(job: Job) -> Tensor:
    """The norm of the whole gradient, ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters() if p.grad is not None])


def refuse_not_finite(tensors: Mapping[str, Tensor], job: Job, step: int) -> None:
    """raises: NumbersError naming the first tensor that holds NaN or infinity"""
    if wrong := first_not_finite(tensors, spared=job.infinite):
        why = "such numbers are neither kept nor saved, and what was saved before is as it was"
        raise NumbersError(f"after step {step} {wrong}", why=why, mend=_slower(job))


def skip_or_stop(
    found: tuple[float, float], norm: Tensor, job: Job, progress: Progress, index: Tensor, epoch: int, before: Before
) -> Warned | None:
    """None where the loss and the gradient are finite numbers. Else what the forward pass changed is put back, and the step is skipped
    where the recipe allows one more.

    found:   sum and count of the loss
    raises:  NumbersError naming the step, its examples, and the first layer or gradient that is no finite number
    """
    total, count = found
    if count > 0 and math.isfinite(total) and math.isfinite(count) and bool(norm.isfinite()):  # waits for the device
        return None
    if count <= 0:
        what, where = "no sample of the batch counts", ""
    elif not math.isfinite(total / count):
        what, where = f"the loss is {total / count}", _first_layer(job, index, epoch, before)
    else:
        what, where = f"the gradient's norm is {float(norm)}", _first_gradient(job)
    before.put_back()
    spoiled = first_not_finite(moving_state(job.model, job.frozen), spared=job.infinite)
    step, allowed = progress.step + 1, job.plan.recipe.not_finite.skip
    examples = _examples(job, index)
    if not spoiled and progress.skipped < allowed:
        progress.skipped += 1
        said = "; ".join(part for part in (what, where, examples) if part)
        return Warned(f"step {step} was skipped, {progress.skipped} of {allowed} that may be: {said}", "no weight has moved")
    weights = f"{spoiled} since step {progress.step}" if spoiled else f"the weights are those of step {progress.step}"
    used = f"{allowed} steps were skipped before, which is all that not_finite allows" if allowed and not spoiled else ""
    raise NumbersError(
        f"step {step}: {what}",
        why="; ".join(part for part in (where, examples, weights, used) if part),
        mend=f"{_slower(job)}, and look at these examples",
    )


def _slower(job: Job) -> str:
    clipped = job.plan.recipe.clip
    return f"try optimizer.lr={job.plan.recipe.optimizer.lr / 10:g}, or clip={1 if clipped is None else clipped / 10:g}"


def _examples(job: Job, index: Tensor) -> str:
    """Those with an input that is no finite number; else the first of the batch."""
    wrong = [number for number in index.tolist() if not all(map(_finite, job.train.take(torch.tensor([number]))[0]))]
    return f"training examples [{listed(wrong or index.tolist(), SHOWN)}]" + (" hold inputs that are no finite numbers" if wrong else "")


def _first_gradient(job: Job) -> str:
    """The backward pass goes from the end to the front: the last layer with such a gradient had it first."""
    wrong = [name for name, p in job.model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not wrong:
        return "it is too large for its type"
    layer = wrong[-1].rpartition(".")[0]
    return f"the first is that of {next(name for name in wrong if name.rpartition('.')[0] == layer)}"


@torch.no_grad()
def _first_layer(job: Job, index: Tensor, epoch: int, before: Before) -> str:
    """Run the whole model on the batch once more, in its pieces and with its draws, and look at what each layer gives."""
    modules, seen = dict(job.model.named_modules()), list[str]()

    def look(name: str) -> Any:
        def hook(_: Any, given: Any, output: Any) -> None:
            if not seen and not all(map(_finite, _tensors(output))):
                already = "" if all(map(_finite, _tensors(given))) else ", which is given one already"
                seen.append(f"the first layer that gives no finite number is {name or 'the model itself'}{already}")

        return hook

    whole = replace(job, plan=job.plan.without("compile"), stepped=job.model, fed=job.train)
    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    carry_out(job.model, whole.plan, job.draws)
    try:
        before.put_back()
        for piece in pieces(whole, index, epoch):
            for part in judged(job.model, *piece(), job.judge.loss, job.judge.around, rows=job.plan.score_rows):
                if not seen and not _finite(part.outputs):
                    seen.append("every layer gives finite numbers, what the model makes of them is none")
            if seen:
                return seen[0]
    finally:
        for handle in handles:
            handle.remove()
        carry_out(job.model, job.plan, job.draws)
    return "every layer gives finite numbers, the loss does not"


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for one in given:
            yield from _tensors(one)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
