"""The kernels of layers with a state: see rule.py.

A state lies in its slot as whole units of work, one behind the other, so that a unit's is one piece of memory: that of
a convolution as [C / block][L - 1][block], that of a rule as [VH][DV / block][DK][block], in float32.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import Lanes, share, widest
from llmc.schedules.cpu.row_kernels import row_mean
from llmc.schedules.cpu.states.rule import ChannelRule, Conv, GatedRule
from llmc.schedules.cpu.states.scan_rule import Scan

Stateful = Conv | GatedRule | Scan
CHAINS = 8
"""Sums that a rule keeps at once, so that a multiply-add need not wait for the one before it."""


def flat(name: str, size: int, dtype: str = "float32") -> Any:
    return T.arg(name, T.buffer((size,), dtype))


def step_operands(rows: int) -> tuple[Any, Any, Any]:
    """(positions, slots, state)"""
    positions, slots = (flat(name, rows, "int32") for name in ("positions", "slots"))
    return positions, slots, T.arg("state", T.buffer((T.int64(1 << 42),), "float32"))


def own_state(kernel: Stateful, slot: Any, start: Any) -> Any:
    """Where a unit's part of a slot's state is, counted in 64 bits."""
    return T.bind(T.cast(slot, "int64") * T.int64(kernel.stride) + T.cast(start, "int64"))


def begin(v: Lanes, position: Any, state: Any, base: Any, size: int) -> None:
    """A text's first token finds zeros."""
    with T.If(position == 0), T.Then(), T.serial(size // v.n) as i:
        v.store(state, base + T.cast(i * v.n, "int64"), v.all(0.0))


def conv_kernel(conv: Conv) -> Any:
    """(x, weight, [bias,] positions, slots, state, y, task, n_tasks).

    for block of channels in parallel:
        for row in order:
            y = act(sum over l of weight[l] · (the last L - 1 inputs, x)[l] + bias)
            keep the last L - 1 inputs
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("conv")
        whole, v, kept = conv.rows * conv.channels, widest(conv.block, conv.lanes), conv.taps - 1
        x, weight = flat("x", whole), flat("weight", conv.taps * conv.channels)
        bias = flat("bias", conv.channels) if conv.bias else None
        positions, slots, state = step_operands(conv.rows)
        y, task, n_tasks = flat("y", whole), T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(conv.channels // conv.block, task, n_tasks) as unit, T.serial(conv.rows) as row:
            position, first = T.bind(positions[row]), T.bind(unit * conv.block)
            with T.If(position >= 0):
                with T.Then():
                    base = own_state(conv, slots[row], unit * (kept * conv.block))
                    begin(v, position, state, base, kept * conv.block)
                    with T.serial(conv.block // v.n) as i:
                        places = [base + T.cast(i * v.n + tap * conv.block, "int64") for tap in range(kept)]
                        inputs = [v.load(state, place) for place in places]
                        inputs.append(v.load(x, row * conv.channels + first + i * v.n))
                        total = v.load(bias, first + i * v.n) if bias is not None else v.all(0.0)
                        for tap, value in enumerate(inputs):
                            of_tap = v.load(weight, tap * conv.channels + first + i * v.n)
                            total = v.keep(v.fma(of_tap, value, total))
                        for place, value in zip(places, inputs[1:], strict=True):
                            v.store(state, place, value)
                        if conv.silu:
                            total = total / (v.all(1.0) + v.exp(v.all(0.0) - total))
                        v.store(y, row * conv.channels + first + i * v.n, total)
                with T.Else(), T.serial(conv.block // v.n) as i:
                    v.store(y, row * conv.channels + first + i * v.n, v.all(0.0))
    return builder.get()


def rule_kernel(rule: GatedRule) -> Any:
    """(qkv, g, beta, positions, slots, state, y, scratch, task, n_tasks).

    for (head, block of columns) in parallel:
        for row in order:
            q, k = normalised
            news = beta (v - exp(g) kᵀT);   y = exp(g) qᵀT + (q · k) news;   T = exp(g) T + k newsᵀ
    without delta: q and k as they are, news = beta v
    by channel: exp(g) is diagonal, so that q and k are multiplied by it where they meet T
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gated_rule")
        qkv, values = flat("qkv", rule.rows * rule.width), rule.value_heads * rule.value_dim
        by_channel = isinstance(rule, ChannelRule)
        n_gates = rule.rows * rule.value_heads
        g, beta = flat("g", n_gates * rule.key_dim if by_channel else n_gates), flat("beta", n_gates)
        positions, slots, state = step_operands(rule.rows)
        y, scratch = flat("y", rule.rows * values), flat("scratch", rule.n_vectors * rule.key_dim + rule.block)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        n_blocks, v = rule.value_dim // rule.block, widest(rule.block, rule.lanes)
        with share(rule.value_heads * n_blocks, task, n_tasks) as unit, T.serial(rule.rows) as row:
            head, position = T.bind(T.truncdiv(unit, n_blocks)), T.bind(positions[row])
            column = T.bind(head * rule.value_dim + T.truncmod(unit, n_blocks) * rule.block)
            with T.If(position >= 0):
                with T.Then():
                    base = own_state(rule, slots[row], unit * (rule.key_dim * rule.block))
                    begin(v, position, state, base, rule.key_dim * rule.block)
                    meeting = normalise(rule, qkv, row, head, scratch)
                    gate = row * rule.value_heads + head
                    if by_channel:
                        decay_each(rule, g, gate * rule.key_dim, scratch)
                    decay, rate = None if by_channel else v.exp(v.all(g[gate])), v.all(beta[gate])
                    known, asked = sums(rule, v, state, base, scratch)
                    start = row * rule.width + 2 * rule.key_heads * rule.key_dim + column
                    for j, of_query in enumerate(asked):
                        value = v.load(qkv, start + j * v.n)
                        left = [x if decay is None else decay * x for x in (*known[j : j + 1], of_query)]
                        news = v.keep(rate * (value - left[0] if rule.delta else value))
                        v.store(scratch, rule.n_vectors * rule.key_dim + j * v.n, news)
                        result = v.fma(v.all(meeting), news, left[-1])
                        v.store(y, row * values + column + j * v.n, result)
                    update(rule, v, state, base, scratch, decay)
                with T.Else(), T.serial(rule.block // v.n) as j:
                    v.store(y, row * values + column + j * v.n, v.all(0.0))
    return builder.get()


def normalise(rule: GatedRule, qkv: Any, row: Any, head: Any, scratch: Any) -> Any:
    """scratch = (scale · q / |q|, k / |k|) of the head's, without delta (scale · q, k); -> their product."""
    v, dim = widest(rule.key_dim, rule.lanes), rule.key_dim
    shared = T.truncdiv(head, rule.value_heads // rule.key_heads) * dim
    for which, factor in enumerate((rule.scale, 1.0)):
        start = T.bind(row * rule.width + which * rule.key_heads * dim + shared)
        size = v.all(factor)
        if rule.delta:
            square = row_mean(v, qkv, start, dim, lambda value, partial: v.fma(value, value, partial))
            size = v.keep(size / T.sqrt(v.fma(square, v.all(float(dim)), v.all(rule.epsilon))))
        with T.serial(dim // v.n) as i:
            v.store(scratch, which * dim + i * v.n, v.load(qkv, start + i * v.n) * size)
    both = T.alloc_buffer((v.n,), "float32")
    v.store(both, 0, v.all(0.0))
    with T.serial(dim // v.n) as i:
        v.store(both, 0, v.fma(v.load(scratch, i * v.n), v.load(scratch, dim + i * v.n), both[v.at(0)]))
    total = T.alloc_buffer((v.n,), "float32")
    v.store(total, 0, v.sum(both[v.at(0)]))
    return T.bind(total[0])


def decay_each(rule: GatedRule, g: Any, start: Any, scratch: Any) -> None:
    """scratch[2:5] = exp(g) · (q, k, 1), element by element."""
    v, dim = widest(rule.key_dim, rule.lanes), rule.key_dim
    with T.serial(dim // v.n) as i:
        decay = v.exp(v.load(g, start + i * v.n))
        for which in range(2):
            v.store(scratch, (2 + which) * dim + i * v.n, decay * v.load(scratch, which * dim + i * v.n))
        v.store(scratch, 4 * dim + i * v.n, decay)


def sums(rule: GatedRule, v: Lanes, state: Any, base: Any, scratch: Any) -> tuple[list[Any], list[Any]]:
    """kᵀT, without delta nothing, and qᵀT, by channel those of the decayed; a vector for each of the block's."""
    n, dim, starts = rule.block // v.n, rule.key_dim, (rule.key_dim, 0) if rule.delta else (0,)
    if isinstance(rule, ChannelRule):
        starts = (3 * dim, 2 * dim)
    ways = next(w for w in (CHAINS // (len(starts) * n), 2, 1) if w and dim % w == 0)  # each takes every so many rows
    chains = [[[T.alloc_buffer((v.n,), "float32") for _ in range(n)] for _ in starts] for _ in range(ways)]
    for chain in (c for way in chains for which in way for c in which):
        v.store(chain, 0, v.all(0.0))
    with T.serial(dim // ways) as i:
        for w, way in enumerate(chains):
            at = i * ways + w
            factors = [v.all(scratch[start + at]) for start in starts]
            for j in range(n):
                t = v.load(state, base + T.cast(at * rule.block + j * v.n, "int64"))
                for factor, of_vector in zip(factors, way, strict=True):
                    v.store(of_vector[j], 0, v.fma(factor, t, of_vector[j][v.at(0)]))
    results: list[list[Any]] = []
    for which in range(len(starts)):
        totals = [chains[0][which][j][v.at(0)] for j in range(n)]
        for way in chains[1:]:
            totals = [v.keep(total + way[which][j][v.at(0)]) for j, total in enumerate(totals)]
        results.append(totals)
    return (results[0], results[1]) if rule.delta else ([], results[0])


def update(rule: GatedRule, v: Lanes, state: Any, base: Any, scratch: Any, decay: Any) -> None:
    """T = exp(g) T + k newsᵀ; decay: None where each row of T has its own."""
    dim, n = rule.key_dim, rule.block // v.n
    news = [v.keep(v.load(scratch, rule.n_vectors * dim + j * v.n)) for j in range(n)]
    with T.serial(dim) as i:
        k = v.all(scratch[dim + i])
        decay = v.all(scratch[4 * dim + i]) if isinstance(rule, ChannelRule) else decay
        for j in range(n):
            at = base + T.cast(i * rule.block + j * v.n, "int64")
            v.store(state, at, v.fma(k, news[j], decay * v.load(state, at)))
