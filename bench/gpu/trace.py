"""What kernels take in their places: in the steps of a model, where each one's neighbours are others than in the tuner.

CUPTI tells when each kernel of a graph began and ended; PyTorch's profiler is the way to it that every GPU image has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

Span = tuple[float, float, str]
"""When a kernel began and ended, in µs, and its name."""
DIGEST = re.compile(r"_[0-9a-f]{8}$")


LAST = 300
"""Kernels of a step of 32 layers, and some more; of a prompt's, which has norms besides."""


def traced(work: Callable[[], object]) -> dict[str, Any]:
    """What `work` launched; nothing without a GPU.

    kernels: what they took, the most expensive first (summed).  last: the last ones, each with its name, begin and end,
    in µs from the first's begin.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        work()
        return {"kernels": [], "last": []}
    torch.zeros(1, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in found.events() if "CUDA" in str(e.device_type)]
    return {"kernels": summed(spans), "last": last(spans)}


def last(spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    ordered = sorted(spans)[-LAST:]
    start = ordered[0][0] if ordered else 0.0
    return [(DIGEST.sub("", name), round(begin - start, 2), round(end - start, 2)) for begin, end, name in ordered]


def summed(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Kernels of one name together.  n: how many.  us: of one from its begin to its end, the median.  advance_us: from
    the end of what ended before it to its own end, the median: these are what a step is the sum of."""
    ordered = sorted(spans, key=lambda span: span[1])
    times: dict[str, list[tuple[float, float]]] = {}
    for before, (begin, end, name) in pairwise(ordered):
        times.setdefault(DIGEST.sub("", name), []).append((end - begin, end - before[1]))
    found = [
        {"name": name, "n": len(each), "us": median(us for us, _ in each), "advance_us": median(a for _, a in each)}
        for name, each in times.items()
    ]
    return sorted(found, key=lambda kernel: -kernel["n"] * kernel["advance_us"])
