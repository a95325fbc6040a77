"""Let attention work on latents directly, so that keys and values of all heads are neither made nor cached.

rewrite:
    l, r = Split(kv, [L, RD]);  k, v = Split(Linear(RMSNormalization(l, w), Wkv), [N, DV])           of each head
    CausalAttention(Concat(q[:N], Rotary(q[N:])), Concat(k, Expand(Rotary(r))), v)
    -->
    HeadProduct(CausalLatentAttention(q, HeadProduct(q, Wk), kv, w, cos, sin), Wv)
since a score is q (Wk l) = (q Wk) l, and a head's result is a weighted sum of Wv l.  Where both queries and keys have
their pairs sorted into halves before rotary, they are left as pairs: a score is then the same sum in another order.
Where neither is turned (Kimi Linear), r is turned by no angle, the cosines and sines of position 0.
refuses: queries and keys that are turned differently; a latent that is not normalised; biases of Wkv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, producer, replace, weight_of
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.weights import Array, Weight
from llmc.passes.slices import paired, size_of


def form_latent(model: ir.Model) -> int:
    """Assumes Linear nodes over M tokens; leaves CausalLatentAttention nodes.  Returns their number."""
    n_rewrites = 0
    for node in list(model.graph):
        found = latent_of(node) if node.op_type == "CausalAttention" else None
        if found is not None:
            replace(node.outputs[0], found.emit(node))
            n_rewrites += 1
    return n_rewrites


@dataclass(frozen=True)
class Turned:
    """What rotary turns [M, …], its angles, and how.  sorted: whether its pairs were sorted into halves first."""

    x: ir.Value
    angles: tuple[ir.Value, ...]
    rotary_dim: int
    interleaved: int
    sorted: bool

    def how(self) -> tuple[Any, ...]:
        return self.angles, self.rotary_dim, self.interleaved, self.sorted


@dataclass(frozen=True)
class Latent:
    """q [M, H·(N + RD)], kv [M, L + RD], the latent's norm and its epsilon, the product that expands it, the angles."""

    q: ir.Value
    kv: ir.Value
    norm: ir.Value
    epsilon: float
    expand: Weight
    turned: Turned

    def emit(self, node: ir.Node) -> ir.Value:
        settings = attributes_of(node)
        heads, latent_dim = settings["num_heads"], size_of(self.norm)
        del settings["kv_num_heads"]
        head_dim = size_of(self.q) // heads
        keys = self.part(node, heads, slice(0, head_dim - self.turned.rotary_dim), "keys")
        values = self.part(node, heads, slice(head_dim - self.turned.rotary_dim, None), "values")
        absorbed = emit(node, "llmc.HeadProduct", [self.q, keys])[0]
        settings |= {"head_dim": head_dim, "latent_dim": latent_dim, "epsilon": self.epsilon}
        settings |= {"rotary_dim": self.turned.rotary_dim, "interleaved": self.turned.interleaved}
        angles = self.turned.angles or no_angles(node, self.turned.rotary_dim)
        operands = [self.q, absorbed, self.kv, self.norm, *angles]
        latents = emit(node, "llmc.CausalLatentAttention", operands, **settings)[0]
        return emit(node, "llmc.HeadProduct", [latents, values])[0]

    def part(self, node: ir.Node, heads: int, rows: slice, kind: str) -> ir.Value:
        """The part of the product that makes keys, transposed [H, L, N], or values [H, DV, L]."""
        graph, whole = node.graph, self.expand
        assert isinstance(graph, ir.Graph)
        each, latent_dim = whole.dims[0] // heads, whole.dims[1]
        n = len(range(each)[rows])

        def read() -> Array:
            part = whole.stored().reshape(heads, each, latent_dim)[:, rows]
            return part.transpose(0, 2, 1) if kind == "keys" else part

        shape = (heads, latent_dim, n) if kind == "keys" else (heads, n, latent_dim)
        made_of = (f"latent {kind}", heads, rows.start, rows.stop, whole)
        name = f"{whole.name}.{kind}"
        return add_constant(graph, Weight.computed(name, shape, read, whole.stored_dtype, made_of), name)


def latent_of(node: ir.Node) -> Latent | None:
    straight_q, turned_q = joined(node.inputs[0])
    straight_k, turned_k = joined(node.inputs[1])
    one = producer(turned_k, "Expand")
    rest = one.inputs[0] if one else None
    a, b = turned_of(turned_q), turned_of(rest)
    whole = plain(node.inputs[0]) if turned_q is None else None  # queries that are not turned lie in one piece
    if whole is not None and rest is not None:
        a = b = unturned(plain(rest))
    cut_q, cut_kv, cut_latent = (producer(value, "Split") for value in (straight_q, straight_k, b.x if b else None))
    if a is None or b is None or cut_kv is None or cut_latent is None:
        return None
    if cut_q is not None and list(cut_q.outputs) == [straight_q, a.x]:
        whole = plain(cut_q.inputs[0])
    if list(cut_kv.outputs) != [straight_k, plain(node.inputs[2])]:
        return None
    linear = producer(plain(cut_kv.inputs[0]), "llmc.Linear")
    norm = producer(linear.inputs[0], "RMSNormalization") if linear is not None else None
    expand = weight_of(linear.inputs[1]) if linear is not None else None
    if a.how() != b.how() or norm is None or expand is None or list(cut_latent.outputs) != [plain(norm.inputs[0]), b.x]:
        return None
    q, kv, weight = whole, cut_latent.inputs[0], norm.inputs[1]
    if q is None or kv is None or weight is None or not fits(node, q, kv, expand, a.rotary_dim):
        return None
    return Latent(q, kv, weight, float(attribute(norm, "epsilon", 1e-5)), expand, a)


def fits(node: ir.Node, q: ir.Value, kv: ir.Value, expand: Weight, rotary_dim: int) -> bool:
    """Whether each head has a key of its own, and everything is of the sizes it should be."""
    heads = attribute(node, "num_heads")
    shapes = [len(dims(value)) == 2 for value in (q, kv)]
    straight = size_of(q) // heads - rotary_dim
    own = attribute(node, "kv_num_heads") == heads and expand.dims[0] % heads == 0
    return all(shapes) and own and 0 < straight < expand.dims[0] // heads and size_of(kv) == expand.dims[1] + rotary_dim


def plain(value: ir.Value | None) -> ir.Value | None:
    """The value in front of all Reshapes and the like."""
    node = producer(value, "Reshape")
    while node is not None:
        value = node.inputs[0]
        node = producer(value, "Reshape")
    return value


def joined(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The two parts of each head."""
    concat = producer(plain(value), "Concat")
    if concat is None or len(concat.inputs) != 2 or attribute(concat, "axis") not in (-1, 2):
        return None, None
    return concat.inputs[0], concat.inputs[1]


def turned_of(value: ir.Value | None) -> Turned | None:
    """What Rotary turned, or sorted into halves of pairs before."""
    rotary = producer(plain(value), "llmc.Rotary")
    if rotary is None:
        return None
    settings: dict[str, Any] = attributes_of(rotary)
    heads, rotary_dim, interleaved = (settings[name] for name in ("num_heads", "rotary_dim", "interleaved"))
    x, *angles = (plain(operand) for operand in rotary.inputs)
    halves = producer(x, "Concat") if not interleaved else None
    if halves is not None:
        pairs = paired(*halves.inputs) if len(halves.inputs) == 2 else None
        if pairs is None:
            return None
        x, interleaved = plain(pairs), 1
    if x is None or None in angles or size_of(rotary.outputs[0]) != heads * rotary_dim:
        return None
    return Turned(x, tuple(angle for angle in angles if angle is not None), rotary_dim, interleaved, halves is not None)


def unturned(x: ir.Value | None) -> Turned | None:
    """[M, RD] that are no rotary's, as turned by no angle."""
    return Turned(x, (), size_of(x), 0, False) if x is not None and len(dims(x)) == 2 and size_of(x) % 2 == 0 else None


def no_angles(node: ir.Node, rotary_dim: int) -> tuple[ir.Value, ...]:
    """Cosines and sines [M, RD/2] that turn nothing: those of position 0, of a table with that row alone."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    positions = next(value for value in graph.inputs if value.name == "positions")
    first = emit(node, "Sub", [positions, positions])[0]
    tables = (np.full((1, rotary_dim // 2), wave, np.float32) for wave in (1, 0))
    names = (f"unturned.{wave}.{rotary_dim}" for wave in ("cos", "sin"))
    waves = [add_constant(graph, table, name) for table, name in zip(tables, names, strict=True)]
    return tuple(emit(node, "Gather", [wave, first], axis=0)[0] for wave in waves)
