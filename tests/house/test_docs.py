"""The pages: what is generated is fresh, and what the README shows works when it is typed."""

import importlib.util
import random
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import typer

import fromzero as fz
from fromzero.cli import app
from fromzero.recipe import read as reading

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "README.zh.md").read_text(encoding="utf-8")
PAGES = ["README.md", "README.zh.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [
    f"docs/{name}.md"
    for name in (
        "LOG",
        "checkpoints",
        "commands",
        "errors",
        "export",
        "generating",
        "how-tested",
        "models",
        "names",
        "planner",
        "predictions",
        "recipe",
        "resume",
        "serve",
    )
]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Every line of every sh block as words, its comment left out."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


OURS = [words[1:] for words in commands(README) if words[0] == "fromzero"]
FETCHED = ("recipes/", "chats.", "run:chats", "run:shakespeare", "run:smollm2", "run:digits")  # of files and runs that a page does not have
FOR_REAL = [words for words in OURS if not any(word.startswith(FETCHED) for word in words)]


def generator():
    spec = importlib.util.spec_from_file_location("fromzero_docs_generate", REPOSITORY / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_answers(table: str) -> str:
    """The first ten rows, `species` left out."""
    lines = table.splitlines()[:11]
    return "".join(",".join(line.split(",")[1:]) + "\n" for line in lines)


def random_penguins() -> str:
    draw = random.Random(0)
    header = "species,island,bill_length_mm,bill_depth_mm,flipper_length_mm,body_mass_g,sex,year"
    rows = [
        f"{species},{draw.choice(['Biscoe', 'Dream'])},{draw.uniform(32, 60):.1f},{draw.uniform(13, 21):.1f},"
        f"{draw.randint(170, 230)},{draw.randint(2700, 6300)},{draw.choice(['male', 'female', 'NA'])},{draw.choice([2007, 2008])}"
        for species in ["Adelie", "Chinstrap", "Gentoo"] * 20
    ]
    return "\n".join([header, *rows]) + "\n"


@pytest.mark.parametrize("name", ["recipe.md", "commands.md"])
def test_a_generated_page_equals_what_the_code_gives_now(name):
    page = generator().PAGES[name]()
    assert (REPOSITORY / "docs" / name).read_text(encoding="utf-8") == page, "run `make docs`"


def test_the_recipe_page_has_a_line_for_every_key():
    page = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `([a-z_.]+)` \|(?:.*\|){3}$", page, re.MULTILINE)
    keys = {".".join(path) for path in reading.known_keys()}
    assert keys <= set(written)
    assert len(keys) > 60


def test_the_readme_opens_with_the_two_commands():
    assert [words[:2] for words in commands(README)[:2]] == [["make", "demo"], ["make", "test"]]
    assert README.index("make demo") < 60


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands((REPOSITORY / page).read_text(encoding="utf-8")) if words[0] == "make"}
    assert {"demo", "test", "docs"} <= named <= targets


def test_every_command_of_the_readme_is_one_that_the_shell_takes():
    group = typer.main.get_command(app)
    shown = [shlex.split(text)[1:] for text in re.findall(r"`(fromzero [^`]+)`", README)]
    for words in [*OURS, *shown]:
        words = words[: words.index(">")] if ">" in words else words
        assert words[0] in group.commands, words
        group.commands[words[0]].make_context(words[0], words[1:])  # raises on an unknown option or a missing argument
    assert len(OURS) >= 12


def test_the_penguin_commands_of_the_readme_run_as_typed(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shared / "penguins.csv", tmp_path)
    (tmp_path / "new.csv").write_text(without_answers((shared / "penguins.csv").read_text()))
    assert len(FOR_REAL) == 9
    for words in FOR_REAL:
        words, into = (words[:-2], words[-1]) if ">" in words else (words, None)
        app([*words, "epochs=2"] if words[0] == "train" else words, standalone_mode=False)
        said = capsys.readouterr().out
        assert said.strip(), words
        if into:
            Path(into).write_text(said)
        if words[0] == "predict":
            assert said.count("new.csv:") == 10


def test_the_python_blocks_of_the_readme_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = random_penguins()
    (tmp_path / "penguins.csv").write_text(table)
    (tmp_path / "new.csv").write_text(without_answers(table))
    pieces = blocks(README, "python")
    assert len(pieces) == 2
    for number, piece in enumerate(pieces):
        script = tmp_path / f"block{number}.py"
        script.write_text(piece)
        runpy.run_path(str(script), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out
    assert {row["run"] for row in fz.runs()} == {"mine", "birds"}
    assert fz.load("run:mine").head.out_features == 3


def test_the_recipes_of_the_readme_are_recipes():
    frozen, chat = (reading.check(reading.parse(piece.encode(), "README.md")) for piece in blocks(README, "yaml"))
    assert frozen.head.new and frozen.freeze.through == "conv2"
    assert chat.adapter.rank == 8 and chat.data.too_long == "cut"


def test_both_readmes_show_the_same_blocks():
    fence = r"^```.*?^```$"
    english = re.findall(fence, README, re.DOTALL | re.MULTILINE)
    assert re.findall(fence, CHINESE, re.DOTALL | re.MULTILINE) == english
    assert len(english) == 15


def test_every_public_name_that_a_page_writes_exists():
    named = {name for page in PAGES for name in re.findall(r"\bfz\.(\w+)", (REPOSITORY / page).read_text(encoding="utf-8"))}
    assert {"train", "plan", "run", "load"} <= named <= set(fz.__all__)


def test_every_link_between_pages_leads_to_a_file():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / page).read_text(encoding="utf-8"))]
    broken = [(page, link) for page, link in links if not (REPOSITORY / page).parent.joinpath(link).is_file()]
    assert not broken
    assert len(links) > 20


def test_the_error_page_shows_the_tree_that_the_code_shows():
    drawn = re.findall(r"^(?:.*── )?(\w+)", "FromzeroError" + fz.errors.__doc__.split("FromzeroError", 1)[1], re.MULTILINE)
    page = (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8")
    (tree,) = [piece for piece in blocks(page, "text") if "├──" in piece]
    assert re.findall(r"^(?:.*── )?(\w+)", tree, re.MULTILINE) == drawn
    assert set(drawn) == {name for name in fz.__all__ if isinstance(getattr(fz, name), type) and issubclass(getattr(fz, name), Exception)}


@pytest.mark.parametrize("code, name", [(2, "UserError"), (3, "NumbersError"), (1, "FromzeroError")])
def test_the_exit_codes_of_the_readme_are_those_of_the_errors(code, name):
    assert getattr(fz, name).code == code
    for page in (README, CHINESE):
        assert re.search(rf"^\| {code} \|", page, re.MULTILINE)
