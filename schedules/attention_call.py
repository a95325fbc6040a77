"""What a call of paged attention says, for the schedules of every target."""

from __future__ import annotations

from typing import Any

from llmc.compiler.kernel import Call

INPUTS = {
    f"llmc.{norm}{turned}PagedAttention": ("qkv", *norms, *angles, "positions", "page_table", "k_cache", "v_cache")
    for norm, norms in (("", ()), ("RMSNorm", ("query_norm", "key_norm")))
    for turned, angles in (("", ()), ("Rotary", ("cos", "sin")))
}
"""The operators of paged attention, and the names of their inputs in order."""
PAGE_TABLE = -3
"""Which of their inputs it is, and of a product that appends, and of attention behind that: caches are the last two."""


def input_places(call: Call) -> dict[str, int]:
    """Where each input of a call of paged attention stands, by name; no places for another call."""
    return {name: index for index, name in enumerate(INPUTS.get(call.op, ()))}


def attention_sizes(call: Call) -> dict[str, Any] | None:
    """The call's rows and pages, heads, rotary, masks and norm, by the names that schedules give them; None: no
    attention, nor a product that appends to its cache."""
    places = input_places(call)
    if not places and not call.op.endswith(("Append", "AppendedAttention")):
        return None
    page_table = call.inputs[PAGE_TABLE]
    if page_table is None:
        return None
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
        "epsilon": float(call.attribute("epsilon")) if "query_norm" in places else None,
    }
