"""bench/README.md's table of shares of the machine's limit comes from the records."""

from pathlib import Path

from llmc.bench import limits_table
from llmc.bench.peers import table

PAGE = Path(__file__).parents[2] / "bench" / "README.md"


def test_the_table_is_what_the_records_say() -> None:
    text = PAGE.read_text()
    assert "<!-- limits -->" in text
    assert limits_table.with_table(text) == text, "python -m bench.limits_table bench/README.md"


def test_the_tables_of_other_systems_are_what_their_records_say() -> None:
    text = PAGE.read_text()
    assert table.with_tables(text, PAGE.parent) == text, "python -m llmc.bench.peers.table --update bench/README.md"
