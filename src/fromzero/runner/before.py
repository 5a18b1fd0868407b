"""Before: a job in; what a forward pass changes by itself kept, and put back where the step is not to count. Knows no loss.

A forward pass draws random numbers and moves running means (BatchNorm); both belong to a step that was made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fromzero.devices import generators
from fromzero.runner.assemble import Job
from fromzero.tuning import moving_state


class Before:
    """The random states and the buffers that move, as they were at the last `note`."""

    def __init__(self, job: Job) -> None:
        learned = {name for name, _ in job.model.named_parameters(remove_duplicate=False)}
        moving = [name.rpartition(".") for name in moving_state(job.model, job.frozen) if name not in learned]
        self._device = job.device
        self._places: list[tuple[nn.Module, str]] = [(job.model.get_submodule(module), buffer) for module, _, buffer in moving]
        self.note()

    def note(self) -> None:
        self._drawn = generators.note(self._device)
        self._kept: list[Tensor] = [getattr(module, buffer).clone() for module, buffer in self._places]

    @torch.no_grad()
    def put_back(self) -> None:
        generators.put_back(self._drawn, self._device)
        for (module, buffer), kept in zip(self._places, self._kept, strict=True):
            getattr(module, buffer).copy_(kept)
