"""Metrics: outputs and targets in, batch by batch; named numbers of all of them out. Knows no model, loss or loop.

Both kinds keep only sums, so that uneven batches and processes merge exactly: torchmetrics adds the states of all
processes in compute(). Its ready-made metrics are the judges in the tests and are not used, for three measured
reasons: r2 is 1.0 for any model where the squared errors add up to less than 1e-4 (targets in small units) and is
summed in float32; a macro average asks for C² numbers in every batch; before the first sample accuracy is 0, not nan.
Dims: B batch, C classes, K numbers (or yes/no labels) per sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torchmetrics
from torch import Tensor

from fromzero.errors import RecipeError, ShapeError, did_you_mean

CLASSIFY = ("accuracy", "macro_f1")
REGRESS = ("r2", "rmse", "mae")
TOKENS = ("perplexity", "bits_per_byte", "token_accuracy")
_KINDS = {"classes": CLASSIFY, "numbers": REGRESS, "tokens": TOKENS}


class Metrics:
    """The named metrics over everything since the last reset; nan where nothing was seen.

    accuracy  share of the samples named right; with K > 1 yes/no labels, share of all labels
    macro_f1  mean F1 over the classes, as scikit-learn does it: over those that occur in targets or predictions
              (K = 1: yes and no are two classes); with K > 1 labels over all K, one never asked nor said being 0
    r2        1 - squared error / variance, mean over the K outputs; nan below 2 samples; for a constant target
              0, or 1 where it is hit exactly (scikit-learn's convention)
    rmse, mae over all elements, in the units of what is given
    perplexity, token_accuracy  e to the mean nats of the next token, and the share of tokens named right
    bits_per_byte               of the text that the tokens say, so that tokenizers can be compared; nan where its bytes are not known

    outputs:  C, or K
    binary:   the loss is bce: outputs are K logits, each for one yes or no
    raises:   RecipeError on a name that is none, and on names of both kinds at once
    """

    def __init__(self, names: Sequence[str], *, outputs: int, binary: bool) -> None:
        self.names = tuple(names)
        _require_one_kind(self.names)
        self._sums: _Hits | _Errors | _Tokens
        if any(name in TOKENS for name in self.names):
            self._sums = _Tokens()
        else:
            self._sums = _Errors(outputs) if any(name in REGRESS for name in self.names) else _Hits(outputs, binary)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch of any size.

        outputs:  (B, C) logits; (B, K) or (B,) logits if binary; (B, K) or (B,) values in the data's own units
        targets:  (B,) indices or (B, C) probabilities; else the shape of the outputs, (B,) and (B, 1) being alike
        raises:   ShapeError if the two disagree
        """
        home = torch.device("cpu") if outputs.device.type == "mps" else outputs.device  # mps has no float64
        self._sums.to(home)
        self._sums.update(outputs.detach().to(home), targets.detach().to(home))

    def compute(self, *, text_bytes: int = 0) -> dict[str, float]:
        """The metrics of all batches, of all processes. Waits for the GPU, and for the other processes.

        text_bytes: UTF-8 length of all that was predicted
        """
        with warnings.catch_warnings():  # a process without a batch of its own takes part all the same
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            found = self._sums.compute()
        if "nats" in found:
            found["bits_per_byte"] = found["nats"] / (math.log(2) * (text_bytes or math.nan))
        return {name: float(found[name]) for name in self.names}

    def reset(self) -> None:
        """Forget everything seen."""
        self._sums.reset()


class _Hits(torchmetrics.Metric):
    """How often each class was right, said and there: int64 counts."""

    right: Tensor
    said: Tensor
    there: Tensor
    agreed: Tensor
    total: Tensor

    def __init__(self, outputs: int, binary: bool) -> None:
        super().__init__()
        self.outputs, self.binary, self.labels = outputs, binary, binary and outputs > 1
        classes = 2 if binary and outputs == 1 else outputs
        for name in ("right", "said", "there"):
            self.add_state(name, torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("agreed", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        said, there = self._named(outputs, targets)
        if self.labels:
            right, asserted, asked = (said & there).sum(0), said.sum(0), there.sum(0)  # (K,)
        else:
            classes = len(self.right)
            right = torch.bincount(there[said == there], minlength=classes)  # (C,)
            asserted, asked = torch.bincount(said, minlength=classes), torch.bincount(there, minlength=classes)
        self.right += right
        self.said += asserted
        self.there += asked
        self.agreed += (said == there).sum()
        self.total += there.numel()

    def compute(self) -> dict[str, Tensor]:
        seen = self.said + self.there  # 2 TP + FP + FN
        f1 = 2 * self.right.double() / seen.clamp(min=1)
        counted = f1 if self.labels else f1[seen > 0]
        nothing = self.total == 0
        return {"accuracy": self.agreed.double() / self.total, "macro_f1": counted.mean().masked_fill(nothing, torch.nan)}

    def _named(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Classes named and asked for: (B,) int64, or (B, K) bool where there are several labels."""
        if self.binary:
            logits, answers = _columns(outputs, targets, self.outputs)
            said, there = logits > 0, answers > 0.5
            return (said, there) if self.labels else (said[:, 0].long(), there[:, 0].long())
        classes = targets.argmax(1) if targets.ndim == 2 and targets.is_floating_point() else targets
        if outputs.ndim != 2 or outputs.shape[1] != self.outputs or classes.shape != outputs.shape[:1]:
            raise _misfit(outputs, targets, f"(B, {self.outputs}) logits and one class for each of the B samples")
        return outputs.argmax(1), classes.long()


class _Errors(torchmetrics.Metric):
    """Sums of errors and targets per output, in float64: enough for targets 1e6 deviations away from zero."""

    count: Tensor
    squared: Tensor
    absolute: Tensor
    target: Tensor
    target_squared: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        zeros = torch.zeros(outputs, dtype=torch.float64)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("squared", "absolute", "target", "target_squared"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("lowest", zeros + torch.inf, dist_reduce_fx="min")
        self.add_state("highest", zeros - torch.inf, dist_reduce_fx="max")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        values, answers = _columns(outputs, targets, self.outputs)
        if not len(values):
            return  # an empty batch has no lowest target
        answers = answers.double()
        errors = values.double() - answers  # (B, K)
        self.count += len(errors)
        self.squared += errors.square().sum(0)
        self.absolute += errors.abs().sum(0)
        self.target += answers.sum(0)
        self.target_squared += answers.square().sum(0)
        self.lowest = torch.minimum(self.lowest, answers.amin(0))
        self.highest = torch.maximum(self.highest, answers.amax(0))

    def compute(self) -> dict[str, Tensor]:
        elements = self.count * self.outputs
        spread = self.target_squared - self.target * self.target / self.count  # (K,) squared deviations from the mean
        constant = self.lowest == self.highest  # asked of the targets: the spread is blurred by rounding
        r2 = torch.where(constant, (self.squared == 0).double(), 1 - self.squared / spread)
        return {
            "r2": r2.mean().masked_fill(self.count < 2, torch.nan),
            "rmse": (self.squared.sum() / elements).sqrt(),
            "mae": self.absolute.sum() / elements,
        }


class _Tokens(torchmetrics.Metric):
    """Nats and hits of every predicted token."""

    nats: Tensor
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("right", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise _misfit(outputs, targets, "(N, V) logits and one token for each of the N")
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        self.nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
        self.right += (outputs.argmax(1) == targets).sum()
        self.total += len(targets)

    def compute(self) -> dict[str, Tensor]:
        return {"nats": self.nats, "perplexity": (self.nats / self.total).exp(), "token_accuracy": self.right.double() / self.total}


def _columns(outputs: Tensor, targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both as (B, K), or a ShapeError."""
    pair = [values[:, None] if values.ndim == 1 else values for values in (outputs, targets)]
    if pair[0].shape != pair[1].shape or pair[0].shape[1:] != (width,):
        raise _misfit(outputs, targets, f"(B, {width}) both" + (" or (B,)" if width == 1 else ""))
    return pair[0], pair[1]


def _misfit(outputs: Tensor, targets: Tensor, expected: str) -> ShapeError:
    return ShapeError(
        f"targets {tuple(targets.shape)} of {targets.dtype} do not fit outputs {tuple(outputs.shape)}",
        why=f"these metrics compare {expected}",
        mend="give the model as many outputs as the data has classes or target columns",
    )


def _require_one_kind(names: tuple[str, ...]) -> None:
    known = [name for kind in _KINDS.values() for name in kind]
    for name in names:
        if name not in known:
            raise RecipeError(
                f"there is no metric '{name}'", why=did_you_mean(name, known), mend="known are " + ", ".join(known), key="metrics"
            )
    used = [kind for kind, members in _KINDS.items() if any(name in members for name in names)]
    if len(used) > 1:
        raise RecipeError(
            f"metrics {', '.join(names)} are of {len(used)} kinds",
            why=f"they compare {', '.join(used)}",
            mend="keep those of " + ", or those of ".join(", ".join(_KINDS[kind]) for kind in used),
            key="metrics",
        )
