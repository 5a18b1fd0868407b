"""Looking at a model leaves nothing behind."""

from __future__ import annotations

import gc

import torch
from torch import nn

from fromzero.models import inspect_model


def tensors() -> int:
    gc.collect()
    return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())


def test_looking_at_a_model_keeps_no_tensor_alive() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 4), nn.Sigmoid())  # two layers whose outputs are what they keep
    batch = torch.randn(2, 8)
    inspect_model(model, (batch,), "first")
    before = tensors()
    facts = inspect_model(model, (batch,), "second")
    assert tensors() == before
    assert facts.activation_bytes == 4 * (8 + 16 + 4)


def test_looking_at_a_model_leaves_its_buffers_and_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect_model(model, (torch.randn(2, 4),), "normed")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and model.training
