"""Reads a call of paged attention, or of a product that appends to its cache, for the schedules of every target."""

from __future__ import annotations

from typing import Any

from llmc.compiler.kernel import Call, RowMajor

NORMS = ("query_norm", "key_norm")
"""The inputs that are weights of norms."""
OF_HEADS = ("sinks", "slopes")
"""The inputs that hold a number for each query head."""
BIASES = "biases"
"""The input that holds a row for each query head, with a number for each distance."""
STEP = ("positions", "page_table", "k_cache", "v_cache")
INPUTS: dict[str, tuple[str, ...]] = {
    f"llmc.{norm}{turned}{sink}PagedAttention": ("qkv", *norms, *angles, *sinks, *STEP)
    for norm, norms in (("", ()), ("RMSNorm", NORMS))
    for turned, angles in (("", ()), ("Rotary", ("cos", "sin")))
    for sink, sinks in (("", ()), ("Sink", ("sinks",)))
}
INPUTS |= {
    f"llmc.{norm}{turned}BidirectionalPagedAttention": ("qkv", *norms, *angles, *STEP)
    for norm, norms in (("", ()), ("RMSNorm", NORMS))
    for turned, angles in (("", ()), ("Rotary", ("cos", "sin")))
}
INPUTS["llmc.RMSNormValuesPagedAttention"] = INPUTS["llmc.RMSNormPagedAttention"]
INPUTS["llmc.RMSNormValuesRotaryPagedAttention"] = INPUTS["llmc.RMSNormRotaryPagedAttention"]
INPUTS["llmc.AlibiPagedAttention"] = ("qkv", "slopes", *STEP)
INPUTS["llmc.DistanceBidirectionalPagedAttention"] = ("qkv", BIASES, *STEP)
INPUTS |= {
    f"llmc.{norm}{turned}{sink}AppendedAttention": ("queries", *norms, *angles, *sinks, *STEP)
    for norm, norms in (("", ()), ("RMSNorm", NORMS[:1]))
    for turned, angles in (("", ()), ("Rotary", ("cos", "sin")))
    for sink, sinks in (("", ()), ("Sink", ("sinks",)))
}
INPUTS |= {
    f"llmc.{norm}{turned}AheadPagedAttention": ("qkv", *norms, *angles, "sees", *STEP)
    for norm, norms in (("", ()), ("RMSNorm", NORMS))
    for turned, angles in (("", ()), ("Rotary", ("cos", "sin")))
}
"""The operators of paged attention, and the names of their inputs in order, as compiler/ops/paged.py defines
them.  They are listed here again because that needs onnx_ir, which is not there where bench/gpu measures kernels."""
LATENT = "llmc.LatentPagedAttention"
LATENT_INPUTS = ("q", "absorbed", "kv", "norm", "cos", "sin", *STEP)
"""Those of attention over latents, as compiler/ops/latent.py defines it."""
PAGE_TABLE = -3
"""Which input is the page table, in all of these and in products that append: the two caches come last."""


def input_places(call: Call) -> dict[str, int]:
    """Where each input of a call of paged attention, or of latents, stands, by name; no places for another call."""
    names = LATENT_INPUTS if call.op == LATENT else INPUTS.get(call.op, ())
    return {name: index for index, name in enumerate(names)}


def is_both_ways(call: Call) -> bool:
    """Whether rows see what is behind them too, in texts that are in the step whole."""
    return call.op.endswith("BidirectionalPagedAttention")


def weight_layouts(call: Call) -> dict[int, RowMajor]:
    """How the weights of the norms, sinks, slopes and biases lie among the inputs of a call of paged attention."""
    return {at: RowMajor("f32") for name, at in input_places(call).items() if name in (*NORMS, *OF_HEADS, BIASES)}


def attention_sizes(call: Call) -> dict[str, Any] | None:
    """The call's rows and pages, heads, rotary, masks and norm, by the names that schedules give them; None: no
    attention."""
    return step_sizes(call) if call.op in INPUTS else None


def appended_sizes(call: Call) -> dict[str, Any] | None:
    """The same of the attention whose queries, keys and values a product makes that appends; None: no such product."""
    return step_sizes(call) if call.op.endswith("Append") else None


def step_sizes(call: Call) -> dict[str, Any]:
    page_table = call.inputs[PAGE_TABLE]
    assert page_table is not None, "its definition asks for one"
    return {
        "rows": page_table.shape[0],
        "pages": page_table.shape[1],
        "heads": call.attribute("num_heads"),
        "kv_heads": call.attribute("kv_num_heads"),
        "head_dim": call.attribute("head_dim"),
        "rotary_dim": call.attribute("rotary_dim", 0),
        "interleaved": bool(call.attribute("interleaved", 0)),
        "scale": float(call.attribute("scale", 1.0)),
        "softcap": float(call.attribute("softcap", 0.0)),
        "window": call.attribute("window", 0),
        "n_layers": call.attribute("n_layers"),
        **own_sizes(call),
        "epsilon": float(call.attribute("epsilon")) if NORMS[0] in input_places(call) else None,
    }


def own_sizes(call: Call) -> dict[str, Any]:
    """Sizes that few models have: values that differ in size from keys, or are normalised; caches that differ in
    size."""
    v_cache = call.inputs[-1]
    assert v_cache is not None, "its definition asks for one"
    value_dim = v_cache.shape[-1]
    differs = {"own_value_dim": value_dim} if value_dim != call.attribute("head_dim") else {}
    differs |= {"norms_values": True} if call.op.startswith("llmc.RMSNormValues") else {}
    differs |= {"both_ways": True} if is_both_ways(call) else {}
    return differs | {name: n for name in ("page_bytes",) if (n := call.attribute(name, 0))}
