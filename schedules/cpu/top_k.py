"""The largest elements of each row, and the groups of experts that have them: what routers ask for.

    TopK(x, k)                  the k largest of each row and where they are; of equals the first comes first
    llmc.KeepGroups(scores)     the scores of the best groups, `fill` elsewhere

One launch (top_k_kernels.py), one row a unit: k passes over a row that lies in the first level cache, k E comparisons.
A token's choice depends on its own row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

MOST_GROUPS = 128
"""Their sums lie on the kernel's stack."""


@dataclass(frozen=True)
class TopK:
    """The k largest of `columns` elements in each of `rows` rows."""

    rows: int
    columns: int
    k: int

    def __str__(self) -> str:
        return "row by row"


@dataclass(frozen=True)
class Groups:
    """`rows` rows of `columns` scores in `count` groups; `kept` stay, by the sum of the `best` largest of each."""

    rows: int
    columns: int
    count: int
    kept: int
    best: int
    fill: float

    def __str__(self) -> str:
        return "row by row"

    @property
    def size(self) -> int:
        return self.columns // self.count


def match_top_k(call: Call, target: Target) -> TopK | None:
    if call.op != "TopK" or not call.attribute("largest", 1):
        return None
    x, k = call.inputs[0], call.attribute("input.1")
    if x is None or x.dtype != "f32" or x.constant or not k or call.outputs[1].dtype != "i64":
        return None
    if call.attribute("axis", -1) not in (-1, len(x.shape) - 1) or not 0 < k[0] <= x.shape[-1]:
        return None
    return TopK(prod(x.shape[:-1]), x.shape[-1], k[0])


def implement_top_k(call: Call, top: TopK, target: Target) -> Implementation:
    operands = (Operand("input", 0), Operand("output", 0), Operand("output", 1))
    n_bytes = top.rows * (4 * top.columns + 12 * top.k)
    return one_launch("top_k", build_top_k, top, operands, n_bytes, top.rows * top.columns * top.k)


def match_groups(call: Call, target: Target) -> Groups | None:
    if call.op != "llmc.KeepGroups":
        return None
    scores = call.inputs[0]
    count, kept, best = (call.attribute(name) for name in ("num_groups", "kept", "best"))
    if scores is None or scores.dtype != "f32" or scores.shape[-1] % count or count > MOST_GROUPS:
        return None
    groups = Groups(scores.shape[0], scores.shape[-1], count, kept, best, float(call.attribute("fill")))
    return groups if 0 < kept <= count and 0 < best <= groups.size else None


def implement_groups(call: Call, groups: Groups, target: Target) -> Implementation:
    n_operations = groups.rows * (groups.columns * groups.best + groups.count * groups.kept)
    operands = (Operand("input", 0), Operand("output", 0))
    return one_launch("keep_groups", build_groups, groups, operands, 8 * groups.rows * groups.columns, n_operations)


def one_launch(
    kind: str, build: Any, params: TopK | Groups, operands: tuple[Operand, ...], n_bytes: int, n_operations: int
) -> Implementation:
    key = f"{build.__name__}({params!r})"
    name = f"{kind}_{params.rows}x{params.columns}_{short_hash(key)}"
    return Implementation(
        (Launch(Kernel(name, key, partial(build, params)), operands, params.rows, n_bytes, n_operations),)
    )


def build_top_k(top: TopK) -> Any:
    from llmc.schedules.cpu import top_k_kernels  # TVM is imported only when something is compiled

    return top_k_kernels.top_k_kernel(top)


def build_groups(groups: Groups) -> Any:
    from llmc.schedules.cpu import top_k_kernels

    return top_k_kernels.groups_kernel(groups)


RULES = (Rule("top_k", match_top_k, implement_top_k), Rule("keep_groups", match_groups, implement_groups))
