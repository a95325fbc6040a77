"""Families beyond Llama and OPT: each small random model compiles, and its certificate holds it against transformers.

docs/models.md says which they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import llmc
from tests.families import FAMILIES, save

DOCS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_family_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    report = llmc.compile(save(family, tmp_path / family), out=tmp_path / "model.so", batch=(1,), max_sequence=32)
    assert report["certificate"]["status"] == "passed"
    assert report["certificate"]["top1_agreement"] > 0.99


def test_the_documentation_names_the_families_that_are_tested() -> None:
    first_section = DOCS.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", first_section, re.MULTILINE)
    assert rows == sorted(FAMILIES)
