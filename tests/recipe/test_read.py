"""Recipes: what is written is what is meant, or it is refused with file and line, everything at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fromzero as fz
from fromzero.recipe.read import from_values, known_keys, parse, read, write

WHOLE = """\
task: classify
model: mlp
data: {train: a.csv, hold_out: 0.2}
optimizer: {name: sgd, lr: 1e-2, momentum: 0.9}
batch: 32
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(fz.RecipeError) as caught:
        read(written(tmp_path, text), overrides)
    assert caught.value.code == 2
    return [str(fault).replace(str(tmp_path) + "/", "") for fault in caught.value.faults]


def test_every_fault_of_a_recipe_comes_at_once_with_its_line(tmp_path: Path) -> None:
    text = "task: clasify\nmodel: mlp\nmodl: mlp\ndata:\n  train: a.csv\n  hold_ot: 0.1\noptimizer: {name: sdg}\nepochs: -1\nbatch: al\n"
    found = faults(tmp_path, text)
    assert len(found) == 6
    assert (
        "recipe.yaml:1 task: 'clasify' is not 'classify', 'regress', 'language' or 'chat'" in found[0]
        and "did you mean 'classify'?" in found[0]
    )
    assert any(f.startswith("recipe.yaml:3 modl: is no key") and "did you mean 'model'?" in f for f in found)
    assert any(f.startswith("recipe.yaml:6 data.hold_ot:") and "did you mean 'data.hold_out'?" in f for f in found)
    assert any(f.startswith("recipe.yaml:7 optimizer: 'sdg' is none of") and "did you mean 'sgd'?" in f for f in found)
    assert any(f.startswith("recipe.yaml:8 epochs: -1 is not above 0") for f in found)
    assert any(f.startswith("recipe.yaml:9 batch: 'al' does not fit") for f in found)


def test_a_key_in_the_wrong_section_is_sent_to_its_own(tmp_path: Path) -> None:
    assert "did you mean 'optimizer.lr'?" in faults(tmp_path, WHOLE + "lr: 0.1\n")[0]


def test_missing_keys_are_named_with_their_meaning(tmp_path: Path) -> None:
    found = faults(tmp_path, "model: mlp\n")
    assert [f.split(":")[0] + ":" + f.split(":")[1] for f in found] == [
        "recipe.yaml task: is missing; it says",
        "recipe.yaml data: is missing; it says",
    ]


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    assert faults(tmp_path, WHOLE + "batch: 64\n") == ["recipe.yaml:6 batch: stands twice (first in line 5); keep one of them"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("'3'", "3"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_scalars_follow_the_core_rules_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"x: {text}".encode(), "f").values["x"]
    assert found == value and type(found) is type(value)


def test_a_word_where_a_switch_belongs_is_refused(tmp_path: Path) -> None:
    assert "data.augment.flip: 'yes' does not fit" in faults(tmp_path, WHOLE.replace("hold_out: 0.2", "augment: {flip: yes}"))[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: !!python/object/apply:os.system [ls]\n", "has the tag"),
        (
            "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e]\n",
            "grows too large",
        ),
        ("[" * 50 + "]" * 50, "nested more than 20 deep"),
        ("x: {a: 1", "is not YAML"),
        ("", "is empty"),
        ("- a\n- b\n", "is no recipe"),
        ("x: " + "y" * 300_000, "larger than 256 kB"),
        ("clip:\n", "has no value"),
    ],
)
def test_hostile_or_broken_yaml_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(fz.RecipeError, match=said):
        read(written(tmp_path, text))


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"task: classify\nmodel: \xff\n")
    with pytest.raises(fz.RecipeError, match=r"r.yaml:2: is not UTF-8"):
        read(path)


def test_a_wrong_path_names_the_recipe_beside_it(tmp_path: Path) -> None:
    written(tmp_path, WHOLE)
    with pytest.raises(fz.RecipeError, match=r"no such recipe; did you mean .*recipe.yaml"):
        read(tmp_path / "recip.yaml")


def test_overrides_reach_into_short_forms_and_are_checked_too(tmp_path: Path) -> None:
    text = "task: classify\nmodel: mlp\ndata: a.csv\noptimizer: sgd\n"
    recipe = read(written(tmp_path, text), ["optimizer.lr=1e-4", "data.limit.per_class=5", "model.hidden=[8]", "data.classes=[1, 2]"])
    assert recipe.optimizer.name == "sgd" and recipe.optimizer.lr == 1e-4
    assert recipe.data.limit is not None and recipe.data.limit.per_class == 5 and recipe.data.train == "a.csv"
    assert recipe.model.options == {"hidden": (8,)} and recipe.data.classes == ("1", "2")
    assert faults(tmp_path, text, "optimizer.lr=no") == [
        "command line optimizer.lr: 'no' does not fit; it says: learning rate: size of a step"
    ]
    assert "is not an override" in faults(tmp_path, text, "batch")[0]


def test_keys_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert "epochs and steps are both given" in faults(tmp_path, WHOLE + "epochs: 2\nsteps: 3\n")[0]
    assert "loss mse measures numbers" in faults(tmp_path, WHOLE + "loss: mse\n")[0]
    assert "nesterov needs a momentum" in faults(tmp_path, WHOLE.replace("momentum: 0.9", "nesterov: true"))[0]


def test_a_recipe_is_written_so_that_it_reads_back_the_same(repository: Path, tmp_path: Path) -> None:
    for path in sorted((repository / "recipes").glob("*.yaml")):
        recipe = read(
            path,
            [
                "clip=1",
                "data.classes=['1', no, 2.0]",
                "optimizer.lr_scale={conv*: 0.1}",
                "loss={name: cross_entropy, label_smoothing: 0.1}",
            ],
        )
        assert read(written(tmp_path, write(recipe))) == recipe


def test_objects_from_python_are_held_and_only_named_when_written() -> None:
    recipe = from_values({"task": "classify", "model": object(), "data": {"train": ([object()], [1])}})
    assert "<given from Python: object>" in write(recipe)
    with pytest.raises(fz.RecipeError, match="was given from Python in the run"):
        from_values({"task": "classify", "model": "<given from Python: Net>", "data": "x.csv"})


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_make_the_reader_fail_otherwise_than_with_a_recipe_error(data: bytes) -> None:
    try:
        parse(data, "f")
    except fz.RecipeError as error:
        assert error.faults


def test_every_key_has_a_meaning() -> None:
    assert all(meaning for path, meaning in known_keys().items() if path[-1] != "name" or len(path) == 1)


def test_none_is_taken_wherever_a_number_may_be_left_out(tmp_path: Path) -> None:
    text = "task: classify\nmodel: mlp\ndata: {train: a.csv, max_tokens: none, limit: none}\nclip: none\nepochs: none\nsteps: none\n"
    (tmp_path / "recipe.yaml").write_text(text + "evaluate: {stop_after: none}\nlimits: {seconds: none}\n")
    found = read(tmp_path / "recipe.yaml")
    assert (found.clip, found.steps, found.limits.seconds, found.evaluate.stop_after, found.data.max_tokens) == (None,) * 5
