"""What pages point at is there: pages, sections of them, and files of the project."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md", *(ROOT / "examples").rglob("*.md")]
)
SOURCES = ("compiler", "passes", "schedules", "runtime", "cli", "bench", "tests", "examples", "docs")
KERNELS = ROOT / "schedules/cuda"

LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(SOURCES)})/[\w./-]*\.(?:pyi?|c|h|cuh?|md|json|svg)\b")
INCLUDE = re.compile(r"(?<![\w./-])include/\w+\.cuh\b")
BARE_SOURCE = re.compile(r"(?<![\w./*-])\w+\.(?:cuh|c)\b")
OF_A_PROGRAM = {"app.c", "main.c"}
"""Names that examples give to a reader's own files."""
PLACEHOLDER = re.compile(r"NAME")
"""In the place of a name that a reader chooses."""


def prose(page: Path) -> str:
    """Without blocks of code, which may speak of files of others."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


@cache
def anchors(page: Path) -> frozenset[str]:
    """As GitHub forms them of headings: lower case, marks left out, blanks to hyphens."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


def dangling(page: Path) -> list[str]:
    wrong = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(target)
    return wrong


@cache
def source_names() -> frozenset[str]:
    return frozenset(path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*"))


def missing_files(page: Path) -> list[str]:
    text = prose(page)
    named = [name for name in FILE.findall(text) if not PLACEHOLDER.search(name)]
    absent = [name for name in named if not (ROOT / name).exists()]
    absent += [name for name in INCLUDE.findall(text) if not (KERNELS / name).exists()]
    bare = set(BARE_SOURCE.findall(text)) - OF_A_PROGRAM - source_names()
    return [*absent, *sorted(bare)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dangling(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert missing_files(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: `x`, y\n[a](#a-title-x-y) [b](#gone) [c](gone.md) passes/gone.py gone.cuh include/gone.cuh\n"
    )
    assert dangling(page) == ["#gone", "gone.md"]
    assert missing_files(page) == ["passes/gone.py", "include/gone.cuh", "gone.cuh"]
