"""Tuning: a module in, the same module with a part frozen, a new head or low-rank adapters out."""

from fromzero.tuning.freeze import Frozen, find_frozen, freeze, frozen_beside, frozen_digest, moving_state, set_training, tensors_digest
from fromzero.tuning.head import new_head
from fromzero.tuning.lowrank import LowRank, add_adapters, choose_lowrank_path, merge_adapters
from fromzero.tuning.quantized import QuantizedLinear
from fromzero.tuning.targets import choose_targets

__all__ = [
    "Frozen",
    "LowRank",
    "QuantizedLinear",
    "add_adapters",
    "choose_lowrank_path",
    "choose_targets",
    "find_frozen",
    "freeze",
    "frozen_beside",
    "frozen_digest",
    "merge_adapters",
    "moving_state",
    "new_head",
    "set_training",
    "tensors_digest",
]
