"""bench/README.md's table of shares of the machine's limit comes from the records."""

from pathlib import Path

from llmc.bench import limits_table

PAGE = Path(__file__).parents[2] / "bench" / "README.md"


def test_the_table_is_what_the_records_say() -> None:
    text = PAGE.read_text()
    assert "<!-- limits -->" in text
    assert limits_table.with_table(text) == text, "python -m bench.limits_table bench/README.md"
