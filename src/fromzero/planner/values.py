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
    """What a few steps on real data showed; the state they changed was thrown away. Steps are those of a batch of mean size.

    losses: one batch, before each of some updates, in training mode.  silent: trainable tensors with no gradient
    """

    step_seconds: float
    fetch_seconds: float  # of a step, to make its batch
    update_seconds: float  # of a step, the optimizer
    piece_seconds: float  # what each piece of a batch costs beside its samples
    evaluate_seconds: float  # of all validation data
    sample_seconds: float  # of the texts that are written to read along
    losses: tuple[float, ...]
    silent: tuple[str, ...]
    beyond_bytes: int  # what the largest batch needed in memory beyond what was counted
    planning_bytes: int  # most that planning held
    seconds: float = 0.0  # that trial steps and certificate took
    kept_step_seconds: float | None = None  # of a step that begins at the cut; None where none can
    no_cut: str = ""  # why none can
    no_compile: str = ""  # how compiled code failed
    pass_seconds: float | None = None  # of one example through what stands still
    certificate: Certificate | None = None

    @property
    def gradient_seconds(self) -> float:
        return self.step_seconds - self.fetch_seconds - self.update_seconds


@dataclass(frozen=True)
class Certificate:
    """How far loss and gradients of the chosen way lie from those of the plain way, on one batch.

    error:      of the tensor that is farthest, relative to its largest gradient.  bound: what another order of additions explains
    tensor:     that tensor; "" where all are equal bit for bit
    refused:    choice → its error, for choices that made more of a difference than that
    plain:      what the plain way was: so many samples, one at a time or together, with nothing chosen
    """

    error: float
    bound: float
    tensor: str
    loss_error: float
    samples: int
    plain: str
    refused: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """What runs that were done on this machine say of predictions: actual over predicted, its median, and what most lie between.

    runs, bytes_runs: how many were counted for seconds and for bytes; with few of them an allowance widens low and high
    """

    runs: int
    seconds_ratio: float
    seconds_low: float
    seconds_high: float
    bytes_runs: int
    bytes_ratio: float
    bytes_low: float
    bytes_high: float


@dataclass(frozen=True)
class Facts:
    """held_bytes: what the process holds before it trains.  disk_bytes: free where the runs are; 0 where nobody looked
    largest: tokens of the run's largest batch; 0 where they are not counted"""

    machine: MachineFacts
    data: DataFacts
    model: ModelFacts
    frozen: Frozen
    adapted: dict[str, tuple[int, ...]] = field(default_factory=dict)  # Linears beside which adapters learn → rows of their parts
    held_bytes: int = 0
    disk_bytes: int = 0
    largest: int = 0
    measured: Measured | None = None
    record: Record | None = None  # scales what is predicted, and decides nothing

    @property
    def reads_text(self) -> bool:
        return self.data.text is not None and self.model.token_bytes > 0

    @property
    def may_not_be_cut(self) -> str:
        """What makes a batch in pieces another one; empty where nothing does."""
        if coupled := [layer for layer in self.model.coupled if layer not in self.frozen.layers]:
            return f"{coupled[0]} mixes the samples of a batch (BatchNorm)"
        if self.measured and self.measured.certificate and "micro_batch" in self.measured.certificate.refused:
            return "its samples were seen to change each other's gradients"
        return "the model draws random numbers that belong to no sample, outside of dropout layers" if self.model.random else ""

    def with_measured(self, measured: Measured) -> Facts:
        return replace(self, measured=measured)

    def with_record(self, record: Record | None) -> Facts:
        return replace(self, record=record)

    def with_noted(self, values: dict[str, Any]) -> Facts:
        """With what an earlier plan measured, what it knew of earlier runs, and the memory, disk and threads that it went by (no more than
        there are now), as the JSON of its facts.

        raises: ValueError, KeyError
        """
        measured = TypeAdapter(Measured | None).validate_python(values["measured"])
        record = TypeAdapter(Record | None).validate_python(values["record"])
        then, now = values["machine"], self.machine
        machine = replace(
            now,
            threads=min(int(then["threads"]), now.threads),
            memory_bytes=int(then["memory_bytes"]),
            host_bytes=int(then["host_bytes"]),
            disk_bytes=int(then["disk_bytes"]),
        )
        return replace(self, machine=machine, held_bytes=int(values["held_bytes"]), measured=measured, record=record)


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
class Alternative:
    """What was not chosen. seconds, bytes: of the whole run and at its peak, more or less than the plan's; None where nobody knows."""

    name: str
    why_not: str
    seconds: float | None = None
    bytes: int | None = None


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
    judged: int  # samples at once where nothing is kept for a backward pass, or tokens of text
    checkpointed: tuple[str, ...]  # stages that keep only their input, and run again in the backward pass
    compiled: bool
    steps_per_epoch: int
    steps: int
    evaluate_every: int  # optimizer steps
    grade: str
    choices: tuple[Choice, ...]
    trains: tuple[TrainRow, ...]
    trainable_parameters: int
    alternatives: tuple[Alternative, ...]
    findings: tuple[Finding, ...]
    seconds: dict[str, float]  # predicted, by what they are for; empty where nothing was measured
    disk: dict[str, int]  # bytes that the run leaves, by what they are for
    memory: dict[str, int]  # bytes at the highest moment, by what they are for; counted, not measured
    predicted_seconds: float | None
    predicted_peak_bytes: int | None
    predicted_seconds_between: tuple[float, float] | None = None  # what most runs here would end within
    predicted_bytes_between: tuple[int, int] | None = None

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that forbid the run"""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def fast_ways(self) -> tuple[str, ...]:
        """The choices that another plan might do without: what the certificate switches off one by one to find a culprit."""
        taken = {
            "compile": self.compiled,
            "frozen part": bool(self.prefix),
            "attention": self.attention not in ("", "plain"),
            "adapters": self.lowrank not in ("", "plain"),
            "checkpointing": bool(self.checkpointed),
            "scores": self.score_rows is not None,
            "micro_batch": self.micro_batch < self.batch or self.micro_tokens is not None,
        }
        return tuple(name for name, there in taken.items() if there)

    def without(self, *names: str) -> Plan:
        """The same plan with some of its fast ways switched off."""
        plain: dict[str, dict[str, Any]] = {
            "compile": {"compiled": False},
            "frozen part": {"prefix": "", "kept_in": ""},
            "attention": {"attention": "plain"},
            "adapters": {"lowrank": "plain"},
            "checkpointing": {"checkpointed": ()},
            "scores": {"score_rows": None},
            "micro_batch": {"micro_batch": self.batch, "micro_tokens": None},
        }
        return replace(self, **{key: value for name in names for key, value in plain[name].items()})

    def as_json(self) -> dict[str, Any]:
        values: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", by_alias=True, exclude={"recipe"})
        values["recipe"] = json.loads(self.recipe.model_dump_json(by_alias=True, exclude_unset=True))
        return values

    @staticmethod
    def from_json(values: dict[str, Any], recipe: Recipe) -> Plan:
        """recipe: read apart, for a recipe that was given objects from Python cannot be read from JSON"""
        return _ADAPTER.validate_python({**values, "recipe": recipe})


_ADAPTER = TypeAdapter(Plan)
