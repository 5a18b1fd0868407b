"""The values of planning: what was looked up, what was measured, what was decided. Frozen, printable, JSON in and out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from fromzero.data import DataFacts
from fromzero.devices import MachineFacts
from fromzero.models import ModelFacts
from fromzero.recipe.schema import Recipe
from fromzero.tuning import Frozen


@dataclass(frozen=True)
class Measured:
    """What a few steps on real data showed; the state they changed was thrown away.

    losses: one batch, before each of some updates, in training mode.  silent: trainable tensors with no gradient
    """

    step_seconds: float
    evaluate_seconds: float  # of one batch
    losses: tuple[float, ...]
    silent: tuple[str, ...]
    peak_bytes: int
    batch: int
    kept_step_seconds: float | None = None  # of a step that begins at the cut; None where none can
    no_cut: str = ""  # why none can
    pass_seconds: float | None = None  # of one example through what stands still
    path_errors: dict[str, float] = field(
        default_factory=dict
    )  # fast path → its distance from the plain one, relative to the largest gradient


@dataclass(frozen=True)
class Facts:
    machine: MachineFacts
    data: DataFacts
    model: ModelFacts
    frozen: Frozen
    adapted: dict[str, tuple[int, ...]] = field(default_factory=dict)  # Linears beside which adapters learn → rows of their parts
    measured: Measured | None = None

    def with_measured(self, measured: Measured) -> Facts:
        return replace(self, measured=measured)

    def with_noted(self, values: dict[str, Any]) -> Facts:
        """With what an earlier plan measured, as its JSON.  raises: ValueError"""
        return self.with_measured(TypeAdapter(Measured).validate_python(values))


@dataclass(frozen=True)
class Finding:
    """Something about data or model. severity: note | warning | error (an error refuses the run)."""

    severity: str
    code: str
    what: str
    why: str = ""
    mend: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.what, self.why, self.mend) if part)


@dataclass(frozen=True)
class Choice:
    """One decision. price: what it costs or saves, in words with units."""

    name: str
    value: Any
    reason: str
    price: str = ""


@dataclass(frozen=True)
class TrainRow:
    """A layer in the table of what trains."""

    layer: str
    kind: str
    parameters: int
    trains: bool
    lr: float


@dataclass(frozen=True)
class Plan:
    """What will happen. batch: samples a step, on average where batch_tokens says how many tokens; micro_batch, micro_tokens:
    most samples and tokens in memory at once; score_rows: most rows of scores over a vocabulary at once."""

    recipe: Recipe
    facts: Facts
    device: str
    threads: int
    keep_memory: bool  # freed memory stays with the process
    precision: str
    attention: str  # the path that attention over documents takes; "" where there is none
    prefix: str  # the first module that still runs: what it reads of each example is computed once; "" where all runs each time
    kept_in: str  # memory | file: what holds that; "" where nothing is kept
    lowrank: str  # the path that adapters take; "" where there are none
    batch: int
    batch_tokens: int | None
    micro_batch: int
    micro_tokens: int | None
    score_rows: int | None
    steps_per_epoch: int
    steps: int
    evaluate_every: int  # optimizer steps
    grade: str
    choices: tuple[Choice, ...]
    trains: tuple[TrainRow, ...]
    trainable_parameters: int
    findings: tuple[Finding, ...]
    predicted_seconds: float | None
    predicted_peak_bytes: int | None

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", by_alias=True, exclude={"recipe"})
        values["recipe"] = json.loads(self.recipe.model_dump_json(by_alias=True, exclude_unset=True))
        return values

    @staticmethod
    def from_json(values: dict[str, Any], recipe: Recipe) -> Plan:
        """recipe: read apart, for a recipe that was given objects from Python cannot be read from JSON"""
        return _ADAPTER.validate_python({**values, "recipe": recipe})


_ADAPTER = TypeAdapter(Plan)
