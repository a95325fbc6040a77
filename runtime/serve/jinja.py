"""Jinja as Hugging Face's libraries set it up for chat templates, within bounds.

A template is a program of others'.  Jinja's sandbox keeps it from the interpreter; here it is kept from going on, and
from growing, without end: by accident it may, and a step of the server waits for whoever holds the interpreter.  What a
single call of a filter or of a text's own method makes ("a"|center(2**31)) is not bounded.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.nodes import Concat, Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 10.0
"""Processor time for one prompt."""
MOST_CHARACTERS = 1 << 25
"""Characters of a text that a template makes, and items of a list; a request has at most 2^25 bytes."""
MOST_BITS = 1 << 16
"""Bits of a number that it makes."""
WIDE = re.compile(r"%[-#0 +.\d]*(?:\d{7}|\*)")
"""Widths in what "%" formats that make a long text of nothing."""


class Generator(CodeGenerator):
    """Looks at the clock wherever a block of statements begins: whatever goes on for ever comes by there."""

    def blockvisit(self, nodes: Iterable[Node], frame: Frame) -> None:
        self.writeline("environment.look_at_clock()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which training finds the answers: what stands between."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def joined(pieces: Iterable[str]) -> str:
    """Raises ValueError where they are too long together, before they are put together."""
    kept, n = [], 0
    for piece in pieces:
        kept.append(piece)
        n += len(piece)
        check_length(n)
    return "".join(kept)


class Templates(ImmutableSandboxedEnvironment):
    """Makes templates; raises ValueError, while one is rendered, where it is out of bounds."""

    code_generator_class = Generator
    concat = staticmethod(joined)
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
        self._clock = threading.local()
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = now
        del self.globals["lipsum"]

    def start_clock(self) -> None:
        """Start counting the processor time of the thread that is about to render."""
        self._clock.end = time.thread_time() + MOST_SECONDS

    def look_at_clock(self) -> None:
        if time.thread_time() > self._clock.end:
            raise ValueError(f"it has not come to an end in {MOST_SECONDS:g} s")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and WIDE.search(left):
            raise ValueError("a text of such a width is too long")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * right)
        if operator == "*":
            check_product(left, right)
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, str | list | tuple):
            check_length(len(result))
        return result


def check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    for many, times in ((left, right), (right, left)):
        if isinstance(many, Sequence) and isinstance(times, int):
            check_length(len(many) * times)


def check_length(n: int) -> None:
    if n > MOST_CHARACTERS:
        raise ValueError(f"what it writes is longer than {MOST_CHARACTERS >> 20} million characters")


def check_bits(n: int) -> None:
    if n > MOST_BITS:
        raise ValueError(f"a number has more than {MOST_BITS} bits")


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON, as templates want it: Jinja's own filter would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: str) -> None:
    raise ValueError(message)


def now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
