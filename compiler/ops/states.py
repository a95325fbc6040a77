"""The operators of layers with a state: over a whole sequence, and over the states of a step's sequences.

A state is what a layer keeps of all tokens before, in a place of a size that does not grow.  S is the number of tokens
of the sequences, M that of rows of a step, of any sequences; each sequence has one slot, with a state for each layer.
C counts channels, L taps, KH and VH heads of keys and of values, of DK and DV elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import ATTRIBUTE_TYPES, Attributes, Dims, define, like_first

SLOTTED = """Row m continues the sequence whose state lies in state[slots[m]]: rows are taken in order, and each leaves
there what the next one finds.  One with positions[m] = 0 finds zeros, whatever lies there; one with -1 changes nothing
and gives zeros."""

PLACE = "place"
"""The attribute that numbers a node's state among those of a slot; definitions do not use it."""


def own_state(op: Any, states: Any, position: Any, slot: Any) -> tuple[Any, Any]:
    """Within a scan over rows: (whether the row is real, the state that it finds)."""
    found = op.Gather(states, op.Max(slot, op.scalar(0)), axis=0)
    return op.GreaterOrEqual(position, op.scalar(0)), op.Where(op.Equal(position, op.scalar(0)), op.scalar(0.0), found)


def kept_states(op: Any, states: Any, real: Any, slot: Any, state: Any) -> Any:
    """All states, with the row's own in its slot if it is real."""
    place = op.Reshape(op.Max(slot, op.scalar(0)), op.ints(1, 1))
    return op.Where(real, op.ScatterND(states, place, op.Unsqueeze(state, op.ints(0))), op.Identity(states))


# -- a short causal convolution ------------------------------------------------------------------------------------


def tap(op: Any, before: Any, x: Any, taps: Any) -> tuple[Any, Any]:
    """One token: (the last L - 1 inputs, sum over l of taps[l] · input[l - L + 1]).

    before [L-1, …, C], x […, C], taps [L, …, C], broadcast.
    """
    window = op.Concat(before, op.Unsqueeze(x, op.ints(0)), axis=0)
    y = op.ReduceSum(op.Mul(window, taps), op.ints(0), keepdims=0)
    return op.Slice(window, op.ints(1), op.Shape(window, start=0, end=1), op.ints(0)), y


def activated(op: Any, y: Any, bias: Any, silu: Any) -> Any:
    """y + bias, times its sigmoid where silu is 1."""
    y = op.Add(y, bias) if bias is not None else y
    return op.Where(op.Equal(op.scalar(silu), op.scalar(1)), op.Mul(y, op.Sigmoid(y)), y)


CONV = """y[t] = act(sum over l of weight[:, l] · x[t - L + 1 + l] + bias), channel by channel; act is silu where `silu`
is 1, and nothing where it is 0; inputs in front of the sequence are zeros."""


def conv_name(bias: bool, stateful: bool = False) -> str:
    """`[Stateful]CausalConv[Bias]`."""
    return f"{'Stateful' * stateful}CausalConv{'Bias' * bias}"


def define_conv(bias: bool) -> None:
    """Register both convolutions with a bias, or without one."""

    def whole(op: Any, x: ir.Value, weight: ir.Value, *vectors: ir.Value, silu: Any) -> Any:
        rows = op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), op.ints(-1), op.Shape(x, start=-1), axis=0))
        taps = op.Unsqueeze(op.Transpose(weight, perm=[1, 0]), op.ints(1))
        before = op.Sub(op.Shape(weight, start=1), op.ints(1))
        shape = op.Concat(before, op.Shape(rows, start=1), axis=0)
        zeros = op.Expand(op.scalar(0.0), shape)
        _, y = op.scan(lambda op, state, row: tap(op, state, row, taps), [zeros], [rows])
        return activated(op, op.Reshape(y, op.Shape(x)), vectors[0] if bias else None, silu)

    def stateful(op: Any, x: ir.Value, weight: ir.Value, *inputs: ir.Value, silu: Any, place: Any) -> Any:
        *vectors, positions, slots, states = inputs
        taps = op.Transpose(weight, perm=[1, 0])

        def step(op: Any, states: Any, x: Any, position: Any, slot: Any) -> Any:
            real, found = own_state(op, states, position, slot)
            left, y = tap(op, found, x, taps)
            return kept_states(op, states, real, slot, left), y

        states, y = op.scan(step, [states], [x, positions, slots])
        y = activated(op, y, vectors[0] if bias else None, silu)
        return op.Where(op.Unsqueeze(op.GreaterOrEqual(positions, op.scalar(0)), op.ints(1)), y, op.scalar(0.0)), states

    whole_doc = f"{CONV}\n\nx [S, …, C], weight [C, L]{', bias [C]' * bias} -> like x."
    step_doc = f"""{CONV}\n\n{SLOTTED}
x [M, C], weight [C, L]{", bias [C]" * bias}, positions, slots int64[M], state [n_slots, L-1, C] (the last inputs)
-> [M, C] and the states."""
    names = ["x", "weight", *["bias"] * bias]
    silu, number = {"silu": ATTRIBUTE_TYPES["int"]}, {PLACE: ATTRIBUTE_TYPES["int"]}
    define(conv_name(bias), names, silu, whole, like_first, whole_doc)
    names = [*names, "positions", "slots", "state"]
    define(conv_name(bias, stateful=True), names, silu | number, stateful, first_and_last, step_doc)


def first_and_last(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [shapes[0], shapes[-1]]


CAUSAL_CONV = tuple(conv_name(bias) for bias in (False, True))
for _bias in (False, True):
    define_conv(_bias)


# -- gated rules ---------------------------------------------------------------------------------------------------

STATE = """For each head of values a state T [DK, DV], zeros at first, and for each token, with the query's and the
key's head, of which VH / KH heads of values each share one,"""
DELTA = f"""{STATE} q and k divided by the root of the sum of their
squares + epsilon:

    T = exp(g) · T;    T = T + k (beta · (v - kᵀ T))ᵀ;    y = scale · qᵀ T

Yang et al. 2024, arXiv:2412.06464."""
BY_CHANNEL = f"""{STATE} q and k divided by the root of the sum of their
squares + epsilon, and a g for each of the key's elements:

    T = diag(exp(g)) · T;    T = T + k (beta · (v - kᵀ T))ᵀ;    y = scale · qᵀ T

Kimi Team 2025, arXiv:2510.26692."""
LINEAR = f"""{STATE}

    T = exp(g) · T + k (beta · v)ᵀ;    y = scale · qᵀ T

Dao and Gu 2024, arXiv:2405.21060, where beta is the step, k is B, q is C and v is x."""
GATED_DELTA, CHANNEL_DELTA, SELECTIVE = "GatedDelta", "ChannelDelta", "Selective"
EQUATIONS = {GATED_DELTA: DELTA, SELECTIVE: LINEAR, CHANNEL_DELTA: BY_CHANNEL}
"""Kinds of rules, and what each says."""


def unit(op: Any, x: Any, epsilon: Any) -> Any:
    """x / sqrt(sum of x² + epsilon) over the last axis."""
    return op.Div(x, op.Sqrt(op.Add(op.ReduceSumSquare(x, op.ints(-1)), op.scalar(epsilon))))


def for_values(op: Any, x: Any, v: Any) -> Any:
    """x [S, B, KH, DK], each head as often as heads of v [S, B, VH, DV] share it: [S, B, VH, DK]."""
    n_values = op.Shape(v, start=2, end=3)
    shared = op.Div(n_values, op.Shape(x, start=2, end=3))
    each = op.Expand(op.Unsqueeze(x, op.ints(3)), op.Concat(op.ints(1, 1, 1), shared, op.ints(1), axis=0))
    return op.Reshape(each, op.Concat(op.ints(0, 0), n_values, op.ints(-1), axis=0))


def rule_step(op: Any, state: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, *, kind: str) -> tuple[Any, Any]:
    """One token: (the state behind it, qᵀ T).  state […, VH, DK, DV], q, k […, VH, DK], v […, VH, DV], decay, beta
    […, VH]; by channel decay […, VH, DK]."""
    state = op.Mul(state, op.Unsqueeze(decay, op.ints(-1) if kind == CHANNEL_DELTA else op.ints(-1, -2)))
    if kind != SELECTIVE:
        v = op.Sub(v, op.Squeeze(op.MatMul(op.Unsqueeze(k, op.ints(-2)), state), op.ints(-2)))
    news = op.Mul(v, op.Unsqueeze(beta, op.ints(-1)))
    state = op.Add(state, op.Mul(op.Unsqueeze(k, op.ints(-1)), op.Unsqueeze(news, op.ints(-2))))
    return state, op.Squeeze(op.MatMul(op.Unsqueeze(q, op.ints(-2)), state), op.ints(-2))


HEADS = ("num_k_heads", "num_v_heads", "key_dim", "value_dim")
WHOLE = "q, k [S, …, KH, DK], v [S, …, VH, DV], g, beta [S, …, VH] -> like v."
STEP = """qkv [M, 2 KH·DK + VH·DV] (queries, keys, values), g, beta [M, VH], positions, slots int64[M],
state [n_slots, VH, DK, DV] -> [M, VH·DV] and the states."""
BY_HEAD, OF_CHANNELS = "g, beta", {WHOLE: "g [S, …, VH, DK], beta", STEP: "g [M, VH·DK], beta"}
GATES = """The same with g = rate · log(1 + exp(a + bias)) and beta = sigmoid(b): a, b [M, VH], bias, rate [VH]."""


def rule_name(kind: str, stateful: bool = False) -> str:
    """`[Stateful]GatedDeltaRule`, `[Stateful]ChannelDeltaRule`, `[Stateful]SelectiveRule`."""
    return f"{'Stateful' * stateful}{kind}Rule"


def headed(op: Any, x: Any, v: Any, kind: str, settings: dict[str, Any]) -> Any:
    """Queries or keys as the rule takes them, each head as often as heads of values share it."""
    return for_values(op, x if kind == SELECTIVE else unit(op, x, settings["epsilon"]), v)


def whole_rule(
    kind: str, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, g: ir.Value, beta: ir.Value,
    *, scale: Any, **settings: Any,
) -> Any:  # fmt: skip
    """A rule over whole sequences."""
    rows = [op.Reshape(x, op.Concat(op.ints(0, -1), op.Shape(x, start=-2), axis=0)) for x in (q, k, v)]
    n_axes = (2 if kind == CHANNEL_DELTA else 1), 1
    gates = [
        op.Reshape(x, op.Concat(op.ints(0, -1), op.Shape(x, start=-n), axis=0))
        for x, n in zip((op.Exp(g), beta), n_axes, strict=True)
    ]
    queries, keys = (headed(op, x, rows[2], kind, settings) for x in rows[:2])
    zeros = op.Expand(op.scalar(0.0), op.Concat(op.Shape(queries, start=1), op.Shape(v, start=-1), axis=0))
    _, y = op.scan(partial(rule_step, kind=kind), [zeros], [queries, keys, rows[2], *gates])
    return op.Mul(op.Reshape(y, op.Shape(v)), op.scalar(scale))


def stateful_rule(
    kind: str, op: Any, qkv: ir.Value, g: ir.Value, beta: ir.Value, positions: ir.Value, slots: ir.Value,
    state: ir.Value, *, scale: Any, **settings: Any,
) -> Any:  # fmt: skip
    """A rule over the rows of a step."""
    key_heads, value_heads, key_dim, value_dim = (settings[name] for name in HEADS)
    sizes = [(key_heads, key_dim), (key_heads, key_dim), (value_heads, value_dim)]
    widths = op.ints(*(op.Mul(op.scalar(heads), op.scalar(size)) for heads, size in sizes))
    parts = op.Split(qkv, widths, axis=1, n_results=3)
    rows = [op.Reshape(x, op.ints(0, 1, *size)) for x, size in zip(parts, sizes, strict=True)]
    q, k = (op.Squeeze(headed(op, x, rows[2], kind, settings), op.ints(1)) for x in rows[:2])

    def step(op: Any, states: Any, q: Any, k: Any, v: Any, decay: Any, beta: Any, position: Any, slot: Any) -> Any:
        real, found = own_state(op, states, position, slot)
        left, y = rule_step(op, found, q, k, v, decay, beta, kind=kind)
        return kept_states(op, states, real, slot, left), y

    v = op.Squeeze(rows[2], op.ints(1))
    decay = op.Exp(op.Reshape(g, op.ints(0, value_heads, key_dim)) if kind == CHANNEL_DELTA else g)
    state, y = op.scan(step, [state], [q, k, v, decay, beta, positions, slots])
    y = op.Mul(op.Reshape(y, op.ints(0, -1)), op.scalar(scale))
    is_real = op.Unsqueeze(op.GreaterOrEqual(positions, op.scalar(0)), op.ints(1))
    return op.Where(is_real, y, op.scalar(0.0)), state


def delta_rule_with_gates(
    op: Any, qkv: ir.Value, a: ir.Value, b: ir.Value, bias: ir.Value, rate: ir.Value, *inputs: ir.Value,
    **attributes: Any,
) -> Any:  # fmt: skip
    """The delta rule over the rows of a step, working out its own gates."""
    g = op.Mul(rate, op.Softplus(op.Add(a, bias)))
    return stateful_rule(GATED_DELTA, op, qkv, g, op.Sigmoid(b), *inputs, **attributes)


def define_rule(kind: str) -> None:
    """Register both forms of a rule: over whole sequences, and over the rows of a step."""
    doc = EQUATIONS[kind]
    whole, step = (x.replace(BY_HEAD, OF_CHANNELS[x]) if kind == CHANNEL_DELTA else x for x in (WHOLE, STEP))
    floats = dict.fromkeys(("scale",) if kind == SELECTIVE else ("scale", "epsilon"), ATTRIBUTE_TYPES["float"])
    settings = dict.fromkeys((*HEADS, PLACE), ATTRIBUTE_TYPES["int"]) | floats
    names, body = ["q", "k", "v", "g", "beta"], partial(whole_rule, kind)
    define(rule_name(kind), names, floats, body, like_values, f"{doc}\n\n{whole}")
    names, body = ["qkv", "g", "beta", "positions", "slots", "state"], partial(stateful_rule, kind)
    name, step_doc = rule_name(kind, stateful=True), f"{doc}\n\n{SLOTTED}\n\n{step}"
    define(name, names, settings, body, rule_results, step_doc)
    if kind == GATED_DELTA:
        names = ["qkv", "a", "b", "bias", "rate", "positions", "slots", "state"]
        define(f"{name}Softplus", names, settings, delta_rule_with_gates, rule_results, f"{step_doc}\n\n{GATES}")


def like_values(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [shapes[2]]


def rule_results(shapes: Sequence[Dims], attributes: Attributes) -> Sequence[Dims]:
    return [(shapes[0][0], attributes["num_v_heads"] * attributes["value_dim"]), shapes[-1]]


GATED_RULES = tuple(map(rule_name, EQUATIONS))
for _kind in EQUATIONS:
    define_rule(_kind)


# -- a selective scan ----------------------------------------------------------------------------------------------

SCAN = """Each channel has a state T [N], zeros at first, and for each token, whose b and c are all channels' own,

    d = log(1 + exp(dt + bias));    T = exp(d · rate) · T + d · x · b;    y = (Tᵀ c + skip · x) · silu(gate)

Gu and Dao 2023, arXiv:2312.00752, where d is the step, rate is A, skip is D and gate is z."""
SCANNED = ["x", "dt", "gate", "b", "c", "rate", "bias", "skip"]
SELECTIVE_SCAN = "SelectiveScan"


def scan_step(op: Any, state: Any, x: Any, d: Any, b: Any, c: Any, rate: Any) -> tuple[Any, Any]:
    """One token: (the state behind it, Tᵀ c).  state […, C, N], x, d […, C], b, c […, N], rate [C, N]."""
    last, each = op.ints(-1), op.ints(-2)
    decay = op.Exp(op.Mul(op.Unsqueeze(d, last), rate))
    news = op.Mul(op.Unsqueeze(op.Mul(d, x), last), op.Unsqueeze(b, each))
    state = op.Add(op.Mul(decay, state), news)
    return state, op.ReduceSum(op.Mul(state, op.Unsqueeze(c, each)), last, keepdims=0)


def define_scan() -> None:
    """Register both scans: over whole sequences, and over the rows of a step."""

    def gated(op: Any, y: Any, x: Any, skip: Any, gate: Any) -> Any:
        return op.Mul(op.Add(y, op.Mul(x, skip)), op.Mul(gate, op.Sigmoid(gate)))

    def whole(
        op: Any, x: ir.Value, dt: ir.Value, gate: ir.Value, b: ir.Value, c: ir.Value, rate: ir.Value, bias: ir.Value,
        skip: ir.Value,
    ) -> Any:  # fmt: skip
        d = op.Softplus(op.Add(dt, bias))
        rows = [
            op.Reshape(value, op.Concat(op.Shape(x, start=0, end=1), op.ints(-1), op.Shape(value, start=-1), axis=0))
            for value in (x, d, b, c)
        ]
        shape = op.Concat(op.Shape(rows[0], start=1, end=2), op.Shape(rate), axis=0)
        zeros = op.Expand(op.scalar(0.0), shape)
        _, y = op.scan(partial(scan_step, rate=rate), [zeros], rows)
        return gated(op, op.Reshape(y, op.Shape(x)), x, skip, gate)

    def stateful(
        op: Any, x: ir.Value, dt: ir.Value, gate: ir.Value, b: ir.Value, c: ir.Value, rate: ir.Value, bias: ir.Value,
        skip: ir.Value, positions: ir.Value, slots: ir.Value, state: ir.Value, *, place: Any,
    ) -> Any:  # fmt: skip
        def step(op: Any, states: Any, x: Any, d: Any, b: Any, c: Any, position: Any, slot: Any) -> Any:
            real, found = own_state(op, states, position, slot)
            left, y = scan_step(op, found, x, d, b, c, rate)
            return kept_states(op, states, real, slot, left), y

        d = op.Softplus(op.Add(dt, bias))
        states, y = op.scan(step, [state], [x, d, b, c, positions, slots])
        is_real = op.Unsqueeze(op.GreaterOrEqual(positions, op.scalar(0)), op.ints(1))
        return op.Where(is_real, gated(op, y, x, skip, gate), op.scalar(0.0)), states

    constants = "rate [C, N], bias, skip [C]"
    whole_doc = f"{SCAN}\n\nx, dt, gate [S, …, C], b, c [S, …, N], {constants} -> like x."
    step_doc = f"""{SCAN}\n\n{SLOTTED}\n
x, dt, gate [M, C], b, c [M, N], {constants}, positions, slots int64[M], state [n_slots, C, N] -> [M, C] and the
states."""
    define(SELECTIVE_SCAN, SCANNED, {}, whole, like_first, whole_doc)
    names = [*SCANNED, "positions", "slots", "state"]
    number = {PLACE: ATTRIBUTE_TYPES["int"]}
    define(f"Stateful{SELECTIVE_SCAN}", names, number, stateful, first_and_last, step_doc)


define_scan()

WITH_STATES = (*GATED_RULES, *CAUSAL_CONV, SELECTIVE_SCAN)
"""The operators of layers with a state, before there are slots."""
STATEFUL = (*(f"Stateful{name}" for name in WITH_STATES), "StatefulGatedDeltaRuleSoftplus")
"""The same, of the rows of a step."""
