"""ARM's NEON, in which kernels are those of AVX2: it has twice as many registers of half the size.  Here is what LLVM
has no common word for, as code that is inlined: products of bytes and of int16, and bytes looked up in a table."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.target import Target

INLINED = "alwaysinline nounwind"

ASK = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr void @llmc_ask(ptr %p) {INLINED} {{
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
  ret void }}
"""
"""llmc_ask(p) of linear/quant_dot.py."""


def is_target() -> bool:
    """Whether the target that a kernel is being built for is one of ARM."""
    target = Target.current(allow_none=True)
    return target is not None and str(target.attrs.get("mtriple", "")).startswith("aarch64")


def dot4(dot: str) -> str:
    """llmc_dot4(c, w, x) of 16 lanes (linear/quant_dot.py) by "usdot", which has w unsigned and x signed; or by "sdot"
    of w - 128 and another one of 1, which sums x."""
    call, bytes_ = f"call <4 x i32> @llvm.aarch64.neon.{dot}.v4i32.v16i8", "<16 x i8>"
    by_sdot = f"""
  %s = xor {bytes_} %a, splat (i8 -128)
  %p = {call}(<4 x i32> %c, {bytes_} %s, {bytes_} %b)
  %t = {call}(<4 x i32> zeroinitializer, {bytes_} splat (i8 1), {bytes_} %b)
  %u = shl <4 x i32> %t, splat (i32 7)
  %r = add <4 x i32> %p, %u"""
    by_usdot = f"\n  %r = {call}(<4 x i32> %c, {bytes_} %a, {bytes_} %b)"
    return f"""
declare <4 x i32> @llvm.aarch64.neon.{dot}.v4i32.v16i8(<4 x i32>, {bytes_}, {bytes_})
define linkonce_odr <4 x i32> @llmc_dot4_part(<4 x i32> %c, <4 x i32> %w, <4 x i32> %x) {INLINED} {{
  %a = bitcast <4 x i32> %w to {bytes_}
  %b = bitcast <4 x i32> %x to {bytes_}{by_usdot if dot == "usdot" else by_sdot}
  ret <4 x i32> %r }}
{in_quarters("llmc_dot4", "cwx")}"""


def e2m1(numbers: Sequence[int]) -> str:
    """llmc_e2m1(w): each byte of 16 words looked up in a table of 16."""
    table = ", ".join(f"i8 {number}" for number in numbers)
    return f"""
declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)
define linkonce_odr <4 x i32> @llmc_e2m1_part(<4 x i32> %w) {INLINED} {{
  %i = bitcast <4 x i32> %w to <16 x i8>
  %b = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> <{table}>, <16 x i8> %i)
  %r = bitcast <16 x i8> %b to <4 x i32>
  ret <4 x i32> %r }}
{in_quarters("llmc_e2m1", "w")}"""


def pmadd(n: int) -> str:
    """llmc_pmadd(a, b): n sums of two products of int16, as vpmaddwd makes them."""
    words, evens, odds = f"<{2 * n} x i32>", indices(0, 2 * n, 2), indices(1, 2 * n, 2)
    return f"""
define linkonce_odr <{n} x i32> @llmc_pmadd(<{2 * n} x i16> %a, <{2 * n} x i16> %b) {INLINED} {{
  %x = sext <{2 * n} x i16> %a to {words}
  %y = sext <{2 * n} x i16> %b to {words}
  %p = mul {words} %x, %y
  %e = shufflevector {words} %p, {words} poison, <{n} x i32> <{evens}>
  %o = shufflevector {words} %p, {words} poison, <{n} x i32> <{odds}>
  %r = add <{n} x i32> %e, %o
  ret <{n} x i32> %r }}"""


def in_quarters(name: str, arguments: str) -> str:
    """A function of 16 lanes by NAME_part, which is of four."""
    lines = [
        f"  %{one}{quarter} = shufflevector <16 x i32> %{one}, <16 x i32> poison, "
        f"<4 x i32> <{indices(4 * quarter, 4 * quarter + 4)}>"
        for quarter in range(4)
        for one in arguments
    ]
    for quarter in range(4):
        parts = ", ".join(f"<4 x i32> %{one}{quarter}" for one in arguments)
        lines.append(f"  %r{quarter} = call <4 x i32> @{name}_part({parts})")
    for half, low, high in (("low", "r0", "r1"), ("high", "r2", "r3")):
        lines.append(f"  %{half} = shufflevector <4 x i32> %{low}, <4 x i32> %{high}, <8 x i32> <{indices(0, 8)}>")
    lines.append(f"  %r = shufflevector <8 x i32> %low, <8 x i32> %high, <16 x i32> <{indices(0, 16)}>")
    head = ", ".join(f"<16 x i32> %{one}" for one in arguments)
    body = "\n".join(lines)
    return f"define linkonce_odr <16 x i32> @{name}({head}) {INLINED} {{\n{body}\n  ret <16 x i32> %r }}\n"


def indices(start: int, stop: int, step: int = 1) -> str:
    return ", ".join(f"i32 {i}" for i in range(start, stop, step))
