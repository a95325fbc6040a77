"""The kernel of a selective scan: see scan_rule.py.

A state lies in its slot as rates lie in the artifact, [C / block][N][block], so that a unit's is one piece of memory.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import LOG2_E, Lanes, share, widest
from llmc.schedules.cpu.linear.panel import FIRST_LEVEL, prefetch
from llmc.schedules.cpu.states.kernels import begin, flat, own_state, step_operands
from llmc.schedules.cpu.states.scan_rule import Scan

UNROLLED = 16
"""States of a channel that are taken in one piece of code."""
LINE = 16
"""Elements of a cache line."""
ATANH = (1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
"""atanh(s) / s in powers of s², Taylor, highest first; on [0, 1/3] the error is below 2e-8."""


def scan_kernel(scan: Scan) -> Any:
    """(x, dt, gate, b, c, rate, bias, skip, positions, slots, state, y, task, n_tasks).

    for block of channels in parallel:
        for row in order:
            d = log(1 + exp(dt + bias))
            for n:  T[n] = 2**(d · rate[n]) · T[n] + d · x · b[n];    total += c[n] · T[n]
            y = (total + skip · x) · silu(gate)
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("selective_scan")
        whole, v = scan.rows * scan.channels, widest(scan.block, scan.lanes)
        x, dt, gate = (flat(name, whole) for name in ("x", "dt", "gate"))
        b, c = (flat(name, scan.rows * scan.size) for name in ("b", "c"))
        rate = flat("rate", scan.channels * scan.size)
        bias, skip = (flat(name, scan.channels) for name in ("bias", "skip"))
        positions, slots, state = step_operands(scan.rows)
        y, task, n_tasks = flat("y", whole), T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        unit_size = scan.size * scan.block
        with share(scan.channels // scan.block, task, n_tasks) as unit, T.serial(scan.rows) as row:
            position, first = T.bind(positions[row]), T.bind(unit * scan.block)
            with T.If(position >= 0):
                with T.Then():
                    base = own_state(scan, slots[row], unit * unit_size)
                    begin(v, position, state, base, unit_size)
                    ask_ahead(scan, (x, dt, gate, y), T.min(row + 1, scan.rows - 1), first)
                    with T.serial(scan.block // v.n) as i:
                        at = T.bind(row * scan.channels + first + i * v.n)
                        step = softplus(v, v.load(dt, at) + v.load(bias, first + i * v.n))
                        value = v.load(x, at)
                        places = base + T.cast(i * v.n, "int64"), unit * unit_size + i * v.n
                        asked = take(scan, v, (state, rate, b, c), places, row, step, v.keep(step * value))
                        total = v.fma(v.load(skip, first + i * v.n), value, asked)
                        v.store(y, at, total * silu(v, v.load(gate, at)))
                with T.Else(), T.serial(scan.block // v.n) as i:
                    v.store(y, row * scan.channels + first + i * v.n, v.all(0.0))
    return builder.get()


def ask_ahead(scan: Scan, operands: tuple[Any, ...], row: Any, first: Any) -> None:
    """Have these channels of a row in the cache when it comes to it: rows lie further apart than processors look."""
    start = T.bind(row * scan.channels + first)
    for operand in operands:
        for line in range(0, scan.block, LINE):
            prefetch(operand, start + line, FIRST_LEVEL)


def take(
    scan: Scan, v: Lanes, operands: tuple[Any, Any, Any, Any], places: tuple[Any, Any], row: Any, step: Any, news: Any
) -> Any:
    """Let the states of some channels take a token in; -> their sum by c.

    operands: state, rate, b, c.  places: of these channels' first states and rates.  news: step · x.
    """
    state, rate, b, c = operands
    total = T.alloc_buffer((v.n,), "float32")
    v.store(total, 0, v.all(0.0))
    unrolled = next(n for n in range(min(UNROLLED, scan.size), 0, -1) if scan.size % n == 0)
    with T.serial(scan.size // unrolled) as outer:
        for inner in range(unrolled):
            n = outer * unrolled + inner
            decay = v.exp2(step * v.load(rate, places[1] + n * scan.block))
            place = places[0] + T.cast(n * scan.block, "int64")
            left = v.keep(v.fma(decay, v.load(state, place), news * v.all(b[row * scan.size + n])))
            v.store(state, place, left)
            v.store(total, 0, v.fma(left, v.all(c[row * scan.size + n]), total[v.at(0)]))
    return total[v.at(0)]


def exp(v: Lanes, x: Any) -> Any:
    """e**x, with the error that x · log2(e) has."""
    return v.exp2(x * v.all(LOG2_E))


def silu(v: Lanes, x: Any) -> Any:
    """x / (1 + e**-x)."""
    return x / (v.all(1.0) + exp(v, v.all(0.0) - x))


def softplus(v: Lanes, x: Any) -> Any:
    """log(1 + e**x) = max(x, 0) + log(1 + u), u = e**-|x|;    log(1 + u) = 2 atanh(u / (2 + u))."""
    x = v.keep(x)
    u = exp(v, v.all(0.0) - T.max(x, v.all(0.0) - x))
    s = v.keep(u / (v.all(2.0) + u))
    square, series = v.keep(s * s), v.all(ATANH[0])
    for coefficient in ATANH[1:]:
        series = v.fma(series, square, v.all(coefficient))
    return v.keep(v.fma(s + s, series, T.max(x, v.all(0.0))))
