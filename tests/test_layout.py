"""The shape of the project: who may import whom, how long things are, what they are called."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "passes", "schedules", "runtime", "cli", "bench")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
TOP_LEVEL = {
    *FOLDERS,
    *("llmc", "tests", "docs", "examples", ".ci"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".gitignore"),
    *("setup.py", "pyproject.toml", "constraints.txt"),
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}

ALLOWED = {
    "runtime": ("runtime",),
    "compiler": ("compiler", "runtime", "llmc"),
    "passes": ("passes", "compiler", "runtime.errors"),
    "schedules": ("schedules", "compiler", "runtime.errors", "runtime.parse_json", "runtime.read_file"),
    "bench": ("bench", "passes", "schedules", "compiler", "runtime", "llmc"),
    "cli": ("cli", "bench", "compiler", "runtime", "llmc"),
    "llmc": ("compiler.driver", "runtime", "cli.main"),
}
"""What the modules of a folder may import of llmc; "llmc" is the package's own face."""
DRIVERS = ("compiler/driver.py", "compiler/rewrite.py", "compiler/tune.py")
DRIVER_ALSO = ("passes", "schedules")
PREPARES_PICTURES = ("runtime/processor.py", "transformers")
NOT_BELOW_THE_DRIVER = ("compiler.driver", "compiler.rewrite", "compiler.tune")
"""What passes and schedules may not import, though they may import the compiler's data structures."""


def sources(*folders: str) -> list[Path]:
    """Python files of these top-level folders, llmc's links left alone."""
    found = [path for folder in folders if folder != "llmc" for path in (ROOT / folder).rglob("*.py")]
    return sorted(found + ([*(ROOT / "llmc").glob("*.py")] if "llmc" in folders else []))


EVERYTHING = sources(*FOLDERS, "llmc", "tests", "examples")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def imported_of_llmc(path: Path) -> Iterator[str]:
    """The same, of llmc alone and without its name; "llmc" for the package's own face."""
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "llmc":
            yield rest if rest.split(".")[0] in FOLDERS else "llmc"


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in allowed)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        allowed = ALLOWED[folder] + (DRIVER_ALSO if name_of(path) in DRIVERS else ())
        refused = NOT_BELOW_THE_DRIVER if folder in ("passes", "schedules") else ()
        names = [n for n in imported_of_llmc(path) if not within(n, allowed) or within(n, refused)]
        wrong += [f"{name_of(path)} imports llmc's {name}" for name in names]
    assert not wrong


def test_imports_are_absolute_and_begin_with_llmc() -> None:
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in EVERYTHING
        for name in imported(path)
        if name.startswith(".") or name.split(".")[0] in FOLDERS
    ]
    assert not wrong


def test_only_schedules_and_one_module_of_the_compiler_import_tvm() -> None:
    users = {name_of(path) for path in sources(*FOLDERS, "llmc") for n in imported(path) if n.split(".")[0] == "tvm"}
    elsewhere = {name for name in users if not name.startswith("schedules/")}
    assert len(elsewhere) <= 1
    assert all(name.startswith("compiler/") for name in elsewhere)


def test_running_imports_little() -> None:
    """numpy and tokenizers in the binding, click and rich on the command line; the rest is the standard library.  Who
    gives pictures needs transformers, without torch."""
    heavy = {"torch", "tvm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "ml_dtypes"}
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in sources("runtime", "cli")
        for name in imported(path)
        if name.split(".")[0] in heavy and (name_of(path), name.split(".")[0]) != PREPARES_PICTURES
    ]
    assert not wrong


def test_only_the_server_and_conversations_import_what_serves() -> None:
    """starlette, uvicorn and jinja2 are an extra; commands say so where they are not there."""
    users = ("cli/serve.py", "runtime/conversation.py")
    extra = {"starlette", "uvicorn", "jinja2"}
    wrong = []
    for path in sources(*FOLDERS, "llmc"):
        serves = name_of(path).startswith("runtime/serve/") or name_of(path) in users
        names = [name for name in imported(path) if name.split(".")[0] in extra]
        names += [name for name in imported_of_llmc(path) if within(name, ("runtime.serve",))]
        wrong += [f"{name_of(path)} imports {name}" for name in names if not serves]
    assert not wrong


def test_json_from_outside_is_read_in_one_place() -> None:
    """Whatever is wrong with it is then a ValueError, depth too."""
    users = {
        name_of(path)
        for path in sources("compiler", "passes", "schedules", "runtime", "cli")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
    }
    assert users == {"runtime/parse_json.py"}


def test_every_pass_has_a_test() -> None:
    passes = [path.stem for path in sources("passes") if defines(path, path.stem)]
    assert passes
    missing = [name for name in passes if not (ROOT / "tests" / "passes" / f"test_{name}.py").exists()]
    assert not missing


def defines(path: Path, name: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree_of(path).body)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_in_llmc_resolve(folder: str) -> None:
    link = ROOT / "llmc" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_else_lies_at_the_top() -> None:
    """Such as what a command has written where it was run."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {name.split("/")[0] for name in tracked.split("\0") if name} == TOP_LEVEL


def test_files_are_short() -> None:
    c_sources = [path for folder in ("runtime", "examples") for path in (ROOT / folder).rglob("*.[ch]")]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in [*EVERYTHING, *c_sources]}
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in EVERYTHING
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}


def test_no_name_says_nothing() -> None:
    assert not [name_of(path) for path in EVERYTHING if VAGUE_NAMES & set(path.stem.split("_"))]


def test_no_line_of_the_changelog_stands_there_twice() -> None:
    """As merges leave them, where one moves what another has changed."""
    first_lines = Counter(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("- "))
    assert not [line for line, n in first_lines.items() if n > 1]
