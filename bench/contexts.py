"""What a step reads of a KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def context_bytes(cache: Mapping[str, Any], n_tokens: int) -> int:
    """Bytes of the cache that a step reads for a sequence of so many tokens: in each layer those in sight, at its own
    size. cache: what a manifest says of it; older ones have one size and no windows."""
    reads = cache.get("reads") or [{"layers": 1, "bytes_per_token": cache["bytes_per_token"], "window": 0}]
    return int(sum(r["layers"] * r["bytes_per_token"] * seen(n_tokens, r["window"]) for r in reads))


def seen(n_tokens: int, window: int) -> int:
    """How many of so many tokens the last one sees; a negative window is a chunk."""
    if window < 0:
        return (n_tokens - 1) % -window + 1
    return min(n_tokens, window or n_tokens)
