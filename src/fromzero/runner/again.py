"""Again: a job and a batch in, the gradients of its mean loss out. Where memory runs out in spite of the plan, or compiled code fails,
the batch begins anew with a plainer plan and the same draws: nothing is lost and no number changes but by the order of additions."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fromzero.data import TextExamples
from fromzero.errors import NumbersError, first_line, out_of_memory
from fromzero.planner.values import Plan
from fromzero.planner.ways import may_run_again
from fromzero.runner.assemble import Job
from fromzero.runner.before import Before
from fromzero.runner.pieces import pieces
from fromzero.runner.regions import carry_out
from fromzero.runner.step import gradients


def sure_gradients(job: Job, index: Tensor, epoch: int, before: Before) -> tuple[tuple[float, float], list[str]]:
    """As `gradients`, and what had to change in the job's plan for it, in words.

    index:   (B,)
    before:  noted when the step began
    raises:  NumbersError where nothing smaller is left; what a person's own code raises
    """
    changed: list[str] = []
    while True:
        try:
            found = gradients(job.stepped, pieces(job, index, epoch), job.judge.loss, job.judge.around, rows=job.plan.score_rows)
            return found, changed
        except Exception as error:
            full = out_of_memory(error)
            if not full and not job.plan.compiled:
                raise
            failed = f"compiled code fails ({type(error).__name__}: {first_line(error)[:120]})"
        job.optimizer.zero_grad()  # after the error is gone, and with it what its frames held
        before.put_back()
        job.plan = _smaller(job.plan, job.train, index) if full else job.plan.without("compile")
        changed.append(
            f"memory ran out: {_what_is_smaller(job.plan)} from here on" if full else f"{failed}; it is not compiled from here on"
        )
        carry_out(job.model, job.plan, job.draws)


def _smaller(plan: Plan, train: object, index: Tensor) -> Plan:
    """The plan with half as much in memory at once.  raises: NumbersError where it has no half"""
    again = may_run_again(plan.facts)
    if not plan.facts.may_not_be_cut:
        if isinstance(train, TextExamples) and len(index) > 1:
            held = min(plan.micro_tokens or 2**62, int(train.lengths[index].sum()))
            if held > int(train.lengths[index].max()):
                return replace(plan, micro_tokens=max(held // 2, 1))
        elif min(plan.micro_batch, len(index)) > 1:
            return replace(plan, micro_batch=min(plan.micro_batch, len(index)) // 2)
    if set(again) - set(plan.checkpointed):
        return replace(plan, checkpointed=again)
    what, mend = "one sample at a time", "a smaller model"
    if plan.facts.may_not_be_cut:
        what, mend = f"a batch of {len(index)} may not be cut: {plan.facts.may_not_be_cut}", f"batch: {max(len(index) // 2, 1)}"
    elif isinstance(train, TextExamples):
        longest = int(train.lengths[index].max())
        what, mend = f"{what}, of {longest} tokens", f"data.max_tokens: {max(longest // 2, 2)}, or a smaller model"
    raise NumbersError("memory is out", why=f"nothing smaller is left ({what})", mend=f"free some, or take {mend}")


def _what_is_smaller(plan: Plan) -> str:
    if plan.checkpointed:
        return f"{len(plan.checkpointed)} stages keep only their input, and run again"
    return f"pieces of {plan.micro_batch} samples" if plan.micro_tokens is None else f"pieces of {plan.micro_tokens} tokens"
