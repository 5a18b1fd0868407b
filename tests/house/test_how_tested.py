"""The page on faults: forty rows, and every test that it names exists."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-tested.md").read_text(encoding="utf-8")
ROWS = {
    int(cells[0]): cells[1:]
    for line in PAGE.splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split(" | ")])[0].isdigit()
}


def test_the_page_has_a_row_for_each_of_forty_faults():
    assert list(ROWS) == list(range(1, 41))
    assert all(len(cells) == 4 and all(cells) for cells in ROWS.values())


@pytest.mark.parametrize("row", [row for row in range(1, 41) if row not in (18, 19)])
def test_every_fault_that_can_happen_here_names_tests_and_a_mutation(row):
    _, happens, tests, mutation = ROWS[row]
    assert "see below" not in happens + tests + mutation and "::test_" in tests and "→" in mutation


def test_every_test_that_the_page_names_exists(repository):
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)", PAGE)
    assert len(named) >= 50
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (repository / file).read_text(encoding="utf-8")]
    assert not missing
    assert all((repository / file).is_file() for file in re.findall(r"`(tests/[\w/.]+\.py)`", PAGE))
