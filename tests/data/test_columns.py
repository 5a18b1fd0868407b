"""Columns: a table's cells become numbers by a schema that prediction finds by name."""

import pytest
import torch

from fromzero.data import Request, load, load_again
from fromzero.data.columns import fit_columns, inspect_column
from fromzero.data.sources import guess_target
from fromzero.data.table import read_table, table_of
from fromzero.errors import DataError

TABLE = table_of({"n": [1, None, 3, 8], "w": ["a", "b", None, "a"]})


def fitted(**policies):
    return fit_columns(TABLE, ("n", "w"), policies)


def test_numbers_are_scaled_words_are_one_hot_and_gaps_are_flagged():
    values = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    scaled = ((torch.tensor([1.0, 3.0, 3.0, 8.0], dtype=torch.float64) - values.mean()) / values.std(correction=0)).float()
    expected = torch.stack(
        [scaled, torch.tensor([0.0, 1, 0, 0]), torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 0])],
        dim=1,
    )
    assert torch.equal(fitted().apply(TABLE), expected)


@pytest.mark.parametrize(("policy", "fill", "said"), [("median", 3.0, "median 3"), ("mean", 4.0, "mean 4"), ("zero", 0.0, "empty → zero")])
def test_each_policy_for_numbers_puts_in_what_it_says_and_no_flag(policy, fill, said):
    schema = fitted(n=policy)
    assert schema.apply(TABLE)[1, 0] == pytest.approx((fill - 4) / (26 / 3) ** 0.5)
    assert schema.columns[0].width == 1 and said in str(schema.columns[0])


def test_a_column_of_numbers_may_be_taken_as_categories():
    schema = fitted(n="category")
    assert schema.columns[0].categories == ("1", "3", "8")
    assert schema.apply(TABLE)[:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize(("name", "line"), [("n", 2), ("w", 3)])
def test_gaps_that_may_not_be_are_named(policy, name, line):
    with pytest.raises(DataError) as caught:
        fitted(**{name: policy}).apply(TABLE)
    assert f":{line} {name}: is empty; data.missing says {policy} for this column" in str(caught.value)


@pytest.mark.parametrize("policy", ["median", "mean", "zero"])
def test_words_have_no_median(policy):
    with pytest.raises(DataError, match=f"w: has words, for which data.missing: {policy} has no meaning; use category, drop or error"):
        fitted(w=policy)


def test_an_unseen_category_is_none_of_the_known_ones():
    assert fitted().apply(table_of({"n": [1], "w": ["never seen"]}))[0, 2:].tolist() == [0, 0, 0]


def test_columns_are_found_by_name_whatever_their_order():
    turned = table_of({"extra": [9] * 4, "w": TABLE.columns["w"], "n": TABLE.columns["n"]})
    assert torch.equal(fitted().apply(turned), fitted().apply(TABLE))


def test_every_missing_column_is_named_with_the_nearest():
    with pytest.raises(DataError) as caught:
        fit_columns(table_of({"width": [1], "tint": ["a"]}), ("width", "tint"), {}).apply(table_of({"widht": [1]}))
    assert "has no column 'width', which the model was trained with; is 'widht' the same?" in str(caught.value)
    assert "has no column 'tint'" in str(caught.value) and len(caught.value.faults) == 2


def test_words_where_numbers_were_are_named_with_their_line():
    with pytest.raises(DataError, match=r":2 n: 'tall' is not a number; the column held numbers in training"):
        fitted().apply(table_of({"n": [1, "tall"], "w": ["a", "b"]}))


def test_a_schema_is_fitted_to_the_training_rows_alone():
    rows = {"x": [1.0, 2, 4, 8, 16, 32, 64, 999], "y": ["a", "b"] * 4}
    held = {"x": [1e6, 5.0], "y": ["a", "b"]}
    form = load(Request(rows, validation=held)).preparation.inputs
    assert form.columns[0].mean == pytest.approx(sum(rows["x"]) / 8)


def test_a_constant_column_asked_for_by_name_gives_zeros():
    table = table_of({"k": [5, 5]})
    assert fit_columns(table, ("k",), {}).apply(table).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2, 5, 2], "number"), (["1", "2.5", "x"], "category"), (["1e3", " 4 "], "number"), ([7, 7], "constant"), ([7, None], "number"),
        (list(range(10)), "id"), ([f"u{i}" for i in range(20)], "id"), (["NA", None, float("nan")], "empty"), ([10**400, 1], "category"),
    ],
)  # fmt: skip
def test_a_column_is_seen_for_what_it_is(cells, kind):
    assert inspect_column("c", cells).kind == kind


def test_the_answer_is_guessed_by_its_usual_name_or_stands_last():
    assert guess_target(["Species", "a", "b"]) == "Species" and guess_target(["a", "b"]) == "b"


def test_missing_or_doubly_used_columns_come_all_at_once():
    with pytest.raises(DataError) as caught:
        load(Request({"width": [1, 2], "y": [0, 1]}, target="y", columns=("widht", "y"), missing={"hight": "drop"}))
    text = str(caught.value)
    assert (
        "data.input: has no column 'widht'; did you mean 'width'?" in text
        and "data.missing: has no column 'hight'" in text
        and "'y' is both input and target" in text
    )


def test_penguins_are_read_with_a_policy_for_every_column(shared):
    loaded = load(Request(shared / "penguins.csv"))
    assert loaded.facts.classes == ("Adelie", "Chinstrap", "Gentoo")
    assert loaded.facts.train + loaded.facts.validation == 344
    assert list(loaded.facts.columns) == ["island", "bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g", "sex", "year"]
    assert "3 categories" in loaded.facts.columns["island"] and loaded.facts.columns["sex"].startswith(
        "2 categories; empty → a category of its own"
    )
    assert all(torch.isfinite(part.take(torch.arange(len(part)))[0][0]).all() for part in (loaded.train, loaded.validation))


def test_penguins_with_their_columns_in_another_order_give_the_same_numbers(shared, tmp_path):
    loaded = load(Request(shared / "penguins.csv", hold_out=0.0))
    table = read_table(shared / "penguins.csv")
    names = sorted(table.columns, reverse=True)
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([",".join(names), *(",".join(row) for row in zip(*(table.columns[n] for n in names), strict=True))]))
    again = load_again(turned, loaded.preparation, Request(turned))
    everything = torch.arange(344)
    ours, theirs = loaded.train.take(everything), again.take(everything)
    assert torch.equal(ours[0][0], theirs[0][0]) and torch.equal(ours[1], theirs[1])
