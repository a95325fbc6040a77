"""Check that a graph is a step graph.

A graph is a step graph when
 1. its inputs are `tokens` i64[M], `positions` i64[M], `page_table` i64[M,P], `rows` i64[R], and for each layer i
    `k_cache.i` and `v_cache.i` f32[n_pages, KH, 64, D], where D is each cache's own; where there are states, `slots`
    i64[M], and for each of them `state.j` f32[n_slots, …]; where adapters add to products, `adapters` i64[M]; where
    rows stand for tokens, `is_given` i64[M] and `given` f32[M,K], K being the embeddings' own, and as much more for
    each layer that rows go into; where rows see what is
    behind them, `sees` i64[M]; where positions have three directions, `turns` i64[M,3];
 2. its results are `logits` f32[R,V], and for each layer `k_cache.i_out` and `v_cache.i_out` of the cache's type, for
    each state `state.j_out` of its type;
 3. there is one attention node for each pair of caches that appends to them, numbered from 0, and it alone uses them;
    others may attend what it has made of them, and say its number; likewise one node for each state;
 4. every value has a name of its own, an element type, and a shape of numbers and the symbols M, R, P, n_pages and
    n_slots;
 5. a node uses only inputs, initializers and results of nodes before it;
 6. every node is a standard operator or one of llmc's, the latter with its own attributes;
 7. every initializer is used, and no result of the whole graph but a node's;
 8. what depends on `rows` never reaches a cache: the graph falls into a body and a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from llmc.compiler.graph.shapes import dims
from llmc.compiler.graph.text import op_name, type_text
from llmc.compiler.kernel import PAGE_TOKENS
from llmc.compiler.ops import (
    ADD_GIVEN,
    AHEAD_PAGED_ATTENTION,
    APPENDED_ATTENTION,
    DOMAIN,
    GATHER_TURNED,
    LATENT_ATTENTION,
    LOW_RANKS,
    N_TURNS,
    OF_PATCHES,
    OPERATORS,
    PAGED_ATTENTION,
    PLACE,
    STATEFUL,
    TAKE_FIRST,
    TAKE_GIVEN,
    WHOLE_PAGED_ATTENTION,
)
from llmc.runtime.errors import LlmcError

SYMBOLS = frozenset({"M", "R", "P", "n_pages", "n_slots"})
INPUTS = {"tokens": "i64[M]", "positions": "i64[M]", "page_table": "i64[M,P]", "rows": "i64[R]"}
SLOTS = {"slots": "i64[M]"}
ADAPTERS = {"adapters": "i64[M]"}
AHEAD = tuple(f"{DOMAIN}.{name}" for name in AHEAD_PAGED_ATTENTION.values())
"""The operators of attention in which a row may see what is behind it."""
ATTENTION = (
    *(f"{DOMAIN}.{name}" for name in (*PAGED_ATTENTION, *WHOLE_PAGED_ATTENTION, LATENT_ATTENTION)),
    *AHEAD,
)
"""The operators of attention that append to a cache of their own."""
WHOLE = tuple(f"{DOMAIN}.{name}" for name in WHOLE_PAGED_ATTENTION)
"""Those of ATTENTION in which tokens see what is behind them, so that all of a text is in one step."""
APPENDED = tuple(f"{DOMAIN}.{name}" for name in APPENDED_ATTENTION)
"""The operators of attention that read a cache to which another node appends."""
WITH_STATE = tuple(f"{DOMAIN}.{name}" for name in STATEFUL)


def check_step_graph(model: ir.Model) -> None:
    """Raise LlmcError, naming the first offence, unless `model` is a step graph."""
    for rule in (inputs_and_results, layers, states, types, order, operators, initializers, body_and_head):
        for fact, place in rule(model.graph):
            raise LlmcError(
                f"not a step graph: {fact}", place=place, hint="this is a fault of llmc's passes: report it"
            )


def check_tower_graph(model: ir.Model) -> None:
    """Raise LlmcError unless `model` is a step graph but for what it takes and gives: `pixels` f32[C,H,W] and, where it
    attends, `positions` i64[n], `page_table` i64[n,P] and caches -> `made` f32[n',d] and caches.  Of pictures of any
    size it takes `pixels` f32[M,K], and what else patches are told (plan_tower.py), and makes f32[R,d]."""
    for rule in (tower_inputs_and_results, layers, types, order, operators, initializers):
        for fact, place in rule(model.graph):
            raise LlmcError(
                f"not the graph of a tower: {fact}", place=place, hint="this is a fault of llmc's passes: report it"
            )


Offences = Iterator[tuple[str, str]]


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if op_name(node) in ATTENTION]


def stateful_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if op_name(node) in WITH_STATE]


def inputs_and_results(graph: ir.Graph) -> Offences:
    caches = [f"{kind}_cache.{layer}" for layer in range(len(attention_nodes(graph))) for kind in "kv"]
    kept = [f"state.{place}" for place, _ in enumerate(stateful_nodes(graph))]
    is_adapted = any(node.op_type in LOW_RANKS and node.domain == DOMAIN for node in graph)
    inputs = INPUTS | (SLOTS if kept else {}) | (ADAPTERS if is_adapted else {}) | given_rows(graph)
    inputs |= {"sees": "i64[M]"} if any(op_name(node) in AHEAD for node in graph) else {}
    inputs |= {"turns": f"i64[M,{N_TURNS}]"} if any(node.op_type == GATHER_TURNED for node in graph) else {}
    expected = [*inputs, *caches, *kept]
    found = [str(value.name) for value in graph.inputs]
    if sorted(found) != sorted(expected):
        yield f"inputs are {', '.join(found)}, not {', '.join(expected)}", "graph"
    by_name = {value.name: value for value in graph.inputs}
    for name, expected_type in inputs.items():
        if type_text(by_name[name]) != expected_type:
            yield f"its type is {type_text(by_name[name])}, not {expected_type}", f"input {name}"
    for name in caches:
        shape = by_name[name].shape
        if shape is None or len(shape) != 4 or shape[2] != PAGE_TOKENS:
            yield f"its type is {type_text(by_name[name])}, not f32[n_pages,KH,{PAGE_TOKENS},D]", f"input {name}"
    results = [str(value.name) for value in graph.outputs]
    if results != ["logits", *(f"{name}_out" for name in (*caches, *kept))]:
        yield f"results are {', '.join(results)}", "graph"
    logits = type_text(graph.outputs[0])
    if not logits.startswith("f32[R,"):
        yield f"its type is {logits}, not f32[R,V]", "result logits"


def given_rows(graph: ir.Graph) -> dict[str, str]:
    """The inputs where rows stand for tokens."""
    taken = next((node for node in graph if op_name(node) == f"{DOMAIN}.{TAKE_GIVEN}"), None)
    if taken is not None:
        return {"is_given": "i64[M]", "given": type_text(taken.outputs[0])}
    first = next((node for node in graph if op_name(node) == f"{DOMAIN}.{TAKE_FIRST}"), None)
    if first is None:
        return {}
    size, n_more = dims(first.outputs[0])[1], sum(op_name(node) == f"{DOMAIN}.{ADD_GIVEN}" for node in graph)
    return {"is_given": "i64[M]", "given": f"f32[M,{(1 + n_more) * int(str(size))}]"}


def tower_inputs_and_results(graph: ir.Graph) -> Offences:
    caches = [f"{kind}_cache.{layer}" for layer in range(len(attention_nodes(graph))) for kind in "kv"]
    expected = ["pixels", *(["positions", "page_table", *caches] if caches else [])]
    found = [str(value.name) for value in graph.inputs]
    if type_text(graph.inputs[0]).startswith("f32[M,"):
        found = [name for name in found if name not in OF_PATCHES]
    if found != expected:
        yield f"inputs are {', '.join(found)}, not {', '.join(expected)}", "graph"
    results = [str(value.name) for value in graph.outputs]
    if results != ["made", *(f"{name}_out" for name in caches)] or len(graph.outputs[0].shape or ()) != 2:
        yield f"results are {', '.join(results)}", "graph"


def layers(graph: ir.Graph) -> Offences:
    for layer, node in enumerate(attention_nodes(graph)):
        place = f"node {node.name}"
        if node.attributes["layer"].as_int() != layer:
            yield f"attention node {layer} says layer {node.attributes['layer'].as_int()}", place
        if [str(value and value.name) for value in node.inputs[-2:]] != [f"k_cache.{layer}", f"v_cache.{layer}"]:
            yield f"attention of layer {layer} uses other caches", place
        if any(len(value.uses()) != 1 for value in node.inputs[-2:] if value is not None):
            yield f"the caches of layer {layer} have another user", place
    made = {node.attributes["layer"].as_int(): list(node.outputs[1:]) for node in attention_nodes(graph)}
    for node in (node for node in graph if op_name(node) in APPENDED):
        if list(node.inputs[-2:]) != made.get(node.attributes["layer"].as_int()):
            yield f"its caches are not those of layer {node.attributes['layer'].as_int()}", f"node {node.name}"


def states(graph: ir.Graph) -> Offences:
    for place, node in enumerate(stateful_nodes(graph)):
        state = node.inputs[-1]
        if node.attributes[PLACE].as_int() != place or state is None or state.name != f"state.{place}":
            yield f"the node of state {place} uses {state and state.name}", f"node {node.name}"
        elif len(state.uses()) != 1 or not type_text(state).startswith("f32[n_slots,"):
            yield f"state {place} has another user, or the type {type_text(state)}", f"node {node.name}"


def types(graph: ir.Graph) -> Offences:
    names: set[str | None] = set()
    every = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in every:
        if value.name in names or not value.name:
            yield "two values share a name, or one has none", f"value {value.name}"
        names.add(value.name)
        if value.dtype is None or value.shape is None:
            yield f"its type is {type_text(value)}", f"value {value.name}"
        else:
            unknown = {size.value for size in value.shape if not isinstance(size, int)} - SYMBOLS
            if unknown:
                yield f"its shape has the symbols {', '.join(map(str, unknown))}", f"value {value.name}"


def order(graph: ir.Graph) -> Offences:
    known = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"{op_name(node)} uses {value.name} before it is made", f"node {node.name}"
        known.update(node.outputs)


def operators(graph: ir.Graph) -> Offences:
    for node in graph:
        if node.domain not in ("", DOMAIN) or (node.domain == DOMAIN and node.op_type not in OPERATORS):
            yield f"unknown operator {op_name(node)}", f"node {node.name}"
        if node.domain == DOMAIN and set(node.attributes) != set(OPERATORS[node.op_type].attributes):
            yield f"{op_name(node)} has the attributes {', '.join(node.attributes)}", f"node {node.name}"


def initializers(graph: ir.Graph) -> Offences:
    for name, value in graph.initializers.items():
        if not value.uses():
            yield "nothing uses it", f"weight {name}"
        if value.const_value is None:
            yield "it has no source", f"weight {name}"
    for value in graph.outputs:
        if value.producer() is None:
            yield "no node makes it", f"result {value.name}"


def body_and_head(graph: ir.Graph) -> Offences:
    head = {value for value in graph.inputs if value.name == "rows"}
    for node in graph:
        if any(value in head for value in node.inputs):
            head.update(node.outputs)
            if op_name(node) in (*ATTENTION, *APPENDED, *WITH_STATE):
                yield (
                    f"{'a state' if op_name(node) in WITH_STATE else 'attention'} depends on rows",
                    f"node {node.name}",
                )
