"""What a call must give, by PyTorch in float32: on the GPU where it sees one, else on the CPU.

LLMC_REFERENCE=cpu leaves the GPU to what is checked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llmc.bench.gpu import kv_codes
from llmc.bench.gpu.bits import Stored, exact
from llmc.bench.gpu.inputs import Inputs
from llmc.bench.gpu.state_reference import with_states
from llmc.compiler.kernel import PAGE_TOKENS, Call
from llmc.schedules.attention_call import LATENT, NORMS, OF_HEADS, input_places, is_both_ways
from llmc.schedules.states_call import is_stateful

Array = np.ndarray[Any, Any]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "Relu": F.relu,
    "Silu": F.silu,
    "Gelu": F.gelu,
    "GeluTanh": lambda x: F.gelu(x, approximate="tanh"),
}
NAME = re.compile(
    r"llmc\.(Deferred)?(RMSNorm|LayerNorm)?(Gated)?Linear(Bias)?(Relu|GeluTanh|Gelu|Silu)?(Bias)?(Residual)?"
    r"((?:Tile)?Moments)?"
)


def expected(call: Call, inputs: Inputs) -> Array:
    """The call's first output, f32."""
    here = torch.cuda.is_available() and os.environ.get("LLMC_REFERENCE") != "cpu"
    device = "cuda" if here else "cpu"
    with torch.inference_mode():
        if call.op == LATENT:
            result = latent_attention(call, inputs, device)
        elif is_stateful(call):
            result = with_states(call, inputs, device)
        else:
            result = attention(call, inputs, device) if call.op.endswith("Attention") else linear(call, inputs, device)
        return np.asarray(result.float().cpu().numpy())


def linear(call: Call, inputs: Inputs, device: str) -> torch.Tensor:
    """[M, N]: act(norm(x) Wᵀ + bias) (· up) + residual."""
    name = NAME.fullmatch(call.op)
    if name is None:
        raise ValueError(f"there is no reference for {call.op}")
    deferred, norm, gated, bias, activation, gated_bias, residual, _ = name.groups()
    rest = iter([on(device, inputs, index) for index in sorted(inputs.arrays)])
    x = next(rest)
    epsilon = float(call.attribute("epsilon", 1e-5))
    if deferred:
        return finished(deferred_sums(call, norm, bool(bias or gated_bias), list(rest)), activation, gated)
    if norm == "RMSNorm":
        x = F.rms_norm(x, x.shape[-1:], next(rest), epsilon)
    elif norm == "LayerNorm":
        x = F.layer_norm(x, x.shape[-1:], next(rest), next(rest), epsilon)
    y = x @ next(rest).T
    if bias or gated_bias:
        y = y + next(rest)
    y = finished(y, activation, gated)
    return y + next(rest) if residual else y


def finished(y: torch.Tensor, activation: str | None, gated: str | None) -> torch.Tensor:
    act = ACTIVATIONS[activation or ""]
    if not gated:
        return act(y)
    gate, up = y.chunk(2, dim=-1)
    return act(gate) * up


def deferred_sums(call: Call, norm: str, bias: bool, inputs: list[torch.Tensor]) -> torch.Tensor:
    """scaled Wᵀ with the norm applied to it, from the moments, and with the bias; inputs: without x."""
    weight, *rest = inputs[1 if norm == "RMSNorm" else 2 :]
    scaled, moments, *folded = rest[bias:]
    means, squares = moments.unbind(-1)
    mean = means.mean(0) if folded else torch.zeros_like(means[0])
    variance = (squares * (len(moments) / scaled.shape[1]) + (means - mean) ** 2).mean(0)
    factor = torch.rsqrt(variance + float(call.attribute("epsilon")))[:, None]
    if folded:
        return (scaled @ weight.T - mean[:, None] * folded[0][0]) * factor + folded[0][1]
    return scaled @ weight.T * factor + (rest[0] if bias else 0)


def on(device: str, inputs: Inputs, index: int) -> torch.Tensor:
    """An input in f32; stored ones become so on the device."""
    found = inputs.arrays[index]
    if not isinstance(found, Stored):
        return torch.from_numpy(inputs.array(index)).to(device)
    kind = torch.bfloat16 if found.dtype == "bf16" else torch.float16
    return torch.from_numpy(found.bits.view(np.int16)).to(device).view(kind).float()


def attention(call: Call, inputs: Inputs, device: str) -> torch.Tensor:
    """[M, H·D]: rotate, write the step's keys and values into the pages, attend; rows that pad it give zeros."""
    heads, kv_heads = call.attribute("num_heads"), call.attribute("kv_num_heads")
    dim, m = call.attribute("head_dim"), len(inputs.rows)
    places, rows = input_places(call), rows_of(call, inputs)
    qkv = torch.from_numpy(inputs.array(0)).to(device).reshape(m, heads + 2 * kv_heads, dim)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    if "query_norm" in places:
        weights = (torch.from_numpy(inputs.array(places[name])).to(device) for name in NORMS)
        normed = (F.rms_norm(x, (dim,), w, call.attribute("epsilon")) for x, w in zip((q, k), weights, strict=True))
        q, k = (multiplied(call, x, is_key) for is_key, x in enumerate(normed))
    if "cos" in places:
        cos, sin = (torch.from_numpy(inputs.array(places[name])).to(device)[:, None] for name in ("cos", "sin"))
        turn = (call.attribute("rotary_dim"), bool(call.attribute("interleaved", 0)))
        q, k = rotate(q, cos, sin, *turn), rotate(k, cos, sin, *turn)
    assert inputs.keys is not None
    assert inputs.values is not None
    keys, values = (torch.from_numpy(cache).to(device).clone() for cache in (inputs.keys, inputs.values))
    for row, position, pages in rows:
        page, slot = int(pages[position // PAGE_TOKENS]), position % PAGE_TOKENS
        keys[page, :, slot], values[page, :, slot] = k[row], v[row]
    heads_of = {name: inputs.array(places[name]) for name in OF_HEADS if name in places}
    of_heads = {name: torch.from_numpy(numbers).to(device) for name, numbers in heads_of.items()}
    return attended(call, q, rows, keys, values, **of_heads)


def latent_attention(call: Call, inputs: Inputs, device: str) -> torch.Tensor:
    """[M, H·L]: the same of latents, which are keys in front of what is turned, and values."""
    heads, latent_dim, rotary_dim = (call.attribute(name) for name in ("num_heads", "latent_dim", "rotary_dim"))
    places, m = input_places(call), len(inputs.rows)
    arrays = {name: torch.from_numpy(inputs.array(at)).to(device) for name, at in places.items() if at in inputs.arrays}
    turn = (arrays["cos"][:, None], arrays["sin"][:, None], rotary_dim, bool(call.attribute("interleaved")))
    turning = arrays["q"].reshape(m, heads, -1)[..., -rotary_dim:]
    q = torch.cat([arrays["absorbed"].reshape(m, heads, -1), rotate(turning, *turn)], dim=-1)
    latent = F.rms_norm(arrays["kv"][:, :latent_dim], (latent_dim,), arrays["norm"], call.attribute("epsilon"))
    own = torch.cat([multiplied(call, latent, 1), rotate(arrays["kv"][:, None, latent_dim:], *turn)[:, 0]], dim=-1)
    assert inputs.keys is not None
    keys = torch.from_numpy(inputs.keys).to(device).clone()
    rows = rows_of(call, inputs)
    for row, position, pages in rows:
        keys[int(pages[-1]), 0, position % PAGE_TOKENS] = own[row]
    return attended(call, q, rows, keys, keys[..., :latent_dim])


def rows_of(call: Call, inputs: Inputs) -> list[tuple[int, int, Array]]:
    """(row, position, its pages up to there, int64) of a step's rows, but for those that pad it; of a text that is read
    whole all of its pages."""
    places = input_places(call)
    positions, tables = (inputs.array(places[name]) for name in ("positions", "page_table"))
    own = (tables >= 0).sum(1) if is_both_ways(call) else positions // PAGE_TOKENS + 1
    return [
        (row, int(position), tables[row, : own[row]].astype(np.int64))
        for row, position in enumerate(positions)
        if position >= 0
    ]


def attended(
    call: Call,
    q: torch.Tensor,
    rows: list[tuple[int, int, Array]],
    keys: torch.Tensor,
    values: torch.Tensor,
    **of_heads: torch.Tensor,
) -> torch.Tensor:
    """[M, H·D]: q [M, H, ..] over the pages [KH, tokens, ..] of keys and values [.., D]; zeros where no row is."""
    out = torch.zeros(*q.shape[:2], values.shape[-1], device=q.device)
    last = last_seen(call, rows)
    for row, position, pages in rows:
        numbers = torch.from_numpy(pages).to(q.device)
        k_seen, v_seen = (gathered(cache, numbers, last[row]) for cache in (keys, values))
        out[row] = attend(call, q[row], k_seen, v_seen, behind=last[row] - position, **of_heads)
    return out.flatten(1)


def last_seen(call: Call, rows: list[tuple[int, int, Array]]) -> dict[int, int]:
    """For each row the last position that it sees: its own, or where its text or window ends."""
    last = {row: position for row, position, _ in rows}
    if not is_both_ways(call):
        return last
    window = int(call.attribute("window", 0)) or len(last)
    ends = dict(last)
    for row in sorted(last, reverse=True):
        if last.get(row + 1) == last[row] + 1:
            ends[row] = ends[row + 1]
    return {row: min(ends[row], position + window - 1) for row, position in last.items()}


def multiplied(call: Call, x: torch.Tensor, is_key: int) -> torch.Tensor:
    """Queries or keys as kernels multiply them.  (Inputs are so already, unless they are normalised; quarter turns do
    not change it.)"""
    dtype, numbers = call.attribute("kv_dtype"), x.cpu().numpy()
    if dtype == "int8" and is_key:
        return torch.from_numpy(kv_codes.kept(numbers)).to(x.device)
    return torch.from_numpy(exact(numbers, "f16" if dtype == "int8" else dtype)).to(x.device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n: int, interleaved: bool) -> torch.Tensor:
    """The first n elements of each head [.., D] turned; pairs are (i, i + n/2), or (2i, 2i + 1)."""
    turned, rest = x[..., :n], x[..., n:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    whole = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([whole, rest], dim=-1)


def gathered(cache: torch.Tensor, pages: torch.Tensor, position: int) -> torch.Tensor:
    """[KH, tokens, D] up to and with a position."""
    chosen = cache[pages].transpose(0, 1)
    return chosen.reshape(chosen.shape[0], -1, chosen.shape[-1])[:, : position + 1]


def attend(
    call: Call,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    behind: int = 0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row, the last of them but for those `behind` it: q [H, D] over [KH, T, D], with sinks [H] or slopes [H] or
    neither."""
    group = q.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("hd,htd->ht", q, keys) * float(call.attribute("scale"))
    if softcap := float(call.attribute("softcap", 0.0)):
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes[:, None] * torch.arange(1 - scores.shape[1], 1, device=scores.device)
    if window := int(call.attribute("window", 0)):
        n = scores.shape[1]
        seen = window + behind if window > 0 else (n - 1) % -window + 1  # of its chunk
        scores[:, : max(0, n - seen)] = -torch.inf
    if sinks is None:
        return torch.einsum("ht,htd->hd", torch.softmax(scores, dim=-1), values)
    weights = torch.softmax(torch.cat([scores, sinks[:, None]], dim=-1), dim=-1)[:, :-1]
    return torch.einsum("ht,htd->hd", weights, values)
