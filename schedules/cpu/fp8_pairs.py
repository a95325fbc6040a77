"""fp8 weights in registers, as LLVM code that is inlined: words of four codes to pairs of bf16.

llmc_fp8_first(w), llmc_fp8_second(w)   the first two and the second two codes of 16 words (fp8_words.py: in the places
                                        of bf16), as pairs of bf16 that are 2**-8 of what they say

A code in its place is a bf16 whose exponent is too small; adding to it is exact, unless the code is subnormal, or zero.
Few are: of normally distributed rows one in ten thousand.  32 codes of which some are take the other way, in which f16
are widened to float32 by an instruction to which subnormal f16 are numbers like others.
"""

from __future__ import annotations

from typing import Any, Literal

from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import AVX512_BF16
from llmc.schedules.cpu.linear.quant_dot import TIMES

_UPPER_HALVES = ", ".join(f"i32 {2 * i + 1}" for i in range(32))


def _words(value: int) -> str:
    return f"<{', '.join([f'i32 {value}'] * 16)}>"


def _halves(value: int) -> str:
    """The same 16 bits in both halves of all words."""
    return _words(value * 0x10001)


_PAIRS = f"""
define linkonce_odr <16 x i32> @llmc_fp8_pairs(<16 x i32> %raw) alwaysinline nounwind {{
  %e = and <16 x i32> %raw, {_halves(0x0780)}
  %exponents = bitcast <16 x i32> %e to <32 x i16>
  %subnormal = icmp eq <32 x i16> %exponents, zeroinitializer
  %some = bitcast <32 x i1> %subnormal to i32
  %none = icmp eq i32 %some, 0
  br i1 %none, label %normal, label %mixed
normal:
  %n = add <16 x i32> %raw, {_halves(0x3800)}
  br label %end
mixed:
  %up = shl <16 x i32> %raw, {_words(3)}
  %size = and <16 x i32> %up, {_halves(0x3F80)}
  %sign = and <16 x i32> %raw, {_halves(0x8000)}
  %both = or <16 x i32> %size, %sign
  %h = bitcast <16 x i32> %both to <32 x half>
  %x = fpext <32 x half> %h to <32 x float>
  %b = bitcast <32 x float> %x to <64 x i16>
  %u = shufflevector <64 x i16> %b, <64 x i16> poison, <32 x i32> <{_UPPER_HALVES}>
  %w = bitcast <32 x i16> %u to <16 x i32>
  br label %end
end:
  %r = phi <16 x i32> [ %n, %normal ], [ %w, %mixed ]
  ret <16 x i32> %r }}
define linkonce_odr <16 x i32> @llmc_fp8_first(<16 x i32> %w) alwaysinline nounwind {{
  %raw = and <16 x i32> %w, {_halves(0x87F0)}
  %r = call <16 x i32> @llmc_fp8_pairs(<16 x i32> %raw)
  ret <16 x i32> %r }}
define linkonce_odr <16 x i32> @llmc_fp8_second(<16 x i32> %w) alwaysinline nounwind {{
  %up = shl <16 x i32> %w, {_words(4)}
  %down = lshr <16 x i32> %w, {_words(4)}
  %a = and <16 x i32> %up, {_halves(0x80F0)}
  %b = and <16 x i32> %down, {_halves(0x0700)}
  %raw = or <16 x i32> %a, %b
  %r = call <16 x i32> @llmc_fp8_pairs(<16 x i32> %raw)
  ret <16 x i32> %r }}
"""


def llvm_code(fp8: bool, dpbf16: bool) -> str:
    """For a product's `pragma_import_llvm`: of fp8 weights, of pairs of bf16 in one instruction."""
    return (AVX512_BF16 if dpbf16 else "") + ((TIMES + _PAIRS) if fp8 else "")


def pairs(words: Any, half: Literal["first", "second"]) -> Any:
    return T.call_extern("int32x16", f"llmc_fp8_{half}", words)
