"""Weights: where they come from, and the formats they come in and go out."""

from fromzero.weights.folder import tokenizer_files, write_folder
from fromzero.weights.pretrained import SHORT_NAMES, Pretrained, foreign_code, locate, open_pretrained
from fromzero.weights.tensors import Tensors, check_fit, map_tensors, read_tensors, write_blocks, write_tensors
from fromzero.weights.translate import to_ours, to_theirs

__all__ = [
    "SHORT_NAMES",
    "Pretrained",
    "Tensors",
    "check_fit",
    "foreign_code",
    "locate",
    "map_tensors",
    "open_pretrained",
    "read_tensors",
    "to_ours",
    "to_theirs",
    "tokenizer_files",
    "write_blocks",
    "write_folder",
    "write_tensors",
]
