"""Weights: files of named tensors in and out."""

from fromzero.weights.tensors import check_fit, read_tensors, write_tensors

__all__ = ["check_fit", "read_tensors", "write_tensors"]
