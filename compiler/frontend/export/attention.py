"""Every attention of an exported graph is one node: transformers calls the function registered here for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from llmc.compiler.frontend.export.masks import exported_mask
from llmc.compiler.frontend.export.states import WITH_ATTENTION
from llmc.compiler.frontend.export.unsupported import unsupported
from llmc.compiler.ops import DOMAIN, OPSET, VERSION

INTERFACE = "llmc"
"""The name under which transformers finds our attention."""
CHUNKED = "chunked_attention"
UNKNOWN = ("indices", "block_indices", "position_bias", "sinks")
"""What some models pass to attention that changes its results: chosen keys, biases."""


def attention_node(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, S, D], key and value [B, KH, S, D], s_aux (sinks) [H] -> [B, S, H, D], as one graph node; its mask
    is one more operand until drop_masks."""
    unknown = next((name for name in UNKNOWN if others.get(name) is not None), None)
    if unknown:
        raise unsupported(module.config, f"its attention takes {unknown}")
    is_causal = getattr(module, "is_causal", True)
    if not is_causal and s_aux is not None:
        raise unsupported(module.config, "its attention is not causal, and has sinks")
    window = window_of(module, sliding_window) if is_causal else 0
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    settings: dict[str, Any] = {"scale": scale, "softcap": float(softcap or 0.0)}
    operands = [query, key, value, *([] if s_aux is None else [s_aux])]
    result = torch.onnx.ops.symbolic(
        "Attention" if s_aux is None else f"{DOMAIN}::SinkAttention",
        [*operands, *([] if attention_mask is None else [attention_mask])],
        settings | ({"is_causal": int(is_causal)} if s_aux is None else {"window": window}),
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=OPSET if s_aux is None else VERSION,
        metadata_props={"llmc.layer": str(getattr(module, "layer_idx", "")), "llmc.window": str(window)},
    )
    return result.transpose(1, 2).contiguous(), None  # as transformers' own gives it: some models view it


def window_of(module: torch.nn.Module, passed: int | None) -> int:
    """The layer's sliding window, 0 for none, or its chunk, negative.  What a model passes on is not always what its
    own mask says."""
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else None
    if kind == "full_attention" or kind in WITH_ATTENTION:
        return 0
    if kind == CHUNKED:
        return -int(getattr(module.config, "attention_chunk_size", None) or 0)
    if kind not in (None, "sliding_attention") or (kind and not passed):
        raise unsupported(module.config, f"its layers of kind {kind} are not compiled yet")
    return passed or 0


AttentionInterface.register(INTERFACE, attention_node)
AttentionMaskInterface.register(INTERFACE, exported_mask)
