"""Fault 33: every key of every shipped recipe with one letter wrong, and YAML that is not what it seems."""

import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import fromzero as fz
from fromzero.models.catalogue import Sizes, blueprint_of_name
from fromzero.recipe.read import check, parse

SOUND = "task: classify\nmodel: mlp\ndata: {train: a.csv, hold_out: 0.2}\nbatch: 4\n"


def keys(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """(path, place in the text, line) of every key"""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.index, key.start_mark.line + 1
            yield from keys(value, (*path, key.value))


def misspelt(word: str) -> list[str]:
    """Without a letter, with two letters swapped, with another letter: at every place."""
    found = []
    for i in range(len(word)):
        found += [word[:i] + word[i + 1 :], word[:i] + ("x" if word[i] != "x" else "z") + word[i + 1 :]]
        found += [word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :]] * (i > 0)
    return [one for one in dict.fromkeys(found) if one not in ("", word)]


def refused_everywhere(repository: Path, every: int) -> tuple[int, int]:
    """Read each recipe with each key misspelt (of the ways every so-manieth).  returns: how many were read, and how many named the key"""
    tried = named = 0
    recipes = sorted((repository / "recipes").glob("*.yaml"))
    assert len(recipes) >= 10
    for recipe in recipes:
        text = recipe.read_text()
        for path, at, line in keys(yaml.compose(text)):
            if path[0] == "model" and path[1:] not in ((), ("from",)):
                continue  # an option of the model, below
            if "lr_scale" in path[:-1]:
                continue  # a glob, not a key
            for word in misspelt(path[-1])[len(path[-1]) % every :: every]:
                broken = text[:at] + word + text[at + len(path[-1]) :]
                with pytest.raises(fz.RecipeError) as caught:
                    check(parse(broken.encode(), str(recipe)))
                if path != ("model", "from"):  # without it the word stands for an option of a model that is not named
                    (fault,) = [fault for fault in caught.value.faults if fault.key == ".".join((*path[:-1], word))]
                    assert (fault.file, fault.line, fault.what) == (str(recipe), line, "is no key of a recipe here")
                    said = f"did you mean '{'.'.join(path)}'?" == fault.mend
                    near = difflib.SequenceMatcher(None, word, path[-1]).ratio() >= 0.6
                    assert said or (not near and path[-1] in fault.mend), fault
                    named += said
                tried += 1
    return tried, named


def test_every_key_of_every_shipped_recipe_with_a_letter_wrong_is_refused_with_its_line_and_the_right_one(repository: Path) -> None:
    tried, named = refused_everywhere(repository, 6)
    assert tried >= 400 and named >= 0.9 * tried


@pytest.mark.slow
def test_every_key_of_every_shipped_recipe_with_any_letter_wrong_is_refused(repository: Path) -> None:
    tried, named = refused_everywhere(repository, 1)
    assert tried >= 2_800 and named >= 0.98 * tried


def test_every_option_of_a_shipped_model_with_any_letter_wrong_is_refused_with_the_right_one(repository: Path) -> None:
    tried = 0
    for recipe in sorted((repository / "recipes").glob("*.yaml")):
        model = check(parse(recipe.read_bytes(), str(recipe))).model
        for option, value in model.options.items():
            sizes = Sizes(inputs=(), outputs=3, vocabulary=20, per_token=True)
            for word in misspelt(option):
                options = {key: value for key, value in model.options.items() if key != option} | {word: value}
                with pytest.raises(fz.ModelError, match=rf"{model.source} has no option '{word}'.*did you mean '{option}'"):
                    blueprint_of_name(model.source, sizes, options).build()
                tried += 1
    assert tried >= 80


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("batch: !!int '4'", "r.yaml:4 batch: '4' does not fit"),
        ("batch: !!python/name:os.system", "r.yaml:4 batch: has the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("batch: !own 4", "r.yaml:4 batch: has the tag '!own'; a recipe holds plain values; remove the tag"),
        ("batch: 4\nbatch: 5", "r.yaml:5 batch: stands twice (first in line 4); keep one of them"),
        ("save: {keep: 1, keep: 2}\nbatch: 4", "r.yaml:4 save.keep: stands twice (first in line 4)"),
        ("batch: no", "r.yaml:4 batch: 'no' does not fit"),
        ("batch: 1e1", "r.yaml:4 batch: 10.0 does not fit"),
        ("batch: true", "r.yaml:4 batch: true does not fit"),
        ("batch: '4'", "r.yaml:4 batch: '4' does not fit"),
        ("batch: 4_0", "r.yaml:4 batch: '4_0' does not fit"),
        ("batch: " + "9" * 5000, "r.yaml:4 batch: '99999"),
        ("seed: 9223372036854775808", "r.yaml:4 seed: 9223372036854775808 is not below 9223372036854775808"),
        ("optimizer: {lr: .nan}", "r.yaml:4 optimizer.lr: NaN does not fit"),
        ("optimizer: {weight_decay: .inf}", "r.yaml:4 optimizer.weight_decay: Infinity does not fit"),
        ("optimizer: {name: adam, betas: [.nan, 0.9]}", "r.yaml:4 optimizer.betas"),
        ("clip: .inf", "r.yaml:4 clip: Infinity does not fit"),
        ("optimizer: {lr: 0}", "r.yaml:4 optimizer.lr: 0 is not above 0"),
        ("<<: {batch: 4}", "r.yaml:4: a key here is not a word"),
        ("? [a]\n: 4", "r.yaml:4: a key here is not a word"),
        (
            "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "grows too large when its aliases",
        ),
        ("a: &a [*a]", "r.yaml:4: grows too large when its aliases"),
        ("a: &a 1\nb: &a 2", "r.yaml:5: is not YAML: found duplicate anchor 'a'; first occurrence: second occurrence"),
        ("a: " + "[" * 100_000, "r.yaml:4: is nested more than 20 deep"),
        ("a: " + "{a: " * 50_000, "r.yaml:4: is nested more than 20 deep"),
        ("a: " + "- " * 100_000, "r.yaml:4"),
        ("a: " + "x" * 2**18, "larger than 256 kB"),
        ("a: \x00", "is not YAML"),
        ("a: \ud800", "r.yaml:4: is not UTF-8 text"),
        ("lr: 0.1", "r.yaml:4 lr: is no key of a recipe here; did you mean 'optimizer.lr'?"),
        ("hold_out: 0.1", "r.yaml:4 hold_out: is no key of a recipe here; did you mean 'data.hold_out'?"),
    ],
)
def test_yaml_that_is_not_what_it_seems_is_refused_with_its_line(changed: str, said: str) -> None:
    text = SOUND.replace("batch: 4\n", changed + "\n")
    with pytest.raises(fz.RecipeError) as caught:
        check(parse(text.encode("utf-8", "surrogatepass"), "r.yaml"))
    assert said in str(caught.value) and len(str(caught.value)) < 2_000 and caught.value.code == 2


def test_words_and_numbers_are_what_they_look_like() -> None:
    found = check(
        parse(SOUND.replace("hold_out: 0.2", "classes: [no, on, y, 1e-4, 012, 1:30]").encode() + b"optimizer: {lr: 1e-4}\n", "r.yaml")
    )
    assert found.data.classes == ("no", "on", "y", "0.0001", "12", "1:30") and found.optimizer.lr == 1e-4


@pytest.mark.parametrize("endless", ["schedule: {" + "x" * 30_000 + "}", "optimizer: {name: " + "x" * 30_000 + "}"])
def test_a_message_shows_the_beginning_of_what_is_endless(endless: str) -> None:
    with pytest.raises(fz.RecipeError) as caught:
        check(parse((SOUND + endless + "\n").encode(), "r.yaml"))
    said = str(caught.value)
    assert "r.yaml:5" in said and "x … x" in said and "(30,0" in said and len(said) < 2_000
