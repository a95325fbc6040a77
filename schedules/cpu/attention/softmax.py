"""The online softmax of paged attention: what a query row has gathered so far, and what a page adds to it.

A query row's state is (m, l, O): the largest score, the sum of exp(score - m), and the sum of exp(score - m) v.
Scores are kept times log2 e, so that exp is a power of two.
Milakov and Gimelshein 2018, arXiv:1805.02867;  Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu import neon
from llmc.schedules.cpu.attention.append import LEAST, ONE, scale_start
from llmc.schedules.cpu.attention.latent_spread import spread_code
from llmc.schedules.cpu.attention.shape import MOST_INT16, Attention
from llmc.schedules.cpu.lanes import AVX512_BF16, LOG2_E, Lanes, widest

MASKED = -1e30
"""The score of a key that is out of sight, and the maximum before the first: finite, so that differences are."""
EXP2 = (1.32647272e-3, 9.67151281e-3, 5.55073374e-2, 2.40222421e-1, 6.93146978e-1, 1.0)
"""2**f on [-0.5, 0.5], the least largest error: 1.7e-7 of itself; 2**0 is exactly 1."""


@dataclass(frozen=True)
class State:
    """Where (m, l, O) of a block's query rows lie: `words` each, the rows of one head in a row, then `stride` apart."""

    buffer: Any
    start: Any
    group: int
    stride: Any
    lanes: int
    words: int

    def maximum(self, r: Any) -> Any:
        return self.start + T.truncdiv(r, self.group) * self.stride + T.truncmod(r, self.group) * self.words

    def total(self, r: Any) -> Any:
        return self.maximum(r) + self.lanes

    def sums(self, r: Any) -> Any:
        return self.maximum(r) + 2 * self.lanes


class Sight(NamedTuple):
    """Which keys of a page a query row at position pos sees: those with least < key - pos <= most.

    ahead: the page's first key - pos.  least: None where no window or chunk ends.  most: None for 0, that is, for rows
    that see nothing behind them."""

    ahead: Any
    least: Any
    most: Any = None


class Softmax:
    """The softmax of a block of `rows` query rows.  sees: of rows that look ahead, the last position they see [M]."""

    sees: Any = None

    def __init__(self, a: Attention, n: int, positions: Any, scratch: Any, sinks: Any = None, slopes: Any = None):
        self.a, self.n, self.rows, self.v = a, n, n * a.group, Lanes(a.lanes)
        self.positions, self.scratch, self.sinks, self.slopes = positions, scratch, sinks, slopes
        words = (PAGE_TOKENS, PAGE_TOKENS, a.lanes, a.lanes, a.state_words)
        starts = [a.room(n) * sum(words[: i + 1]) for i in range(len(words))]
        self.scores, self.weights, self.decays, self.steps = 0, *starts[:3]
        self.states = starts[3:]

    def state(self, start: Any) -> State:
        """A state in scratch memory."""
        words = self.a.state_words
        return State(self.scratch, start, self.a.group, self.a.group * words, self.a.lanes, words)

    def empty(self, state: State) -> None:
        """m, l, O before the first page."""
        v = self.v
        with T.serial(self.rows) as r:
            v.store(state.buffer, state.maximum(r), v.all(MASKED))
            v.store(state.buffer, state.total(r), v.all(0.0))
            with T.serial(self.a.padded_dim // v.n) as d:
                v.store(state.buffer, state.sums(r) + d * v.n, v.all(0.0))

    def soften(self, row: Any, head: Any, page: Any, query: Any, scales: Any, base: Any, state: State) -> None:
        """m, l, P and what O decays by, for each query row, from its scores in this page."""
        a = self.a
        with T.serial(self.rows) as r:
            sight = self.sight_of(page, row, r)
            in_sight = sight.ahead <= (1 - PAGE_TOKENS if sight.most is None else sight.most + (1 - PAGE_TOKENS))
            if a.window:
                in_sight = T.And(in_sight, sight.ahead > sight.least)
            slope = self.slope(head, r)
            if self.n == 1:  # memory is the limit: the shorter code will do
                self.soften_row(r, sight, True, slope, query, scales, base, state)
            else:
                with T.If(in_sight):
                    with T.Then():
                        self.soften_row(r, sight, False, slope, query, scales, base, state)
                    with T.Else():
                        self.soften_row(r, sight, True, slope, query, scales, base, state)

    def position(self, row: Any, r: Any) -> Any:
        """The position of query row r of the block that starts at `row`."""
        return self.positions[row + (T.truncdiv(r, self.a.group) if self.n > 1 else 0)]

    def sight_of(self, page: Any, row: Any, r: Any) -> Sight:
        """What query row r of the block that starts at `row` sees of a page."""
        return self.sight(page, self.position(row, r))

    def sight(self, page: Any, position: Any) -> Sight:
        """What a row at this position sees of a page."""
        return Sight(ONE.keep(page * PAGE_TOKENS - position, "int32"), self.least(position))

    def least(self, position: Any) -> Any:
        """Sight.least of a row at this position."""
        a = self.a
        if a.chunk:
            return ONE.keep(-1 - T.truncmod(position, a.chunk), "int32")
        return -a.window if a.window else None

    def slope(self, head: Any, r: Any) -> Any:
        """What the score of a query row grows by from key to key, times log2 e; None: by nothing."""
        if self.slopes is None:
            return None
        return ONE.keep(self.slopes[head * self.a.group + T.truncmod(r, self.a.group)] * T.float32(LOG2_E))

    def soften_row(
        self, r: Any, sight: Sight, masked: bool, slope: Any, query: Any, scales: Any, base: Any, state: State
    ) -> None:
        """One query row.  masked: whether a key may be out of sight."""
        v = self.v
        vectors = range(PAGE_TOKENS // v.n)
        scores = [self.score_of(r, i * v.n, query, scales, base) for i in vectors]
        if slope is not None:
            scores = [self.biased(score, sight.ahead, i * v.n, slope) for i, score in zip(vectors, scores, strict=True)]
        if masked:
            scores = [self.seen(score, sight, i * v.n) for i, score in zip(vectors, scores, strict=True)]
        before = v.load(state.buffer, state.maximum(r))
        maximum = v.keep(T.max(before, v.maximum(self.over_all(T.max, scores))))
        v.store(state.buffer, state.maximum(r), maximum)
        decay = self.exp2(before - maximum)
        v.store(self.scratch, self.decays + r * v.n, decay)
        weights = [self.exp2(score - maximum) for score in scores]
        self.keep_weights(r, weights, scales, base)
        total = v.load(state.buffer, state.total(r))
        v.store(state.buffer, state.total(r), v.fma(total, decay, self.over_all(lambda x, y: x + y, weights)))

    def over_all(self, combine: Any, values: list[Any]) -> Any:
        """`combine` over vectors, in pairs."""
        while len(values) > 1:
            values = [self.v.keep(combine(x, y)) for x, y in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def score_of(self, r: Any, token: int, query: Any, scales: Any, base: Any) -> Any:
        """The scaled, capped score of v.n tokens, times log2 e."""
        a, v = self.a, self.v
        score = v.load(self.scratch, self.scores + r * PAGE_TOKENS + token)
        if a.is_int8:
            step = T.reinterpret(query(r, a.query_words - 1), dtype="float32")
            score = v.keep(score * v.load(scales, scale_start(a, base) + T.int64(token)) * v.all(step))
        if not a.softcap:
            return v.keep(score * v.all(a.scale * LOG2_E))
        return v.keep(v.tanh(score * v.all(a.scale / a.softcap)) * v.all(a.softcap * LOG2_E))

    def biased(self, score: Any, ahead: Any, token: int, slope: Any) -> Any:
        """The score and slope · (key - pos)."""
        v = self.v
        distance = v.keep(T.cast(v.all(ahead) + T.ramp(T.int32(token), 1, v.n), v.f32))
        return v.keep(v.fma(distance, v.all(slope), score))

    def seen(self, score: Any, sight: Sight, token: int) -> Any:
        """The score where the key is in sight: least < key - pos <= most."""
        a, v = self.a, self.v
        distance = v.keep(v.all(sight.ahead) + T.ramp(T.int32(token), 1, v.n), "int32")
        score = T.Select(distance <= v.all(0 if sight.most is None else sight.most), score, v.all(MASKED))
        if a.window:
            score = T.Select(distance > v.all(sight.least), score, v.all(MASKED))
        return v.keep(score)

    def exp2(self, x: Any) -> Any:
        """2**x for x <= 0: exactly 1 at 0, and 0 far below."""
        v = self.v
        x = v.keep(x) if v.n == 16 else v.keep(T.max(x, v.all(-127.0)))
        whole = v.keep(T.nearbyint(x))
        part = v.keep(x - whole)
        power = v.all(EXP2[0])
        for coefficient in EXP2[1:]:
            power = v.fma(power, part, v.all(coefficient))
        if v.n == 16:
            return v.keep(T.call_extern(v.f32, "llmc_scalef", power, whole))
        scale = v.float(T.shift_left(T.cast(whole, v.i32) + v.all(127), v.all(23)))
        return v.keep(power * scale)

    def keep_weights(self, r: Any, weights: list[Any], scales: Any, base: Any) -> None:
        """P as the values' multiplier: float32, rounded to bf16 where the cache is, in pairs where pairs multiply."""
        a, v = self.a, self.v
        if a.is_int8:
            self.keep_steps(r, weights, scales, base)
        elif a.dot in ("dpbf16", "tiles"):
            for i, weight in enumerate(weights):
                self.keep_pairs(r, i, T.call_extern(f"int32x{v.n // 2}", "llmc_cvtbf16", weight))
        else:
            for i, weight in enumerate(weights):
                rounded = weight if a.dot == "fma" else v.float(v.round_bf16(weight))
                v.store(self.scratch, self.weights + r * PAGE_TOKENS + i * v.n, rounded)

    def keep_steps(self, r: Any, weights: list[Any], scales: Any, base: Any) -> None:
        """P times the values' scales, as multiples of 1/32767 of the largest in the page.  A slot that was not written
        yet may hold anything as its scale: its weight is 0."""
        v, zero = self.v, self.v.all(0.0)
        scaled = []
        for i, weight in enumerate(weights):
            scale = v.load(scales, scale_start(self.a, base) + T.int64(PAGE_TOKENS + i * v.n))
            scaled.append(v.keep(T.Select(weight > zero, weight * scale, zero)))
        largest = v.maximum(self.over_all(T.max, scaled))
        v.store(self.scratch, self.steps + r * v.n, largest * v.all(1.0 / MOST_INT16))
        per_unit = v.keep(T.Select(largest > v.all(LEAST), v.all(MOST_INT16) / largest, zero))
        for i, weight in enumerate(scaled):
            self.keep_pairs(r, i, T.call_extern(f"int32x{v.n // 2}", "llmc_pack16", weight * per_unit))

    def keep_pairs(self, r: Any, i: int, pairs: Any) -> None:
        half = self.v.n // 2
        place = T.ramp(self.weights + r * (PAGE_TOKENS // 2) + i * half, 1, half)
        T.buffer_store(self.scratch, T.reinterpret(pairs, dtype=f"float32x{half}"), [place])

    def merge(self, into: State, other: State) -> None:
        """(m, l, O) of two spans of the context, into the first's place."""
        v = self.v
        with T.serial(self.rows) as r:
            ours, theirs = (v.load(state.buffer, state.maximum(r)) for state in (into, other))
            maximum = v.keep(T.max(ours, theirs))
            a, b = self.exp2(ours - maximum), self.exp2(theirs - maximum)
            v.store(into.buffer, into.maximum(r), maximum)
            l1, l2 = (v.load(state.buffer, state.total(r)) for state in (into, other))
            v.store(into.buffer, into.total(r), v.fma(l1, a, l2 * b))
            with T.serial(self.a.padded_dim // v.n) as d:
                o1, o2 = (v.load(state.buffer, state.sums(r) + d * v.n) for state in (into, other))
                v.store(into.buffer, into.sums(r) + d * v.n, v.fma(o1, a, o2 * b))

    def finish(self, row: Any, head: Any, state: State, out: Any) -> None:
        """out = O / l; zeros for a row at position -1."""
        with T.serial(self.rows) as r:
            self.finish_row(r, row, head, state, out)

    def finish_row(self, r: Any, row: Any, head: Any, state: State, out: Any) -> None:
        """The same of one query row.  Adding 0 leaves one zero, not two."""
        a, v, part = self.a, self.v, widest(self.a.value_dim, self.a.lanes)
        here = T.bind(row + T.truncdiv(r, a.group))
        to = T.bind((here * a.heads + head * a.group + T.truncmod(r, a.group)) * a.value_dim)
        with T.If(self.positions[here] >= 0):
            with T.Then():
                v.store(state.buffer, state.total(r), v.sum(v.load(state.buffer, state.total(r))))
                if self.sinks is not None:
                    self.add_sink(r, head, state)
                scale = T.bind(part.all(T.float32(1.0) / state.buffer[state.total(r)]))
                with T.serial(a.value_dim // part.n) as d:
                    gathered = part.load(state.buffer, state.sums(r) + d * part.n)
                    part.store(out, to + d * part.n, part.fma(gathered, scale, part.all(0.0)))
            with T.Else(), T.serial(a.value_dim // part.n) as d:
                part.store(out, to + d * part.n, part.all(0.0))

    def add_sink(self, r: Any, head: Any, state: State) -> None:
        """l = l + exp(sink - m), through the larger of the two scores: neither power of two overflows."""
        v = self.v
        sink = T.bind(self.sinks[head * self.a.group + T.truncmod(r, self.a.group)] * T.float32(LOG2_E))
        score = v.keep(T.max(v.all(sink), v.all(MASKED)))
        before = v.load(state.buffer, state.maximum(r))
        maximum = v.keep(T.max(before, score))
        decay, weight = self.exp2(before - maximum), self.exp2(score - maximum)
        total = v.load(state.buffer, state.total(r))
        v.store(state.buffer, state.total(r), v.fma(total, decay, weight) / decay)


def intrinsics(a: Attention) -> str:
    """LLVM's text of the instructions that TIR has no word for: 2**n, and products of int16 and int8."""
    text = AVX512_BF16 if a.dot in ("dpbf16", "tiles") else 'target triple = "x86_64-unknown-linux-gnu"\n'
    if a.lanes == 16:
        text += SCALEF
    if a.is_int8:
        text += madd16(a.lanes)
    if a.spreads:
        text += spread_code(a)
    return text


SCALEF = """
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)
define linkonce_odr <16 x float> @llmc_scalef(<16 x float> %a, <16 x float> %n) alwaysinline nounwind {
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float> %a, <16 x float> %n, <16 x float> %a,
                                                             i16 -1, i32 4)
  ret <16 x float> %r }
"""


def madd16(n: int) -> str:
    """c + a b: pairs of int16 times pairs of int8, summed in int32; and n float32 rounded to n/2 pairs of int16."""
    multiply = "llvm.x86.avx512.pmaddw.d.512" if n == 16 else "llvm.x86.avx2.pmadd.wd"
    made = f"declare <{n} x i32> @{multiply}(<{2 * n} x i16>, <{2 * n} x i16>)"
    if neon.is_target():
        multiply, made = "llmc_pmadd", neon.pmadd(n)
    return f"""
{made}
declare <{n} x float> @llvm.rint.v{n}f32(<{n} x float>)
define linkonce_odr <{n} x i32> @llmc_madd16(<{n} x i32> %c, <{n} x i32> %a, <{n} x i16> %b) alwaysinline nounwind {{
  %x = bitcast <{n} x i32> %a to <{2 * n} x i16>
  %y = bitcast <{n} x i16> %b to <{2 * n} x i8>
  %z = sext <{2 * n} x i8> %y to <{2 * n} x i16>
  %p = call <{n} x i32> @{multiply}(<{2 * n} x i16> %x, <{2 * n} x i16> %z)
  %s = add <{n} x i32> %c, %p
  ret <{n} x i32> %s }}
define linkonce_odr <{n // 2} x i32> @llmc_pack16(<{n} x float> %a) alwaysinline nounwind {{
  %r = call <{n} x float> @llvm.rint.v{n}f32(<{n} x float> %a)
  %i = fptosi <{n} x float> %r to <{n} x i16>
  %p = bitcast <{n} x i16> %i to <{n // 2} x i32>
  ret <{n // 2} x i32> %p }}
"""
