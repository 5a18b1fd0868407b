"""Probe inputs: a run's examples and its model in, a few inputs and what the model says of them out, kept beside its weights.

They are real, and tensors as the model reads them; whoever writes the model in another form compares with them. The texts are not
kept: the tokenizer gives them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fromzero.data import Inputs
from fromzero.runner.assemble import Job
from fromzero.weights import read_tensors, write_tensors

FILE = "probe.safetensors"
MOST_EXAMPLES, MOST_TOKENS, LEAST_ROWS = 8, 48, 4  # MOST_TOKENS: of each text
MOST_BYTES = 2**21  # of the inputs, and of the outputs; one input and LEAST_ROWS rows may be larger


@dataclass(frozen=True)
class ProbeInputs:
    """inputs: the arguments of the model.  rows: (R,) int64, which of its outputs were kept.  outputs: (R, …)"""

    inputs: Inputs
    rows: Tensor
    outputs: Tensor


@torch.no_grad()
def keep_probe(folder: Path, job: Job) -> None:
    """Write those of a model that has its kept weights. Validation examples, where there are some."""
    examples = job.train if job.validation is None else job.validation
    index = torch.linspace(0, len(examples) - 1, min(MOST_EXAMPLES, len(examples))).round().long()
    while True:
        inputs = _cut(job.judge.on_device(*examples.take(index))[0])
        if len(index) == 1 or sum(tensor.nbytes for tensor in inputs) <= MOST_BYTES:
            break
        index = index[:-1]
    outputs = job.model.eval()(*inputs)
    most = max(LEAST_ROWS, MOST_BYTES // max(1, outputs.nbytes // len(outputs)))
    rows = torch.linspace(0, len(outputs) - 1, min(most, len(outputs))).round().long()
    named = {f"inputs.{number}": tensor for number, tensor in enumerate(inputs)}
    write_tensors(folder / FILE, {**named, "rows": rows, "outputs": outputs[rows.to(outputs.device)]})


def read_probe(folder: Path) -> ProbeInputs | None:
    """None where the run kept none.  raises: SourceError for a file that is not whole"""
    if not (folder / FILE).is_file():
        return None
    found = read_tensors(folder / FILE)
    inputs = tuple(found[name] for name in sorted(found) if name.startswith("inputs."))
    return ProbeInputs(inputs, found["rows"], found["outputs"])


def _cut(inputs: Inputs) -> Inputs:
    """Of texts the first tokens of each"""
    if len(inputs) == 1:
        return inputs
    tokens, offsets = inputs
    parts = [tokens[begin : min(begin + MOST_TOKENS, end)] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return torch.cat(parts), offsets.new_tensor([0, *map(len, parts)]).cumsum(0)
