"""What a call of the Linear family asks for, on a GPU.

    [{RMS,Layer}Norm]Linear[Bias][Relu|Gelu|GeluTanh|Silu][Residual]        act(x' Wᵀ + bias) + residual
    [{RMS,Layer}Norm]GatedLinear{Silu|Gelu|GeluTanh}[Bias]                  act(x' Wgᵀ + bg) · (x' Wuᵀ + bu)
    [{RMS,Layer}Norm]LinearStrips[Bias]                                     x' Wᵀ + bias of that W, in its rows' order

Inputs in order: x [M, K], [norm weight [K], [norm bias [K] of LayerNorm]], W [N, K] (gated: [2N, K]), [bias], [residual
[M, N]]; x' is x, or its norm.  A deferred norm (deferred_norm.py) adds inputs behind them: in front of it
(…{Tile}?Moments) the norm's weight [N]; behind it (Deferred…) x ∘ norm weight [M, K], moments of x, and LayerNorm's
vectors as W makes them [2, rows of W], which have the bias in them.

…Linear[Bias]{Rotary}?Append makes queries, keys and values of attention (compiler/ops/append.py): it turns them, and
appends keys and values to the cache.  Last come [cos, sin [M, RD/2]], positions [M], page_table [M, P], both caches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from llmc.compiler.kernel import Call, DType, TensorType
from llmc.schedules.cuda.attention.shape import Attention, appended_to
from llmc.schedules.cuda.deferred_norm import part_columns

Element = Literal["bf16", "f16", "f32"]

_NAME = re.compile(
    r"llmc\.(?P<deferred>Deferred)?(?P<norm>RMSNorm|LayerNorm)?"
    r"(?:Linear(?P<strips>Strips)?(?P<bias>Bias)?(?P<activation>Relu|GeluTanh|Gelu|Silu)?(?P<residual>Residual)?(?P<moments>(?:Tile)?Moments)?"
    r"(?P<append>(?:Rotary)?Append)?"
    r"|GatedLinear(?P<gate>Silu|GeluTanh|Gelu)(?P<gated_bias>Bias)?)"
)
_ACTIVATIONS = {"": "none", "Relu": "relu", "Gelu": "gelu", "GeluTanh": "gelu_tanh", "Silu": "silu"}
_NORMS: dict[str, Literal["", "rms", "layer"]] = {"": "", "RMSNorm": "rms", "LayerNorm": "layer"}


@dataclass(frozen=True)
class LinearOp:
    """x [m, k] times a weight [n, k], or [2n, k] when gated.

    element     the dtype that is multiplied; x is rounded to it
    weight      how the weight is stored, in groups of `group` if it is quantised
    tiled_x     whether x lies in tiles, in `element`; else it is f32 row-major.  tiled_y: the same of y
    deferred    whether x ∘ norm weight is multiplied and the norm applied to the sums, with moments of parts of x that
                are `part` columns wide
    moments     whether the norm behind y is prepared
    append      the attention whose queries, keys and values the product makes and appends; None: it writes y
    strips      whether the rows of W, and what is added to sums, lie as those of a gated weight, and y's columns too
    """

    m: int
    n: int
    k: int
    element: Element
    weight: DType
    group: int = 0
    norm: Literal["", "rms", "layer"] = ""
    epsilon: float = 0.0
    gated: bool = False
    bias: bool = False
    activation: Literal["none", "relu", "gelu", "gelu_tanh", "silu", "clamped_swish"] = "none"
    residual: bool = False
    tiled_x: bool = False
    tiled_y: bool = False
    deferred: bool = False
    part: int = field(default=0, repr=False)
    moments: bool = False
    append: Attention | None = None
    strips: bool = field(default=False, repr=False)

    @property
    def alternates(self) -> bool:
        """Whether the weight lies with rows of gate and up in turn."""
        return self.gated or self.strips

    @property
    def weight_input(self) -> int:
        """Index of the weight among the call's inputs; bias and residual follow."""
        return {"": 1, "rms": 2, "layer": 3}[self.norm]

    @property
    def bias_input(self) -> int:
        return self.weight_input + 1

    @property
    def residual_input(self) -> int:
        return self.weight_input + 1 + self.bias

    @property
    def scaled_input(self) -> int:
        """The input x ∘ norm weight of a deferred norm; moments and, of LayerNorm, its folded vectors follow."""
        return self.weight_input + 1 + self.bias

    @property
    def append_input(self) -> int:
        """The first input that an appending product adds: cos, or else the positions."""
        return self.scaled_input + (2 + (self.norm == "layer") if self.deferred else 0)

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.n * (2 if self.gated else 1)

    @property
    def words(self) -> str:
        """The operator in a few lower-case words, for the name of a kernel."""
        parts = (
            "deferred" if self.deferred else "",
            f"{self.norm}norm" if self.norm else "",
            "gated" if self.gated else "",
            "bias" if self.bias else "",
            "" if self.activation == "none" else self.activation,
            "residual" if self.residual else "",
            "moments" if self.moments else "",
            "append" if self.append else "",
        )
        return "_".join(filter(None, (*parts, f"m{self.m}_n{self.n}_k{self.k}")))

    @property
    def n_operations(self) -> int:
        return 2 * self.m * self.rows * self.k

    @property
    def vector_bytes(self) -> int:
        """Bytes of everything but the weight: x, y, bias, residual, and the norm's vectors, each once."""
        x = self.m * self.k * (2 if self.tiled_x else 4)
        y = self.m * self.n * (2 if self.tiled_y or self.append else 4)
        y += 4 * self.m * self.append.rotary_dim if self.append else 0
        vectors = 4 * (self.rows * self.bias + self.k * {"": 0, "rms": 1, "layer": 2}[self.norm])
        if self.deferred:
            folded = 2 * self.rows if self.norm == "layer" else self.rows * self.bias
            vectors = 4 * folded + self.taken_bytes
        handed_on = 8 * self.m * (self.n // part_columns(self.m, self.weight))
        prepared = (2 * self.m + 4) * self.n + handed_on if self.moments else 0
        return x + y + vectors + 4 * self.m * self.n * self.residual + prepared

    @property
    def taken_bytes(self) -> int:
        """Bytes that are read of the moments of x."""
        return 8 * self.m * (self.k // self.part) if self.deferred else 0


def parse(call: Call) -> LinearOp | None:
    """What the call asks for; None if it is not of this family, or its weight is no constant."""
    name = _NAME.fullmatch(call.op)
    if name is None:
        return None
    norm = _NORMS[name["norm"] or ""]
    at = {"": 1, "rms": 2, "layer": 3}[norm]
    x, weight = call.inputs[0], call.inputs[at]
    if x is None or weight is None or not weight.constant or len(x.shape) != 2:
        return None
    bias = bool(name["bias"] or name["gated_bias"])
    vectors = [*call.inputs[1:at], *call.inputs[at + 1 : at + 1 + bias]]
    multiplied, moments = call.inputs[at + 1 + bias :][:2] if name["deferred"] else (x, None)
    assert multiplied is not None
    if any(vector is None or not vector.constant for vector in vectors):
        return None
    gated = name["gate"] is not None
    y = call.outputs[0]
    return LinearOp(
        m=x.shape[0],
        n=weight.shape[0] // (2 if gated else 1),
        k=weight.shape[1],
        element=element_of(weight, (multiplied, y), vectors),
        weight=weight.dtype,
        group=weight.group,
        norm=norm,
        epsilon=float(call.attribute("epsilon", 1e-5)) if norm else 0.0,
        gated=gated,
        bias=bias,
        activation=_ACTIVATIONS[name["activation"] or name["gate"] or ""],  # type: ignore[arg-type]
        residual=bool(name["residual"]),
        tiled_x=multiplied.tiled,
        tiled_y=y.tiled,
        deferred=bool(name["deferred"]),
        part=weight.shape[1] // moments.shape[0] if moments else 0,
        moments=bool(name["moments"]),
        append=appended_to(call),
        strips=bool(name["strips"]),
    )


def element_of(weight: TensorType, values: tuple[TensorType, TensorType], vectors: list[TensorType | None]) -> Element:
    """What is multiplied: what the weight is stored in; beside quantised weights what tiled values or the layer's
    vectors are stored in, or bf16."""
    if weight.dtype in ("bf16", "f16", "f32"):
        return weight.dtype
    for other in (*(value for value in values if value.tiled), *vectors):
        if other is not None and other.dtype in ("bf16", "f16"):
            return other.dtype
    return "bf16"
