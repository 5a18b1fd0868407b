"""Numbers: the loss and the gradient of a step in, nothing out, or the error that stops a run before its weights are touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Inputs
from fromzero.errors import NumbersError
from fromzero.runner.assemble import Job
from fromzero.runner.progress import Progress


def gradient_norm(job: Job) -> Tensor:
    """The norm of the whole gradient, ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters() if p.grad is not None])


def refuse_what_is_no_number(total: float, count: float, norm: Tensor, job: Job, progress: Progress, index: Tensor) -> None:
    """Stop before the weights are touched.

    raises: NumbersError naming the step, its examples, and the first layer or gradient that is no finite number
    """
    if count > 0 and math.isfinite(total) and bool(norm.isfinite()):  # waits for the device
        return
    if count <= 0:
        what, where = "no sample of the batch counts", ""
    elif not math.isfinite(total):
        what, where = f"the loss is {total / count}", _first_layer(job.model, job.judge.on_device(*job.train.take(index))[0])
    else:
        bad = next((n for n, p in job.model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())), "")
        what, where = f"the gradient's norm is {float(norm)}", f"the first is that of {bad}" if bad else "it is too large for its type"
    examples = f"training examples {index[:8].tolist()}{' …' if len(index) > 8 else ''}"
    raise NumbersError(
        f"step {progress.step + 1}: {what}",
        why="; ".join(part for part in (where, examples, f"the weights are those of step {progress.step}") if part),
        mend=f"try optimizer.lr={job.plan.recipe.optimizer.lr / 10:g}, or clip=1, and look at these examples",
    )


def refuse_to_save(tensors: Mapping[str, Tensor], model: nn.Module, step: int) -> None:
    """What is no finite number is not written. A buffer may hold infinity, as masks do, but no NaN.

    raises: NumbersError naming the first such tensor
    """
    masks = {name for name, _ in model.named_buffers()}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(tensor.aminmax())  # one pass, no copy; both are NaN where one value is
        if bool(ends.isnan().any()) or not (bool(ends.isfinite().all()) or name in masks):
            wrong = int((~tensor.isfinite()).sum())
            raise NumbersError(
                f"step {step} is not saved: {wrong} of {tensor.numel()} values of {name} are NaN or infinite",
                why="nothing could go on from it; what was saved before is as it was",
                mend="try a smaller optimizer.lr, or clip=1",
            )


@torch.no_grad()
def _first_layer(model: nn.Module, inputs: Inputs) -> str:
    """Run the batch once more and look at what each layer gives."""
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                seen.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if not list(module.children())]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first layer that gives no finite number is {seen[0]}" if seen else "every layer gives finite numbers, the loss does not"
