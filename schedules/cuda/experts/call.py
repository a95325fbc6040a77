"""What a call of the Experts family asks for, on a GPU.

    Experts{Silu|Gelu|GeluTanh}[Residual]     Σ_j share_j · ((act(x Wgᵀ) · (x Wuᵀ)) Wdᵀ) [+ residual], over k experts
    ExpertsClampedSwish[Bias][Residual]       the same with biases of each expert, and a clamped gate

Inputs in order: x f32 [M, K], index i64 [M, k], share f32 [M, k], [Wg; Wu] [E, 2N, K], Wd [E, K, N],
[[bg; bu] [E, 2N], bd [E, K]], [residual f32 [M, K]].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmc.compiler.kernel import Call, DType, Layout, RowMajor
from llmc.compiler.ops import CLAMPED_EXPERTS, DOMAIN, EXPERTS, RESIDUAL_CLAMPED_EXPERTS, RESIDUAL_EXPERTS
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.experts_call import Clamp, clamp_of
from llmc.schedules.experts_layout import OfExperts

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_swish"]
ACTIVATIONS: dict[str, Activation] = {"Silu": "silu", "Gelu": "gelu", "GeluTanh": "gelu_tanh"}
WEIGHTS = ("bf16", "f16", "i8", "i4", "z4", "f8", "m4")
X, INDEX, SHARE, GATE_UP, DOWN, FIRST_MORE = range(6)
"""Inputs of a call; biases, of both products, and the residual come last."""


@dataclass(frozen=True)
class ExpertsOp:
    """`tokens` rows of k elements, each through `chosen` of n_experts experts of width n.

    element: what is multiplied.  weight: how that of gates and ups is stored, in groups of `group` if it is quantised;
    down_weight, down_group: the other one.
    """

    tokens: int
    chosen: int
    n_experts: int
    n: int
    k: int
    element: Literal["bf16", "f16"]
    weight: DType
    group: int
    down_weight: DType
    down_group: int
    activation: Activation
    residual: bool = False

    @property
    def clamp(self) -> Clamp | None:
        """How the gate is clamped; None: it is as the activation says."""
        return None

    @property
    def biased(self) -> bool:
        """Whether each expert's products have biases."""
        return False

    @property
    def bias_inputs(self) -> tuple[int, ...]:
        """The inputs that are biases of gate and up, and of down."""
        return (FIRST_MORE, FIRST_MORE + 1) if self.biased else ()

    @property
    def residual_input(self) -> int:
        return FIRST_MORE + len(self.bias_inputs)

    @property
    def members(self) -> str:
        """Members of the first product's Layer in C++: the numbers of its gate."""
        if self.clamp is None:
            return ""
        numbers = ", ".join(f"k{name.capitalize()} = {number!r}f" for name, number in vars(self.clamp).items())
        return f"    static constexpr float {numbers};\n"

    @property
    def pairs(self) -> int:
        return self.tokens * self.chosen

    @property
    def active(self) -> int:
        """The most experts that can have pairs."""
        return min(self.n_experts, self.pairs)

    @property
    def expected(self) -> float:
        """How many have, if each token chooses by chance."""
        return self.n_experts * (1 - (1 - self.chosen / self.n_experts) ** self.tokens)

    @property
    def words(self) -> str:
        return f"m{self.tokens}_{self.chosen}of{self.n_experts}{'_residual' * self.residual}"

    def gate_up(self, rows: int) -> LinearOp:
        """The first product of so many rows, as if they were one expert's."""
        stored = {"weight": self.weight, "group": self.group, "bias": self.biased}
        parts = {**stored, "gated": True, "activation": self.activation}
        return LinearOp(rows, self.n, self.k, self.element, tiled_x=True, tiled_y=True, **parts)  # type: ignore[arg-type]

    def down(self, rows: int) -> LinearOp:
        stored = {"weight": self.down_weight, "group": self.down_group, "bias": self.biased}
        return LinearOp(rows, self.k, self.n, self.element, tiled_x=True, **stored)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ClampedExperts(ExpertsOp):
    """Experts whose gate is clamped; bias: whether they have biases."""

    gate: Clamp
    bias: bool

    @property
    def clamp(self) -> Clamp:
        return self.gate

    @property
    def biased(self) -> bool:
        return self.bias


def parse(call: Call) -> ExpertsOp | None:
    """What the call asks for; None for what is no mixture of experts, or none that there are kernels for."""
    domain, _, name = call.op.rpartition(".")
    gate, clamp = (EXPERTS | RESIDUAL_EXPERTS).get(name, ""), clamp_of(call)
    if domain != DOMAIN or (gate not in ACTIVATIONS and clamp is None):
        return None
    x, index, share, gate_up, down, *more = call.inputs
    n_biases = 2 * (CLAMPED_EXPERTS | RESIDUAL_CLAMPED_EXPERTS).get(name, False)
    biases, residual = more[:n_biases], more[n_biases:]
    if any(r is None or r.tiled or r.dtype != "f32" for r in residual):
        return None
    if not (x and index and share and gate_up and down and all(w and w.constant for w in (gate_up, down, *biases))):
        return None
    lies = (x.dtype, index.dtype, share.dtype, call.outputs[0].dtype)
    stored = are_multiplied(gate_up.dtype, down.dtype)
    if lies != ("f32", "i64", "f32", "f32") or x.tiled or call.outputs[0].tiled or not stored:
        return None
    element: Literal["bf16", "f16"] = "f16" if gate_up.dtype == "f16" else "bf16"
    n_experts, k, n = down.shape
    tokens, chosen = index.shape
    sizes = (tokens, chosen, n_experts, n, k, element, gate_up.dtype, gate_up.group, down.dtype, down.group)
    if clamp is not None:
        return ClampedExperts(*sizes, "clamped_swish", bool(residual), gate=clamp, bias=bool(biases))
    return ExpertsOp(*sizes, ACTIVATIONS[gate], bool(residual))


def are_multiplied(gate_up: DType, down: DType) -> bool:
    """Whether there are kernels for weights that are stored so: alike, or in codes both."""
    return {gate_up, down} <= set(WEIGHTS) and (gate_up == down or not {gate_up, down} & {"bf16", "f16"})


def expert_bytes(op: LinearOp) -> int:
    """Bytes of one expert's weight, as it lies."""
    return weight_format(op).layout.n_bytes((op.rows, op.k))


def layouts(op: ExpertsOp) -> dict[int, Layout]:
    """One expert's weight behind the other, each as a linear layer's; biases row by row."""
    both = {GATE_UP: op.gate_up(1), DOWN: op.down(1)}
    found: dict[int, Layout] = dict.fromkeys(op.bias_inputs, RowMajor("f32"))
    return found | {index: OfExperts(weight_format(linear).layout, op.n_experts) for index, linear in both.items()}
