"""Attention over latents as it is carried to a GPU machine: layers of models too large to carry, and odd shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.compiler.kernel import PAGE_TOKENS, Call, DType, TensorType
from llmc.schedules import records
from llmc.schedules.attention_call import LATENT

if TYPE_CHECKING:
    from llmc.bench.gpu.jobs import Jobs

SIZES = {"deepseek-v3": (128, 192), "glm-4.7-flash": (20, 256)}
"""Sizes of one layer: heads, and elements of each in front of the product with latents; latents of 512, 64 turned."""
LAYERS, PAGES = 4, 64
LENGTHS = {1: (1024, 4096), 8: (4096,), 512: (2048,)}
"""Contexts at which steps of so many rows are measured."""
ODD: tuple[tuple[int, int, int, int, str, dict[str, Any]], ...] = (
    (1, 3, 48, 16, "bf16", {}),
    (8, 20, 512, 64, "bf16", {"interleaved": 0}),
    (5, 70, 256, 32, "f16", {"softcap": 9.0}),
    (90, 16, 64, 16, "f16", {"window": 70}),
    (70, 40, 512, 64, "bf16", {}),
)
"""Rows, heads, elements of a latent and of what is turned, the cache's dtype, and what is special."""


def add_latents(jobs: Jobs, most: int) -> None:
    """Layers of models, to be checked and timed."""
    for heads, head_dim in SIZES.values():
        for m, lengths in LENGTHS.items():
            call = latent_call(m, (heads, head_dim, 512, 64), "bf16", PAGES, LAYERS)
            jobs.add(str(records.signature(call, jobs.target)), call, min(most, 4), lengths)


def add_odd_latents(jobs: Jobs, most: int) -> None:
    """Shapes that fill no tile, to be checked."""
    for m, heads, latent_dim, rotary_dim, dtype, special in ODD:
        name = f"odd latents {dtype} M={m} H={heads} L={latent_dim}"
        call = latent_call(m, (heads, 12 + rotary_dim, latent_dim, rotary_dim), dtype, 9, 2, **special)
        jobs.add(name, call, most, tuned=False)


def latent_call(
    m: int, sizes: tuple[int, int, int, int], dtype: str, pages: int, n_layers: int, **special: Any
) -> Call:
    """sizes: heads, elements of each, of a latent, and of what is turned."""
    heads, head_dim, latent_dim, rotary_dim = sizes
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "head_dim": head_dim,
        "latent_dim": latent_dim,
        "rotary_dim": rotary_dim,
        "interleaved": 1,
        "epsilon": 1e-6,
        "scale": head_dim**-0.5,
        "softcap": 0.0,
        "window": 0,
        "n_layers": n_layers,
        "kv_dtype": dtype,
        "page_tokens": PAGE_TOKENS,
        **special,
    }
    element: DType = "f16" if dtype == "f16" else "bf16"
    widths = (heads * head_dim, heads * latent_dim, latent_dim + rotary_dim)
    rows = [TensorType((m, width), "f32") for width in widths]
    turn = [TensorType((m, rotary_dim // 2), "f32")] * 2
    ids = [TensorType((m,), "i32"), TensorType((m, pages), "i32")]
    caches = [TensorType((1, 1, PAGE_TOKENS, dim), "f32") for dim in (rotary_dim, latent_dim)]
    inputs = (*rows, TensorType((latent_dim,), element, constant=True), *turn, *ids, *caches)
    out = TensorType((m, heads * latent_dim), element, tiled=True)
    return Call(LATENT, inputs, (out, *caches), tuple(sorted(attributes.items())))
