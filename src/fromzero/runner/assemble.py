"""Assemble: a plan and its data in, the objects of a run out. The only place that knows both plan and constructors."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fromzero.data import Augmentation, ChatFormat, Classes, Examples, Loaded
from fromzero.data.opening import find_path
from fromzero.errors import ModelError, RecipeError
from fromzero.models import Blueprint, Decoder, Sizes, blueprint_of_file, blueprint_of_name, blueprint_of_object, seeded
from fromzero.models.foreign import hub_name
from fromzero.objectives import LOSSES, Loss, Metrics
from fromzero.optim import lr_factor, make_optimizer, parameter_groups
from fromzero.planner.facts import adapter_options
from fromzero.planner.values import Plan
from fromzero.recipe.schema import Given, OwnLoss, Recipe
from fromzero.runner.draws import Draws
from fromzero.runner.judge import Judge
from fromzero.runner.regions import carry_out
from fromzero.runner.saved import Adapted, Design, SavedModel, begin_with, find_model
from fromzero.runner.start import Start, build_published, load_weights
from fromzero.tuning import Frozen, add_adapters, freeze, new_head, tensors_digest
from fromzero.weights.tensors import not_finite

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}  # of the master weights


@dataclass(frozen=True)
class Place:
    """Where a recipe's names lead: folders for relative paths, in this order; the runs; what its model starts from."""

    folders: tuple[Path, ...]
    runs: Path
    start: Start = field(default_factory=Start)


@dataclass
class Job:
    """Everything the loop works with."""

    plan: Plan
    model: nn.Module
    design: Design
    frozen: Frozen
    train: Examples
    validation: Examples | None
    judge: Judge
    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float]  # step → multiplier of every learning rate
    augment: Augmentation | None
    draws: Draws
    device: torch.device
    saved: SavedModel
    stepped: nn.Module  # what a step runs: the model, or its tail from where the frozen part ends
    fed: Examples  # what a step takes: the training examples, or those with what the tail reads of them
    fed_validation: Examples | None
    infinite: frozenset[str] = frozenset()  # buffers that hold infinities by design, such as masks


def build_model(recipe: Recipe, loaded: Loaded, place: Place) -> tuple[nn.Module, Design]:
    """The model as its source gives it, with first weights fixed by the seed and rows for added tokens, before head and freeze."""
    model, design = _from_source(recipe, loaded, place)
    return (model, design) if recipe.data.add_tokens is None else _with_added_tokens(model, design, loaded)


def _from_source(recipe: Recipe, loaded: Loaded, place: Place) -> tuple[nn.Module, Design]:
    source, options = recipe.model.source, recipe.model.options
    if isinstance(source, Given):
        blueprint = blueprint_of_object(source.value, options)
        if isinstance(source.value, nn.Module):
            return copy.deepcopy(source.value), Design(type(source.value).__name__, blueprint)
        if not callable(source.value):
            raise ModelError(f"{type(source.value).__name__} is no model", mend="give a torch.nn.Module, its class, or a name", key="model")
        built = seeded(recipe.seed, lambda: source.value(**options))
        return built, Design(getattr(source.value, "__name__", "model"), blueprint)
    start = place.start
    if start.saved is not None:
        if options:
            raise RecipeError(f"a trained model takes no options ({', '.join(options)})", mend="remove them", key="model")
        return start.saved.load(), start.saved.design
    if start.published is not None:
        if recipe.model.weights == "none":
            raise RecipeError(
                f"'{source}' names weights, and weights: none wants none", mend="take it out, or name an architecture", key="model.weights"
            )
        language = recipe.predicts_tokens
        fresh = loaded.facts.outputs if recipe.head.new and not language else None
        model, design = build_published(start.published, options, per_token=language, fresh_head=fresh, seed=recipe.seed)
        if (
            not language
            and design.blueprint is not None
            and design.blueprint.kind == "family"
            and "outputs" not in design.blueprint.options
        ):
            raise ModelError(
                "has no head, only a body that gives embeddings", mend="set head: new", file=start.published.origin, key="head"
            )
        return model, design
    if ".py:" in source:
        file, _, name = source.rpartition(":")
        blueprint = blueprint_of_file(find_path(file, place.folders), name, options)
    elif source.startswith(("hub:", "timm:")):
        blueprint = _outside(recipe, loaded, place)
    else:
        facts = loaded.facts
        vocabulary = None if facts.text is None else facts.text.vocabulary
        blueprint = blueprint_of_name(source, Sizes(facts.input_shape, facts.outputs, vocabulary, recipe.predicts_tokens), options)
    model = seeded(recipe.seed, blueprint.build)
    if recipe.model.weights not in ("auto", "none") and blueprint.kind != "hub":
        load_weights(model, recipe.model.weights, place.folders)
    return model, Design(blueprint.name, blueprint)


def _with_added_tokens(model: nn.Module, design: Design, loaded: Loaded) -> tuple[nn.Module, Design]:
    """A row for each token of the data.  raises: ModelError where the model has no place for more"""
    text, blueprint = loaded.facts.text, design.blueprint
    if text is None or not isinstance(model, Decoder) or blueprint is None or "config" not in blueprint.options:
        raise ModelError(f"{design.name} cannot get more tokens", why="only published language models can", key="data.add_tokens")
    model.grow(text.vocabulary)
    config = {**blueprint.options["config"], "vocab_size": model.config.vocabulary}
    return model, replace(design, blueprint=replace(blueprint, options={**blueprint.options, "config": config}))


def inspected_model(recipe: Recipe, loaded: Loaded, place: Place) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """The model, and the rows of the parts of each Linear that joins several published matrices."""
    model, design = build_model(recipe, loaded, place)
    return model, {name.removesuffix(".weight"): sizes for name, (_, how, sizes) in design.names().items() if how == "cat"}


def _outside(recipe: Recipe, loaded: Loaded, place: Place) -> Blueprint:
    """A model of torch.hub, whose `weights` are an option of its own, or of timm, sized from the data."""
    source, options, shape = recipe.model.source, recipe.model.options, loaded.facts.input_shape
    if source.startswith("timm:"):
        if len(shape) != 3:
            raise ModelError(f"{source} takes images, the data has inputs of shape {shape}", key="model")
        return Blueprint("timm", source.removeprefix("timm:"), {"num_classes": loaded.facts.outputs, "in_chans": shape[0], **options})
    name = hub_name(source, place.folders)
    if "hub" not in recipe.trust:
        said = f"'{source}' would run the hubconf.py of {'' if name.startswith('/') else 'github.com/'}{name.rpartition('/')[0]}"
        raise RecipeError(said, why="code that a source brings along runs only where it is trusted", mend="trust: [hub]", key="trust")
    weights = {} if recipe.model.weights in ("auto", "none") else {"weights": recipe.model.weights}
    return Blueprint("hub", name, {**options, **weights})


def assemble(plan: Plan, loaded: Loaded, place: Place) -> Job:
    """Build every object of the run. torch's random state is the caller's to set."""
    recipe = plan.recipe
    model, design = build_model(recipe, loaded, place)
    if recipe.head.new:
        layer = recipe.head.layer or plan.facts.model.head
        model = seeded(recipe.seed, lambda: new_head(model, layer, loaded.facts.outputs, linears=plan.facts.model.linears))
        design = Design(design.name, design.blueprint, (*design.heads, (layer or "", loaded.facts.outputs)))
    frozen, device, dtype = plan.facts.frozen, torch.device(plan.device), DTYPES[plan.precision]
    model.to(device, dtype)
    if recipe.adapter is not None:
        design = replace(design, adapted=_adapted(plan, place, model))
        add_adapters(model, plan.facts.adapted, **design.adapted.options, seed=recipe.seed)  # type: ignore[union-attr]
        if recipe.adapter.start is not None:
            begin_with(model, design, _folder_of(recipe.adapter.start, place))
    draws = Draws(recipe.seed)
    carry_out(model, plan, draws)
    freeze(model, frozen)
    spec = recipe.optimizer
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = parameter_groups(trained, spec.lr, spec.lr_scale)
    options = spec.model_dump(exclude={"name", "lr", "lr_scale"})
    schedule = recipe.schedule.model_dump(exclude={"name"})
    return Job(
        plan=plan,
        model=model,
        design=design,
        frozen=frozen,
        train=loaded.train,
        validation=loaded.validation,
        judge=make_judge(plan, loaded, place),
        optimizer=make_optimizer(spec.name, groups, **options),
        factor=lambda step: lr_factor(recipe.schedule.name, step, plan.steps, **schedule),
        augment=_augmentation(recipe, loaded),
        draws=draws,
        device=device,
        saved=SavedModel(design, loaded.preparation, recipe.task, recipe.loss_name, Path(), published=_accompanying(loaded, place)),
        stepped=model,
        fed=loaded.train,
        fed_validation=loaded.validation,
        infinite=frozenset(name for name, buffer in model.named_buffers() if not_finite(buffer)),
    )


def _adapted(plan: Plan, place: Place, model: nn.Module) -> Adapted:
    """model: on its device, before adapters"""
    assert plan.recipe.adapter is not None
    inner = {f"{name}." for name in plan.facts.adapted}
    still = set(plan.facts.frozen.parameters)
    learned = [n for n, _ in model.named_parameters() if n not in still and not n.startswith(tuple(inner))]
    options = adapter_options(plan.recipe.adapter)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in learned}
    return Adapted(plan.facts.adapted, options, place.start.base, tensors_digest(kept), tuple(learned))


def _folder_of(source: str, place: Place) -> Path:
    return find_model(source, place.runs) if source.startswith("run:") else find_path(source, place.folders)


def _accompanying(loaded: Loaded, place: Place) -> dict[str, Any]:
    """What goes on with the weights; of conversations the template they were learned with, and what ends an answer in it."""
    form, found = loaded.preparation.inputs, place.start.accompanying
    if not isinstance(form, ChatFormat):
        return found
    generation = {**found.get("generation", {}), "eos_token_id": list(form.stops)}
    return {**found, "special": {**found.get("special", {}), **form.special}, "chat_template": form.template, "generation": generation}


def _outputs(plan: Plan) -> int:
    shape = plan.facts.model.output_shape
    return shape[-1] if shape else 1


def _augmentation(recipe: Recipe, loaded: Loaded) -> Augmentation | None:
    asked = recipe.data.augment
    if asked is None:
        return None
    if len(loaded.facts.input_shape) != 3:
        raise RecipeError(f"augments images, but the inputs have shape {loaded.facts.input_shape}", mend="remove it", key="data.augment")
    return Augmentation(asked.shift, asked.rotate, asked.flip)


def make_judge(plan: Plan, loaded: Loaded, place: Place) -> Judge:
    """The recipe's loss with its options, and its metrics."""
    recipe, device, dtype = plan.recipe, torch.device(plan.device), DTYPES[plan.precision]
    return Judge(
        loss=_loss(plan, loaded, place, device, dtype),
        metrics=Metrics(recipe.metric_names, outputs=_outputs(plan), binary=recipe.loss_name == "bce"),
        answers=loaded.preparation.answers,
        device=device,
        dtype=dtype,
        rows=plan.score_rows,
        around=(lambda: torch.autocast(device.type, torch.bfloat16)) if plan.precision == "bf16" else nullcontext,
        batch=_at_once(plan, loaded),
    )


def _at_once(plan: Plan, loaded: Loaded) -> int:
    """Samples at once where nothing is kept for a backward pass."""
    return max(1, plan.judged // loaded.facts.text.longest) if plan.facts.reads_text and loaded.facts.text else plan.judged


def _loss(plan: Plan, loaded: Loaded, place: Place, device: torch.device, dtype: torch.dtype) -> Loss:
    recipe = plan.recipe
    spec = recipe.loss
    options: dict[str, Any] = spec.model_dump(exclude={"name", "function"}) if spec is not None else {}
    if "class_weights" in options:
        options["class_weights"] = _class_weights(options["class_weights"], plan, loaded, device, dtype)
    function = _own_loss(spec, place) if isinstance(spec, OwnLoss) else LOSSES[recipe.loss_name]
    return partial(function, **options)


def _class_weights(asked: Any, plan: Plan, loaded: Loaded, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if asked is None:
        return None
    width = _outputs(plan)
    answers = loaded.preparation.answers
    if not isinstance(answers, Classes):
        raise RecipeError("weights classes, but the answers are no classes", mend="remove it", key="loss.class_weights")
    if asked == "balanced":
        counts = [max(loaded.facts.train_counts.get(n, 0), 1) for n in answers.names]
        asked = [sum(counts) / (len(counts) * c) for c in counts]
    if len(asked) != len(answers.names):
        raise RecipeError(
            f"has {len(asked)} weights, the data {len(answers.names)} classes",
            mend=f"one for each of {', '.join(answers.names[:12])}",
            key="loss.class_weights",
        )
    weights = [float(w) for w in asked] + [1.0] * (width - len(asked))
    return torch.tensor(weights, device=device, dtype=dtype)


def _own_loss(spec: OwnLoss, place: Place) -> Callable[..., tuple[Tensor, Tensor]]:
    if isinstance(spec.function, Given):
        given: Callable[..., tuple[Tensor, Tensor]] = spec.function.value
        return given
    file, _, name = spec.function.rpartition(":")
    path = find_path(file, place.folders)
    module_spec = importlib.util.spec_from_file_location("fromzero_user_loss", path)
    if module_spec is None or module_spec.loader is None:
        raise RecipeError(f"'{spec.function}' is not FILE.py:FUNCTION", key="loss.function")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise RecipeError(f"{path} has no function '{name}'", key="loss.function")
    function: Callable[..., tuple[Tensor, Tensor]] = getattr(module, name)
    return function
