"""Gradients into smaller losses: optimizers, their parameter groups, and how the learning rate moves."""

from fromzero.optim.groups import parameter_groups
from fromzero.optim.optimizers import OPTIMIZERS, make_optimizer
from fromzero.optim.schedules import SCHEDULES, lr_factor

__all__ = ["OPTIMIZERS", "SCHEDULES", "lr_factor", "make_optimizer", "parameter_groups"]
