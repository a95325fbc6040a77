"""From the step graph to step plans: bind, choose, place, resolve.

Each plan is bound to one size, so that everything in it is static: which kernel, which operands, where. Buffers that
never live together share memory (memory.py); what a body hands to a head lies at the same place in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from llmc.compiler.bind import ALIASES, Binding, attended_values, call_of, shape_of, tiled_values, turned_queries
from llmc.compiler.graph.check import APPENDED, ATTENTION, WHOLE
from llmc.compiler.graph.text import op_name
from llmc.compiler.kernel import FEW_ROWS, PAGE_TOKENS, Call, Implementation, Kernel
from llmc.compiler.memory import aligned, lay_out
from llmc.compiler.placement import Placement, Weights, alias_roots, live_buffers, place_states
from llmc.compiler.plan import ADAPTED, BODY, HEAD, JOINED, JOINED_ADAPTED, Choice, PlannedCall, Program, StepPlan
from llmc.compiler.sampling import Sampling
from llmc.runtime.format import Argument

SLOTS_A_TEXT = 2
"""Slots of states for each text of the largest batch, by default: one for the text itself, and a second for a text that
has ended and is kept, or for guessed tokens."""
Implement = Callable[[Call], Implementation]


class Body:
    """A graph, cut where it picks the rows that want logits, and what is laid out differently on a GPU.

    nodes: what does not depend on the choice of rows: all layers.  head: what does.
    tiled, attended, queries: values of `nodes` with a layout of their own on a GPU (see bind.py); empty for CPUs.
    """

    def __init__(self, graph: ir.Graph, kv_dtype: str, device: str) -> None:
        on_gpu = device == "cuda"
        self.outputs = graph.outputs
        self.nodes, self.head = body_and_head(graph)
        self.tiled = tiled_values(graph) if on_gpu else {}
        self.attended = attended_values(graph, kv_dtype) if on_gpu else {}
        self.queries = turned_queries(graph) if on_gpu else {}


@dataclass
class Planner:
    """Plans one program. Its state is what all plans share: kernels, weights, choices, the extent of each memory.

    graph: the step graph.  implement: picks kernels for a call: the schedules.  kv_dtype: of the KV cache.
    n_context: most tokens of a sequence.  device: "cpu" or "cuda".
    n_tokens: how many different tokens there are.  n_types: how many token types, where texts are given labels; else 0.
    adapters: names of the adapters that sequences choose from.
    rewritten: gives the graph to plan M rows with; None: it is always `graph`.  Its weights, and the values that heads
        read, have the same names as in `graph`.
    joined: gives the graph of a step of M tokens that all want logits, with weights of the same names; None: there are
        no joined plans.
    adapted, joined_adapted: likewise those of steps in which a row has an adapter; None: one plan does for all steps.
    """

    graph: ir.Graph
    implement: Implement
    kv_dtype: str
    n_context: int
    device: str = "cpu"
    n_tokens: int = 0
    n_types: int = 0
    adapters: tuple[str, ...] = ()
    rewritten: Callable[[int], ir.Graph] | None = None
    joined: Callable[[int], ir.Graph] | None = None
    adapted: Callable[[int], ir.Graph] | None = None
    joined_adapted: Callable[[int], ir.Graph] | None = None
    kernels: dict[str, Kernel] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    choices: dict[tuple[int, int, Call], Choice] = field(default_factory=dict)
    arena_bytes: int = 0
    scratch_bytes: int = 0
    layer_bytes: tuple[int, ...] = ()
    bodies: dict[ir.Graph, Body] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_layers = sum(op_name(node) in (*ATTENTION, *APPENDED) for node in self.graph)
        self.n_caches = sum(op_name(node) in ATTENTION for node in self.graph)
        self.is_whole = any(op_name(node) in WHOLE for node in self.graph)
        self.states, self.slot_bytes = place_states(self.graph)
        self.body = self.body_of(self.graph)
        self.logits = self.graph.outputs[0]

    def plan(self, bodies: Sequence[int], heads: Sequence[int]) -> Program:
        """The program with a body for each M in `bodies`, and a head for each R in `heads`.

        With `joined`, it has a joined plan too for each number that is in both; on a GPU also a sampler for each head.
        """
        self.layer_bytes = self.bytes_of_layers(min(bodies))
        largest = self.binding(max(bodies), max(heads))
        handed_over, end = self.hand_over(largest)
        kinds = {BODY: self.rewritten or (lambda m: self.graph)} | ({ADAPTED: self.adapted} if self.adapted else {})
        plans = [
            self.body_plan(kind, graph(m), m, max(heads), handed_over, end)
            for kind, graph in kinds.items()
            for m in sorted(bodies)
        ]
        nodes, outputs = self.body.head, self.graph.outputs
        for r in sorted(heads):
            plans.append(self.step(HEAD, r, nodes, outputs, self.binding(max(bodies), r), handed_over, end))
        for kind, joined in ((JOINED, self.joined), (JOINED_ADAPTED, self.joined_adapted)):
            if joined is not None and not self.is_whole:
                plans += [self.joined_plan(kind, joined(n), n) for n in sorted(set(bodies) & set(heads))]
        choices = list(self.choices.values())
        if self.device == "cuda" and not self.is_whole:
            plans, chosen = self.with_sampling(plans, sorted(heads), shape_of(self.logits, largest)[-1])
            choices += chosen
        return Program(
            tuple(plans),
            tuple(self.kernels.values()),
            tuple(self.weights.placed.values()),
            tuple(choices),
            self.weights.n_bytes,
            self.arena_bytes,
            self.scratch_bytes,
            (max(self.layer_bytes),) if self.is_whole else self.layer_bytes,
            self.n_layers,
            self.n_context,
            shape_of(self.logits, largest)[-1],
            slot_bytes=self.slot_bytes,
            default_slots=SLOTS_A_TEXT * max(heads) if self.slot_bytes else 0,
            n_tokens=self.n_tokens if self.is_whole or self.n_types else 0,
            is_whole=self.is_whole,
            n_types=self.n_types,
            adapters=self.adapters,
            n_row=row_size(self.graph),
            is_turned=any(value.name == "turns" for value in self.graph.inputs),
        )

    def with_sampling(
        self, plans: list[StepPlan], heads: Sequence[int], n_vocab: int
    ) -> tuple[list[StepPlan], list[Choice]]:
        """The plans, in which the GPU then chooses tokens itself, with plans that only choose; and their choices."""
        sampling, choosing = Sampling(self.implement, self.kernel_index), (HEAD, JOINED, JOINED_ADAPTED)
        plans = [sampling.after(plan, n_vocab) if plan.kind in choosing else plan for plan in plans]
        plans += sampling.samplers(heads, n_vocab)
        return sorted(plans, key=lambda plan: (plan.kind, plan.n_rows)), sampling.choices

    def binding(self, m: int, r: int, body: Body | None = None) -> Binding:
        body = body or self.body
        pages = -(-self.n_context // PAGE_TOKENS)
        tiled = body.tiled | body.attended if m > FEW_ROWS else body.tiled
        sizes = {"M": m, "R": r, "P": pages, "n_pages": 1, "n_slots": 1}
        of_all = max if self.is_whole else sum  # no step reads what another has left: layers write over each other
        page_bytes = of_all(self.layer_bytes) if len(set(self.layer_bytes)) > 1 else 0
        n_layers = 1 if self.is_whole else self.n_caches
        return Binding(sizes, self.kv_dtype, n_layers, tiled, body.queries, self.slot_bytes, page_bytes)

    def bytes_of_layers(self, m: int) -> tuple[int, ...]:
        """Bytes of each layer's part of a page, as the schedules say: the same for every M."""
        binding = self.binding(m, 1)
        asked: dict[Call, int] = {}
        calls = [call_of(node, binding) for node in self.graph if op_name(node) in ATTENTION]
        for call in calls:
            if call not in asked:
                asked[call] = self.implement(call).kv_layer_bytes
        return tuple(asked[call] for call in calls)

    def body_of(self, graph: ir.Graph) -> Body:
        if graph not in self.bodies:
            self.bodies[graph] = Body(graph, self.kv_dtype, self.device)
        return self.bodies[graph]

    def body_plan(
        self, kind: int, graph: ir.Graph, m: int, r: int, handed_over: Mapping[ir.Value, int], start: int
    ) -> StepPlan:
        """The body of M = m rows, from the graph for that M.

        handed_over: values of the planner's own graph; in another, they are found by their names.
        """
        body = self.body_of(graph)
        if body is not self.body:
            made, roots = {value.name: value for node in body.nodes for value in node.outputs}, alias_roots(body.nodes)
            handed_over = {roots[made[value.name]]: offset for value, offset in handed_over.items()}
        return self.step(kind, m, body.nodes, body.outputs, self.binding(m, r, body), handed_over, start)

    def joined_plan(self, kind: int, graph: ir.Graph, n: int) -> StepPlan:
        """A step of n tokens that all want logits."""
        body = self.body_of(graph)
        return self.step(kind, n, body.nodes, body.outputs, self.binding(n, n, body), {}, 0)

    def hand_over(self, largest: Binding) -> tuple[dict[ir.Value, int], int]:
        """Offsets of the body's results that heads read, and where they end.

        They lie at the start of the arena in every plan, each with room for the largest body.
        """
        roots = alias_roots(self.body.nodes)
        made = {value for node in self.body.nodes for value in node.outputs}
        offsets: dict[ir.Value, int] = {}
        end = 0
        for value in (value for node in self.body.head for value in node.inputs):
            if value in made and roots[value] not in offsets:
                offsets[roots[value]] = end
                end += aligned(largest.type_of(roots[value]).n_bytes)
        return offsets, end

    def step(
        self,
        kind: int,
        n_rows: int,
        nodes: Sequence[ir.Node],
        outputs: Sequence[ir.Value],
        binding: Binding,
        handed_over: Mapping[Any, int],
        start: int,
        elsewhere: Mapping[str, Argument] | None = None,
    ) -> StepPlan:
        """One plan: choose an implementation for each node, place its buffers, resolve its operands.

        outputs: the logits first.  elsewhere: see Placement.places.
        """
        roots = alias_roots(nodes)
        work = [node for node in nodes if node.op_type not in ALIASES]
        chosen = [self.choose(kind, n_rows, node, binding) for node in work]
        keep = {roots.get(value, value) for value in [*handed_over, *outputs]}
        offsets, end = lay_out(live_buffers(work, chosen, roots, binding, keep), start)
        self.arena_bytes = max(self.arena_bytes, end)
        logits = roots.get(outputs[0], outputs[0])
        layers = [0 if self.is_whole else sum(self.layer_bytes[:layer]) for layer in range(len(self.layer_bytes))]
        places = {**offsets, **handed_over}
        where = (roots, places, logits, self.weights, layers, self.states, elsewhere or {})
        placement = Placement(binding, *where)
        calls = []
        for index, (node, implementation) in enumerate(zip(work, chosen, strict=True)):
            for launch in implementation.launches:
                arguments = tuple(placement.argument(op, index, node, implementation) for op in launch.operands)
                kernel = self.kernel_index(launch.kernel)
                moved = (launch.n_bytes, launch.n_operations)
                calls.append(PlannedCall(kernel, launch.grid, arguments, str(node.name), *moved))
        return StepPlan(kind, n_rows, tuple(calls))

    def choose(self, kind: int, n_rows: int, node: ir.Node, binding: Binding) -> Implementation:
        """Ask the schedules; equal calls share one answer."""
        call = call_of(node, binding)
        known = self.choices.get((kind, n_rows, call))
        implementation = known.implementation if known else self.implement(call)
        nodes = (*known.nodes, str(node.name)) if known else (str(node.name),)
        self.choices[kind, n_rows, call] = Choice(kind, n_rows, call, implementation, nodes)
        self.scratch_bytes = max(self.scratch_bytes, aligned(implementation.scratch_bytes))
        if implementation.kv_layer_bytes:
            expected = self.layer_bytes[node.attributes["layer"].as_int()]
            assert implementation.kv_layer_bytes == expected, f"{node.name} keeps other bytes than its layer"
        return implementation

    def kernel_index(self, kernel: Kernel) -> int:
        known = self.kernels.setdefault(kernel.name, kernel)
        if known.key != kernel.key:
            raise AssertionError(f"two kernels are named {kernel.name}:\n{known.key}\n{kernel.key}")
        return list(self.kernels).index(kernel.name)


def body_and_head(graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Node]]:
    """The nodes that do not depend on the graph input `rows`, and those that do."""
    after_rows = values_after(graph, "rows")
    split: tuple[list[ir.Node], list[ir.Node]] = ([], [])
    for node in graph:
        split[node.outputs[0] in after_rows].append(node)
    return split


def values_after(graph: ir.Graph, name: str) -> set[ir.Value]:
    """Every value that depends on the graph input `name`."""
    after = {value for value in graph.inputs if value.name == name}
    for node in graph:
        if any(value in after for value in node.inputs):
            after.update(node.outputs)
    return after


def row_size(graph: ir.Graph) -> int:
    """Numbers of a row that may stand for a token; 0: none may."""
    shapes = [value.shape for value in graph.inputs if value.name == "given"]
    return int(str(shapes[0][1])) if shapes and shapes[0] is not None else 0
