"""Multi-head latent attention over a paged cache of latents: paged attention in which all heads share one key.

Launches, for a step of M rows from any mix of sequences:
    append: normalise each row's latent, turn what belongs behind it, write both into its page as the key, and the
            latent as the value; put each head's query together                               (latent_append.py)
    attend, merge: as rule.py has them, with one key head                                (walk.py)

A token takes L + RD numbers of the cache, whatever the number of heads: its latent lies there as part of the key, in
the order in which scores want it, and is brought into that of the weighted sums page by page (latent_spread.py), or
lies there a second time as the value, L numbers more.  Operations: 2 H (2 L + RD) a token of context and row, which is
what limits it beyond a few heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from llmc.compiler.kernel import PAGE_TOKENS, Call, Implementation, Launch, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.attention_call import LATENT, LATENT_INPUTS
from llmc.schedules.cpu.attention import rule as attention
from llmc.schedules.cpu.attention.rule import Blocks
from llmc.schedules.cpu.attention.shape import MOST_INT8_DIM, LatentAttention
from llmc.schedules.rule import Rule

*INPUTS, _, _ = LATENT_INPUTS
"""What the first launch reads of the call's inputs, all but both caches."""


def parse(call: Call, target: Target) -> LatentAttention | None:
    """The attention that a call asks for, or None.  Raises LlmcError for heads that these kernels cannot take."""
    if call.op != LATENT:
        return None
    page_table, kv_dtype = call.inputs[INPUTS.index("page_table")], call.attribute("kv_dtype")
    latent_dim, rotary_dim = call.attribute("latent_dim"), call.attribute("rotary_dim")
    head_dim = latent_dim + rotary_dim
    if head_dim % 2:
        raise LlmcError(f"attention takes keys of an even number of elements, not {head_dim}", place=call.op)
    if kv_dtype == "int8" and head_dim > 2 * MOST_INT8_DIM:
        fact = f"a KV cache in int8 takes keys of up to {2 * MOST_INT8_DIM} elements, not {head_dim}"
        raise LlmcError(fact, place="--kv-dtype int8", hint="take bf16 or f32")
    dots = {"f32": "fma", "bf16": attention.bf16_dot(head_dim, target), "int8": "madd16"}
    if page_table is None or call.attribute("page_tokens") != PAGE_TOKENS or kv_dtype not in dots:
        return None
    return LatentAttention(
        m=page_table.shape[0],
        pages=page_table.shape[1],
        heads=call.attribute("num_heads"),
        kv_heads=1,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        interleaved=bool(call.attribute("interleaved")),
        scale=float(call.attribute("scale")),
        softcap=float(call.attribute("softcap")),
        window=call.attribute("window"),
        n_layers=call.attribute("n_layers"),
        page_bytes=call.attribute("page_bytes", 0),
        dot=dots[kv_dtype],
        lanes=target.lanes,
        epsilon=float(call.attribute("epsilon")),
        query_dim=call.attribute("head_dim"),
        spreads=spreads(dots[kv_dtype], target.lanes, latent_dim, head_dim),
    )


def spreads(dot: str, lanes: int, latent_dim: int, head_dim: int) -> bool:
    """Whether a page has latents once, where that is no slower.  In int8 two copies have two scales; bf16 in vectors of
    16 is bound by arithmetic from few heads on, to which this adds: with 16 heads decode took 9 % more.  And a block of
    16 latents must be there as a whole to be read."""
    pays = dot in ("fma", "tiles") or (dot == "widen" and lanes == 8)
    return pays and -(-latent_dim // 16) * 16 <= head_dim


def match(call: Call, target: Target) -> Blocks | None:
    a = parse(call, target)
    return attention.blocks_of(a, least=1) if a else None


def space(call: Call, target: Target) -> Iterable[Blocks]:
    """Other blocks worth measuring."""
    a = parse(call, target)
    return attention.space_of(a, (1, 2, 4, 8)) if a else []


def implement(call: Call, blocks: Blocks, target: Target) -> Implementation:
    a = parse(call, target)
    assert a is not None, "implement follows match"
    inputs = {name: Operand("input", at) for at, name in enumerate(INPUTS)}
    kv, q, scratch = (Operand("kv"),) * (2 if a.is_int8 else 1), Operand("temp"), Operand("scratch")
    words = a.m * (a.heads * (2 * a.head_dim + a.rotary_dim) + 2 * a.head_dim + (0 if a.spreads else a.value_dim))
    append = Launch(
        attention.kernel("append_latent", a, partial(build_append, a)),
        (*inputs.values(), *kv, q, scratch),
        a.m * a.heads,
        4 * words,
        3 * a.m * a.heads * a.head_dim,
    )
    attend, temps = attention.attending(a, blocks, (q, inputs["positions"], inputs["page_table"], *kv), ())
    return Implementation(
        launches=(append, *attend),
        temps=(4 * a.query_words * (a.m * a.heads + a.rows_beyond(blocks.rows)), *temps),
        scratch_bytes=4 * max(a.head_dim, a.scratch_words(blocks.rows)),
        kv_layer_bytes=a.layer_bytes,
        layouts={INPUTS.index("norm"): RowMajor("f32")},
    )


def build_append(a: LatentAttention) -> Any:
    from llmc.schedules.cpu.attention import latent_append  # TVM is imported only when something is compiled

    return latent_append.append_kernel(a)


RULES = (Rule("latent_attention", match, implement, space),)
