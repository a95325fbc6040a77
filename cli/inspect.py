"""`llmc inspect`: what an artifact holds, read without executing anything of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from llmc.cli import schedules_view
from llmc.cli.call_facts import CallFacts, facts_of_plan
from llmc.cli.output import (
    artifact_argument,
    certificate_in_words,
    in_bytes,
    json_option,
    manifest_shown,
    pictures_in_words,
    print_json,
    table,
)
from llmc.runtime import ArtifactFile, LlmcError
from llmc.runtime.artifact import program_section
from llmc.runtime.format import FORMAT_VERSION, PLAN_KINDS, SPACES
from llmc.runtime.plan import PlanTables

Said = dict[str, Any]
MOST_LABELS = 8
"""The most labels that are named in a line."""


@click.command(short_help="Show what an artifact holds.")
@artifact_argument
@click.option("--graph", "views", flag_value="graph", multiple=True, help="What each pass did, and the final graph.")
@click.option("--plan", "views", flag_value="plan", multiple=True, help="The kernel calls of each step size.")
@click.option(
    "--schedules", "views", flag_value="schedules", multiple=True, help="The schedule chosen for each operator."
)
@click.option("--manifest", "views", flag_value="manifest", multiple=True, help="The manifest, as JSON.")
@click.option("--html", metavar="REPORT.html", type=click.Path(), help="Write all of it as one page for a browser.")
@click.option("--profile", metavar="TRACE.json", type=click.Path(), help="Times for --html, from llmc run --profile.")
@click.option("--for", "target", metavar="TARGET", help="Which of its targets.  [default: the first]")
@json_option
def command(
    artifact: str, views: tuple[str, ...], html: str | None, profile: str | None, target: str | None, as_json: bool
) -> None:
    """Show what an artifact holds: model, targets, sizes, plans, parity certificate.

    Nothing of the artifact is executed, so this is safe on a file from anywhere and for any machine's artifact.
    """
    if len(set(views)) + (html is not None) > 1:
        raise click.UsageError("show one of --graph, --plan, --schedules, --manifest, --html at a time")
    if profile is not None and html is None:
        raise click.UsageError("--profile goes with --html")
    collect, write = VIEWS[views[0] if views else "summary"]
    with ArtifactFile.open(artifact) as file:
        program = None if target is None else file.program_for(target)
        if html is not None:
            said = write_report(file, html, profile, program)
            write = write_place
        else:
            with manifest_shown("inspect", artifact):
                said = collect(file, program or 0)
    if as_json:
        print_json(said)
        return
    with manifest_shown("inspect", artifact):
        text = printable(write(said))
    click.echo(text)


def printable(text: str) -> str:
    """The text without control characters, which a terminal obeys: a file may come from anywhere."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


# -- the page ---------------------------------------------------------------------


def write_report(file: ArtifactFile, place: str, profile: str | None, program: int | None) -> Said:
    """Write the page at `place`, whole or not at all; of the program that the profile is of.  Raises LlmcError."""
    from llmc.cli.html.page import write_page
    from llmc.cli.trace_summary import read_summary

    path = Path(place)
    if path.is_dir():
        raise LlmcError("the report's place is a directory", place=place, hint="name a file: --html report.html")
    if path.exists() and not path.is_file():  # as /dev/null, whose place a file would take
        hint = "name a file: --html report.html"
        raise LlmcError("the report's place is a device or a pipe, which it would replace", place=place, hint=hint)
    if path.exists() and path.samefile(file.path):
        raise LlmcError("the report would replace the artifact", place=place, hint="name a file: --html report.html")
    summary = None
    if profile is not None:
        wanted = range(file.n_programs) if program is None else [program]
        digests = {file.sections[program_section("plan", i)].sha256.hex(): i for i in wanted}
        summary = read_summary(profile, digests, str(file.path))
        program = digests[summary["plan_sha256"]]
    text = write_page(file, summary, program or 0)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise LlmcError(f"the report cannot be written: {error.strerror}", place=place) from None
    return {"report": place, "bytes": path.stat().st_size, "profile": profile}


def write_place(said: Said) -> str:
    return f"{said['report']}  {in_bytes(said['bytes'])}, for any browser"


# -- summary --------------------------------------------------------------------


def collect_summary(file: ArtifactFile, program: int = 0) -> Said:
    manifest, plan = file.manifest(program), file.plan(program)
    return {
        "path": str(file.path),
        "bytes": file.n_bytes,
        "format_version": manifest.get("format_version", FORMAT_VERSION),
        "llmc": manifest.get("llmc"),
        "created": manifest.get("created"),
        "model": without(manifest.get("model", {}), "config"),
        **({"labels": manifest["classification"]} if manifest.get("classification") else {}),
        **({"images": manifest["images"]} if manifest.get("images") else {}),
        "target": manifest.get("target", {}),
        **({"targets": file.targets} if file.n_programs > 1 else {}),
        "kv_cache": manifest.get("kv_cache", {}),
        "memory": manifest.get("memory", {}),
        "sections": [
            {"name": s.name, "offset": s.offset, "bytes": s.n_bytes, "sha256": s.sha256.hex()}
            for s in file.sections.values()
        ],
        "n_kernels": len(plan.kernels),
        "plans": [{"kind": PLAN_KINDS[p.kind], "rows": p.n_rows, "calls": p.n_calls} for p in plan.plans],
        "certificate": without_prompts(manifest.get("certificate", {"status": "missing"})),
    }


def write_summary(said: Said) -> str:
    model, target, memory, cache = said["model"], said["target"], said["memory"], said["kv_cache"]
    plans = {kind: [p for p in said["plans"] if p["kind"] == kind] for kind in PLAN_KINDS}
    features = " ".join(target.get("cpu_features", ()))
    facts = {
        "file": f"{said['path']}, {in_bytes(said['bytes'])}, by llmc {said['llmc']} on {said['created']}",
        "model": f"{model.get('name')} ({model.get('type')}), {model.get('n_layers')} layers, {model.get('dtype')}, "
        f"{model.get('weights')} weights",
        "limits": f"context {model.get('n_context')} tokens, vocabulary {model.get('n_vocab')}",
        **({"labels": labels_in_words(said["labels"])} if "labels" in said else {}),
        **({"images": images_in_words(said["images"], said["certificate"].get("images"))} if "images" in said else {}),
        **({"targets": f"{', '.join(said['targets'])}; shown:"} if "targets" in said else {}),
        "target": f"{target.get('name')}{f' ({features})' if features else ''}",
        "memory": f"weights {in_bytes(memory.get('weight_bytes', 0))}, "
        f"activations {in_bytes(memory.get('arena_bytes', 0))}, "
        f"KV cache {in_bytes(cache.get('bytes_per_token', 0))} a token in {cache.get('dtype')}{kept_by(cache, model)}"
        + (f", states {in_bytes(memory['slot_bytes'])} a sequence" if memory.get("slot_bytes") else ""),
        "kernels": f"{said['n_kernels']}",
        **{k: ", ".join(f"{p['rows']} rows: {p['calls']} calls" for p in plans[k]) for k in PLAN_KINDS if plans[k]},
        "certificate": certificate_in_words(said["certificate"], "targets" in said),
    }
    adapters = [f"{'adapter':<12} {said}" for said in adapters_of(model, said["certificate"])]
    sections = [(s["name"], s["offset"], s["bytes"], s["sha256"][:16]) for s in said["sections"]]
    lines = [f"{name:<12} {fact}" for name, fact in facts.items()]
    return "\n".join([*lines, *adapters, "", table(("section", "offset", "bytes", "sha256"), sections)])


def adapters_of(model: Said, certificate: Said) -> list[str]:
    """The adapters that sequences may choose, a line each."""
    own = certificate.get("adapters", {})
    return [
        f"{each['name']} ({each['adapter']}), rank {each['rank']}, {each['n_weights']} weights"
        + (f"; {certificate_in_words(own[each['name']])}" if each["name"] in own else "")
        for each in model.get("named_adapters", ())
    ]


def images_in_words(said: Said, certificate: Said | None) -> str:
    """What a picture becomes, and how near that is to what the source makes of one."""
    if "tile" in said:
        high, wide = said["tile"][1:]
        words = f"tiles of {wide} by {high} pixels, each of which stands for {said['rows']} tokens"
    else:
        words = f"of any size, which stand for up to {said['most_rows']} tokens"
    return words if certificate is None else f"{words}; {pictures_in_words(certificate)}"


def labels_in_words(said: Said) -> str:
    """The labels that the model gives texts, and what makes scores of its logits."""
    names = list(map(str, said.get("labels", ())))
    more = [f"{len(names) - MOST_LABELS} more"] if len(names) > MOST_LABELS else []
    return f"{', '.join(names[:MOST_LABELS] + more)}; scores by {said.get('activation')}"


def kept_by(cache: Said, model: Said) -> str:
    """Which layers keep a cache, where they differ: some share another's, or have sizes of their own."""
    sizes: Counter[int] = Counter(cache.get("layer_bytes", ()))
    n_layers, n_kept = int(model.get("n_layers") or 0), sum(sizes.values())
    if not sizes or (n_kept == n_layers and len(sizes) == 1):
        return ""
    parts = [f"{n} layer{'s' * (n != 1)} of {in_bytes(size // cache['page_tokens'])}" for size, n in sizes.items()]
    shared = [f"{n_layers - n_kept} that share them"] if n_kept < n_layers else []
    return f" ({', '.join([*parts, *shared])})"


# -- plan -----------------------------------------------------------------------


def collect_plan(file: ArtifactFile, program: int = 0) -> Said:
    tables, manifest = file.plan(program), file.manifest(program)
    schedules = manifest.get("schedules", [])
    header = tables.header
    return {
        "arena_bytes": header.arena_bytes,
        "scratch_bytes_per_thread": header.scratch_bytes,
        "kv_page_bytes": header.kv_page_bytes,
        "page_tokens": header.page_tokens,
        "pages_per_sequence": header.pages_per_sequence,
        "cpu_features": list(tables.cpu_features),
        "kernels": [{"name": kernel.name, "n_pointers": kernel.n_pointers} for kernel in tables.kernels],
        "plans": [
            {
                "kind": PLAN_KINDS[plan.kind],
                "rows": plan.n_rows,
                "bytes": step_bytes(schedules, PLAN_KINDS[plan.kind], plan.n_rows),
                "calls": [call_record(tables, facts) for facts in facts_of_plan(tables, plan, manifest)],
            }
            for plan in tables.plans
        ],
    }


def call_record(tables: PlanTables, facts: CallFacts) -> Said:
    call = tables.calls[facts.number]
    return {
        "kernel": facts.kernel,
        "op": facts.op,
        "weight": facts.weight,
        "bytes": facts.n_bytes,
        "operations": facts.n_operations,
        "grid": call.grid,
        "arguments": [
            {"space": SPACES[a.space], "offset": a.offset, "bytes": a.n_bytes} for a in tables.arguments_of(call)
        ],
    }


def step_bytes(schedules: list[Said], kind: str, n_rows: int) -> int:
    """Bytes that the kernels of one step read and write, by the schedules' own count."""
    return sum(s["bytes"] * s["nodes"] for s in schedules if (s["plan"], s["m"]) == (kind, n_rows))


def write_plan(said: Said) -> str:
    lines = [
        f"arena {in_bytes(said['arena_bytes'])}, scratch {in_bytes(said['scratch_bytes_per_thread'])} a thread, "
        f"KV pages of {said['page_tokens']} tokens and {in_bytes(said['kv_page_bytes'])}",
        "arguments are space[offset:end], in bytes",
    ]
    for plan in said["plans"]:
        moved = f", {in_bytes(plan['bytes'])} a step" if plan["bytes"] else ""
        rows = [
            (index, call["kernel"], call["op"], call["weight"], moved_by(call), call["grid"], arguments_in_words(call))
            for index, call in enumerate(plan["calls"])
        ]
        lines += ["", f"{plan['kind']} of {plan['rows']} rows: {len(rows)} calls{moved}"]
        lines.append(table(("call", "kernel", "operator", "weight", "moves", "grid", "arguments"), rows))
    return "\n".join(lines)


def moved_by(call: Mapping[str, Any]) -> str:
    return "" if call["bytes"] is None else in_bytes(call["bytes"])


def arguments_in_words(call: Mapping[str, Any]) -> str:
    return " ".join(f"{a['space']}[{a['offset']}:{a['offset'] + a['bytes']}]" for a in call["arguments"])


# -- graph, manifest ---------------------------------------------------


def collect_graph(file: ArtifactFile, program: int = 0) -> Said:
    graph, tower = file.graph(program), file.tower_graph()
    if graph is None:
        raise LlmcError("the artifact does not keep its graph", place=str(file.path))
    return graph if tower is None else {**graph, "tower": tower}


def write_graph(said: Said) -> str:
    rows = [(p["name"], p["rewrites"], p["nodes"]) for p in said["passes"]]
    parts = [table(("pass", "rewrites", "nodes left"), rows)]
    if said.get("exported_layer"):
        parts.append("\n".join(["one layer as it was exported:", *said["exported_layer"]]))
        parts.append("the step graph:")
    tower = ["what makes rows of a picture's tile:", write_graph(said["tower"])] if "tower" in said else []
    return "\n\n".join([*parts, said["final"].rstrip(), *tower])


def collect_manifest(file: ArtifactFile, program: int = 0) -> Said:
    return file.manifest(program)


def write_manifest(said: Said) -> str:
    import json

    return json.dumps(said, indent=2, ensure_ascii=False)


def without_prompts(certificate: Said) -> Said:
    """The numbers of a certificate, and of those of its adapters and of pictures."""
    numbers = without(certificate, "prompts")
    of_adapters = {name: without_prompts(own) for name, own in numbers.get("adapters", {}).items()}
    of_images = {"images": without_prompts(numbers["images"])} if "images" in numbers else {}
    return numbers | ({"adapters": of_adapters} if of_adapters else {}) | of_images


def without(values: Mapping[str, Any], key: str) -> Said:
    return {name: value for name, value in values.items() if name != key}


VIEWS: dict[str, tuple[Callable[[ArtifactFile, int], Said], Callable[[Said], str]]] = {
    "summary": (collect_summary, write_summary),
    "graph": (collect_graph, write_graph),
    "plan": (collect_plan, write_plan),
    "schedules": (schedules_view.collect, schedules_view.write),
    "manifest": (collect_manifest, write_manifest),
}
