"""The house as ARCHITECTURE.md draws it: who may import whom, no cycles, budgets, public names, and every key read."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import fromzero
from fromzero.recipe.read import known_keys

SOURCE = Path(fromzero.__file__).parent
DOORS = {"__init__", "cli"}
TIER = {
    "__main__": 7,
    "cli": 6,
    "__init__": 6,
    "use": 5,
    "runner": 4,
    "planner": 3,
    "recipe": 2,
    "data": 1,
    "models": 1,
    "weights": 1,
    "tuning": 1,
    "objectives": 1,
    "optim": 1,
    "devices": 0,
    "report": 0,
    "sources": 0,
    "errors": 0,
    "retired": 0,
}
PARTS = {room for room, tier in TIER.items() if tier == 1}
EXTRA = {
    "recipe": {"errors"},  # reading and checking a recipe starts at once
    "report": {"errors"},
    "devices": {"errors"},
    "sources": {"errors"},
    "errors": set(),
    "retired": set(),
    "use": {"runner", "models", "weights", "data", "devices", "objectives", "sources", "errors", "retired"},
}
PUBLIC = """SGD Adam AdamW DataError FromzeroError Interrupted MissingExtra ModelError NumbersError Plan PlanRefused Planned
RMSProp Recipe RecipeError ShapeError SourceError UserError chat evaluate export fetch generate load new plan predict predictions read resume run runs train"""


def files() -> list[Path]:
    found = sorted(SOURCE.rglob("*.py"))
    assert len(found) >= 60
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ast.stmt, bool]]:
    """(module of ours, statement, whether it stands inside a function)"""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [(name, node, id(node) in inside) for name in names if name.split(".")[0] == "fromzero"]
    return found


def code_lines(path: Path) -> int:
    """Lines with code: no blank ones, comments or docstrings."""
    text = path.read_text()
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skip = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_rooms_import_only_what_lies_below_them() -> None:
    wrong = []
    for path in files():
        room = room_of(path)
        for module, _, _ in imports(path):
            other = module.split(".")[1] if "." in module else "__init__"
            if other == room:
                continue
            allowed = EXTRA.get(room)
            fine = other in allowed if allowed is not None else TIER[other] < TIER[room] or (room in DOORS)
            if room in PARTS and other in PARTS:
                fine = False
            if not fine:
                wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_tier() -> None:
    assert {room_of(path) for path in files()} == set(TIER)


def test_files_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in files():
        name = ".".join(("fromzero", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = {module for module, _, inside in imports(path) if not inside} - {"fromzero"}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph.get(name, set()):
                walk(other, (*trail, name))
            done.add(name)

    for name in graph:
        if name not in ("fromzero", "fromzero.cli"):
            walk(name, ())


def test_only_the_doors_import_ours_inside_a_function() -> None:
    wrong = [
        f"{p.relative_to(SOURCE)}:{node.lineno}" for p in files() if room_of(p) not in DOORS for _, node, inside in imports(p) if inside
    ]
    assert not wrong


def test_torch_is_not_imported_by_the_page_the_shell_the_recipe_or_the_report() -> None:
    code = "import sys, fromzero, fromzero.cli, fromzero.recipe.read, fromzero.report.events, fromzero.report.page; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fromzero.recipe.read" in loaded
    for heavy in ("torch", "numpy", "polars", "PIL", "torchmetrics", "rich"):
        assert heavy not in loaded, heavy


def test_importing_the_public_page_and_asking_for_help_load_nothing_heavy() -> None:
    code = "import sys, fromzero; print(*sys.modules)"
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("torch", "pydantic", "yaml", "typer", "numpy"):
        assert heavy not in page, heavy
    code = "import sys; sys.argv = ['fromzero', '--help']\nimport atexit\natexit.register(lambda: print(*sys.modules))\nfrom fromzero.cli import main; main()"
    shell = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("torch", "pydantic", "yaml", "rich", "numpy"):
        assert heavy not in shell, heavy


def test_files_functions_loop_and_package_stay_within_their_budgets() -> None:
    sizes = {path: code_lines(path) for path in files()}
    assert {str(p): n for p, n in sizes.items() if n > 400} == {}
    assert sizes[SOURCE / "runner" / "loop.py"] <= 250
    assert sum(sizes.values()) <= 19_000  # 10,000 once; ARCHITECTURE.md says what took the rest
    long = []
    for path in sizes:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0  # type: ignore[operator]
                if (node.end_lineno or 0) - node.lineno + 1 - doc > 60:
                    long.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}")
    assert not long


def test_the_public_names_are_these() -> None:
    assert sorted(PUBLIC.split()) == sorted(fromzero.__all__)
    for name in fromzero.__all__:
        assert getattr(fromzero, name) is not None


def test_every_recipe_key_is_read_by_code() -> None:
    keys = known_keys()
    assert len(keys) >= 70
    code = "\n".join(p.read_text() for p in files() if p.name not in ("schema.py", "new.py") and "docs" not in p.parts)
    schema = (SOURCE / "recipe" / "schema.py").read_text()
    whole = {"loss", "optimizer", "schedule"}  # handed over whole: their options are the parameters of one function
    unread = [
        ".".join(path)
        for path in keys
        if not (path[0] in whole and len(path) == 2) and f".{_field(path[-1])}" not in code and f"self.{path[-1]}" not in schema
    ]
    assert not unread


def _field(key: str) -> str:
    return "source" if key == "from" else key
