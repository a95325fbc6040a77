"""A schedule: a rule that can say no."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target


def _no_space(call: Call, target: Target) -> Iterable[Any]:
    return ()


@dataclass(frozen=True)
class Rule:
    """How one family of calls is executed.

    match: the parameters this rule would use for a call (a frozen dataclass of named tiles), or None: not mine.
    implement: the implementation with these parameters.
    space: other parameters worth measuring; nothing for a rule with nothing to tune.
    """

    name: str
    match: Callable[[Call, Target], Any | None]
    implement: Callable[[Call, Any, Target], Implementation]
    space: Callable[[Call, Target], Iterable[Any]] = _no_space
