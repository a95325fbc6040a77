"""Records as pictures and pages: the same bytes every time, and README shows what the records say."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
from click.testing import CliRunner

from llmc.bench.chart import page
from llmc.bench.chart.draw import draw
from llmc.bench.chart.record import Panel, Record, Sample
from llmc.cli.main import main
from llmc.runtime import LlmcError

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "bench/README.md")


def made(path: Path | None = None) -> Record:
    """Two batch sizes, two lengths; at the largest point one system has no room, and another died."""
    panel = Panel("m bf16", "M-7B", "bf16", "random", [1, 2], [128, 1024], 512)
    panel.model = {"step_bytes": 10**9, "kv_bytes_per_token": 1000, "n_weights": 5 * 10**8, "compiled": {}}
    panel.systems = {"llmc": {"version": "llmc 1", "precision": "int8"}, "hf": {"version": "hf 1", "precision": "bf16"}}
    panel.left_out = {"openvino": "died at load"}
    panel.unfit = {"hf decode 2x1024": {"needs": 3e10, "free": 2e10}}
    for round in range(3):
        for batch in (1, 2):
            for length in (128, 1024):
                task = f"decode {batch}x{length}"
                panel.samples.append(Sample("llmc", task, [0.1 + 0.01 * round] * 3, 10.0, 0.0))
                if task != "decode 2x1024":
                    panel.samples.append(Sample("hf", task, [0.3] * 3, 10.0, 0.0))
    record = Record(path, {"name": "A CPU", "memory_bytes": 2e10}, 3, 2, 0.2, "2026-01-01", ["llmc bench m"], [panel])
    record.save()
    return record


def words(svg: Path) -> list[str]:
    """What is written in a picture: matplotlib notes the text of its glyphs in comments."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_the_picture_says_what_was_measured_and_why_not(tmp_path: Path) -> None:
    draw([made()], tmp_path / "c.svg")
    said = words(tmp_path / "c.svg")
    assert {"M-7B, bf16", "Hugging Face (PyTorch)", "llmc", "batch 1", "batch 2", "128", "1k*"} <= set(said)
    assert {"HF needs 30 GB", "openvino left out"} <= set(said)
    assert "speed-up over HF (×)" in said
    assert "tokens per second" in said


def test_the_same_record_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw([made()], tmp_path / "a.svg")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    draw([made()], tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_a_png(tmp_path: Path) -> None:
    draw([made()], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    record = made()
    record.panels[0].samples = []
    with pytest.raises(LlmcError, match="nothing to draw"):
        draw([record], tmp_path / "c.png")


def test_a_record_is_drawn_again_without_measuring(tmp_path: Path) -> None:
    made(tmp_path / "r.json")
    given = ["bench", "--from", str(tmp_path / "r.json"), "--plot", str(tmp_path / "c.svg"), "--markdown"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    assert result.stdout == page.markdown([made()]) + "\n"
    assert "M-7B, bf16" in words(tmp_path / "c.svg")


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"format": "llmc bench 1"}', '{"format": "other"}'])
def test_an_unreadable_record_is_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(main, ["bench", "--from", str(path)])
    assert result.exit_code == 1
    assert re.match(
        r"error: (this is not a record of llmc bench|the record cannot be read: No such file)", result.stderr
    )


def test_the_record_reads_as_it_was_written(tmp_path: Path) -> None:
    record = made(tmp_path / "r.json")
    assert Record.read(tmp_path / "r.json") == record


def test_samples_with_busy_neighbours_count_only_where_there_are_no_others() -> None:
    record = made()
    panel = record.panels[0]
    panel.samples = [Sample("llmc", "decode 1x128", [s], 10.0, others) for s, others in ((0.1, 0.0), (0.9, 2.0))]
    (point, *_) = page.points(record, panel)
    assert point["tokens_per_s"]["median"] == pytest.approx(10.0)
    panel.samples = panel.samples[1:]
    (point, *_) = page.points(record, panel)
    assert point["tokens_per_s"]["median"] == pytest.approx(1 / 0.9)
    assert "1 of 1 samples were taken while others" in page.markdown([record])


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_what_the_records_say(name: str, tmp_path: Path) -> None:
    """python -m llmc.bench.chart.page README.md makes it so."""
    file = ROOT / name
    text, pictures = page.with_charts(file.read_text(), file.parent)
    assert text == file.read_text()
    assert pictures
    for picture, records in pictures.items():
        draw(records, tmp_path / picture.name)
        assert words(tmp_path / picture.name) == words(picture)
        if f"Matplotlib v{matplotlib.__version__}," in picture.read_text():  # others place glyphs elsewhere
            assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()
