"""Where everything lies: the file, the arena over the calls of a step, and a page of the KV cache."""

from __future__ import annotations

from llmc.cli.call_facts import layer_sizes
from llmc.cli.html.artifact_facts import Facts, Plan, category
from llmc.cli.html.markup import Child, Markup, box, drawing, element, figure, paragraph, section, table, text
from llmc.cli.html.ticks import axis, ticks
from llmc.cli.output import in_bytes
from llmc.runtime.format import SPACES

WIDTH = 1040.0
GUTTER = 64.0
ARENA_WIDTH = WIDTH - GUTTER
ROW = 9.0
MOST_CALLS = 100
ARENA = SPACES.index("arena")


def show(facts: Facts) -> Child:
    memory = facts.manifest.get("memory", {})
    header = facts.tables.header
    return section(
        "memory",
        "Memory",
        paragraph(
            "Nothing is allocated while a step runs: weights are mapped from the file, activations share one arena "
            f"of {in_bytes(header.arena_bytes)}, each thread has {in_bytes(header.scratch_bytes)} of its own, and "
            f"keys and values live in pages of {header.page_tokens} tokens."
        ),
        element("h3", "The file"),
        file_map(facts, int(memory.get("weight_bytes", 0))),
        element("h3", "The arena"),
        arena(facts),
        element("h3", "The KV cache"),
        kv_cache(facts),
    )


# -- the file ----------------------------------------------------------------------


def file_map(facts: Facts, weight_bytes: int) -> Markup:
    sections, total = list(facts.file.sections.values()), facts.file.n_bytes
    x, parts = 0.0, []
    for index, each in enumerate(sections):
        width = WIDTH * each.n_bytes / total
        title = f"{each.name}: {each.n_bytes:,} bytes at {each.offset:,}"
        parts.append(box(x, 0, max(width, 0.5), 30, f"tone{index % 4}", title))
        if width > 60:
            parts.append(text(x + 8, 20, each.name, "on"))
        x += width
    rows = [
        (
            element("span", element("i", class_=f"chip tone{index % 4}"), element("code", each.name)),
            f"{each.offset:,}",
            f"{each.n_bytes:,}",
            element("code", each.sha256.hex()[:16], title=each.sha256.hex(), class_="quiet"),
        )
        for index, each in enumerate(sections)
    ]
    picture = element("div", drawing(WIDTH, 30, parts, label="sections of the file", class_="strip"))
    return element(
        "div", picture, table(("section", "offset", "bytes", "SHA-256"), rows, numeric=(1, 2)), class_="file"
    )


# -- the arena ---------------------------------------------------------------------


def arena(facts: Facts) -> Child:
    """What each call touches, a line a call: of the largest body, which uses most."""
    plan = max((p for p in facts.plans if p.kind == "body"), key=lambda p: p.rows, default=None)
    total = facts.tables.header.arena_bytes
    if plan is None or not total:
        return paragraph("This artifact needs no arena.")
    n_calls = min(len(plan.calls), MOST_CALLS)
    height = n_calls * ROW
    grid = [
        element("path", d=f"M {GUTTER + ARENA_WIDTH * tick / total:.1f} 0 V {height:.1f}", class_="grid")
        for tick in ticks(total)
    ]
    marks = axis(total, ARENA_WIDTH, height, lambda value: in_bytes(value) if value else "0", GUTTER)
    parts = [touched(facts, plan, index, total) for index in range(n_calls)]
    picture = drawing(
        WIDTH, height + 24, grid, layer_marks(plan, n_calls), parts, marks, label="the arena", class_="strip"
    )
    more = f" (the first {n_calls} of {len(plan.calls)} calls; layers repeat)" if len(plan.calls) > n_calls else ""
    return figure(
        element("div", picture, class_="scroll wide"),
        f"The {plan.name}{more}: from top to bottom the calls in the order they run, from left to right the arena. "
        "A call's bars are the memory it reads and writes; buffers that never live together share a place.",
    )


def touched(facts: Facts, plan: Plan, index: int, total: int) -> list[Markup]:
    """The arena's part in one call's arguments."""
    call = plan.calls[index]
    parts = []
    for argument in facts.tables.arguments_of(facts.tables.calls[call.number]):
        if argument.space == ARENA:
            x, width = GUTTER + ARENA_WIDTH * argument.offset / total, ARENA_WIDTH * argument.n_bytes / total
            place = f"{in_bytes(argument.n_bytes)} at {in_bytes(argument.offset)} of the arena"
            title = f"call {index}: {call.short_kernel}\n{place}"
            parts.append(box(x, index * ROW, max(width, 1.2), ROW - 1.5, f"call {category(call.op)}", title))
    return parts


def layer_marks(plan: Plan, n_calls: int) -> list[Markup]:
    """The number of each layer beside its first call."""
    parts, seen = [], -1
    for index, call in enumerate(plan.calls[:n_calls]):
        if call.layer is not None and call.layer > seen:
            seen = call.layer
            parts.append(text(0, index * ROW + 9, f"layer {seen}", "tick"))
            parts.append(element("path", d=f"M 0 {index * ROW - 1:.1f} H {WIDTH}", class_="grid"))
    return parts


# -- the KV cache --------------------------------------------------------------------


def kv_cache(facts: Facts) -> Child:
    header, cache = facts.tables.header, facts.manifest.get("kv_cache", {})
    if not header.kv_page_bytes:
        return paragraph("This model keeps no cache.")
    rows = [
        ("one token", 1, header.kv_page_bytes // header.page_tokens),
        ("one page", header.page_tokens, header.kv_page_bytes),
        (
            "one sequence, full context",
            header.pages_per_sequence * header.page_tokens,
            header.pages_per_sequence * header.kv_page_bytes,
        ),
    ]
    return (
        figure(
            element("div", kv_drawing(facts), class_="scroll wide"),
            f"Keys and values in {cache.get('dtype', '?')}. A sequence holds whole pages, wherever they are free; "
            "a page holds all layers that keep any, and a layer the keys and values of each head.",
        ),
        table(
            ("room for", "tokens", "bytes"),
            [(name, f"{n:,}", element("span", in_bytes(size), title=f"{size:,} bytes")) for name, n, size in rows],
            numeric=(1, 2),
        ),
    )


def kv_drawing(facts: Facts) -> Markup:
    """Three rows: pages of a sequence, layers of a page, heads of the first layer."""
    header = facts.tables.header
    heads = facts.attribute("kv_num_heads") or 1
    sizes = layer_sizes(header.kv_page_bytes, facts.manifest)
    n_layers, layer_bytes = len(sizes), sizes[0]
    pages = min(header.pages_per_sequence, 64)
    more = "" if pages == header.pages_per_sequence else f", {pages} of them"
    parts: list[Child] = []
    parts += row_of(0, pages, [f"page {i}" for i in range(pages)], "tone0", in_bytes(header.kv_page_bytes))
    parts += row_of(76, n_layers, [f"layer {i}" for i in range(n_layers)], "attention", [in_bytes(n) for n in sizes])
    names = [f"{what} {head}" for head in range(heads) for what in ("K", "V")]
    parts += row_of(152, 2 * heads, names, "linear", in_bytes(layer_bytes / (2 * heads)))
    for y, n, said in (
        (0, pages, f"a sequence: {header.pages_per_sequence} pages of {header.page_tokens} tokens{more}"),
        (76, n_layers, f"a page: {n_layers} layers"),
        (152, 2 * heads, f"a layer: keys and values of {heads} head{'s' * (heads != 1)}"),
    ):
        parts.append(text(6, y + 12, said, "tick"))
        if y < 150:
            path = f"M 0 {y + 50} L 0 {y + 94} M {WIDTH / n:.1f} {y + 50} L {WIDTH} {y + 94}"
            parts.append(element("path", d=path, class_="zoom"))
    return drawing(WIDTH, 204, parts, label="the KV cache: pages, layers, heads", class_="strip")


def row_of(y: float, n: int, names: list[str], class_: str, size: str | list[str]) -> list[Markup]:
    """size: of all, or of each."""
    width = WIDTH / n
    parts = []
    for index, name in enumerate(names):
        said = size if isinstance(size, str) else size[index]
        parts.append(box(index * width, y + 18, width - 1.5, 32, f"cell {class_}", f"{name}: {said}", 2))
        if width > 8 * len(name) + 6:
            parts.append(text(index * width + width / 2, y + 38, name, "on", "middle"))
    return parts
