"""Where everything lies in a plan: constants in the weights section, results in the arena, states in a slot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from llmc.compiler.bind import ALIASES, IN_PLACE, STEP_INPUTS, Binding, constant_type, is_constant
from llmc.compiler.kernel import Implementation, Layout, Operand, RowMajor, TensorType
from llmc.compiler.memory import Buffer, aligned
from llmc.compiler.ops import PLACE
from llmc.compiler.plan import PlacedWeight
from llmc.runtime.format import SPACES, Argument

WEIGHT_ALIGNMENT = 256


@dataclass
class Weights:
    """Places of the constants in the weights section, in the order they are first used."""

    placed: dict[tuple[str, str], PlacedWeight] = field(default_factory=dict)
    n_bytes: int = 0

    def place(self, value: ir.Value, kind: TensorType, layout: Layout) -> PlacedWeight:
        """One place for each (constant, layout); most constants have one layout whatever M is."""
        return self.place_shaped(value, kind.shape, layout)

    def place_shaped(self, value: ir.Value, shape: tuple[int, ...], layout: Layout) -> PlacedWeight:
        key = (str(value.name), str(layout))
        if key not in self.placed:
            self.placed[key] = PlacedWeight(value, layout, self.n_bytes, layout.n_bytes(shape))
            self.n_bytes += aligned(self.placed[key].n_bytes, WEIGHT_ALIGNMENT)
        return self.placed[key]


@dataclass
class Placement:
    """Where everything lies in one plan.

    roots: for each value, the value whose memory it uses (see alias_roots).
    arena: byte offsets of roots, and of temporaries by (index of their node, index of the temporary).
    logits: the root that the plan writes logits to.  weights: where constants lie; shared by all plans.
    layers: where the part of each layer begins in a page of the KV cache.
    states: the byte offset and the bytes of each state in a slot.
    places: where inputs of the graph, the KV cache ("kv") and the logits lie elsewhere than in a body.
    """

    binding: Binding
    roots: Mapping[ir.Value, ir.Value]
    arena: Mapping[ir.Value | tuple[int, int], int]
    logits: ir.Value
    weights: Weights
    layers: Sequence[int]
    states: Sequence[tuple[int, int]]
    places: Mapping[str, Argument] = field(default_factory=dict)

    def argument(self, operand: Operand, index: int, node: ir.Node, implementation: Implementation) -> Argument:
        """An operand of the plan's `index`-th node: its space and offset, and how many bytes the kernel may touch."""
        if operand.kind == "temp":
            return argument("arena", self.arena[index, operand.index], implementation.temps[operand.index])
        if operand.kind == "scratch":
            return argument("scratch", 0, implementation.scratch_bytes)
        if operand.kind in self.places:
            return self.places[operand.kind]
        if operand.kind == "kv":
            return argument("kv", self.layers[node.attributes["layer"].as_int()], implementation.kv_layer_bytes)
        if operand.kind == "state":
            return argument("states", *self.states[node.attributes[PLACE].as_int()])
        value = (node.inputs if operand.kind == "input" else node.outputs)[operand.index]
        if value is None:
            raise AssertionError(
                f"{implementation.rule} uses {operand.kind} {operand.index} of {node.name}: it is absent"
            )
        if is_constant(value):
            kind = constant_type(value, self.binding)
            placed = self.weights.place(value, kind, implementation.layouts.get(operand.index) or RowMajor(kind.dtype))
            return argument("weights", placed.offset, placed.n_bytes)
        root, n_bytes = self.roots[value], self.binding.type_of(value).n_bytes
        if root.name is not None and root.name in self.places:
            return self.places[root.name]
        if root.name in STEP_INPUTS:
            return argument(STEP_INPUTS[root.name], 0, n_bytes)
        if root is self.logits:
            return self.places.get("logits") or argument("logits", 0, n_bytes)
        return argument("arena", self.arena[root], n_bytes)


def argument(space: str, offset: int, n_bytes: int) -> Argument:
    return Argument(SPACES.index(space), offset, n_bytes)


def place_states(graph: ir.Graph) -> tuple[list[tuple[int, int]], int]:
    """(offset, bytes) of each state in a slot, by its number, and the bytes of a slot.  States are float32."""
    places: list[tuple[int, int]] = []
    end = 0
    for value in (value for value in graph.inputs if str(value.name).startswith("state.")):
        n_bytes = 4 * prod(size for size in value.shape or () if isinstance(size, int))
        places.append((end, n_bytes))
        end += aligned(n_bytes)
    return places, end


def alias_roots(nodes: Iterable[ir.Node]) -> dict[ir.Value, ir.Value]:
    """For each value that `nodes` touch, the value whose memory it uses.

    That is the value itself, unless a reshape or an operator that works in place made it: then it is its input's root.
    """
    roots: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None:
                roots.setdefault(value, value)
        for value in node.outputs:
            place = 0 if node.op_type in ALIASES else IN_PLACE.get(node.op_type)
            source = None if place is None else node.inputs[place]
            roots[value] = value if source is None else roots[source]
    return roots


def live_buffers(
    work: Sequence[ir.Node],
    chosen: Sequence[Implementation],
    roots: Mapping[ir.Value, ir.Value],
    binding: Binding,
    keep: set[ir.Value],
) -> list[Buffer]:
    """What a plan needs in the arena, and while which nodes run.

    A result is needed from its node to the last launch that takes it, and not at all if no launch touches it; a
    temporary is needed while its own node runs.  keep: results that need no room here, since they live elsewhere
    (logits, the KV cache) or at a fixed place (what a body hands to a head).
    """
    taken = [operands_of(implementation) for implementation in chosen]
    last: dict[ir.Value, int] = {}
    for index, (node, operands) in enumerate(zip(work, taken, strict=True)):
        for kind, values in (("input", node.inputs), ("output", node.outputs)):
            touched = (value for i, value in enumerate(values) if (kind, i) in operands)
            last |= {roots[value]: index for value in touched if value is not None}
    buffers = []
    for index, (node, implementation) in enumerate(zip(work, chosen, strict=True)):
        for value in node.outputs:
            if value not in keep and value in last:
                buffers.append(Buffer(value, binding.type_of(value).n_bytes, index, last[value]))
        buffers += [Buffer((index, i), n_bytes, index, index) for i, n_bytes in enumerate(implementation.temps)]
    return buffers


def operands_of(implementation: Implementation) -> set[tuple[str, int]]:
    """Which inputs and outputs of a call its launches take."""
    return {(operand.kind, operand.index) for launch in implementation.launches for operand in launch.operands}
