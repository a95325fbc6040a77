"""HTML and SVG as nested calls.  Text is escaped; what `element` returns is not escaped again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias

VOID = {"meta", "br", "wbr"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | int | Markup | Iterable[Child] | None"


def element(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """<name attribute="…">children</name>.  class_ is class, font_size is font-size; None leaves out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(written(children))
    if not inner and (name in VOID or name in ("rect", "path", "line", "circle", "polyline")):
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{inner}</{name}>")


def written(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str | int):
            yield escape(printable(str(child)), quote=False)
        else:
            yield from written(child)


def number(value: str | float) -> str:
    """Coordinates to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """What no markup may hold, and no reader should get from a file from anywhere, is replaced."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def code(name: str, title: str | None = None) -> Markup:
    """A name in the type of programs, which may be broken after an underscore or a dot."""
    parts = re.split(r"(?<=[_.])", name)
    return element("code", [(part, element("wbr") if part is not parts[-1] else None) for part in parts], title=title)


def drawing(width: float, height: float, *children: Child, label: str, class_: str = "") -> Markup:
    """An SVG that shrinks with the page.  label: what it shows, for those who cannot see it."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {number(float(width))} {number(float(height))}",
        width=float(width),
        height=float(height),
        role="img",
        aria_label=label,
        class_=class_ or None,
    )


def box(x: float, y: float, width: float, height: float, class_: str, title: str = "", round_: float = 0) -> Markup:
    """A rectangle; title: what a pointer over it says."""
    about = element("title", title) if title else None
    return element(
        "rect",
        about,
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        rx=float(round_) if round_ else None,
        class_=class_,
    )


def text(x: float, y: float, said: str, class_: str = "", anchor: str | None = None) -> Markup:
    return element("text", said, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor)


def table(
    titles: Sequence[Child], rows: Iterable[Sequence[Child]], *, numeric: Sequence[int] = (), class_: str = ""
) -> Markup:
    """A table that scrolls on its own when it is wider than the page.  numeric: columns set to the right."""

    def cell(name: str, index: int, child: Child) -> Markup:
        return element(name, child, class_="number" if index in numeric else None)

    head = element("thead", element("tr", [cell("th", i, title) for i, title in enumerate(titles)]))
    body = element("tbody", [element("tr", [cell("td", i, child) for i, child in enumerate(row)]) for row in rows])
    return element("div", element("table", head, body, class_=class_ or None), class_="scroll")


def section(anchor: str, title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children, id=anchor)


def figure(picture: Child, caption: Child, class_: str | None = None) -> Markup:
    return element("figure", picture, element("figcaption", caption), class_=class_)


def paragraph(*children: Child) -> Markup:
    return element("p", *children)
