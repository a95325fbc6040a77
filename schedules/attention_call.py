"""What a call of paged attention says, for the schedules of every target."""

from __future__ import annotations

from typing import Any

from llmc.compiler.kernel import Call


def attention_sizes(call: Call) -> dict[str, Any] | None:
    """The call's rows and pages, heads, rotary and masks, by the names that schedules give them; None: no attention."""
    rotary = call.op == "llmc.RotaryPagedAttention"
    if not rotary and call.op != "llmc.PagedAttention":
        return None
    page_table = call.inputs[4 if rotary else 2]
    if page_table is None:
        return None
    return {
        "rows": page_table.shape[0],
        "pages": page_table.shape[1],
        "heads": call.attribute("num_heads"),
        "kv_heads": call.attribute("kv_num_heads"),
        "head_dim": call.attribute("head_dim"),
        "rotary_dim": call.attribute("rotary_dim") if rotary else 0,
        "interleaved": bool(call.attribute("interleaved", 0)),
        "scale": float(call.attribute("scale")),
        "softcap": float(call.attribute("softcap", 0.0)),
        "window": call.attribute("window", 0),
        "n_layers": call.attribute("n_layers"),
    }
