"""What a layer with a state must give, by PyTorch in float32, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmc.bench.gpu.inputs import RUNS, Inputs
from llmc.compiler.kernel import Call
from llmc.schedules.states_call import DELTA_RULES, SELECTIVE_SCAN

Row = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A row, and the state in front of it -> the state behind it, and the row's result."""


def with_states(call: Call, inputs: Inputs, device: str) -> torch.Tensor:
    """The call's first output in the last of the runs."""
    state = call.inputs[-1]
    assert state is not None
    arrays = [torch.from_numpy(inputs.array(index)).to(device) for index in sorted(inputs.arrays)]
    *arrays, positions, slots = arrays
    kind = delta_rule if call.op in DELTA_RULES else selective_scan if call.op == SELECTIVE_SCAN else convolution
    row = kind(call, arrays)
    states = torch.zeros(state.shape, device=device)
    out = torch.zeros(call.outputs[0].shape, device=device)
    for _ in range(RUNS):
        for m, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
            if position >= 0:
                states[slot], y = row(m, states[slot] if position else torch.zeros_like(states[slot]))
                out[m] = y.flatten()
    return out


def convolution(call: Call, arrays: list[torch.Tensor]) -> Row:
    x, weight, *bias = arrays

    def row(m: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        window = torch.cat([state, x[m : m + 1]])
        y = (window * weight.T).sum(0) + sum(bias)
        return window[1:], F.silu(y) if call.attribute("silu") else y

    return row


def selective_scan(_: Call, arrays: list[torch.Tensor]) -> Row:
    x, dt, gate, b, c, rate, bias, skip = arrays
    steps = F.softplus(dt + bias)

    def row(m: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = steps[m][:, None]
        state = (d * rate).exp() * state + d * x[m][:, None] * b[m]
        return state, (state @ c[m] + skip * x[m]) * F.silu(gate[m])

    return row


def delta_rule(call: Call, arrays: list[torch.Tensor]) -> Row:
    qkv, g, beta, *vectors = arrays
    if DELTA_RULES[call.op]:
        bias, rate = vectors
        g, beta = rate * F.softplus(g + bias), beta.sigmoid()
    key_heads, heads, dim = (call.attribute(name) for name in ("num_k_heads", "num_v_heads", "key_dim"))
    q, k, v = torch.tensor_split(qkv, (key_heads * dim, 2 * key_heads * dim), dim=-1)

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        each = vectors.reshape(len(vectors), key_heads, dim).repeat_interleave(heads // key_heads, 1)
        epsilon: float = call.attribute("epsilon")
        return each * (each.square().sum(-1, keepdim=True) + epsilon).rsqrt()

    queries, keys, values = unit(q), unit(k), v.reshape(len(v), heads, -1)

    def row(m: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * g[m].exp()[:, None, None]
        news = beta[m][:, None] * (values[m] - (keys[m][:, :, None] * state).sum(1))
        state = state + keys[m][:, :, None] * news[:, None]
        return state, call.attribute("scale") * (queries[m][:, :, None] * state).sum(1)

    return row
