"""The next token from rows of logits, on a GPU: include/choose.cuh, sample.cuh.

    llmc.ChooseTokens   logits [R, V] -> i32 [R], three times                   the most likely token of each row
    llmc.DrawTokens     logits [R, V], draws u8 [S, 32] -> i32 [S], three times   tokens drawn as `draws` say

Neither is an operator of the graph: compiler/sampling.py asks for them.  A row of `draws` is an llmc_draw_record of
runtime/src/format.h.  -1: no logit of the row is a number; the second result, which an embedding reads, has 0 there.
"""

from __future__ import annotations

from functools import partial

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

THREADS = 1024
CHOOSER_BLOCKS, CHOOSER_THREADS, FOUND_BYTES = 8, 128, 33 * 16
"""Blocks of a cluster that choose the most likely token of a row together, threads of each, and their shared memory."""
TOKENS = tuple(Operand("output", index) for index in range(3))
CHOOSE, DRAW = "llmc.ChooseTokens", "llmc.DrawTokens"
PASSES = 15
"""Times that a drawing block reads its row when both top-k and top-p cut."""


def match(op: str, call: Call, target: Target) -> int | None:
    """Columns of the logits."""
    logits = call.inputs[0] if call.op == op else None
    return None if logits is None else logits.shape[1]


def implement_choose(call: Call, n_vocab: int, target: Target) -> Implementation:
    """A cluster of blocks for each row, where there are clusters; else a block."""
    together = target.arch >= 90
    call_name, blocks = ("choose_together", CHOOSER_BLOCKS) if together else ("choose", 1)
    name = f"{call_name}_{n_vocab}"
    parameters = f"{name}(const float *logits, int *chosen, int *next, int *told)"
    n_threads, shared_bytes = (CHOOSER_THREADS, FOUND_BYTES) if together else (THREADS, 0)
    body = f"{call_name}<{n_vocab}>(logits, {{chosen, next, told}})"
    source = partial(sample_source, parameters, body, n_threads, blocks)
    kernel = Kernel(name, f"{call_name}_source({n_vocab})", source, n_threads, shared_bytes, dependent=True)
    n_rows = call.outputs[0].shape[0]
    return Implementation((Launch(kernel, (Operand("input", 0), *TOKENS), blocks * n_rows, 4 * n_rows * n_vocab),))


def implement_draw(call: Call, n_vocab: int, target: Target) -> Implementation:
    """One block a draw."""
    name = f"draw_{n_vocab}"
    parameters = f"{name}(const float *logits, const Draw *draws, int *chosen, int *next, int *told)"
    source = partial(sample_source, parameters, f"draw<{n_vocab}>(logits, draws, {{chosen, next, told}})")
    kernel = Kernel(name, f"draw_source({n_vocab})", source, n_threads=THREADS, dependent=True)
    operands = (Operand("input", 0), Operand("input", 1), *TOKENS)
    n_draws = call.outputs[0].shape[0]
    return Implementation((Launch(kernel, operands, n_draws, 4 * n_draws * n_vocab * PASSES),))


def sample_source(declaration: str, body: str, n_threads: int = THREADS, blocks: int = 1) -> str:
    """The kernel's CUDA C++.  blocks: of a cluster."""
    clusters = f"__cluster_dims__({blocks}, 1, 1) " if blocks > 1 else ""
    return (
        '#include "sample.cuh"\n\n'
        f'extern "C" __global__ void {clusters}__launch_bounds__({n_threads}, 1) {declaration} {{\n    {body};\n}}\n'
    )


RULES = (
    Rule("choose_tokens", partial(match, CHOOSE), implement_choose),
    Rule("draw_tokens", partial(match, DRAW), implement_draw),
)
