"""`llmc inspect --html`: one page that needs nothing else, whose numbers are the artifact's, in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zlib
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.cli.html.layer_drawing import parse, weight_label
from llmc.cli.html.markup import element
from llmc.cli.html.ticks import ticks
from llmc.cli.main import main
from llmc.cli.output import in_bytes
from llmc.compiler.layer_text import one_layer
from llmc.runtime.artifact import ArtifactFile
from tests.runtime.stub_artifact import write_stub

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=192,
    bos_token_id=1,
    eos_token_id=2,
)
PHONE = 390


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(TINY).save_pretrained(folder / "tiny")
    llmc.compile(folder / "tiny", out=folder / "tiny.so", dtype="f32", batch=(1, 2))
    return folder / "tiny.so"


@pytest.fixture(scope="module")
def trace(artifact: Path) -> Path:
    path = artifact.parent / "trace.json"
    run = ["run", str(artifact), "--tokens", "5,17,3", "-n", "8", "--ignore-eos", "--profile", str(path)]
    assert CliRunner().invoke(main, run).exit_code == 0
    return path


def inspect(artifact: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", str(artifact), *map(str, arguments)])


def write_report(artifact: Path, *arguments: object) -> Path:
    place = artifact.parent / "report.html"
    result = inspect(artifact, "--html", place, *arguments)
    assert result.exit_code == 0, result.stderr
    assert str(place) in result.stdout
    return place


@pytest.fixture(scope="module")
def page(artifact: Path) -> str:
    return write_report(artifact).read_text()


@pytest.fixture(scope="module")
def timed_page(artifact: Path, trace: Path) -> str:
    return write_report(artifact, "--profile", trace).read_text()


def tree(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page)


def section(page: str, anchor: str) -> ElementTree.Element:
    (found,) = [each for each in tree(page).iter("section") if each.get("id") == anchor]
    return found


def rows(inside: ElementTree.Element, titled: str) -> list[list[str]]:
    """The rows of the first table whose first title is this."""
    for each in inside.iter("table"):
        head, body = each
        if words(head[0][0]) == titled:
            return [[words(cell) for cell in row] for row in body]
    raise AssertionError(f"no table of {titled}")


def words(of: ElementTree.Element) -> str:
    return "".join(of.itertext()).strip()


# -- the page -------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_runs_nothing(page: str, timed_page: str) -> None:
    for text in (page, timed_page):
        assert text.startswith("<!DOCTYPE html>")
        assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|<script|<link|<img|<iframe|\son\w+=", text)
        targets = {each.get("href") for each in tree(text).iter("a")}
        anchors = {f"#{each.get('id')}" for each in tree(text).iter("section")}
        assert targets == anchors


def test_every_section_is_there(page: str) -> None:
    found = [each.get("id") for each in tree(page).iter("section")]
    assert found == ["pipeline", "layer", "plan", "memory", "schedules", "certificate"]


def test_the_pipeline_is_the_graph_sections(artifact: Path, page: str) -> None:
    with ArtifactFile.open(artifact) as file:
        graph = file.graph() or {}
    passes = graph["passes"]
    said = rows(section(page, "pipeline"), "pass")
    assert [(row[0], int(row[3])) for row in said] == [(p["name"], p["nodes"]) for p in passes]
    assert [row[2] for row in said[1:]] == [str(p["nodes"]) for p in passes[:-1]]
    assert [row[1] for row in said[1:]] == [str(p["rewrites"] or "–") for p in passes[1:]]


def test_one_layer_is_drawn_as_exported_and_as_it_ends(artifact: Path, page: str) -> None:
    with ArtifactFile.open(artifact) as file:
        graph = file.graph() or {}
    before, after = graph["exported_layer"], one_layer(graph["final"])
    captions = [words(each) for each in section(page, "layer").iter("figcaption")]
    assert captions == [f"As exported: {len(before)} nodes", f"After the passes: {len(after)} nodes"]
    drawings = list(section(page, "layer").iter("svg"))
    drawn = [[words(t) for t in each.iter("text") if t.get("class") == "name"] for each in drawings]
    assert drawn[1] == [node.name for node in parse(after)]
    assert sum(name == "MatMul" for name in drawn[0]) == 7
    assert sum(each.tag == "circle" for each in drawings[0].iter()) == 7


def test_the_plan_is_the_artifacts(artifact: Path, page: str) -> None:
    said = json.loads(inspect(artifact, "--plan", "--json").stdout)
    table = rows(section(page, "plan"), "plan")
    assert [(row[0].split()[0], int(row[0].split()[2]), int(row[1])) for row in table] == [
        (plan["kind"], plan["rows"], len(plan["calls"])) for plan in said["plans"]
    ]
    assert [row[2] for row in table] == [in_bytes(sum(c["bytes"] for c in plan["calls"])) for plan in said["plans"]]
    kernels = [each["name"] for each in said["kernels"]]
    for details, plan in zip(section(page, "plan").iter("details"), said["plans"], strict=True):
        counts: dict[str, int] = {}
        for call in plan["calls"]:
            assert call["kernel"] in kernels
            name = call["kernel"].rpartition("_")[0]
            counts[name] = counts.get(name, 0) + 1
        shown = {row[0]: int(row[-3]) for row in rows(details, "kernel")}
        assert shown == counts


def test_times_are_the_profiles(trace: Path, timed_page: str) -> None:
    plans = json.loads(trace.read_text())["llmc"]["plans"]
    table = rows(section(timed_page, "plan"), "plan")
    found = {row[0]: row[-3] for row in table}
    for plan in plans:
        plural = "s" * (plan["rows"] != 1)
        assert found[f"{plan['kind']} of {plan['rows']} row{plural}"] == str(plan["runs"])
    assert {name for name, runs in found.items() if runs != "–"} == {
        f"{p['kind']} of {p['rows']} row{'s' * (p['rows'] != 1)}" for p in plans
    }
    assert len(list(section(timed_page, "plan").iter("details"))) == len(plans)


def test_memory_is_the_artifacts(artifact: Path, page: str) -> None:
    with ArtifactFile.open(artifact) as file:
        sections, header = dict(file.sections), file.plan().header
    table = rows(section(page, "memory"), "section")
    assert [(row[0], row[1], row[2]) for row in table] == [
        (each.name, f"{each.offset:,}", f"{each.n_bytes:,}") for each in sections.values()
    ]
    room = rows(section(page, "memory"), "room for")
    assert [row[1:] for row in room][1] == [str(header.page_tokens), in_bytes(header.kv_page_bytes)]
    heads = [words(t) for t in section(page, "memory").iter("text") if re.fullmatch("[KV] \\d", words(t))]
    assert heads == ["K 0", "V 0", "K 1", "V 1"]


def test_schedules_and_certificate_are_the_manifests(artifact: Path, page: str) -> None:
    with ArtifactFile.open(artifact) as file:
        manifest = file.manifest()
    linear = [record for record in manifest["schedules"] if record["family"]]
    cells = [row[1:] for row in rows(section(page, "schedules"), "linear layer")]
    assert sum(bool(cell) for row in cells for cell in row) == len(linear)
    shown = words(section(page, "certificate"))
    assert "passed" in shown
    assert f"{100 * manifest['certificate']['relative_error']:.3g} % of their range" in shown
    for prompt in manifest["certificate"]["prompts"]:
        assert f"of {len(prompt['greedy'])} greedy tokens" in shown


@pytest.mark.parametrize("changes", [{}, {"manifest": {}}, {"graph": None}, {"vocabulary": None}])
def test_an_artifact_that_says_little_has_a_page_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = write_report(write_stub(tmp_path / "a.so", **changes)).read_text()
    assert "plan" in [each.get("id") for each in tree(page).iter("section")]


def test_nothing_in_an_artifact_becomes_markup(tmp_path: Path) -> None:
    hostile = "</style><script>alert(1)</script>\x1b\x00"
    graph = {"passes": [{"name": hostile, "rewrites": 0, "nodes": 1}], "final": hostile}
    manifest = {"model": {"name": hostile}, "created": hostile, "certificate": {"status": hostile}}
    page = write_report(write_stub(tmp_path / "a.so", graph=graph, manifest=manifest)).read_text()
    assert "<script" not in page
    assert words(next(tree(page).iter("h1"))).startswith("</style><script>alert(1)</script>\ufffd\ufffd")


# -- what goes wrong ---------------------------------------------------------------------


def test_bad_profiles_are_one_clear_line(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"traceEvents": []}')
    (tmp_path / "c.json").write_text('{"llmc": {"version": 1, "plan_sha256": "00"}}')
    for name, fact in (
        ("none.json", "the profile cannot be read: No such file or directory"),
        ("a.json", "the profile is not valid JSON"),
        ("b.json", "this is no trace that this llmc wrote"),
        ("c.json", f"the profile is of another artifact than {artifact}"),
    ):
        result = inspect(artifact, "--html", tmp_path / "r.html", "--profile", tmp_path / name)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {fact}\n  at: {tmp_path / name}\n  hint: llmc run ")
    assert not (tmp_path / "r.html").exists()


def test_a_manifest_that_makes_no_sense_is_one_clear_line(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", manifest={"schedules": [{"plan": "body", "m": 1, "kernels": 7}]})
    result = inspect(path, "--html", tmp_path / "r.html")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the manifest lacks what the report shows: ")
    assert [each.name for each in tmp_path.iterdir()] == ["a.so"]


def test_bad_places_are_refused(artifact: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, fact in (
        (tmp_path, "the report's place is a directory"),
        (artifact, "the report would replace the artifact"),
        (tmp_path / "no" / "r.html", "the report cannot be written: No such file or directory"),
        (tmp_path / "pipe", "the report's place is a device or a pipe, which it would replace"),
    ):
        result = inspect(artifact, "--html", place)
        assert (result.exit_code, result.stderr.splitlines()[0]) == (1, f"error: {fact}")
    assert (tmp_path / "pipe").is_fifo()


def test_html_goes_alone_and_profile_goes_with_it(artifact: Path) -> None:
    assert inspect(artifact, "--html", "r.html", "--plan").exit_code == 2
    assert inspect(artifact, "--profile", "trace.json").exit_code == 2


# -- parts ---------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("b", "a<b", element("i", 1), title='"<', class_="x") == (
        '<b title="&quot;&lt;" class="x">a&lt;b<i>1</i></b>'
    )


@pytest.mark.parametrize(("total", "last"), [(19.3, 15), (100, 100), (7, 6), (4.2e6, 4e6)])
def test_axes_have_round_numbers(total: float, last: float) -> None:
    found = ticks(total)
    assert found[-1] == pytest.approx(last)
    assert 3 <= len(found) <= 7


def test_a_weight_is_called_by_what_is_its_own() -> None:
    assert weight_label("model.layers.1.self_attn.{q,k,v}_proj.weight") == "{q,k,v}_proj"
    assert weight_label("model.decoder.layers.0.fc1.bias") == "fc1"
    assert weight_label("model.layers.1.mlp.down_proj.weight.int8") == "down_proj"
    assert weight_label("table.cos") == "cos"


def test_a_layer_goes_from_its_first_weight_to_the_next_ones() -> None:
    lines = [f"%{i} = MatMul(%{i - 1}, m.layers.{i // 2}.w{i % 2}.weight[4,4]) : f32[M,4]" for i in range(8)]
    assert one_layer("\n".join(["graph(%x: f32[M,4])", *lines, "return %7: f32[M,4]"])) == lines[4:6]
    assert one_layer("graph()") == []


# -- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    profile = tmp_path_factory.mktemp("chromium")

    def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Without a network; what the page logs goes to standard error."""
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
        command = [program, *flags, *offline, *arguments, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return browse


def test_a_browser_shows_it_without_complaint(chromium: Any, tmp_path: Path, page: str, timed_page: str) -> None:
    for name, text in (("plain", page), ("timed", timed_page)):
        place = tmp_path / f"{name}.html"
        place.write_text(text)
        shot = tmp_path / f"{name}.png"
        done = chromium(place, "--window-size=1280,4000", f"--screenshot={shot}")
        assert ":CONSOLE" not in done.stderr
        assert n_colours(shot) > 40
        assert "Parity certificate" in chromium(place, "--dump-dom").stdout


def test_the_browser_would_complain(chromium: Any, tmp_path: Path) -> None:
    place = tmp_path / "wrong.html"
    place.write_text("<script>nonsense()</script>")
    assert ":CONSOLE" in chromium(place, "--dump-dom").stderr


def test_nothing_is_wider_than_a_phone_or_a_desk(chromium: Any, tmp_path: Path, timed_page: str, page: str) -> None:
    for text in (page, timed_page):
        for width in (PHONE, 1280):
            assert measured_width(chromium, tmp_path, text, width) == width


def test_too_wide_a_page_would_be_noticed(chromium: Any, tmp_path: Path) -> None:
    assert measured_width(chromium, tmp_path, "<div style='width:500px'>x</div>", PHONE) > PHONE


def measured_width(chromium: Any, folder: Path, page: str, width: int) -> int:
    """How wide the page wants to be in a window of this width, every part of it unfolded."""
    frame = f'<iframe srcdoc="{escape(page)}" style="border:0;width:{width}px;height:800px"></iframe>'
    script = (
        "onload = () => { const inner = document.querySelector('iframe').contentDocument;"
        "inner.querySelectorAll('details').forEach(each => each.open = true);"
        "document.title = 'width ' + inner.documentElement.scrollWidth }"
    )
    place = folder / "frame.html"
    place.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frame}<script>{script}</script>')
    dom = chromium(place, "--window-size=1400,900", "--virtual-time-budget=4000", "--dump-dom").stdout
    found = re.search(r"<title>width (\d+)</title>", dom)
    assert found
    return int(found[1])


def n_colours(png: Path) -> int:
    """Different byte values in a picture: few in an empty one."""
    data, at, packed = png.read_bytes(), 8, b""
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return len(set(zlib.decompress(packed)))
