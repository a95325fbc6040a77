"""How tokens are chosen on a GPU: a launch at the end of every head, and plans that draw.

    head of R rows       … -> logits [R, V] -> llmc.ChooseTokens -> tokens [R]            the most likely
    sampler of R rows    logits [R of the largest head, V], draws [R] -> llmc.DrawTokens -> tokens [R]

Tokens go to three places: `chosen`, whence they can be copied to any row of the next step; `next`, which are that
step's own if its rows are the same; and `told`, memory of the host. So nothing need be copied between two steps.

On a CPU the runtime does this itself (runtime/src/sample.c), which says what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.plan import SAMPLER, Choice, PlannedCall, StepPlan
from llmc.runtime.format import DRAW_BYTES, SPACES, Argument

SPACE_OF = {
    ("input", 0): "logits",
    ("input", 1): "draws",
    ("output", 0): "chosen",
    ("output", 1): "next",
    ("output", 2): "told",
}


def choose_call(n_rows: int, n_vocab: int) -> Call:
    """logits f32[R, V] -> where each row is largest, i32[R]: the first among equals, -1 where none is a number.

    Three times: the second has 0 instead of -1.
    """
    return Call("llmc.ChooseTokens", (TensorType((n_rows, n_vocab), "f32"),), (TensorType((n_rows,), "i32"),) * 3)


def draw_call(n_rows: int, n_logits: int, n_vocab: int) -> Call:
    """logits f32[rows, V], draws (llmc_draw_record) u8[R, 32] -> the token drawn for each, i32[R], as choose_call."""
    logits, draws = TensorType((n_logits, n_vocab), "f32"), TensorType((n_rows, DRAW_BYTES), "u8")
    return Call("llmc.DrawTokens", (logits, draws), (TensorType((n_rows,), "i32"),) * 3)


class Sampling:
    """Adds these launches to plans.  implement, kernel_index: the planner's."""

    def __init__(self, implement: Callable[[Call], Implementation], kernel_index: Callable[[Kernel], int]) -> None:
        self.implement, self.kernel_index = implement, kernel_index
        self.choices: list[Choice] = []

    def after(self, head: StepPlan, n_vocab: int) -> StepPlan:
        """The head with the choice of the most likely tokens behind it."""
        calls = self.calls(head.kind, head.n_rows, choose_call(head.n_rows, n_vocab))
        return StepPlan(head.kind, head.n_rows, (*head.calls, *calls))

    def samplers(self, sizes: Sequence[int], n_vocab: int) -> list[StepPlan]:
        """A sampler for each number of rows."""
        return [
            StepPlan(SAMPLER, n_rows, self.calls(SAMPLER, n_rows, draw_call(n_rows, max(sizes), n_vocab)))
            for n_rows in sizes
        ]

    def calls(self, kind: int, n_rows: int, call: Call) -> tuple[PlannedCall, ...]:
        implementation = self.implement(call)
        name = call.op.removeprefix("llmc.")
        self.choices.append(Choice(kind, n_rows, call, implementation, (name,)))

        def argument(operand: Operand) -> Argument:
            value = (call.inputs if operand.kind == "input" else call.outputs)[operand.index]
            assert value is not None
            return Argument(SPACES.index(SPACE_OF[operand.kind, operand.index]), 0, value.n_bytes)

        def planned(launch: Launch) -> PlannedCall:
            arguments = tuple(map(argument, launch.operands))
            kernel = self.kernel_index(launch.kernel)
            return PlannedCall(kernel, launch.grid, arguments, name, launch.n_bytes, launch.n_operations)

        return tuple(map(planned, implementation.launches))
