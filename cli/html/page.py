"""The page: a head, then a section for each thing that the compiler decided."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from llmc.cli.html import certificate, layer, memory, pipeline, plan, schedules
from llmc.cli.html.artifact_facts import Facts
from llmc.cli.html.markup import Child, Markup, element, paragraph
from llmc.cli.output import in_bytes, manifest_shown
from llmc.runtime import ArtifactFile

SECTIONS = (pipeline, layer, plan, memory, schedules, certificate)
NAMES = ("pipeline", "layer", "plan", "memory", "schedules", "certificate")


def write_page(file: ArtifactFile, profile: Mapping[str, Any] | None, program: int = 0) -> str:
    """The whole page.  Raises LlmcError when the manifest lacks what the page shows."""
    with manifest_shown("the report", str(file.path)):
        return page(Facts(file, profile, program))


def page(facts: Facts) -> str:
    name = str(facts.model.get("name") or facts.file.path.stem)
    sections = [(anchor, part.show(facts)) for anchor, part in zip(NAMES, SECTIONS, strict=True)]
    links = [element("a", anchor, href=f"#{anchor}") for anchor, shown in sections if shown]
    style = (files("llmc") / "cli" / "html" / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name} · llmc"),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("header", title(facts, name), element("nav", links)),
        element("main", [shown for _, shown in sections]),
        element("footer", paragraph(footnote(facts))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def title(facts: Facts, name: str) -> list[Child]:
    model, target = facts.model, facts.manifest.get("target", {})
    quant = facts.manifest.get("quant") or {}
    said = [
        str(model.get("type", "")),
        f"{model.get('n_layers')} layers",
        f"{quant['name']} weights" if quant else f"{model.get('dtype')} weights",
        f"KV cache in {facts.manifest.get('kv_cache', {}).get('dtype')}",
        str(target.get("name", "")),
    ]
    verdict = str(facts.manifest.get("certificate", {}).get("status", "missing"))
    return [
        element("h1", name, " ", certificate.badge(f"parity {verdict}")),
        element("p", " · ".join(filter(None, said)), class_="subtitle"),
        element("dl", [tile(*each) for each in tiles(facts)], class_="tiles"),
    ]


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(what, figure, exact figure)"""
    header, memory_ = facts.tables.header, facts.manifest.get("memory", {})
    weights = int(memory_.get("weight_bytes", 0))
    per_token = header.kv_page_bytes // header.page_tokens
    return [
        ("file", in_bytes(facts.file.n_bytes), f"{facts.file.n_bytes:,} bytes"),
        ("weights", in_bytes(weights), f"{weights:,} bytes"),
        ("activations", in_bytes(header.arena_bytes), f"{header.arena_bytes:,} bytes"),
        ("KV cache a token", in_bytes(per_token), f"{per_token:,} bytes"),
        ("context", f"{header.n_context:,}", "tokens a sequence can hold"),
        ("kernels", f"{len(facts.tables.kernels):,}", f"{len(facts.tables.calls):,} calls in {len(facts.plans)} plans"),
    ]


def tile(what: str, figure: str, exact: str) -> Markup:
    return element("div", element("dt", what), element("dd", figure, title=exact))


def footnote(facts: Facts) -> str:
    features = ", ".join(map(str, facts.manifest.get("target", {}).get("cpu_features", ())))
    needs = f" It needs {features}." if features else ""
    others = [name for name in facts.file.targets if name != facts.manifest.get("target", {}).get("name")]
    also = f" The file is for {', '.join(others)} too: llmc inspect --for TARGET." if others else ""
    return (
        f"{facts.file.path.name}, compiled by llmc {facts.manifest.get('llmc')} on {facts.manifest.get('created')}."
        f"{needs}{also} Read from the file; nothing of it was executed."
    )
