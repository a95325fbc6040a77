"""AMX in TIR: sums of products of tiles, as LLVM code that is inlined.

A tile register holds up to 16 rows of 64 bytes.  A block of sums is `across` tiles of x by `panels` of the weight; a
tile of sums is [rows][16] float32, one of x [rows][16][2] bf16, one of a weight [16][16][2] bf16: 16 steps of a panel
as they lie in memory (linear/panel_layout.py).  Of bytes there are four where there are two bf16, and sums are int32;
their tiles may be of 8 steps.

llmc_tiles_open, llmc_tiles_close       around a task: the registers' shapes; their release, so that the system has no
                                        more to save than before when it switches threads
llmc_sums_zero                          sums = 0
llmc_sums_load, llmc_sums_store(at, n)  from and to memory, rows n bytes apart
llmc_sums_add(x, w, n)                  sums += products of the x tiles, one behind the other, and the weight's, n bytes
                                        apart
llmc_sums_add_p(x, w)                   the same for panel p alone

tdpbf16ps adds up the 16 products of even elements and those of odd ones, in order, and adds these two to what was
there: so the order is the same whatever the number of rows, and of tiles.  tdpbsud multiplies bytes of x that have a
sign with bytes of the weight that have none, exactly.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

REGISTERS = 8
ROWS, ROW_BYTES = 16, 64
TILE_BYTES = ROWS * ROW_BYTES

DECLARED = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
declare void @llvm.x86.tdpbsud(i8 immarg, i8 immarg, i8 immarg)
"""


@dataclass(frozen=True)
class TileBlock:
    """What a kernel keeps in tile registers: sums, then tiles of x, then as many of the weight as there is room for.

    rows: of a tile of x and of sums.  across: tiles of x.  panels: of the weight.  steps: 32-bit words along k of a
    tile of x, and rows of one of the weight.
    """

    rows: int
    across: int
    panels: int
    steps: int = 16
    product: Literal["tdpbf16ps", "tdpbsud"] = "tdpbf16ps"

    @property
    def x_row_bytes(self) -> int:
        return self.steps * 4

    @property
    def sums(self) -> dict[tuple[int, int], int]:
        """The register of each (tile of x, panel)."""
        return {(a, p): a * self.panels + p for a in range(self.across) for p in range(self.panels)}

    @property
    def x(self) -> range:
        return range(len(self.sums), len(self.sums) + self.across)

    @property
    def weights(self) -> range:
        return range(self.x.stop, REGISTERS)

    def llvm_code(self) -> str:
        """The functions above, for a kernel's `pragma_import_llvm`."""
        parts = [
            self._tiles("load", "tileloadd64"),
            self._tiles("store", "tilestored64"),
            function("llmc_tiles_open", "", ["call void @llvm.x86.ldtilecfg(ptr @llmc_tile_shapes)"]),
            function("llmc_tiles_close", "", ["call void @llvm.x86.tilerelease()"]),
            function("llmc_sums_zero", "", [f"call void @llvm.x86.tilezero(i8 {t})" for t in self.sums.values()]),
            self._products(),
            *map(self._products_of, range(self.panels)),
        ]
        return DECLARED + self._shapes() + "".join(parts)

    def _shapes(self) -> str:
        rows = [self.steps if register in self.weights else self.rows for register in range(REGISTERS)]
        widths = [self.x_row_bytes if register in self.x else ROW_BYTES for register in range(REGISTERS)]
        return shapes("llmc_tile_shapes", rows, widths)

    def _tiles(self, verb: str, instruction: str) -> str:
        """Between a block of sums in memory and the registers."""
        lines = []
        for (a, p), register in self.sums.items():
            lines += [
                f"%row{register} = mul i64 %stride, {a * self.rows}",
                f"%start{register} = add i64 %row{register}, {p * ROW_BYTES}",
                f"%at{register} = getelementptr i8, ptr %at, i64 %start{register}",
                f"call void @llvm.x86.{instruction}(i8 {register}, ptr %at{register}, i64 %stride)",
            ]
        return function(f"llmc_sums_{verb}", "ptr %at, i64 %stride", lines)

    def _products(self) -> str:
        lines = self._x_tiles()
        for p in range(self.panels):
            weight = self.weights[p % len(self.weights)]
            lines += [f"%panel{p} = mul i64 %apart, {p}", *load(weight, "%w", f"%panel{p}", ROW_BYTES, f"w{p}")]
            lines += self._multiply(p, weight)
        return function("llmc_sums_add", "ptr %x, ptr %w, i64 %apart", lines)

    def _products_of(self, panel: int) -> str:
        weight = self.weights[0]
        lines = [*self._x_tiles(), *load(weight, "%w", "0", ROW_BYTES, "w0"), *self._multiply(panel, weight)]
        return function(f"llmc_sums_add_{panel}", "ptr %x, ptr %w", lines)

    def _x_tiles(self) -> list[str]:
        return [
            line
            for a, register in enumerate(self.x)
            for line in load(register, "%x", f"{a * self.rows * self.x_row_bytes}", self.x_row_bytes, f"x{a}")
        ]

    def _multiply(self, panel: int, weight: int) -> list[str]:
        return [
            f"call void @llvm.x86.{self.product}(i8 {self.sums[a, panel]}, i8 {x}, i8 {weight})"
            for a, x in enumerate(self.x)
        ]


def shapes(name: str, rows: list[int], widths: list[int]) -> str:
    """What ldtilecfg reads: palette 1, then bytes of a row (u16) and rows (u8) of each register."""
    data = bytes([1, *[0] * 15]) + struct.pack("<16H", *widths, *[0] * 8) + bytes(rows + [0] * 8)
    text = "".join(f"\\{byte:02X}" for byte in data)
    return f'@{name} = private constant [{len(data)} x i8] c"{text}", align 64\n'


def load(register: int, base: str, offset: str, row_bytes: int, name: str) -> list[str]:
    """A register from `offset` bytes behind `base`, rows row_bytes apart.  name: of the address, used once."""
    return [
        f"%{name} = getelementptr i8, ptr {base}, i64 {offset}",
        f"call void @llvm.x86.tileloadd64(i8 {register}, ptr %{name}, i64 {row_bytes})",
    ]


def store(register: int, base: str, offset: str, row_bytes: int, name: str) -> list[str]:
    """The same to memory."""
    return [
        f"%{name} = getelementptr i8, ptr {base}, i64 {offset}",
        f"call void @llvm.x86.tilestored64(i8 {register}, ptr %{name}, i64 {row_bytes})",
    ]


def function(name: str, parameters: str, lines: list[str]) -> str:
    """A function that is inlined wherever it is called."""
    body = "".join(f"  {line}\n" for line in lines)
    return f"define linkonce_odr i32 @{name}({parameters}) alwaysinline nounwind {{\n{body}  ret i32 0 }}\n"


def call(name: str, *arguments: Any) -> None:
    """One of the functions above; numbers are counted in int64."""
    from tvm.tirx.script import builder as T  # not at the top: to choose a kernel takes no TVM

    values = [T.int64(a) if isinstance(a, int) else a for a in arguments]
    T.evaluate(T.call_extern("int32", f"llmc_{name}", *values))
