"""What the kernels of quantised layers need from the CPU beyond float32 vectors, as LLVM code that is inlined.

llmc_dot4(c, w, x)      c[i] + the sum of four products of bytes, w unsigned and x signed, in each of 16 lanes:
                        one vpdpbusd where there is VNNI, else two vpmaddwd on widened bytes; on ARM usdot, or sdot of
                        w - 128 and another one of 1, which sums x; exact in all
llmc_halves(h)          16 f16 as 16 float32
llmc_upper_halves(h)    16 bf16 as 16 float32
llmc_e2m1(w)            for each byte, the number of an e2m1: twice its value, plus 12
llmc_times(a, b)        the product, rounded: LLVM would make one fma of it and an addition that it happens to see,
                        and not of one in the next loop
llmc_bytes(v)           the low bytes of 16 int32, as 4 int32
llmc_largest, llmc_total    the maximum and the sum of 16 int32
llmc_ask(p)             asks for the cache line at p: with VNNI between the loads it stands between (lanes.py)
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.cpu import neon
from llmc.schedules.cpu.lanes import ASK
from llmc.schedules.cpu.linear.quant_layout import ZERO
from llmc.schedules.mxfp4_words import E2M1

TIMES = """
declare <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float>)
define linkonce_odr <16 x float> @llmc_times(<16 x float> %a, <16 x float> %b) alwaysinline nounwind {
  %x = fmul <16 x float> %a, %b
  %r = call <16 x float> @llvm.arithmetic.fence.v16f32(<16 x float> %x)
  ret <16 x float> %r }
"""

_SHARED = """
target triple = "x86_64-unknown-linux-gnu"
declare i32 @llvm.vector.reduce.smax.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define linkonce_odr <16 x float> @llmc_halves(<8 x i32> %h) alwaysinline nounwind {
  %x = bitcast <8 x i32> %h to <16 x half>
  %r = fpext <16 x half> %x to <16 x float>
  ret <16 x float> %r }
define linkonce_odr <4 x i32> @llmc_bytes(<16 x i32> %v) alwaysinline nounwind {
  %x = trunc <16 x i32> %v to <16 x i8>
  %r = bitcast <16 x i8> %x to <4 x i32>
  ret <4 x i32> %r }
define linkonce_odr i32 @llmc_largest(<16 x i32> %v) alwaysinline nounwind {
  %r = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %v)
  ret i32 %r }
define linkonce_odr i32 @llmc_total(<16 x i32> %v) alwaysinline nounwind {
  %r = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %v)
  ret i32 %r }
"""

_VNNI = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @llmc_dot4(<16 x i32> %c, <16 x i32> %w, <16 x i32> %x) alwaysinline nounwind {
  %a = bitcast <16 x i32> %w to <64 x i8>
  %b = bitcast <16 x i32> %x to <64 x i8>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %c, <64 x i8> %a, <64 x i8> %b)
  ret <16 x i32> %r }
"""


def _widened(lanes: int, multiply_add: str) -> str:
    """llmc_dot4 on registers of `lanes` int32: even bytes and odd bytes of w and x as 16-bit numbers, then vpmaddwd."""
    words, shorts = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
    eights = ", ".join(["i16 8"] * (2 * lanes))
    bytes_ = ", ".join(["i16 255"] * (2 * lanes))
    part = f"""
declare {words} @{multiply_add}({shorts}, {shorts})
define linkonce_odr {words} @llmc_dot4_part({words} %c, {words} %w, {words} %x) alwaysinline nounwind {{
  %a = bitcast {words} %w to {shorts}
  %b = bitcast {words} %x to {shorts}
  %a0 = and {shorts} %a, <{bytes_}>
  %a1 = lshr {shorts} %a, <{eights}>
  %b2 = shl {shorts} %b, <{eights}>
  %b0 = ashr {shorts} %b2, <{eights}>
  %b1 = ashr {shorts} %b, <{eights}>
  %even = call {words} @{multiply_add}({shorts} %a0, {shorts} %b0)
  %odd = call {words} @{multiply_add}({shorts} %a1, {shorts} %b1)
  %sum = add {words} %even, %odd
  %r = add {words} %c, %sum
  ret {words} %r }}
"""
    if lanes == 16:
        return part.replace("@llmc_dot4_part", "@llmc_dot4")
    low, high, both = (", ".join(f"i32 {i}" for i in range(*ends)) for ends in ((0, 8), (8, 16), (0, 16)))
    halves = "".join(
        f"  %{v}{half} = shufflevector <16 x i32> %{v}, <16 x i32> poison, <8 x i32> <{lanes_of}>\n"
        for v in "cwx"
        for half, lanes_of in (("l", low), ("h", high))
    )
    return f"""{part}
define linkonce_odr <16 x i32> @llmc_dot4(<16 x i32> %c, <16 x i32> %w, <16 x i32> %x) alwaysinline nounwind {{
{halves}  %l = call {words} @llmc_dot4_part({words} %cl, {words} %wl, {words} %xl)
  %h = call {words} @llmc_dot4_part({words} %ch, {words} %wh, {words} %xh)
  %r = shufflevector {words} %l, {words} %h, <16 x i32> <{both}>
  ret <16 x i32> %r }}
"""


_DOTS = {
    "vnni": _VNNI,
    "avx512": _widened(16, "llvm.x86.avx512.pmaddw.d.512"),
    "avx2": _widened(8, "llvm.x86.avx2.pmadd.wd"),
    "usdot": neon.dot4("usdot"),
    "sdot": neon.dot4("sdot"),
}


def llvm_code(dot: str) -> str:
    """The functions above, for a kernel's `pragma_import_llvm`."""
    return _SHARED + TIMES + _DOTS[dot] + (ASK if dot == "vnni" else neon.ASK)


def e2m1_code(dot: str) -> str:
    """The functions that mxfp4 takes besides: one table of 16 bytes, looked up in each 16 bytes of a register."""
    lanes, name = (64, "llvm.x86.avx512.pshuf.b.512") if dot != "avx2" else (32, "llvm.x86.avx2.pshuf.b")
    numbers = [ZERO["m4"] + sign * code for sign in (1, -1) for code in E2M1]
    bytes_, words = f"<{lanes} x i8>", f"<{lanes // 4} x i32>"
    table = ", ".join(f"i8 {number}" for number in numbers * (lanes // 16))
    if dot in ("usdot", "sdot"):
        return _UPPER_HALVES + neon.e2m1(numbers)
    part = f"""
declare {bytes_} @{name}({bytes_}, {bytes_})
define linkonce_odr {words} @llmc_e2m1_part({words} %w) alwaysinline nounwind {{
  %i = bitcast {words} %w to {bytes_}
  %b = call {bytes_} @{name}({bytes_} <{table}>, {bytes_} %i)
  %r = bitcast {bytes_} %b to {words}
  ret {words} %r }}
"""
    if lanes == 64:
        return _UPPER_HALVES + part.replace("@llmc_e2m1_part", "@llmc_e2m1")
    low, high, both = (", ".join(f"i32 {i}" for i in range(*ends)) for ends in ((0, 8), (8, 16), (0, 16)))
    return f"""{_UPPER_HALVES}{part}
define linkonce_odr <16 x i32> @llmc_e2m1(<16 x i32> %w) alwaysinline nounwind {{
  %wl = shufflevector <16 x i32> %w, <16 x i32> poison, <8 x i32> <{low}>
  %wh = shufflevector <16 x i32> %w, <16 x i32> poison, <8 x i32> <{high}>
  %l = call {words} @llmc_e2m1_part({words} %wl)
  %h = call {words} @llmc_e2m1_part({words} %wh)
  %r = shufflevector {words} %l, {words} %h, <16 x i32> <{both}>
  ret <16 x i32> %r }}
"""


_UPPER_HALVES = """
define linkonce_odr <16 x float> @llmc_upper_halves(<8 x i32> %h) alwaysinline nounwind {
  %x = bitcast <8 x i32> %h to <16 x i16>
  %y = zext <16 x i16> %x to <16 x i32>
  %z = shl <16 x i32> %y, splat (i32 16)
  %r = bitcast <16 x i32> %z to <16 x float>
  ret <16 x float> %r }
"""


def e2m1(words: Any) -> Any:
    return T.call_extern("int32x16", "llmc_e2m1", words)


def upper_halves(words: Any) -> Any:
    return T.call_extern("float32x16", "llmc_upper_halves", words)


def dot4(c: Any, w: Any, x: Any) -> Any:
    return T.call_extern("int32x16", "llmc_dot4", c, w, x)


def times(a: Any, b: Any) -> Any:
    return T.call_extern("float32x16", "llmc_times", a, b)


def halves(words: Any) -> Any:
    return T.call_extern("float32x16", "llmc_halves", words)


def low_bytes(values: Any) -> Any:
    return T.call_extern("int32x4", "llmc_bytes", values)


def largest(values: Any) -> Any:
    return T.call_extern("int32", "llmc_largest", values)


def total(values: Any) -> Any:
    return T.call_extern("int32", "llmc_total", values)
