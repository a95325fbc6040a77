"""Blocks that begin beside those of the kernel in front find room there: of a multiprocessor of Hopper, on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, Launch
from llmc.compiler.sampling import choose_call
from llmc.compiler.target import Target
from llmc.schedules.cuda.attention import rule as attention
from llmc.schedules.cuda.attention import stream as attention_stream
from llmc.schedules.cuda.attention.rule import Stream
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.schedules.cuda.sass import Sass
from tests.schedules.cuda.test_deferred_norm import deferred_call, moments_call, stored_as
from tests.schedules.cuda.test_sass import LLAMA, REGISTERS, compiled, unavailable

HOPPER = Target("cuda", "sm_90a")
SHARED_BYTES = 228 << 10

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "all is here")


def check_room(launches: Sequence[Launch]) -> list[Sass]:
    """Whether a block of each finds room on one multiprocessor, whose registers a warp has in lots of 256."""
    found = [compiled(launch, HOPPER.level)[0] for launch in launches]
    pairs = list(zip(launches, found, strict=True))
    assert sum(launch.kernel.shared_bytes + sass.shared_bytes for launch, sass in pairs) <= SHARED_BYTES
    assert sum(launch.kernel.n_threads * -(-sass.registers // 8) * 8 for launch, sass in pairs) <= REGISTERS
    assert not any(sass.count("LDL") + sass.count("STL") for sass in found), "registers are spilled"
    return found


def product(call: Call, wanted: Callable[[Gemv], bool]) -> Launch:
    """Of a product in int4, the first candidate of that kind."""
    call = stored_as(call, "i4")
    params = next(each for each in linear.space(call, HOPPER) if isinstance(each, Gemv) and wanted(each))
    (launch,) = linear.implement(call, params, HOPPER).launches
    return launch


def attending(m: int, wanted: Callable[[Stream], bool]) -> Launch:
    call = LLAMA.call(m)
    params = next(each for each in attention.space(call, HOPPER) if isinstance(each, Stream) and wanted(each))
    (launch,) = attention.implement(call, params, HOPPER).launches
    return launch


def test_attention_of_one_token_begins_beside_the_product_in_front() -> None:
    """What it reads ahead of queries it asks for before the wait, and its page table with its position."""
    in_front = product(deferred_call("RMSNormLinear", 1, 12288, 4096, columns=16), lambda p: p.digits and not p.kept)
    beside = attending(1, lambda params: params.ahead > 0)
    assert beside.grid <= 132
    _, sass = check_room([in_front, beside])
    last, wait = (len(sass.listed) - sass.listed[::-1].index(name) for name in ("CCTL.E.PF2", "ACQBULK"))
    assert sass.listed[: sass.first("VOTE")].count("LDG.E") == 2
    assert sass.first("PREEXIT") < sass.first("LDGSTS") < last < wait


def test_the_output_of_8_tokens_begins_beside_two_blocks_of_attention() -> None:
    attends = attending(8, lambda params: params.slots == attention_stream.EARLY_COPIES)
    assert 132 < attends.grid <= 2 * 132
    behind = product(moments_call(8, 4096, 4096, columns=16), lambda params: params.warps == 8)
    check_room([attends, attends, behind])


def test_the_choice_of_a_token_begins_beside_the_product_in_front() -> None:
    """In bf16, whose ring leaves 9 KB; of the largest vocabulary, which asks for most at once."""
    head = schedules.implement(deferred_call("RMSNormLinear", 1, 32000, 4096), HOPPER).launches[0]
    check_room([head, schedules.implement(choose_call(1, 262144), HOPPER).launches[0]])
