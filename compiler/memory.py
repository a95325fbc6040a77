"""Lay buffers out in one arena: those that never live together share memory.

Greedy by size (Pisarchyk & Lee 2020, arXiv:2001.03288): the largest buffer first, each at the lowest offset where it
overlaps no buffer that is alive at the same time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 64


@dataclass(frozen=True)
class Buffer:
    """`n_bytes` needed from call `first` to call `last`, both included."""

    name: Hashable
    n_bytes: int
    first: int
    last: int


def aligned(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def lay_out(buffers: Sequence[Buffer], start: int = 0) -> tuple[dict[Any, int], int]:
    """Offsets by name, none below `start`, and the end of the arena, in bytes."""
    offsets: dict[Any, int] = {}
    placed: list[tuple[int, int, Buffer]] = []  # (offset, end, buffer), sorted by offset
    for buffer in sorted(buffers, key=lambda b: (-b.n_bytes, b.first)):
        offset = start
        for other_offset, other_end, other in placed:
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if offset + buffer.n_bytes <= other_offset:
                break
            offset = max(offset, other_end)
        offsets[buffer.name] = offset
        placed.append((offset, offset + aligned(buffer.n_bytes), buffer))
        placed.sort(key=lambda entry: entry[0])
    return offsets, max((end for _, end, _ in placed), default=start)
