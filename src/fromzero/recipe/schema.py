"""The recipe's keys: each one typed field with its meaning, unit and default. Knows no torch, no file, no plan.

The long form is what the fields hold; the short forms that people write (`freeze: body`, `limit: 500`,
`optimizer: sgd`) are turned into it by the validators beside them. `none` in a recipe is None here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fromzero.recipe.section import Given as Given
from fromzero.recipe.section import NoneWord, Section, Source, short_for

# ------------------------------------------------------------------------------------------- model


class Model(BaseModel):
    """Where the model comes from; every further key is an option of that model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, populate_by_name=True)
    source: Source = Field(
        alias="from", description="catalogue name, FILE.py:CLASS, run:NAME, hf:owner/name, a short name, or a folder or file of weights"
    )
    weights: str = Field(
        "auto", description="auto: those of the source; none: fresh ones; or a file whose tensors fit a catalogue or own model"
    )

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Head(Section):
    """`keep`, or `new`: the last Linear is replaced by one sized from the data."""

    new: bool = Field(False, description="true: replace the last Linear by a fresh one sized from the data")
    layer: Annotated[str | None, NoneWord] = Field(None, description="name of the Linear to replace, where it cannot be found")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if value in ("keep", "new"):
            return {"new": value == "new"}
        if isinstance(value, str):
            raise ValueError("is not keep, new or {new: true, layer: NAME}")
        return value


class Freeze(Section):
    """`none`, `body`, `{through: LAYER}` or a list of globs of parameter names."""

    body: bool = Field(False, description="freeze all but the head (the last Linear)")
    through: Annotated[str | None, NoneWord] = Field(
        None, description="freeze every layer up to and including this one, in the order they run"
    )
    names: tuple[str, ...] = Field((), description="globs of parameter names to freeze")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if value is None or value == "none":
            return {}
        if value == "body":
            return {"body": True}
        if isinstance(value, (list, tuple)):
            return {"names": value}
        if isinstance(value, str):
            raise ValueError("is not none, body, {through: LAYER} or a list of globs of parameter names")
        return value

    @property
    def nothing(self) -> bool:
        return not (self.body or self.through or self.names)


class Adapter(Section):
    """Low-rank matrices beside frozen ones; only they learn."""

    name: Literal["lora", "dora"] = Field("lora", description="lora: W + s·B·A; dora: its rows rescaled by a learned magnitude")
    rank: int = Field(8, ge=1, le=1024, description="rows of A, columns of B")
    alpha: float = Field(16.0, gt=0, description="s = alpha / rank")
    rank_stabilised: bool = Field(False, description="true: s = alpha / √rank")
    targets: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = Field(
        "all-linear", description="which Linears: all-linear (all but the head), attention, mlp, or a list of globs of their names"
    )
    layers: str = Field("all", pattern=r"^(all|last-[1-9][0-9]*)$", description="all, or last-N: only the last N stages that hold a target")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapters' inputs set to 0 in training")
    base: Literal["full", "8bit", "4bit"] = Field(
        "full", description="how the frozen matrices are kept: full, 8bit or 4bit (lossy, smaller)"
    )
    start: Annotated[str | None, NoneWord] = Field(None, description="a folder in PEFT's format, or run:NAME, whose matrices to begin with")
    train: tuple[str, ...] = Field(
        (), description="globs of parameters that learn whole beside the adapters, such as embedding.tokens.weight"
    )


# -------------------------------------------------------------------------------------------- data


class Limit(Section):
    """A sample of the training examples, fixed by the seed."""

    examples: int | None = Field(None, ge=1, description="keep this many training examples")
    per_class: int | None = Field(None, ge=1, description="keep this many training examples of each class")


class Augment(Section):
    """Random changes of training images, drawn from (seed, epoch, sample)."""

    shift: float = Field(0.0, ge=0, lt=1, description="largest shift, as a share of the image's side")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation, degrees")
    flip: bool = Field(False, description="mirror left and right, half of the time")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if value == "light":
            return {"shift": 0.08, "rotate": 8.0}
        if isinstance(value, str):
            raise ValueError("is not none, light or {shift: …, rotate: …, flip: …}")
        return value


class ImageInput(Section):
    """How images are read when `input` is long: needed where their sizes differ."""

    size: tuple[int, int] = Field(description="height and width in pixels; one number stands for both")
    channels: Literal[1, 3] = Field(3, description="1 grey, 3 colours")

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1 or max(value) > 4096:
            raise ValueError("is not between 1 and 4096 pixels a side")
        return value


MissingPolicy = Literal["auto", "median", "mean", "zero", "category", "drop", "error"]


class Data(Section):
    """What to learn from, and what of it is kept aside."""

    train: Source = Field(description="a named set, a file (csv, tsv, jsonl, json, parquet, npz, pt), an image folder or a pypi: source")
    validation: Annotated[Source, NoneWord] = Field(None, description="a file or folder of its own for validation")
    hold_out: float = Field(
        0.1, ge=0, lt=1, description="share of train kept for validation: stratified, split by distinct content, fixed by seed"
    )
    input: ImageInput | tuple[str, ...] | None = Field(None, description="input columns (or npz arrays); for images {size: …, channels: …}")
    target: Annotated[str | None, NoneWord] = Field(None, description="column (or npz array) of the answer")
    classes: tuple[str, ...] | None = Field(None, description="keep only these classes, in this order")
    limit: Annotated[Limit | None, short_for("examples"), NoneWord] = Field(
        None, description="a sample of the training examples fixed by the seed"
    )
    missing: dict[str, MissingPolicy] = Field(
        {}, description="what an empty cell becomes, by column; auto: median and a flag, or a category of its own"
    )
    scale_target: Literal["none", "standard"] = Field("none", description="regress: learn the target in standard deviations from its mean")
    tokenizer: str = Field(
        "auto", description="text: auto (the model's own, else bpe), characters, bpe (learned from train), or a tokenizer.json"
    )
    add_tokens: Annotated[tuple[str, ...] | Literal["auto"] | None, NoneWord] = Field(
        None,
        description="text: texts that become tokens of their own, such as [<tool>]; auto: what the tokenizer has beyond the model; the model gets a row for each",
    )
    vocabulary: int = Field(8000, ge=300, le=1_000_000, description="text: how many tokens bpe learns")
    max_tokens: Annotated[Annotated[int, Field(ge=2)] | None, NoneWord] = Field(
        None,
        description="text: longer texts are cut to this; language: documents are cut into pieces of this (the model's context if left out); chat: see too_long",
    )
    documents: Literal["apart", "stream"] = Field(
        "apart", description="language: apart (no piece holds two documents), or stream (end to end, cut regardless of where they end)"
    )
    template: str = Field("auto", description="chat: auto (the model's own chat template), or a .jinja file")
    mapping: dict[str, str] = Field(
        {}, description="chat: {user: COLUMN, assistant: COLUMN, system: COLUMN} or {messages: COLUMN, role: KEY, content: KEY}"
    )
    turns: Literal["all", "last"] = Field("all", description="chat: which of the assistant's turns are learned")
    too_long: Annotated[Literal["cut", "drop", "split"] | None, NoneWord] = Field(
        None, description="chat: what becomes of conversations beyond max_tokens or the model's context; left out: they are refused"
    )
    shared: Literal["leave_out", "keep"] = Field("leave_out", description="validation examples that stand in train too")
    skip_broken: int = Field(
        0,
        ge=0,
        description="how many unreadable images, rows of a table or conversations may be left out, and named in the plan, before the run is refused",
    )
    augment: Annotated[Augment | None, NoneWord] = Field(None, description="none, light, or {shift, rotate, flip}; images only")

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping) else {"train": value}

    @field_validator("input", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        if value is None or value == "none":
            return None
        if isinstance(value, str):
            return (value,)
        return value

    @field_validator("classes", mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        if value is None or value == "all":
            return None
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("is not all or a list of class names")
        return tuple(str(name) for name in value)


# --------------------------------------------------------------------------- loss, optimizer, clock


class CrossEntropy(Section):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the answer spread over all classes")
    class_weights: tuple[float, ...] | Literal["balanced"] | None = Field(
        None, description="one weight a class, or balanced: inverse to its frequency in train"
    )


class BinaryCrossEntropy(Section):
    name: Literal["bce"] = "bce"
    pos_weight: float = Field(1.0, gt=0, description="weight of the positive answers")


class SquaredError(Section):
    name: Literal["mse"] = "mse"


class AbsoluteError(Section):
    name: Literal["mae"] = "mae"


class Huber(Section):
    name: Literal["huber"] = "huber"
    delta: float = Field(1.0, gt=0, description="where the square turns into a line, in units of the target")


class OwnLoss(Section):
    name: Literal["own"] = "own"
    function: Source = Field(description="FILE.py:FUNCTION taking (outputs, targets) and returning (sum, count)")


Loss = Annotated[CrossEntropy | BinaryCrossEntropy | SquaredError | AbsoluteError | Huber | OwnLoss, Field(discriminator="name")]


class Optimizer(Section):
    """Keys that every optimizer has."""

    lr: float = Field(1e-3, gt=0, description="learning rate: size of a step")
    weight_decay: float = Field(0.0, ge=0, description="pull of the weights towards zero")
    lr_scale: dict[str, float] = Field({}, description="globs of parameter names → multiplier of lr")

    @field_validator("lr_scale")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if any(scale < 0 for scale in value.values()):
            raise ValueError("multipliers are 0 or more")
        return value


class SGD(Optimizer):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.01, gt=0, description="learning rate: size of a step")
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is repeated")
    nesterov: bool = Field(False, description="look ahead along the momentum")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, such as momentum: 0.9")
        return self


class RMSProp(Optimizer):
    name: Literal["rmsprop"] = "rmsprop"
    lr: float = Field(0.01, gt=0, description="learning rate: size of a step")
    alpha: float = Field(0.99, ge=0, lt=1, description="memory of the squared gradient")
    eps: float = Field(1e-8, gt=0, description="keeps the division finite")
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is repeated")


class Adam(Optimizer):
    name: Literal["adam"] = "adam"
    betas: tuple[float, float] = Field((0.9, 0.999), description="memory of the gradient and of its square")
    eps: float = Field(1e-8, gt=0, description="keeps the division finite")


class AdamW(Optimizer):
    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = Field((0.9, 0.999), description="memory of the gradient and of its square")
    eps: float = Field(1e-8, gt=0, description="keeps the division finite")
    weight_decay: float = Field(0.01, ge=0, description="pull of the weights towards zero, apart from the gradient")


AnyOptimizer = Annotated[SGD | RMSProp | Adam | AdamW, Field(discriminator="name")]


class Schedule(Section):
    """How the learning rate moves over the optimizer steps."""

    name: Literal["constant", "linear", "cosine", "step", "one_cycle"] = Field("constant", description="the shape after the warm-up")
    warmup: float = Field(0.0, ge=0, description="linear rise from 0: steps, or below 1 a share of all steps")
    floor: float = Field(0.0, ge=0, le=1, description="linear, cosine: where it ends, as a share of lr")
    every: float = Field(0.34, gt=0, description="step: between drops, steps, or below 1 a share of all steps")
    factor: float = Field(0.1, gt=0, lt=1, description="step: lr is multiplied by this at each drop")
    peak_at: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of the steps after which lr is at its top")


class BatchTokens(Section):
    tokens: int = Field(ge=1, description="text: about this many tokens per optimizer step; no document is cut for it")


class Evaluate(Section):
    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = Field("epoch", description="epoch, or a number of optimizer steps")
    keep: Literal["best", "last"] = Field("best", description="which weights the run's model has: lowest validation loss, or the last")
    stop_after: Annotated[Annotated[int, Field(ge=1)] | None, NoneWord] = Field(
        None, description="stop after this many evaluations without a lower loss"
    )
    samples: int = Field(
        2, ge=0, le=100, description="language, chat: how many beginnings from the validation data are gone on with, to be read"
    )


class NotFinite(Section):
    """`stop`, or `{skip: N}`."""

    skip: int = Field(
        0,
        ge=0,
        description="most steps, in the whole run, that may be left out because loss or gradient is NaN or infinite: each is warned of, "
        "moves no weight and does not count in the mean loss; order and schedule go on. One more stops the run",
    )

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if value == "stop":
            return {}
        if isinstance(value, str):
            raise ValueError("is not stop or {skip: N}")
        return value


class Save(Section):
    every: Literal["auto", "epoch"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="auto: at most once a minute; epoch; or optimizer steps"
    )
    keep: int = Field(2, ge=1, description="how many checkpoints stay")
    full: Literal["stop", "go_on"] = Field(
        "stop", description="where the disk has no room for a checkpoint: stop (resume goes on later), or go_on and warn"
    )


class Limits(Section):
    """What the planner may use. Nothing here may change the mathematics."""

    memory: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="bytes, as a number or 2GB; auto: four fifths of what is free"
    )
    seconds: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(
        None, description="stop after this time, saved, with exit code 3"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="most samples in memory at once")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="CPU threads")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda where there is one, else cpu")
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile; auto: only in long runs on cuda, for on a CPU it did not pay"
    )

    @field_validator("memory", mode="before")
    @classmethod
    def _units(cls, value: Any) -> Any:
        if not isinstance(value, str) or value == "auto":
            return value
        text = value.strip().upper().removesuffix("B").removesuffix("I")
        scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:], 1.0)
        try:
            return float(text.rstrip("KMGT")) * scale
        except ValueError:
            raise ValueError("is not auto, a number of bytes, or like 500MB or 2GB") from None


# ------------------------------------------------------------------------------------------ recipe

METRICS = {
    "classify": ("accuracy", "macro_f1"),
    "regress": ("r2", "rmse", "mae"),
    "language": ("perplexity", "bits_per_byte", "token_accuracy"),
    "chat": ("perplexity", "token_accuracy"),
}
TOKEN_TASKS = ("language", "chat")  # the next token is predicted


class Recipe(Section):
    """What to train. It defines the mathematics of a run, completely, and nothing else."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="folder name of the run; the recipe's file name if left out"
    )
    task: Literal["classify", "regress", "language", "chat"] = Field(
        description="classify (name a class), regress (predict numbers), language (go on with raw text) or chat (answer in conversations)"
    )
    model: Model = Field(description="a catalogue name, FILE.py:CLASS, run:NAME, or {from: …, any option of that model}")
    head: Head = Field(Head(), description="keep | new (sized from the data)")
    freeze: Freeze = Field(Freeze(), description="none | body | {through: LAYER} | [globs of parameter names]")
    adapter: Annotated[Adapter | None, short_for("name"), NoneWord] = Field(None, description="none | lora | dora, with options")
    data: Data = Field(description="a source, or a section")
    loss: Loss | None = Field(None, description="auto | cross_entropy | bce | mse | mae | huber | FILE.py:FUNCTION, with options")
    metrics: tuple[Literal["accuracy", "macro_f1", "r2", "rmse", "mae", "perplexity", "bits_per_byte", "token_accuracy"], ...] | None = (
        Field(None, description="auto, or a list")
    )
    optimizer: AnyOptimizer = Field(AdamW(), description="adamw | adam | sgd | rmsprop, with options")
    schedule: Annotated[Schedule, short_for("name")] = Field(
        Schedule(), description="constant | linear | cosine | step | one_cycle, with warmup"
    )
    batch: Annotated[int, Field(ge=1)] | Literal["all"] | BatchTokens = Field(
        64, description="samples per optimizer step; all: gradient descent; {tokens: N} for text"
    )
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(
        None, description="passes over the training data (10 if neither this nor steps or tokens is given)"
    )
    steps: Annotated[Annotated[int, Field(ge=1)] | None, NoneWord] = Field(None, description="optimizer steps, instead of epochs")
    tokens: Annotated[Annotated[int, Field(ge=1)] | None, NoneWord] = Field(None, description="text: tokens to train on, instead of epochs")
    clip: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(None, description="largest norm of the whole gradient")
    not_finite: NotFinite = Field(NotFinite(), description="what a loss or gradient that is NaN or infinite does: stop | {skip: N}")
    precision: Literal["float32", "float64", "bf16", "auto"] = Field("float32", description="auto: bf16 where the device has it")
    seed: int = Field(0, ge=0, lt=2**63, description="first weights, split, order and dropout follow from it")
    evaluate: Annotated[Evaluate, short_for("every")] = Field(
        Evaluate(), description="when to measure on validation data, and what to keep"
    )
    save: Annotated[Save, short_for("every")] = Field(Save(), description="when to write a checkpoint")
    limits: Limits = Field(Limits(), description="what the planner may use")
    certificate: Literal["on", "off"] = Field("on", description="check before training that the plan's way equals the plain way")
    trust: tuple[Literal["hub"], ...] = Field((), description="code that a source brings along and may run: none, or [hub]")
    report: tuple[Literal["console", "page", "tensorboard"], ...] = Field(
        ("console", "page"), description="console, page (curves as HTML in the run's folder), tensorboard"
    )

    @field_validator("model", mode="before")
    @classmethod
    def _model_name(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, Model)) else {"from": value}

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_name(cls, value: Any) -> Any:
        if isinstance(value, Given) or callable(value) or (isinstance(value, str) and ".py:" in value):
            return {"name": "own", "function": value}
        if isinstance(value, str):
            return None if value in ("auto", "none") else {"name": value}
        return value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "name" not in value:
            return {"name": "adamw", **value}
        return value

    @field_validator("trust", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return () if value in ("none", None) else value

    @field_validator("metrics", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value in ("auto", "none") else value

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; the length of a run is one of them")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        name = self.loss_name
        if self.task == "classify" and name in ("mse", "mae", "huber"):
            raise ValueError(f"task classify names classes, but loss {name} measures numbers; use cross_entropy or bce, or task: regress")
        if self.predicts_tokens and name not in ("cross_entropy", "own"):
            raise ValueError(f"task {self.task} predicts tokens, but loss {name} does not; use cross_entropy")
        if self.task == "regress" and name in ("cross_entropy", "bce"):
            raise ValueError(f"task regress predicts numbers, but loss {name} compares classes; use mse, mae or huber, or task: classify")
        if self.task == "language" and self.data.skip_broken:
            raise ValueError("data.skip_broken leaves out images, rows and conversations; a text to be gone on with is read whole")
        wrong = [m for m in self.metric_names if m not in METRICS[self.task]]
        if wrong:
            raise ValueError(f"metric {wrong[0]} does not belong to task {self.task}")
        return self

    @model_validator(mode="after")
    def _adapter_alone(self) -> Self:
        if self.adapter is not None and not self.freeze.nothing:
            raise ValueError("adapter and freeze are both given; with an adapter all that it does not train stands still")
        return self

    @property
    def given(self) -> tuple[Any, Any]:
        """Model and training data that came from Python; None for one that did not"""
        model, data = (source.value if isinstance(source, Given) else None for source in (self.model.source, self.data.train))
        return model, data

    @property
    def predicts_tokens(self) -> bool:
        return self.task in TOKEN_TASKS

    @property
    def loss_name(self) -> str:
        if self.loss is not None:
            return self.loss.name
        return "mse" if self.task == "regress" else "cross_entropy"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return METRICS[self.task] if self.metrics is None else self.metrics
