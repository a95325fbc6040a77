"""float32 vectors in TIR: the few words that the kernels of this folder are written in.

Kernels are built statement by statement with TVM's IR builder, so that a loop nest is plain Python and its parts are
functions.  A multiply-add is always the explicit `fma`: the compiler never chooses where to round, which is what lets
two kernels promise the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx import Shuffle
from tvm.tirx.script import builder as T

LOG2_E = 1.4426950408889634
# 2**f on [-0.5, 0.5], Taylor: the error is below 1.3e-7 and 2**0 is exactly 1.
EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)

# (2**f - 1) / f on [-0.5, 0.5], minimax of the whole's relative error, which is below 1.1e-7; 2**0 is exactly 1.
EXP2_QUICK = (1.3264727e-3, 9.671513e-3, 5.5507336e-2, 2.4022242e-1, 6.93147e-1)
ROUNDS = 12582912.0  # 1.5 · 2**23: added to a small number, it leaves that rounded to a whole one in the lowest bits


@dataclass(frozen=True)
class Lanes:
    """Vectors of `n` float32 (or int32) lanes; n = 1 gives scalars."""

    n: int

    @property
    def f32(self) -> str:
        return "float32" if self.n == 1 else f"float32x{self.n}"

    @property
    def i32(self) -> str:
        return "int32" if self.n == 1 else f"int32x{self.n}"

    def all(self, value: Any) -> Any:
        """A vector with `value` (a Python float is float32, an int int32) in every lane."""
        scalar = T.float32(value) if isinstance(value, float) else T.int32(value) if isinstance(value, int) else value
        return scalar if self.n == 1 else T.broadcast(scalar, self.n)

    def at(self, start: Any) -> Any:
        """The index of the lanes that lie at `start`, `start` + 1, …"""
        return start if self.n == 1 else T.ramp(start, 1, self.n)

    def load(self, buffer: Any, start: Any) -> Any:
        """buffer[start : start + n] of a flat buffer, kept in a register."""
        return T.bind(buffer[self.at(start)])

    def store(self, buffer: Any, start: Any, value: Any) -> None:
        T.buffer_store(buffer, value, [self.at(start)])

    def keep(self, value: Any, dtype: str = "float32") -> Any:
        """`value`, computed once.  (TVM's simplifier writes a bound expression out at every use of its name, which
        doubles the code with every step of a chain; it leaves what was stored alone.)"""
        register = T.alloc_buffer((self.n,), dtype)
        self.store(register, 0, value)
        return register[self.at(0)]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return T.call_llvm_pure_intrin(self.f32, "llvm.fma", a, b, c)

    def bits(self, value: Any) -> Any:
        return T.reinterpret(value, dtype=self.i32)

    def float(self, bits: Any) -> Any:
        return T.reinterpret(bits, dtype=self.f32)

    def low_bf16(self, pair: Any) -> Any:
        """The even element of each pair of bf16, widened to float32."""
        return self.float(T.shift_left(pair, self.all(16)))

    def high_bf16(self, pair: Any) -> Any:
        """The odd element of each pair of bf16, widened to float32."""
        return self.float(T.bitwise_and(pair, self.all(-65536)))

    def round_bf16(self, value: Any) -> Any:
        """float32 rounded to the nearest bf16, ties to even, as the high half of int32.  NaN stays NaN."""
        bits = self.keep(self.bits(value), "int32")
        odd = T.bitwise_and(T.shift_right(bits, self.all(16)), self.all(1))
        rounded = T.bitwise_and(bits + self.all(0x7FFF) + odd, self.all(-65536))
        is_nan = T.bitwise_and(bits, self.all(0x7FFFFFFF)) > self.all(0x7F800000)
        return self.keep(T.Select(is_nan, self.all(0x7FC00000), rounded), "int32")

    def _butterfly(self, value: Any, combine: Any) -> Any:
        """`combine` over all lanes, in every lane; lane i meets lane i ^ n/2, then i ^ n/4, …"""
        distance = self.n // 2
        while distance:
            value = self.keep(value)
            swapped = Shuffle([value], [lane ^ distance for lane in range(self.n)])
            value, distance = combine(value, swapped), distance // 2
        return self.keep(value)

    def maximum(self, value: Any) -> Any:
        return self._butterfly(value, T.max)

    def sum(self, value: Any) -> Any:
        return self._butterfly(value, lambda a, b: a + b)

    def exp(self, x: Any) -> Any:
        """e**x to 2 units in the last place; exactly 1 at 0 and exactly 0 below -87."""
        x = self.keep(x)
        clamped = self.keep(T.max(T.min(x, self.all(88.0)), self.all(-87.0)))
        whole = self.keep(T.nearbyint(clamped * self.all(LOG2_E)))
        part = self.keep(self.fma(clamped, self.all(LOG2_E), self.all(0.0) - whole))
        power = self.all(EXP2[0])
        for coefficient in EXP2[1:]:
            power = self.fma(power, part, self.all(coefficient))
        scale = self.float(T.shift_left(T.cast(whole, self.i32) + self.all(127), self.all(23)))
        return self.keep(T.Select(x < self.all(-87.0), self.all(0.0), power * scale))

    def exp2(self, x: Any) -> Any:
        """2**x to 2 units in the last place; exactly 1 at 0, and 2**-126 below -126."""
        x = self.keep(T.max(T.min(x, self.all(127.0)), self.all(-126.0)))
        rounded = self.keep(x + self.all(ROUNDS))
        part = self.keep(x - self.keep(rounded - self.all(ROUNDS)))
        power = self.all(EXP2_QUICK[0])
        for coefficient in (*EXP2_QUICK[1:], 1.0):
            power = self.fma(power, part, self.all(coefficient))
        exponent = T.shift_left(self.bits(rounded), self.all(23))
        return self.keep(self.float(self.bits(self.keep(power)) + exponent))

    def tanh(self, x: Any) -> Any:
        """tanh(x) = sign(x) (1 - 2 / (e**2|x| + 1)); the absolute error is below 2e-7."""
        x = self.keep(x)
        size = T.max(x, self.all(0.0) - x)
        tail = self.keep(self.all(1.0) - self.all(2.0) / (self.exp(size + size) + self.all(1.0)))
        return self.keep(T.Select(x < self.all(0.0), self.all(0.0) - tail, tail))


def widest(count: int, lanes: int) -> Lanes:
    """The widest vectors that `count` elements divide into."""
    while count % lanes:
        lanes //= 2
    return Lanes(lanes)


def share(grid: int, task: Any, n_tasks: Any) -> Any:
    """A loop over this task's units of `grid`."""
    if grid == 1:
        return T.serial(0, 1)
    return T.serial(T.truncdiv(task * grid, n_tasks), T.truncdiv((task + 1) * grid, n_tasks))


ASK = """
define linkonce_odr void @llmc_ask(ptr %p) alwaysinline nounwind {
  call void asm sideeffect "prefetcht0 $0", "*m"(ptr elementtype(i8) %p)
  ret void }
"""
"""llmc_ask(p) on x86: asks for the cache line at p, between the loads it stands between.  LLVM moves its own prefetches
to the end of a loop, where many at once wait for each other."""


def ask(at: Any) -> None:
    """Asks for the cache line that an element of a buffer lies in."""
    T.evaluate(T.call_extern("void", "llmc_ask", T.address_of(at)))


AVX512_BF16 = """
target triple = "x86_64-unknown-linux-gnu"
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <16 x float> @llmc_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r }
define linkonce_odr <8 x i32> @llmc_cvtbf16(<16 x float> %a) alwaysinline nounwind {
  %r = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %z = bitcast <16 x bfloat> %r to <8 x i32>
  ret <8 x i32> %z }
"""
