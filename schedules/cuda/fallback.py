"""Any standard operator on a GPU, slowly and correctly: the loops of schedules/fallback.py, each nest a launch."""

from __future__ import annotations

import functools
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import fallback
from llmc.schedules.fallback import OneNode
from llmc.schedules.rule import Rule

if TYPE_CHECKING:
    from llmc.schedules.cuda.fallback_bind import Bound


def match(call: Call, target: Target) -> OneNode | None:
    return OneNode()


def implement(call: Call, params: OneNode, target: Target) -> Implementation:
    """Raises LlmcError when TVM cannot import the operator, has no loops for it, or needs memory of its own for it."""
    if any(value is not None and value.tiled for value in (*call.inputs, *call.outputs)):
        raise LlmcError(f"no schedule for a GPU takes {call.op} on tiles", place=str(call))
    launches = []
    for index, bound in enumerate(bound_nests(call)):
        key = f"bound_nest({call}, {call.attributes!r}, {index})"
        name = f"{re.sub('[^a-z0-9]+', '_', call.op.lower())}_{short_hash(key)}_{index}"
        kernel = Kernel(name, key, partial(build_nest, call, index), n_threads=bound.n_threads)
        launches.append(Launch(kernel, bound.operands, bound.grid))
    narrow = {i: x for i, x in enumerate(call.inputs) if x and x.constant and x.dtype in ("bf16", "f16")}
    temps = fallback.lower_call(call).temps
    return Implementation(tuple(launches), temps, layouts={index: RowMajor("f32") for index in narrow})


@functools.lru_cache(maxsize=256)
def bound_nests(call: Call) -> tuple[Bound, ...]:
    from llmc.schedules.cuda import fallback_bind  # TVM is imported only when it is needed

    steps = fallback.lower_call(call).steps
    try:
        return tuple(bound for step in steps for bound in fallback_bind.bound_nests(step))
    except LlmcError as error:
        raise LlmcError(f"no schedule for a GPU takes {call.op}: {error.fact}", place=str(call)) from error


def build_nest(call: Call, index: int) -> Any:
    """The PrimFunc of one launch."""
    return bound_nests(call)[index].function


RULES = (Rule("fallback", match, implement),)
