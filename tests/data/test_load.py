"""Loading: every kind of source, filters, splits and what was seen on the way."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fromzero.data import Classes, ImageFormat, Numbers, Request, Soft, load, load_again
from fromzero.errors import DataError, SourceError

X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 3


def everything(examples):
    (inputs,), targets = examples.take(torch.arange(len(examples)))
    return inputs, targets


def refused(request, *said, kind=DataError):
    with pytest.raises(kind) as caught:
        load(request)
    for piece in said:
        assert piece in str(caught.value)


# ------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X, Y),
        lambda: [X.tolist(), Y.tolist()],
        lambda: (torch.tensor(X), torch.tensor(Y)),
        lambda: (X.astype(">f8"), Y.astype(">i2")),
    ],
)
def test_arrays_lists_and_tensors_are_the_same_data(make):
    loaded = load(Request(make(), hold_out=0.0))
    inputs, targets = everything(loaded.train)
    assert torch.equal(inputs, torch.tensor(X)) and torch.equal(targets, torch.tensor(Y))
    assert loaded.facts.classes == ("0", "1", "2") and loaded.facts.input_shape == (4,) and loaded.facts.given_indices


def test_reversed_and_read_only_arrays_are_taken():
    frozen = X.copy()
    frozen.flags.writeable = False
    assert torch.equal(everything(load(Request((frozen[::-1], Y[::-1]), hold_out=0.0)).train)[0], torch.tensor(X[::-1].copy()))


def test_one_number_an_example_and_yes_or_no_labels_are_understood():
    loaded = load(Request((X[:, 0], X[:, 0] > 0), hold_out=0.0))
    assert loaded.facts.input_shape == (1,) and loaded.facts.classes == ("0", "1")
    assert torch.equal(everything(loaded.train)[1], torch.tensor(X[:, 0] > 0).long())


def test_uint8_images_get_a_channel_and_lie_between_0_and_1():
    pixels = np.arange(60 * 25, dtype=np.uint8).reshape(60, 5, 5)
    loaded = load(Request((pixels, Y), hold_out=0.0))
    assert torch.equal(everything(loaded.train)[0], torch.tensor(pixels)[:, None].float() / 255)
    last = np.zeros((60, 5, 6, 3), dtype=np.uint8)
    assert load(Request((last, Y))).facts.input_shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (X, Y[:-1], "inputs (60, 4) and targets (59,) do not fit together"), (X[:0], Y[:0], "holds 0 examples"), (X, [["a"]] * 60, "targets are no array of numbers"),
        ([[1], [1, 2]], [0, 1], "inputs are no array of numbers"), (X * 1j, Y, "complex"), (X, np.zeros((60, 2, 2)), "do not fit together"), (X, None, "targets are no array of numbers"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(x, y, said):
    refused(Request((x, y)), said)


class Frame:
    """What pandas and polars have in common."""

    def __init__(self, columns):
        self._columns, self.columns = columns, list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def to_dict(self):
        return self._columns


def test_a_dict_and_a_data_frame_are_tables():
    import polars

    columns = {"a": np.array([1.5, 2.0, 4.0, np.nan]), "b": ["u", "v", None, "u"], "label": ["no", "yes", "yes", "no"]}
    results = [
        everything(load(Request(source, hold_out=0.0)).train)
        for source in (columns, Frame(columns), polars.DataFrame(columns, strict=False))
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert results[0][0].shape == (4, 5)


@pytest.mark.parametrize("columns", [{"x": X, "y": Y}, {"x": "abc", "y": [1, 2, 3]}, {"x": 5, "y": [1]}])
def test_a_dict_of_anything_but_columns_is_refused(columns):
    refused(Request(columns), "x: is", "not one cell a row", "give arrays as (inputs, targets)")


def test_columns_of_different_lengths_are_refused():
    refused(Request({"x": [1, 2], "y": [1]}), "different lengths", "'x': 2, 'y': 1")


def test_a_dataset_is_fetched_item_by_item():
    loaded = load(Request(TensorDataset(torch.tensor(X), torch.tensor(Y)), hold_out=0.0, classes=None))
    assert all(torch.equal(a, b) for a, b in zip(everything(loaded.train), (torch.tensor(X), torch.tensor(Y)), strict=True))


def test_two_datasets_are_not_said_to_share_examples():
    data = TensorDataset(torch.tensor(X), torch.tensor(Y))
    other = TensorDataset(torch.tensor(X + 1), torch.tensor(Y))
    facts = load(Request(data, validation=other)).facts
    assert (facts.train, facts.validation, facts.shared, facts.repeats) == (60, 60, 0, 0)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([(np.ones(2), "cat")] * 3, "example 0 has str for an answer, not numbers"), ([(object(), 1)] * 3, "example 0 has object for an input"),
        ([(np.ones(2), 0), (np.ones(2), 0), (np.ones(3), 0)], "example 2 has shape (3,), example 0 (2,)"), ([{"x": 1}] * 3, "example 0 is dict, not (input, answer)"),
        ([], "holds 0 examples"), ([(np.ones(2), [1.0]), (np.ones(2), [1.0, 2.0]), (np.ones(2), [1.0])], "example 1 has an answer of another shape"),
    ],
)  # fmt: skip
def test_a_dataset_of_the_wrong_items_is_refused(items, said):
    refused(Request(items), said)


def test_a_loader_and_other_things_are_refused():
    refused(
        Request(DataLoader(TensorDataset(torch.ones(2, 2), torch.ones(2)))), "a DataLoader was given", "give its dataset: loader.dataset"
    )
    refused(Request(5), "int is no data", "give (inputs, targets)")
    refused(Request(iter([1])), "is no data")


# ------------------------------------------------------------------------------------------ labels


def test_labels_from_one_stay_indices():
    loaded = load(Request((X, Y + 1), hold_out=0.0))
    assert loaded.facts.classes == ("0", "1", "2", "3") and loaded.facts.train_counts == {"0": 0, "1": 20, "2": 20, "3": 20}
    assert torch.equal(everything(loaded.train)[1], torch.tensor(Y + 1))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (-1, ("example 7", "label -1 is below 0", "number the classes from 0")),
        (200_000, ("largest label is 200000", "task: regress")),
        (1.5, ("example 7", "label 1.5 is no class", "1 of 60")),
    ],
)
def test_labels_that_are_no_index_are_named(bad, said):
    y = Y.astype(np.float64)
    y[7] = bad
    refused(Request((X, y)), *said)


def test_a_label_that_only_validation_has_is_named():
    refused(
        Request((X, Y), validation=(X, np.where(Y == 2, 9, Y)), keep_shared=True),
        "example 2: label '9' is none of the 3 classes in training",
    )


def test_an_answer_that_is_nan_is_left_out_and_noted():
    y = Y.astype(np.float64)
    y[3] = np.nan
    facts = load(Request((X, y), hold_out=0.0)).facts
    assert facts.train == 59 and facts.notes == ("1 rows without an answer are left out",)


def test_rows_of_probabilities_are_soft_answers_and_are_checked():
    soft = np.full((60, 3), 1 / 3, dtype=np.float32)
    loaded = load(Request((X, soft), hold_out=0.0, classes=("a", "b", "c")))
    assert loaded.preparation.answers == Soft(("a", "b", "c")) and torch.equal(everything(loaded.train)[1], torch.tensor(soft))
    refused(Request((X, soft), classes=("a", "b")), "names 2 classes, each answer has 3 numbers")
    for bad, said in ((1.5, "answers are outside 0..1"), (np.nan, "not a finite number")):
        soft[4, 1] = bad
        refused(Request((X, soft), hold_out=0.0), "example 4", said)


def test_two_classes_for_bce_are_a_column_of_floats_and_three_are_refused():
    loaded = load(Request((X, Y % 2), hold_out=0.0, answers="binary"))
    assert loaded.preparation.answers == Classes(("0", "1"), binary=True) and torch.equal(
        everything(loaded.train)[1], torch.tensor(Y % 2)[:, None].float()
    )
    refused(Request((X, Y), answers="binary"), "bce needs 2 classes, the data has 3")


def test_numbers_are_scaled_by_the_training_rows_and_restored():
    y = X[:, 0].astype(np.float64) * 50 + 1000
    loaded = load(Request((X, y), answers="number", scale_target=True))
    targets = everything(loaded.train)[1]
    assert isinstance(loaded.preparation.answers, Numbers)
    torch.testing.assert_close(targets.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    restored = loaded.preparation.answers.restored(targets)
    assert all(
        float(v) == pytest.approx(float(w), abs=1e-3)
        for v, w in zip(
            sorted(restored[:, 0].tolist()), sorted(y[i] for i in range(60) if abs(restored[:, 0] - y[i]).min() < 1e-3), strict=True
        )
    )
    y[5] = np.inf
    refused(Request((X, y), answers="number", hold_out=0.0), "example 5", "not a finite number")


# --------------------------------------------------------------------------- filters, limits, splits


def test_classes_are_filtered_and_ordered_as_asked(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "".join(f"{i * i},{['cat', 'dog', 'newt'][i % 3]}\n" for i in range(30)))
    loaded = load(Request(path, classes=("newt", "cat"), hold_out=0.0))
    assert loaded.facts.classes == ("newt", "cat") and loaded.facts.train_counts == {"newt": 10, "cat": 10}
    assert everything(loaded.train)[1][:2].tolist() == [1, 0] and "data.classes keeps 20 of 30 rows" in loaded.facts.notes
    assert load(Request(path)).facts.classes == ("cat", "dog", "newt")


def test_words_stand_in_their_order_and_numbers_in_theirs():
    assert load(Request({"x": [1, 5, 3, 2], "y": ["10", "9", "b", "a"]})).facts.classes == ("9", "10", "a", "b")


def test_a_limit_is_fixed_by_the_seed_and_spares_validation():
    facts = [load(Request((X, Y), per_class=5, seed=seed)).facts for seed in (0, 0, 1)]
    assert facts[0].train_counts == {"0": 5, "1": 5, "2": 5} and facts[0].validation == 6
    assert facts[0].digest == facts[1].digest != facts[2].digest
    assert load(Request((X, Y), limit=7)).facts.train == 7


def test_the_digest_knows_content_and_order():
    base = load(Request((X, Y))).facts.digest
    swapped, changed = np.arange(60), X.copy()
    swapped[[10, 11]] = [11, 10]
    changed[5, 2] += 1e-4
    assert base == load(Request((X.copy(), Y.copy()))).facts.digest
    assert base not in {
        load(Request((X[swapped], Y[swapped]))).facts.digest,
        load(Request((changed, Y))).facts.digest,
        load(Request((X, Y), validation=(X, Y), keep_shared=True)).facts.digest,
    }


def test_repeats_and_contradictions_are_counted_and_stay_on_one_side():
    x, y = np.concatenate([X, X[:10]]), np.concatenate([Y, (Y[:10] + 1) % 3])
    facts = load(Request((x, y), hold_out=0.3)).facts
    assert (facts.repeats, facts.conflicting, facts.shared) == (10, 10, 0)


def test_a_validation_set_of_its_own_is_read_whole_and_every_shared_row_is_counted():
    held = (np.concatenate([X[:7], X[:7], X[7:9] + 9]), np.concatenate([Y[:7], Y[:7], Y[7:9]]))
    for keep, left in ((True, 16), (False, 2)):
        facts = load(Request((X, Y), validation=held, keep_shared=keep)).facts
        assert (facts.train, facts.validation, facts.shared) == (60, left, 14)


def test_a_validation_file_is_read_with_the_columns_of_training(tmp_path):
    train, held = tmp_path / "train.csv", tmp_path / "held.jsonl"
    train.write_text("x,z,y\n" + "".join(f"{i * i},{i % 5},{'ab'[i % 2]}\n" for i in range(20)))
    held.write_text(json.dumps({"y": "b", "z": "1", "x": "1"}) + "\n")  # alone, every column looks constant
    loaded = load(Request(train, validation=held, keep_shared=True))
    assert (loaded.facts.validation, loaded.facts.shared) == (1, 1)
    assert torch.equal(everything(loaded.validation)[0][0], everything(loaded.train)[0][1])


# --------------------------------------------------------------------------------------------- files


def files(folder):
    import polars
    from safetensors.torch import save_file

    tensors = {"x": torch.tensor(X), "y": torch.tensor(Y)}
    np.savez(folder / "d.npz", x=X, y=Y)
    torch.save(tensors, folder / "d.pt")
    save_file(tensors, folder / "d.safetensors")
    columns = {f"c{i}": X[:, i].tolist() for i in range(4)} | {"y": Y.tolist()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "d.json").write_text(json.dumps(rows))
    (folder / "columns.json").write_text(json.dumps(columns))
    polars.DataFrame(columns).write_parquet(folder / "d.parquet")
    for name, separator in (("d.csv", ","), ("d.tsv", "\t")):
        (folder / name).write_text("\n".join(separator.join(map(str, row)) for row in [list(columns), *(r.values() for r in rows)]))


def test_a_table_or_an_array_is_the_same_in_every_kind_of_file(tmp_path):
    files(tmp_path)
    arrays = [everything(load(Request(tmp_path / f"d.{kind}", hold_out=0.0)).train) for kind in ("npz", "pt", "safetensors")]
    tables = [
        everything(load(Request(tmp_path / name, hold_out=0.0)).train)
        for name in ("d.csv", "d.tsv", "d.jsonl", "d.json", "columns.json", "d.parquet")
    ]
    for group in (arrays, tables):
        assert all(torch.equal(a, b) for other in group[1:] for a, b in zip(group[0], other, strict=True))
    assert torch.equal(arrays[0][0], torch.tensor(X)) and torch.equal(tables[0][1], torch.tensor(Y))


def test_an_array_that_is_not_there_brings_the_nearest(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=X, answer=Y)
    refused(Request(tmp_path / "d.npz"), "d.npz data.target: does not say which array", "it has inputs, answer")
    refused(Request(tmp_path / "d.npz", target="answers"), "has no array 'answers'", "did you mean 'answer'?")
    assert load(Request(tmp_path / "d.npz", target="answer")).facts.train == 54


def test_a_tsv_of_texts_that_begin_with_quotes_keeps_every_row(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text(
        "text\tlabel\tscore\n" + "".join(f'"{"good" if i % 2 else "bad"} film\t{i % 2}\t{i * i}\n' for i in range(54)) + "fine\t1\t3\n"
    )
    facts = load(Request(path, columns=("text", "score"), hold_out=0.0)).facts
    assert facts.train == 55 and facts.train_counts == {"0": 27, "1": 28}


def test_a_source_that_is_not_there_brings_the_nearest(tmp_path):
    (tmp_path / "train.csv").write_text("x,y\n1,2\n")
    refused(Request("trian.csv", folders=(tmp_path,)), "'trian.csv' is no file, folder or named set", "did you mean 'train.csv'?")
    refused(Request("mnist-5", folders=(tmp_path,)), "did you mean 'mnist-5k'?")
    refused(Request("hf:owner/name", folders=(tmp_path,)), "cannot come from yet", kind=SourceError)
    (tmp_path / "a.docx").write_text("x")
    refused(Request(tmp_path / "a.docx"), "is of a kind that cannot be read ('.docx')", "one of .csv, .tsv")


# -------------------------------------------------------------------------------------- reading again


def test_other_data_is_prepared_as_in_training(tmp_path):
    train = {"x": [1, 2, 4, None, 9, 3], "w": ["a", "b", "a", "b", "a", "b"], "y": ["u", "v", "u", "v", "u", "v"]}
    loaded = load(Request(train, hold_out=0.0, missing={"x": "drop"}))
    again = load_again({"w": ["b", "c", "a"], "y": ["v", "u", "u"], "x": [2, 4, None]}, loaded.preparation, Request(train))
    assert len(again) == 2 and again.targets.tolist() == [1, 0]  # the row that training would drop is dropped
    with pytest.raises(DataError, match="label 'q' is none of the 2 classes"):
        load_again({"w": ["b"], "y": ["q"], "x": [2]}, loaded.preparation, Request(train))


def test_data_of_another_kind_or_shape_than_in_training_is_refused(tmp_path):
    table = load(Request({"x": [1, 5, 3, 2], "y": ["a", "b"] * 2}, hold_out=0.0)).preparation
    arrays = load(Request((X, Y))).preparation
    for preparation, data, said in (
        (table, (X, Y), "holds arrays, the model was trained on a table"),
        (arrays, {"x": [1, 5], "y": [0, 1]}, "holds a table, the model was trained on arrays"),
        (arrays, (X[:, :3], Y), "shape (3,), the model was trained with (4,)"),
    ):
        with pytest.raises(DataError) as caught:
            load_again(data, preparation, Request(data, target="y" if isinstance(data, dict) else None))
        assert said in str(caught.value)


def test_images_of_a_folder_keep_their_class_and_pixels(tmp_path):
    from PIL import Image

    for shade, name in enumerate(("a", "b")):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (3, 2), shade * 100 + i).save(tmp_path / "d" / name / f"{i}.png")
    loaded = load(Request(tmp_path / "d", hold_out=0.25))
    assert loaded.preparation.inputs == ImageFormat(2, 3, 1) and (loaded.facts.train, loaded.facts.validation) == (6, 2)
    inputs, targets = everything(loaded.train)
    assert torch.equal((inputs[:, 0, 0, 0] * 255).round() // 100, targets.float())
    assert torch.equal(everything(load_again(tmp_path / "d", loaded.preparation, Request(None)))[1], torch.tensor([0] * 4 + [1] * 4))
