"""The plan of a tower: one tile of a picture through all of its layers, to rows that stand for tokens.

It is planned like a body, by the same schedules, over the same arena, kernels and weights section; no step runs
meanwhile.  Attention reads positions and pages as it does of a text: the n rows that attend are a text of n tokens.
But here all of that is known, so that positions and page table are constants, and the pages lie in the arena.

A tower of pictures of any size is one graph that is planned for several numbers of rows.  Patches that attend each
other are a text in a step: the runtime says which, for each picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.shapes import dims
from llmc.compiler.kernel import PAGE_TOKENS, RowMajor
from llmc.compiler.memory import aligned
from llmc.compiler.ops import window_name
from llmc.compiler.placement import Weights, argument
from llmc.compiler.plan import TOWER, Program
from llmc.compiler.planner import Planner
from llmc.runtime.format import Argument, Sized

MOST_RATIO = 200
"""Of a picture's sides: what others are refused for (runtime/pictures.py)."""


def with_tower(planner: Planner, program: Program, graph: ir.Graph, kv_dtype: str) -> Program:
    """The program with a plan for its tower.  planner: the one that made it.

    graph: the tower's: `pixels` f32 [3, H, W], and `positions`, `page_table` and caches where it attends -> `made`
    f32 [n, d].  kv_dtype: how its keys and values are kept while it runs.
    """
    n_attending = next((rows for value in graph.inputs if value.name == "positions" for rows in dims(value)), 1)
    assert isinstance(n_attending, int)
    tower = replace(planner, graph=graph, kv_dtype=kv_dtype, n_context=n_attending, joined=None, bodies={})
    tower.layer_bytes = tower.bytes_of_layers(n_attending)
    binding = tower.binding(n_attending, 1)
    n_pages = -(-n_attending // PAGE_TOKENS)
    pages = argument("arena", 0, n_pages * max(tower.layer_bytes, default=0))
    made = binding.type_of(graph.outputs[0])
    n_rows, size = made.shape
    tile = next(binding.type_of(value) for value in graph.inputs if value.name == "pixels")
    places = {
        "pixels": argument("pixels", 0, tile.n_bytes),
        "logits": argument("made", 0, made.n_bytes),
        "kv": pages,
        **(constants(planner.weights, n_attending, n_pages) if tower.layer_bytes else {}),
    }
    plan = tower.step(TOWER, n_rows, list(graph), graph.outputs, binding, {}, aligned(pages.n_bytes), places)
    channels, height, width = tile.shape
    return replace(
        program,
        plans=(*program.plans, plan),
        kernels=tuple(planner.kernels.values()),
        weights=tuple(planner.weights.placed.values()),
        choices=tuple(planner.choices.values()),
        weight_bytes=planner.weights.n_bytes,
        arena_bytes=max(program.arena_bytes, tower.arena_bytes),
        scratch_bytes=max(program.scratch_bytes, tower.scratch_bytes),
        n_row=size,
        tile=(channels, height, width),
        picture_rows=n_rows if any(value.name == "sees" for value in planner.graph.inputs) else 0,
    )


def constants(weights: Weights, n_rows: int, n_pages: int) -> Mapping[str, Argument]:
    """Positions i32 [n_rows] and page table i32 [n_rows, n_pages] of a text whose pages lie in order."""
    pages = np.broadcast_to(np.arange(n_pages, dtype=np.int32), (n_rows, n_pages))
    arrays = {"positions": np.arange(n_rows, dtype=np.int32), "page_table": np.ascontiguousarray(pages)}
    placed = {}
    for name, array in arrays.items():
        value = ir.Value(name=f"tower.{name}", const_value=ir.tensor(array, name=f"tower.{name}"))
        place = weights.place_shaped(value, array.shape, RowMajor("i32"))
        placed[name] = argument("weights", place.offset, place.n_bytes)
    return placed


def with_sized_tower(
    planner: Planner, program: Program, graph: ir.Graph, kv_dtype: str, sized: Sized, rows: Sequence[int]
) -> Program:
    """The same with a plan for each of these numbers of rows, rising.

    graph: `pixels` f32 [M, patch], `positions` i64 [M], `page_table` i64 [M, P] and caches, both again for windows,
    `line`, `column` i64 [M], and where there is a table of positions `taps` i64, `shares` f32 [M, n] -> `made` f32
    [R, d].
    """
    sized = sized._replace(pages=most_pages(sized, max(rows)))
    plans, size = list(program.plans), 0
    for n_rows in rows:
        m = n_rows * sized.merge**2
        tower = replace(planner, graph=graph, kv_dtype=kv_dtype, n_context=m, joined=None, bodies={})
        tower.layer_bytes = tower.bytes_of_layers(m)
        binding = tower.binding(m, n_rows)
        pages = argument("arena", 0, sized.pages * max(tower.layer_bytes))
        made = binding.type_of(graph.outputs[0])
        size = made.shape[1]
        places = {
            "pixels": argument("pixels", 0, 4 * m * sized.patch),
            "logits": argument("made", 0, made.n_bytes),
            "kv": pages,
            **parts_of_places(sized, m),
        }
        plans.append(tower.step(TOWER, n_rows, list(graph), graph.outputs, binding, {}, aligned(pages.n_bytes), places))
        arena, scratch = (
            max(getattr(each, name) for each in (program, tower)) for name in ("arena_bytes", "scratch_bytes")
        )
        program = replace(program, arena_bytes=arena, scratch_bytes=scratch)
    return replace(
        program,
        plans=tuple(plans),
        kernels=tuple(planner.kernels.values()),
        weights=tuple(planner.weights.placed.values()),
        choices=tuple(planner.choices.values()),
        weight_bytes=planner.weights.n_bytes,
        n_row=size,
        sized=sized,
    )


def parts_of_places(sized: Sized, m: int) -> Mapping[str, Argument]:
    """Where the parts of the space "places" are for m patches: LLMC_SPACE_PLACES."""
    attending = {"positions": 1, "page_table": -(-m // PAGE_TOKENS)}
    columns = dict(attending)
    if sized.window:
        columns |= {window_name(name): n for name, n in attending.items()}
    columns |= {"line": 1, "column": 1}
    if sized.n_taps:
        columns |= dict.fromkeys(("taps", "shares"), sized.n_taps)
    placed, offset = {}, 0
    for name, n in columns.items():
        placed[name] = argument("places", offset, 4 * m * n)
        offset += 4 * m * n
    return placed


def most_pages(sized: Sized, n_rows: int) -> int:
    """The most pages that hold what patches of a picture of up to so many rows keep, each window in its own."""
    of_all = -(-n_rows * sized.merge**2 // PAGE_TOKENS)
    if not sized.window:
        return of_all
    grids = ((lines, n_rows // lines) for lines in range(1, n_rows + 1))
    return max(of_all, *(pages_of(sized, *grid) for grid in grids if max(grid) <= MOST_RATIO * min(grid)))


def pages_of(sized: Sized, lines: int, columns: int) -> int:
    """Those of a picture of so many lines and columns of rows."""
    sides = [
        [sized.window] * (size // sized.window) + [size % sized.window] * (size % sized.window > 0)
        for size in (lines, columns)
    ]
    return sum(-(-high * wide * sized.merge**2 // PAGE_TOKENS) for high in sides[0] for wide in sides[1])
