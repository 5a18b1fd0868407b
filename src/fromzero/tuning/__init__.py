"""Tuning: a module in, the same module with a part frozen or a new head out."""

from fromzero.tuning.freeze import Frozen, find_frozen, freeze, frozen_digest, set_training
from fromzero.tuning.head import new_head

__all__ = ["Frozen", "find_frozen", "freeze", "frozen_digest", "new_head", "set_training"]
