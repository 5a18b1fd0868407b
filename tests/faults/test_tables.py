"""Faults 23 to 27: tables that are damaged, empty, oddly encoded or wrongly labelled."""

import pytest

from fromzero.data import Request, load
from fromzero.data.table import read_table
from fromzero.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write(content, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(path, *said, read=read_table):
    with pytest.raises(DataError) as caught:
        read(path)
    for piece in said:
        assert piece in str(caught.value)
    assert caught.value.code == 2
    return caught.value


# 23: encodings


def test_a_byte_order_mark_is_eaten(write):
    assert list(read_table(write(b"\xef\xbb\xbfx,y\n1,2\n")).columns) == ["x", "y"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x,y\n1,你好世界\n".encode("gbk"), ("t.csv:2", "byte 6 is not UTF-8", "gb18030")),
        ("x,y\n1,na\u00efve caf\u00e9\n".encode("latin-1"), ("t.csv:2", "byte 8 is not UTF-8", "save it as UTF-8 (it looks like latin-1)")),
        ("x,y\n1,2\n".encode("utf-16"), ("t.csv:1", "UTF-16", "save it as UTF-8")),
        (b"x,y\n1,\xed\xa0\x80\n", ("t.csv:2", "byte 6 is not UTF-8")),
        (b"x,y\n1,2\n3,\x00\n", ("t.csv:3", "NUL", "is it a text file?")),
    ],
)
def test_another_encoding_is_named_with_line_and_byte(write, data, said):
    refused(write(data), *said)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\u202e"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_inside_text_neither_cut_a_row_nor_are_changed(write, mark, end):
    rows = ["text,label", f"one{mark}two,a", f'"three{mark}four",b']
    table = read_table(write(end.join(rows) + end))
    assert table.columns == {"text": [f"one{mark}two", f"three{mark}four"], "label": ["a", "b"]}
    assert list(table.lines) == [2, 3]


def test_half_a_surrogate_pair_in_json_is_refused_with_its_line(write):
    refused(
        write('{"x": "ok \\ud83d\\ude00", "y": 1}\n{"x": "\\ud800", "y": 1}\n', "t.jsonl"),
        "t.jsonl:2",
        "half of a surrogate pair",
        "write the character itself",
    )
    assert read_table(write('{"x": "\\ud83d\\ude00"}\n', "t.jsonl")).columns == {"x": ["😀"]}


# 21 touches the same reader


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"x": 1', "column 8 is not JSON"),
        ("null", "is null, not an object"),
        ("[1]", "is list, not an object"),
        ('{"x": 1, "x": 2}', "names 'x' twice"),
        ('{"x": ' + "9" * 5000 + "}", 'column 7 holds a number of thousands of digits near \'{"x": 999'),
        ('{"x": ' + "[" * 100_000 + "}", "column 70 is nested more than 64 deep near '[[["),
        ('{"z": "' + "]" * 90_000 + '", "x": ' + "[" * 80_000 + "}", "column 90079 is nested more than 64 deep"),
    ],
)
def test_a_bad_json_line_is_named_and_all_come_at_once(write, line, said):
    error = refused(write(f'{{"x": 0}}\n{line}\n{{"x": 1}}\n{line}\n', "t.jsonl"), f"t.jsonl:2: {said}", f"t.jsonl:4: {said}")
    assert len(error.faults) == 2


def test_brackets_inside_text_are_no_nesting(write):
    text = "[" * 500
    assert read_table(write(f'{{"x": "{text}\\"[["}}\n', "t.jsonl")).columns["x"] == [text + '"[[']


# 24: separated values


def test_a_ragged_row_is_named_by_its_physical_line(write):
    error = refused(
        write('x,y\n"a\nb",1\n1,2,3\n4\n'),
        "t.csv:4: row 2 has 3 cells, the header has 2",
        "t.csv:5: row 3 has 1 cells",
        "needs quotes around the cell",
    )
    assert [fault.line for fault in error.faults] == [4, 5]


def test_many_faults_are_counted_not_listed(write):
    assert str(refused(write("x,y\n" + "1\n" * 50))).endswith("and 30 more faults")


def test_newlines_and_long_cells_inside_quotes_are_kept(write):
    long = "w" * 300_000
    table = read_table(write(f'text,y\r\n"one\r\ntwo",a\r\n"{long}",b\r\n'))
    assert table.columns["text"] == ["one\r\ntwo", long]
    assert list(table.lines) == [2, 4]


@pytest.mark.parametrize("cell", ['"good" film', '"good', '"a" and "b'])
def test_a_quote_that_does_not_fit_names_the_row_where_it_begins(write, cell):
    refused(write(f'text,y\nfine,1\n{cell},0\nlast,1\n"end"x,1\n'), "t.csv:3", "a quote that does not fit", "written twice")


def test_a_tsv_with_quotes_that_begin_texts_loses_no_row_and_no_quote(write):
    texts = [f'"{i} good' if i % 3 == 0 else (f'{i} "fine" film"' if i % 3 == 1 else f'"{i}" said he') for i in range(81)]
    assert sum(text.startswith('"') for text in texts) == 54
    table = read_table(write("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(texts)), "t.tsv"))
    assert table.columns["text"] == texts
    assert list(table.lines) == list(range(2, 83))


def test_a_tsv_that_quotes_properly_is_read_with_its_quotes_undone(write):
    table = read_table(write('text\tlabel\n"a\tb"\t0\n"say ""no"""\t1\n', "t.tsv"))
    assert table.columns["text"] == ["a\tb", 'say "no"']


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,y,x\n1,2,3\n", ("t.csv:1", "names a column twice: 'x'", "rename one")),
        (",row\n1,2\n", ("names a column twice: 'row'",)),
        ("x,,y\n1,2,3\n", ("t.csv:1", "column 2 has no name", "name it")),
        ("x;y\n1;2\n", ("t.csv:1", "has one column", "1 semicolons", "separated by commas")),
    ],
)
def test_a_wrong_header_is_refused(write, content, said):
    refused(write(content), *said)


def test_a_nameless_index_column_is_called_row(write):
    assert list(read_table(write(",x\n0,5\n1,6\n")).columns) == ["row", "x"]


# 25: empty


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet"])
def test_a_file_of_no_bytes_is_refused(write, name):
    refused(write(b"", name), name, "empty (0 bytes)", "complete?")


@pytest.mark.parametrize(("content", "name"), [("x,y\n", "t.csv"), ("\n\n", "t.csv"), ("[]", "t.json"), ("\n", "t.jsonl")])
def test_a_file_without_rows_is_refused(write, content, name):
    refused(write(content, name), name, "has no rows")


def test_no_row_with_an_answer_gives_the_counts(write):
    refused(write("x,y\n1,\n2,NA\n"), "no row has an answer", "2 rows", read=lambda p: load(Request(p)))


def test_a_class_that_no_row_has_names_those_there_are(write):
    path = write("x,y\n1,cat\n2,dog\n3,cat\n4,dog\n9,newt\n")
    for classes in (("cat", "dogg"), ("dogg",)):
        refused(
            path,
            "names 'dogg', which no example has",
            "the classes are cat, dog, newt",
            "did you mean 'dog'?",
            read=lambda p, c=classes: load(Request(p, classes=c)),
        )


def test_dropping_every_row_gives_the_counts(write):
    request = {"missing": {"x": "drop"}, "columns": ("x", "z")}
    refused(
        write("x,z,y\n,1,a\n?,2,b\ninf,3,a\n"), "no row is left", "3 rows", "empty cell in x", read=lambda p: load(Request(p, **request))
    )


def test_a_validation_file_without_answers_is_refused(write):
    train, held = write("x,y\n1,a\n2,b\n3,a\n5,b\n"), write("x,y\n1,\n", "v.csv")
    refused(train, "v.csv", "no row has an answer", "1 rows", read=lambda p: load(Request(p, validation=held)))


# 26: labels


def test_a_label_seen_only_in_validation_is_named_by_file_and_line(write):
    train, held = write("x,y\n1,cat\n2,dog\n4,cat\n3,dog\n"), write("x,y\n1,cat\n2,dgo\n", "v.csv")
    refused(
        train,
        "v.csv:3: label 'dgo' is none of the 2 classes",
        "they are cat, dog",
        "did you mean 'dog'?",
        read=lambda p: load(Request(p, validation=held)),
    )


def test_labels_with_fractions_are_no_classes_unless_named(write):
    path = write("x,y\n1,0.5\n2,1.0\n3,0.5\n4,1.0\n9,1.0\n")
    refused(path, "t.csv:2: label 0.5 is no class", "2 of 5 labels", "task: regress", read=lambda p: load(Request(p)))
    assert load(Request(path, classes=("0.5", "1.0"))).facts.classes == ("0.5", "1.0")


@pytest.mark.parametrize(
    ("answer", "said"), [("high", "'high' is not a number"), ("inf", "not a finite number"), ("9" * 400, "not a finite number")]
)
def test_an_answer_that_is_no_finite_number_is_named(write, answer, said):
    refused(write(f"x,y\n1,0.5\n2,{answer}\n3,1\n"), "t.csv:3", said, read=lambda p: load(Request(p, answers="number", hold_out=0.0)))


def test_a_json_number_too_large_for_floats_is_refused_not_a_traceback(write):
    refused(
        write('{"x": 1, "y": 1}\n{"x": 2, "y": ' + "9" * 400 + "}\n", "t.jsonl"),
        "t.jsonl:2",
        "not a number",
        read=lambda p: load(Request(p, answers="number", hold_out=0.0)),
    )


def test_one_row_with_label_99_is_seen_in_the_counts(write):
    facts = load(Request(write("x,y\n" + "".join(f"{i * i},{i % 3}\n" for i in range(30)) + "5,99\n"))).facts
    assert facts.train_counts["99"] == 1
    assert facts.classes == ("0", "1", "2", "99")


# 27: tabular values


def test_the_usual_words_for_nothing_are_gaps(write):
    loaded = load(Request(write("x,y\n1,a\nNA,b\n?,a\n ,b\n<NA>,a\n3,b\n"), hold_out=0.0))
    inputs = loaded.train.take(loaded.train.targets.new_tensor(range(6)))[0][0]
    assert inputs[:, 1].tolist() == [0, 1, 1, 1, 1, 0]  # the flag
    assert inputs[:, 0].tolist() == [-1, 0, 0, 0, 0, 1]  # the median, 2


def test_infinite_cells_are_gaps_and_dropped_where_asked(write):
    path = write("x,z,y\n1,3,a\ninf,4,b\n2,5,a\n-inf,7,b\n5,8,b\n")
    assert load(Request(path, hold_out=0.0, missing={"x": "drop"})).facts.train == 3
    refused(
        path,
        "t.csv:3 x: is inf, not a finite number",
        "t.csv:5",
        "data.missing says error",
        read=lambda p: load(Request(p, hold_out=0.0, missing={"x": "error"})),
    )


def test_constant_and_empty_columns_are_set_aside_with_a_reason(write):
    loaded = load(Request(write("k,e,x,y\n7,,1,a\n7,,3,b\n7,,2,a\n7,,9,b\n")))
    assert loaded.facts.set_aside == {"k": "has one value in every row", "e": "is empty in every row"}
    assert list(loaded.facts.columns) == ["x"]


def test_values_beyond_all_scaling_are_refused(write):
    refused(
        write("x,y\n1e308,a\n-1e308,b\n1,a\n"), "x: holds values up to 1e+308", "too large", read=lambda p: load(Request(p, hold_out=0.0))
    )
    train, held = write("x,y\n1,a\n2,b\n3,a\n"), write("x,y\n1,a\n1e300,a\n", "v.csv")
    refused(train, "v.csv:3 x: 1e300 is out of all range", read=lambda p: load(Request(p, validation=held)))
