"""Regions: a job and a plan in, the same modules carrying that plan out: paths, stages that run again, compiled code.

Weights and names stay; what is done here is undone by carrying out another plan.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fromzero.devices import generators
from fromzero.models import choose_path
from fromzero.planner.values import Plan
from fromzero.runner.draws import Draws
from fromzero.tuning import choose_lowrank_path


def carry_out(model: nn.Module, plan: Plan, draws: Draws) -> None:
    """Let the modules of a model compute as the plan says, and draw what belongs to each example."""
    choose_path(model, plan.attention)
    choose_lowrank_path(model, plan.lowrank)
    make_plain(model)
    draws.carry_out(model)
    for name in plan.checkpointed:
        stage = model.get_submodule(name)
        stage.forward = partial(run_again, stage.forward, draws)
    if plan.compiled:
        sizes = None if plan.facts.reads_text else False  # of texts they are many, and one code serves all; of images each has its own
        for module in _regions(model, plan.facts.model.stages):
            module.compile(
                dynamic=sizes, options={"fallback_random": True}
            )  # what draws from torch's stream draws what it would without compiling


def run_again(forward, draws, *arguments, **named):  # type: ignore[no-untyped-def]
    """Keep the inputs of a stage alone; its forward pass runs again before its backward pass, with the same random draws.

    Compiled code keeps torch's stream alone.

    source: arXiv:1604.06174 section 3; torch.utils.checkpoint, non-reentrant
    """
    drawn: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_as_before, generators.note())}
    return checkpoint(draws.again(forward), *arguments, use_reentrant=False, preserve_rng_state=True, **drawn, **named)


def _as_before(noted: generators.Noted) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first pass, and the second"""
    return nullcontext(), generators.lent(noted)


def make_plain(model: nn.Module) -> None:
    """Take back what `carry_out` did to modules."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), partial):
            del module.forward
        module._compiled_call_impl = None


def _regions(model: nn.Module, stages: tuple[str, ...]) -> list[nn.Module]:
    """The stages that are alike, of which one compilation serves all; else the whole."""
    modules = [model.get_submodule(name) for name in stages]
    kinds = [type(module) for module in modules]
    repeated = [module for module in modules if kinds.count(type(module)) > 2 and list(module.children())]
    return repeated or [model]
