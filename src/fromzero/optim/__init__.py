"""Gradients into smaller losses: optimizers, their parameter groups, and how the learning rate moves."""

from fromzero.optim.groups import lr_multiplier, parameter_groups
from fromzero.optim.optimizers import OPTIMIZERS, make_optimizer
from fromzero.optim.schedules import SCHEDULES, follows_length, lr_factor

__all__ = ["OPTIMIZERS", "SCHEDULES", "follows_length", "lr_factor", "lr_multiplier", "make_optimizer", "parameter_groups"]
