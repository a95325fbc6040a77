"""Loops that TVM wrote for one task, spread over a GPU's blocks and threads."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import IRModule

from llmc.compiler.kernel import Operand
from llmc.runtime.errors import LlmcError
from llmc.schedules.fallback import Step

THREADS = 256


@dataclass(frozen=True)
class Bound:
    """A PrimFunc over `operands` whose loops are bound to `grid` blocks of `n_threads` threads."""

    function: Any
    operands: tuple[Operand, ...]
    grid: int
    n_threads: int


def bound_nests(step: Step) -> list[Bound]:
    """Each loop nest of a step as a launch of its own, in order: what one writes lies in memory before the next reads.

    A step that is more than such nests stays whole and runs on one thread.  Raises LlmcError where it keeps arrays of
    its own: whole numbers of the graph, written out.
    """
    root = step.function.body.block
    if root.alloc_buffers:
        raise LlmcError("TVM writes numbers of this operator into memory of its own, which a GPU's kernels do not have")
    nests = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    blocks = [innermost(nest) for nest in nests]
    if None in blocks:
        return [on_one_thread(step.function, step.operands)]
    return [spread(*over_its_operands(step, nest, block)) for nest, block in zip(nests, blocks, strict=True)]


def innermost(nest: Any) -> Any:
    """The block inside a nest of loops; None if the statement is not such a nest."""
    while isinstance(nest, tirx.For):
        nest = nest.body
    return nest.block if isinstance(nest, s_tir.SBlockRealize) else None


def over_its_operands(step: Step, nest: Any, block: Any) -> tuple[Any, tuple[Operand, ...]]:
    """A function of one nest, whose parameters are the buffers that it touches."""
    touched = [region.source for region in (*block.reads, *block.writes)]
    buffers = step.function.params[: len(step.operands)]
    kept = [
        (buffer, operand)
        for buffer, operand in zip(buffers, step.operands, strict=True)
        if any(buffer.same_as(other) for other in touched)
    ]
    return in_root(nest, [buffer for buffer, _ in kept]), tuple(operand for _, operand in kept)


def in_root(body: Any, parameters: list[Any]) -> Any:
    block = s_tir.SBlock([], [], [], "root", body)
    function = tirx.PrimFunc(parameters, s_tir.SBlockRealize([], True, block))
    return function.with_attr({"s_tir": True, "tirx.noalias": True})


def spread(function: Any, operands: tuple[Operand, ...]) -> Bound:
    """The outer loops whose rounds are independent, over blocks of THREADS threads."""
    schedule = s_tir.Schedule(IRModule({"main": function}))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    loops = schedule.get_loops(block)
    kinds = [iter_var.iter_type for iter_var in schedule.get(block).iter_vars]
    n_spatial = next((i for i, kind in enumerate(kinds) if kind != tirx.IterVar.DataPar), len(kinds))
    if not n_spatial or len(kinds) != len(loops):
        return on_one_thread(function, operands)
    extent = prod(int(schedule.get(loop).extent) for loop in loops[:n_spatial])
    block_loop, thread_loop = schedule.split(schedule.fuse(*loops[:n_spatial]), [None, THREADS])
    schedule.bind(block_loop, "blockIdx.x")
    schedule.bind(thread_loop, "threadIdx.x")
    return Bound(schedule.mod["main"], operands, ceil(extent / THREADS), THREADS)


def on_one_thread(function: Any, operands: tuple[Operand, ...]) -> Bound:
    buffers = function.params[: len(operands)]
    one = tirx.IterVar(None, tirx.Var("thread", "int32"), tirx.IterVar.ThreadIndex, "threadIdx.x")
    body = tirx.AttrStmt(one, "thread_extent", tirx.const(1, "int32"), function.body)
    made = tirx.PrimFunc(list(buffers), body).with_attr({"s_tir": True, "tirx.noalias": True})
    return Bound(made, operands, 1, 1)
