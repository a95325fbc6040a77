"""The product of a linear layer, tile by tile.

    for unit in parallel:                                     grid = panels of W / (panels a tile * group)
        for chunk of k:                                       one when x and W's panels fit the cache
            for row tile, for tile in the group:
                sums [rows][panels][16] = 0, or from scratch  in registers
                for step in the chunk:
                    w[p]       = W[panel p][step]             16 outputs; bf16: two k each; fp8: four, unpacked
                    sums[r][p] += x[row tile][step][r] * w[p]
                sums to scratch; after the last chunk, row by row:
                    y[row][16 p …] = act(sums + bias) + residual,  or act(gate + bias) * (up + bias)

In fp8 sums are multiplied by the rows' scales before all else.

Bytes: W once for M up to a tile's rows; beyond, W once from memory (a chunk of a group's panels stays in the second
level cache while all row tiles pass) and x once for every unit.  Operations: 2 M N K.
The limit is memory up to M of about 16, then arithmetic: `rows * panels` multiply-adds for rows + panels loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.activations import ACTIVATIONS
from llmc.schedules.cpu.fp8_pairs import llvm_code, pairs
from llmc.schedules.cpu.lanes import ASK, Lanes, ask, share
from llmc.schedules.cpu.linear.panel_layout import PANEL
from llmc.schedules.cpu.linear.quant_dot import times
from llmc.schedules.cpu.linear.rule import Linear, Tiles, asks_in_turn

VECTOR = Lanes(PANEL)
FIRST_LEVEL, SECOND_LEVEL = 3, 2  # LLVM's names for the caches that a prefetch fills


def product_function(linear: Linear, tiles: Tiles) -> Any:
    """(x, weight[, bias][, residual], y, scratch, task, n_tasks); x as pack.py lays it out."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("product")
        product = Product(linear, tiles)
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        llvm = llvm_code(linear.weight == "f8", linear.dot == "dpbf16") + (ASK if asks_in_turn(linear, tiles) else "")
        with T.attr(0, "pragma_import_llvm", llvm), share(tiles.grid(linear), task, n_tasks) as unit:
            product.unit(unit)
    return builder.get()


class Product:
    """The operands, and the loop nest over them from the outside in."""

    def __init__(self, linear: Linear, tiles: Tiles) -> None:
        self.linear, self.tiles = linear, tiles
        word = "float32" if linear.weight == "f32" else "int32"
        self.declare_x(tiles.row_tiles(linear) * tiles.rows)
        self.declare((linear.panels * linear.panel_words, word), tiles.scratch_words(linear))

    def declare_x(self, rows: int) -> None:
        """The operand in front, as packing leaves it: of so many rows."""
        linear = self.linear
        dtype = "int32" if linear.dot == "dpbf16" else "float32"
        self.x = T.arg("x", T.buffer((rows * linear.steps * linear.words,), dtype))

    def declare(self, weight: tuple[int, str], scratch_words: int) -> None:
        """The operands behind x.  weight: its words, and their type."""
        linear = self.linear
        n_words, word = weight
        self.weight = T.arg("weight", T.buffer((n_words,), word))
        if linear.bias:
            self.bias = T.arg("bias", T.buffer((self.bias_panels * PANEL,), "float32"))
        if linear.residual:
            self.residual = T.arg("residual", T.buffer((linear.m * linear.n,), "float32"))
        self.y = T.arg("y", T.buffer((linear.m * linear.n,), "float32"))
        self.scratch = T.arg("scratch", T.buffer((scratch_words,), "float32"))

    @property
    def bias_panels(self) -> int:
        return self.linear.panels

    def unit(self, unit: Any) -> None:
        linear, tiles = self.linear, self.tiles
        chunks = -(-linear.steps // tiles.steps)
        with loop(chunks) as chunk, loop(tiles.row_tiles(linear)) as row_tile, loop(tiles.group) as member:
            panel = T.bind((unit * tiles.group + member) * tiles.panels)
            waiting = row_tile if chunks > 1 else 0
            place = T.bind((waiting * tiles.group + member) * (tiles.rows * tiles.panels * PANEL))
            self.accumulate(chunk, chunks, row_tile, panel, place)
            with if_last(chunk, chunks):
                self.finish(row_tile, panel, place)

    def accumulate(self, chunk: Any, chunks: int, row_tile: Any, panel: Any, place: Any) -> None:
        """Adds a chunk of k to a tile's sums, which are in scratch before and after."""
        linear, tiles = self.linear, self.tiles
        places = [(r, p) for r in range(tiles.rows) for p in range(tiles.panels)]
        sums = {at: T.alloc_buffer((PANEL,), "float32") for at in places}

        def in_scratch(r: int, p: int) -> list[Any]:
            return [VECTOR.at(place + (r * tiles.panels + p) * PANEL)]

        def begin() -> None:
            for at in places:
                T.buffer_store(sums[at], VECTOR.all(0.0), [VECTOR.at(0)])

        if chunks == 1:
            begin()
        else:
            with T.If(chunk == 0):
                with T.Then():
                    begin()
                with T.Else():
                    for at in places:
                        T.buffer_store(sums[at], self.scratch[tuple(in_scratch(*at))], [VECTOR.at(0)])
        first = chunk * tiles.steps
        with T.serial(first, T.min(first + tiles.steps, linear.steps)) as step:
            self.step(sums, row_tile, panel, step)
        for at in places:
            T.buffer_store(self.scratch, sums[at][VECTOR.at(0)], in_scratch(*at))

    def step(self, sums: dict[tuple[int, int], Any], row_tile: Any, panel: Any, step: Any) -> None:
        """Adds one step of k to the sums of a tile."""
        linear, tiles = self.linear, self.tiles
        weights = []
        for p in range(tiles.panels):
            at = (panel + p) * linear.panel_words + step * PANEL
            if asks_in_turn(linear, tiles):
                beyond = step + tiles.near >= linear.steps  # of what this unit or the next one takes then
                jump = T.Select(beyond, (tiles.panels - 1) * linear.panel_words, 0)
                ask(self.weight[at + tiles.near * PANEL + jump])
                weights.append(T.bind(self.weight[VECTOR.at(at)]))
                continue
            for ahead, locality in ((tiles.near, FIRST_LEVEL), (tiles.far, SECOND_LEVEL)):
                if ahead:
                    prefetch(self.weight, at + ahead * PANEL, locality)
            weights.append(T.bind(self.weight[VECTOR.at(at)]))
        terms = [weights]
        if linear.weight == "f8":
            terms = [[VECTOR.keep(pairs(w, half), "int32") for w in weights] for half in ("first", "second")]
        if linear.dot == "fma" and linear.weight != "f32":
            terms = [[widen(w) for w in words] for words in terms for widen in (VECTOR.low_bf16, VECTOR.high_bf16)]
        for i, vectors in enumerate(terms):
            vectors = [T.bind(vector) for vector in vectors]
            words = self.place_of_x(row_tile, step * linear.words + i, linear.steps * linear.words)
            for r in range(tiles.rows):
                x = T.bind(VECTOR.all(self.x[words + r]))
                for p, w in enumerate(vectors):
                    old = sums[r, p][VECTOR.at(0)]
                    T.buffer_store(sums[r, p], self.multiply_add(x, w, old), [VECTOR.at(0)])

    def place_of_x(self, row_tile: Any, word: Any, n_words: int) -> Any:
        """Where a word of a tile's rows lies, the rows side by side, of `n_words` words a row."""
        return (row_tile * n_words + word) * self.tiles.rows

    def multiply_add(self, x: Any, w: Any, c: Any) -> Any:
        if self.linear.dot == "dpbf16":
            return T.call_extern(VECTOR.f32, "llmc_dpbf16", c, x, w)
        return VECTOR.fma(x, w, c)

    def finish(self, row_tile: Any, panel: Any, place: Any) -> None:
        """Bias, activation, gate and residual, from a tile's sums in scratch to y."""
        linear, tiles = self.linear, self.tiles
        with T.serial(T.min(tiles.rows, linear.m - row_tile * tiles.rows)) as r:
            start = T.bind(place + r * (tiles.panels * PANEL))
            row = T.bind((row_tile * tiles.rows + r) * linear.n)
            for p in range(0, tiles.panels, linear.parts):
                column = T.bind(T.truncdiv(panel + p, linear.parts) * PANEL)
                self.store(row, column, self.outputs(panel + p, start + p * PANEL), start + p * PANEL)

    def outputs(self, panel: Any, start: Any) -> Any:
        """16 outputs, without the residual, from the sums of the panels they come from."""
        linear = self.linear
        sums = [self.scratch[VECTOR.at(start + part * PANEL)] for part in range(linear.parts)]
        if linear.weight == "f8":
            sums = [times(s, self.row_scales(panel + part)) for part, s in enumerate(sums)]
        if linear.bias:
            sums = [s + self.bias[VECTOR.at((panel + part) * PANEL)] for part, s in enumerate(sums)]
        return self.activated(sums)

    def activated(self, sums: list[Any]) -> Any:
        """act(sums), or act(gate) · up."""
        value = ACTIVATIONS[self.linear.activation](VECTOR, T.bind(sums[0]))
        return T.bind(value * sums[1] if self.linear.parts == 2 else value)

    def row_scales(self, panel: Any) -> Any:
        """What multiplies the sums of a panel in fp8: its last 16 words."""
        return VECTOR.float(self.weight[VECTOR.at((panel + 1) * self.linear.panel_words - PANEL)])

    def store(self, row: Any, column: Any, value: Any, spare: Any) -> None:
        """y[row][column …] = value + residual, as far as there are columns; `spare` is scratch to take value apart."""
        linear = self.linear

        def whole() -> None:
            at = VECTOR.at(row + column)
            T.buffer_store(self.y, value + self.residual[at] if linear.residual else value, [at])

        if linear.panels * PANEL == linear.n * linear.parts:
            whole()
            return
        with T.If(column + PANEL <= linear.n):
            with T.Then():
                whole()
            with T.Else():
                T.buffer_store(self.scratch, value, [VECTOR.at(spare)])
                with T.serial(T.max(linear.n - column, 0)) as i:
                    element = self.scratch[spare + i]
                    at = row + column + i
                    T.buffer_store(self.y, element + self.residual[at] if linear.residual else element, [at])


@contextmanager
def loop(extent: int) -> Iterator[Any]:
    """A loop, or nothing at all for one pass."""
    if extent == 1:
        yield 0
    else:
        with T.serial(extent) as index:
            yield index


@contextmanager
def if_last(index: Any, extent: int) -> Iterator[None]:
    """Runs in the last pass of a `loop`."""
    if extent == 1:
        yield
    else:
        with T.If(index == extent - 1), T.Then():
            yield


def prefetch(buffer: Any, index: Any, locality: int) -> None:
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), 0, locality, 1))
