"""X-ray: facts in, findings out: what is wrong with the data and the model, each with its mend. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fromzero.data import ChatFacts
from fromzero.objectives import predicted_start
from fromzero.planner.values import Facts, Finding
from fromzero.recipe.schema import Recipe

SLOW_FETCH = 0.3  # of a step's time, from which on a person should know


def findings(recipe: Recipe, facts: Facts) -> tuple[Finding, ...]:
    """Every finding, errors first."""
    found = [
        *_labels(recipe, facts),
        *_rows(recipe, facts),
        *_text(facts),
        *_chat(facts),
        *_inputs(facts),
        *_model(recipe, facts),
        *_measured(recipe, facts),
        *_certified(facts),
    ]
    rank = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(found, key=lambda finding: rank[finding.severity]))


def _labels(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    data, width = facts.data, facts.model.output_shape[-1] if facts.model.output_shape else 1
    if recipe.task == "regress" or data.classes is None:
        spare = data.text is not None and width > data.outputs  # an embedding may be wider than its tokenizer
        if width != data.outputs and facts.model.output_shape and not spare:
            yield Finding(
                "error",
                "outputs",
                f"the model gives {width} numbers, the answers have {data.outputs}",
                mend="set head: new, or change the model's last layer",
            )
        return
    held = [name for name, count in data.train_counts.items() if count]
    if len(held) == 1:
        yield Finding(
            "error",
            "one-class",
            f"all {data.train} training examples are of class '{held[0]}'",
            "there is nothing to tell apart",
            "check data.target and data.classes",
        )
    if recipe.loss_name == "cross_entropy" and data.given_indices and "0" not in held and held:
        yield Finding(
            "warning",
            "one-based",
            f"labels run from {held[0]} to {held[-1]} and none is 0",
            "class indices start at 0; these look 1-based",
            "subtract 1 from the labels, or say data.classes",
        )
    if data.outputs > width:
        counts = ", ".join(f"{n}: {c}" for n, c in list(data.train_counts.items())[:12])
        beyond = [f"'{n}' stands {c} times, first at {data.first[n]}" for n, c in list(data.train_counts.items())[width:] if c]
        yield Finding(
            "error",
            "labels-out-of-range",
            f"the data has {data.outputs} classes, the model {width} outputs",
            "; ".join([f"labels from {width} on are out of range ({counts})", *beyond[:3]]),
            "set head: new, which is sized from the data, or give the model more outputs",
        )
    elif data.outputs < width and recipe.loss_name == "cross_entropy":
        yield Finding(
            "note",
            "spare-outputs",
            f"the model has {width} outputs, the data {data.outputs} classes",
            "the other outputs learn only to stay low",
            "head: new would fit exactly",
        )
    if data.validation:
        empty = [n for n, count in data.validation_counts.items() if not count and data.train_counts.get(n)]
        if empty:
            yield Finding(
                "warning",
                "class-not-validated",
                f"no validation example of class {', '.join(empty[:8])}",
                "its errors will not be seen",
                "raise data.hold_out or add examples",
            )


def _rows(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    data = facts.data
    for note in data.notes:
        yield Finding("note", "rows", note)
    for name, why in data.set_aside.items():
        yield Finding("warning", "column-set-aside", f"column '{name}' is not used", why, "name it in data.input to use it all the same")
    if data.repeats:
        yield Finding("note", "repeats", f"{data.repeats} rows repeat an earlier one", "repeats fall on the same side of the split")
    if data.shared:
        kept = recipe.data.shared == "keep" or recipe.task == "language"
        yield Finding(
            "warning",
            "leak",
            f"{data.shared} validation examples stand in the training data too",
            "data.shared: keep, so the validation figure flatters"
            if kept
            else "they are left out of the validation, which they would flatter",
            "remove them from one side" if kept else "data.shared: keep would measure on them all the same",
        )
    if data.conflicting and data.chat:
        yield Finding(
            "note", "several-answers", f"{data.conflicting} prompts have more than one answer", "the model learns to give each of them"
        )
    elif data.conflicting:
        yield Finding(
            "warning",
            "conflicting-labels",
            f"{data.conflicting} inputs carry more than one label",
            "no model can be right on all of them",
            "look at them",
        )
    if not data.validation:
        yield Finding(
            "warning",
            "no-validation",
            "there is no validation data",
            "nothing will show whether the model has merely learned by heart",
            "set data.hold_out: 0.1",
        )
    if isinstance(recipe.batch, int) and recipe.batch > data.train:
        yield Finding(
            "note",
            "batch",
            f"batch {recipe.batch} is larger than the {data.train} training examples",
            "every step sees all of them, as with batch: all",
        )
    if data.target_std and max(data.target_std) > 100 and recipe.data.scale_target == "none":
        yield Finding(
            "warning",
            "target-scale",
            f"the answers spread by {max(data.target_std):.4g} around {data.target_mean[0]:.4g}",
            "steps of the learning rate are small against that",
            "set data.scale_target: standard",
        )


def _text(facts: Facts) -> Iterator[Finding]:
    text = facts.data.text
    if text is None:
        return
    if text.cut:
        yield Finding(
            "warning",
            "text-cut",
            f"{text.cut} of {facts.data.train} training texts are longer than data.max_tokens and lose their end",
            "the model never sees it",
            f"the longest text has its end cut at {text.longest} tokens; raise data.max_tokens",
        )
    if text.unknown > 0.01 * text.tokens:
        yield Finding(
            "warning",
            "unknown-tokens",
            f"{text.unknown / text.tokens:.0%} of the tokens are unknown to the tokenizer",
            "what they said is lost; it was made for other text",
            "take a model made for this language, or data.tokenizer: bpe with a model from zero",
        )


def _chat(facts: Facts) -> Iterator[Finding]:
    chat = facts.data.chat
    if chat is None:
        return
    if chat.untrained:
        yield Finding(
            "error",
            "nothing-trained",
            f"no token is trained in {chat.untrained} of {chat.conversations} conversations: {_places(chat.untrained_at, chat.untrained)}",
            "their answers lie beyond data.max_tokens"
            if chat.too_long and chat.way == "cut"
            else "the assistant says nothing in them that counts",
            "data.too_long: drop or split, or raise data.max_tokens" if chat.too_long and chat.way == "cut" else "remove them",
        )
    yield from _too_long(chat)
    if chat.empty:
        yield Finding(
            "warning",
            "empty-answers",
            f"{chat.empty} conversations have an answer without words: {_places(chat.empty_at, chat.empty)}",
            "the model learns to say nothing there",
            "remove them, or give the message weight: 0",
        )
    if chat.terminator:
        yield Finding("note", "terminator", f"every answer ends with {chat.terminator!r}, which is trained", "the model stops there")
    if chat.crossing:
        yield Finding(
            "note",
            "crossing-tokens",
            f"{chat.crossing} tokens hold the end of a prompt and the beginning of an answer",
            "they are trained; the text begins an answer inside a token",
        )


def _too_long(chat: ChatFacts) -> Iterator[Finding]:
    if not chat.too_long:
        return
    what = f"{chat.too_long} of {chat.conversations} conversations have more than {chat.room} tokens, up to {chat.longest}"
    price = {
        way: f"{tokens} of {chat.tokens} tokens ({tokens / chat.tokens:.1%}) and {trained} of {chat.trained} trained ones ({trained / max(chat.trained, 1):.1%})"
        for way, (tokens, trained) in chat.lost.items()
    }
    if chat.way is None:
        yield Finding(
            "error",
            "too-long",
            what,
            f"nothing is lost unasked: cut would lose {price['cut']}, drop {price['drop']}, split none, but later pieces do not see the earlier ones",
            "set data.too_long: cut, drop or split",
        )
    elif chat.way == "split":
        yield Finding("warning", "too-long", what, "they are split: no token is lost, but later pieces do not see the earlier ones")
    else:
        yield Finding(
            "warning", "too-long", what, f"data.too_long: {chat.way} loses {price[chat.way]}", "raise data.max_tokens, or split them"
        )


def _places(first: tuple[str, ...], count: int) -> str:
    return ", ".join(first) + (f" and {count - len(first)} more" if count > len(first) else "")


def _inputs(facts: Facts) -> Iterator[Finding]:
    largest = max(abs(facts.data.lowest), abs(facts.data.highest))
    if not math.isfinite(largest):
        yield Finding(
            "error",
            "input-not-finite",
            "inputs hold NaN or infinite values",
            "the loss would be NaN in the first step",
            "clean them; a table's empty cells are filled by data.missing",
        )
    elif largest > 30:
        yield Finding(
            "warning",
            "input-scale",
            f"inputs run from {facts.data.lowest:.4g} to {facts.data.highest:.4g}",
            "networks learn slowly, or not at all, from inputs far from 1",
            "divide them: pixels by 255, others by their standard deviation",
        )


def _model(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    model = facts.model
    if model.foreign:
        why = "fromzero does not write this one: no path of attention is chosen for it, and only fromzero opens its run's folder"
        yield Finding("note", "foreign", f"the model is built by {model.foreign}", why)
    if recipe.loss_name == "cross_entropy" and model.ends_in == "softmax":
        yield Finding(
            "warning",
            "softmax-twice",
            "the model ends in softmax, and cross_entropy applies softmax again",
            "the loss cannot fall below a floor and gradients shrink",
            "return the last Linear's output as it is",
        )
    if recipe.loss_name == "cross_entropy" and model.ends_in == "log_softmax":
        yield Finding(
            "warning",
            "softmax-twice",
            "the model ends in log_softmax, and cross_entropy applies it again",
            "log_softmax of log_softmax is itself, so the numbers are right and the work is done twice (a plain softmax there would spoil training)",
            "return the last Linear's output as it is, or pair log_softmax with NLLLoss",
        )
    if recipe.loss_name == "bce" and model.ends_in:
        yield Finding(
            "warning",
            "softmax-twice",
            f"the model ends in {model.ends_in}, and bce applies a sigmoid",
            mend="return the last Linear's output as it is",
        )
    for name in model.flat_dropout:
        yield Finding(
            "warning",
            "dropout2d-flat",
            f"layer '{name}' is Dropout2d but gets flat features (batch, features)",
            "it is made to drop whole channels of images; on flat input torch lets it act as plain Dropout, warns, and will refuse one day",
            "use nn.Dropout there",
        )
    if model.idle:
        yield Finding(
            "warning",
            "idle-layer",
            f"parameters never used: {', '.join(model.idle[:6])}",
            "their layer does not run, so it cannot learn",
            "call it in forward, or remove it",
        )


def _measured(recipe: Recipe, facts: Facts) -> Iterator[Finding]:
    seen = facts.measured
    if seen is None or not seen.losses:
        return
    first, last = seen.losses[0], seen.losses[-1]
    silent = [name for name in seen.silent if name not in facts.model.idle]
    if silent:
        yield Finding(
            "warning",
            "no-gradient",
            f"no gradient reaches {', '.join(silent[:6])}",
            "detached, or cut off by something flat; it will not learn",
            "look for detach(), no_grad() or a dead ReLU before it",
        )
    if not math.isfinite(first):
        yield Finding(
            "warning" if recipe.not_finite.skip else "error",
            "loss-not-finite",
            f"the first loss is {first}",
            "the weights or the inputs are not finite, or no example of the batch counts",
            "check inputs, initialisation and loss.class_weights",
        )
        return
    if seen.fetch_seconds > SLOW_FETCH * seen.step_seconds:
        yield Finding(
            "warning",
            "slow-data",
            f"making a batch takes {seen.fetch_seconds / seen.step_seconds:.0%} of a step",
            "the model waits for its data",
            "prepare the data once, or augment less",
        )
    expected = predicted_start(recipe.loss_name, facts.model.output_shape[-1] if facts.model.output_shape else 1)
    fresh = not str(recipe.model.source).startswith("run:")
    if expected is not None and fresh and first > 2 * expected + 0.5:
        yield Finding(
            "warning",
            "initial-loss",
            f"the first loss is {first:.3g}, a fresh network should start near {expected:.3g} (ln C)",
            "the outputs are too large: unscaled inputs, or too large first weights",
            "scale the inputs, or the last layer's initial weights",
        )
    if not math.isfinite(last):
        yield Finding(
            "error",
            "loss-not-finite",
            f"the loss is {last} after {len(seen.losses) - 1} steps on one batch",
            f"lr {recipe.optimizer.lr:g} is far too large",
            f"try optimizer.lr={recipe.optimizer.lr / 100:g}",
        )
    elif last > 1.5 * first + 0.1:
        yield Finding(
            "warning",
            "loss-rises",
            f"the loss rose from {first:.3g} to {last:.3g} in {len(seen.losses) - 1} steps on one batch",
            f"lr {recipe.optimizer.lr:g} is too large",
            f"try optimizer.lr={recipe.optimizer.lr / 10:g}",
        )


def _certified(facts: Facts) -> Iterator[Finding]:
    """What the certificate refused, by name."""
    found = None if facts.measured is None else facts.measured.certificate
    for name, error in {} if found is None else found.refused.items():
        assert found is not None
        apart = f"its gradients are {error:.1e} apart from the plain way's, another order of additions explains {found.bound:.1e}"
        if name == "micro_batch":
            what = "a batch cut into single samples is not the whole batch"
            mend = "look for a mean over the batch, in the model or in the loss; the plan does not cut this one"
            yield Finding("warning", "samples-mix", what, apart, mend)
            continue
        with_what = f" with torch {facts.machine.torch}" if name == "compile" else ""
        yield Finding("warning", "refused", f"{name}{with_what} computes something else here", apart, "the run does without it")
