"""compiler/planner.py: a small step graph, planned with schedules that only say what they would launch."""

from dataclasses import replace

import onnx_ir as ir
import pytest

from llmc.compiler.bind import call_of
from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.placement import alias_roots, live_buffers
from llmc.compiler.plan import BODY, HEAD, JOINED, Program
from llmc.compiler.planner import Planner
from llmc.passes.take_all_rows import take_all_rows
from llmc.runtime.errors import LlmcError
from llmc.runtime.format import SPACES

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
step (int64[M] tokens, int64[M] positions, int64[M,P] page_table, int64[R] rows,
      float[n_pages,2,64,16] k0, float[n_pages,2,64,16] v0)
  => (float[R,10] logits, float[n_pages,2,64,16] k0_out, float[n_pages,2,64,16] v0_out)
<float[10,32] embed = {0}, float[64,32] w_qkv = {0}, float[32,32] w_o = {0}, float[10,32] head = {0}> {
  h = Gather(embed, tokens)
  qkv = llmc.Linear(h, w_qkv)
  a, k0_out, v0_out = llmc.PagedAttention<num_heads: int = 2, layer: int = 0>(qkv, positions, page_table, k0, v0)
  o = llmc.Linear(a, w_o)
  shape = Constant<value_ints: ints = [-1, 32]>()
  r = Identity(o)
  s = Add(h, r)
  g = Gather(s, rows)
  logits = llmc.Linear(g, head)
}
"""
SHAPES = {name: ["M", 64 if name == "qkv" else 32] for name in ("h", "qkv", "a", "o", "r", "s")} | {"g": ["R", 32]}


LAYERS = """
<ir_version: 10, opset_import: ["" : 23, "llmc" : 1]>
step (int64[M] tokens, int64[M] positions, int64[M,P] page_table, int64[R] rows,
      float[n_pages,2,64,16] k0, float[n_pages,2,64,16] v0, float[n_pages,1,64,32] k1, float[n_pages,1,64,48] v1)
  => (float[R,32] logits, float[n_pages,2,64,16] k0_out, float[n_pages,2,64,16] v0_out,
      float[n_pages,1,64,32] k1_out, float[n_pages,1,64,48] v1_out)
<float[10,32] embed = {0}> {
  h = Gather(embed, tokens)
  a, k0_out, v0_out = llmc.PagedAttention<layer: int = 0>(h, positions, page_table, k0, v0)
  o, k1_out, v1_out = llmc.PagedAttention<layer: int = 1>(a, positions, page_table, k1, v1)
  r = llmc.AppendedAttention<layer: int = 1>(o, positions, page_table, k1_out, v1_out)
  s = llmc.AppendedAttention<layer: int = 0>(r, positions, page_table, k0_out, v0_out)
  logits = Gather(s, rows)
}
"""
"""Two layers with caches of two sizes, and two that share them."""


def step_graph(text: str = TEXT) -> ir.Graph:
    model = ir.from_onnx_text(text)
    for node in list(model.graph):
        if node.op_type == "Constant":
            model.graph.remove(node, safe=True)
            continue
        node.name = f"{node.op_type.lower()}_{node.outputs[0].name}"
        for value in node.outputs:
            if value.name in SHAPES:
                value.shape, value.dtype = ir.Shape(SHAPES[value.name]), ir.DataType.FLOAT
    return model.graph


def schedule(call: Call) -> Implementation:
    """One launch over all inputs and outputs; matmuls with a temporary, attention with the cache."""
    count = len(call.inputs)
    operands = [Operand("input", i) for i in range(count if "Attention" not in call.op else 3)]
    operands.append(Operand("output", 0))
    if "Linear" in call.op:
        operands.append(Operand("temp", 0))
    if "Attention" in call.op:
        operands += [Operand("kv"), Operand("scratch")]
    name = f"k_{abs(hash(str(call)))}"
    kernel = Kernel(name, str(call), lambda: None)
    temps = (100,) if "Linear" in call.op else ()
    attention = "Attention" in call.op
    launch = Launch(kernel, tuple(operands), grid=4)
    return Implementation((launch,), temps, 256 * attention, {}, 8192 * attention, "toy", "")


@pytest.fixture(scope="module")
def program() -> Program:
    return Planner(step_graph(), schedule, "f32", n_context=100).plan([1, 8], [1, 4])


def test_bodies_and_heads_are_planned_for_every_size(program: Program) -> None:
    assert [(plan.kind, plan.n_rows) for plan in program.plans] == [(BODY, 1), (BODY, 8), (HEAD, 1), (HEAD, 4)]
    assert [len(plan.calls) for plan in program.plans] == [5, 5, 2, 2]


def test_weights_lie_apart_and_are_placed_once(program: Program) -> None:
    assert [w.value.name for w in program.weights] == ["embed", "w_qkv", "w_o", "head"]
    ends = [w.offset + w.n_bytes for w in program.weights]
    assert all(end <= w.offset for end, w in zip(ends, program.weights[1:], strict=False))
    assert program.weight_bytes >= ends[-1]


def test_cache_of_a_page_and_scratch_are_reported(program: Program) -> None:
    assert (program.kv_page_bytes, program.scratch_bytes, program.pages_per_sequence) == (8192, 256, 2)


def sized(call: Call) -> Implementation:
    """A layer's part of a page as its caches' shapes say it."""
    n_bytes = sum(kind.n_bytes for kind in call.inputs[-2:] if kind) if "Attention" in call.op else 0
    return replace(schedule(call), kv_layer_bytes=n_bytes)


def test_layers_lie_one_after_the_other_each_of_its_own_size() -> None:
    calls: list[Call] = []

    def asked(call: Call) -> Implementation:
        calls.append(call)
        return sized(call)

    program = Planner(step_graph(LAYERS), asked, "f32", n_context=100).plan([8], [1])
    sizes = (2 * 2 * 64 * 16 * 4, 64 * (32 + 48) * 4)
    assert (program.layer_bytes, program.kv_page_bytes, program.n_layers) == (sizes, sum(sizes), 4)
    arguments = [a for call in program.plans[0].calls for a in call.arguments if SPACES[a.space] == "kv"]
    first, second = (0, sizes[0]), (sizes[0], sizes[1])
    assert [(a.offset, a.n_bytes) for a in arguments] == [first, second, second, first]
    kept = {call.op: call.attribute("page_bytes") for call in calls if "Attention" in call.op}  # as asked at last
    assert kept == dict.fromkeys(kept, sum(sizes))
    assert {call.attribute("n_layers") for call in calls if "Attention" in call.op} == {2}


def test_every_argument_lies_inside_its_space(program: Program) -> None:
    limits = {"arena": program.arena_bytes, "weights": program.weight_bytes, "kv": 8192, "scratch": 256}
    for plan in program.plans:
        for call in plan.calls:
            for argument in call.arguments:
                limit = limits.get(SPACES[argument.space])
                assert limit is None or argument.offset + argument.n_bytes <= limit


def test_a_reshape_is_a_name_and_not_a_copy(program: Program) -> None:
    calls = {call.node: call for call in program.plans[0].calls}
    assert calls["linear_o"].arguments[2] == calls["add_s"].arguments[1]


def test_what_the_head_reads_is_where_every_body_left_it(program: Program) -> None:
    bodies = [plan.calls[-1].arguments[2].offset for plan in program.plans if plan.kind == BODY]
    heads = [plan.calls[0].arguments[0].offset for plan in program.plans if plan.kind == HEAD]
    assert len({*bodies, *heads}) == 1


def test_a_joined_step_hands_nothing_over_and_picks_no_rows() -> None:
    """A plan for each number of rows that a body and a head have; its weights are those that they read."""
    graph = step_graph()
    model = ir.Model(step_graph(), ir_version=10)
    take_all_rows(model)
    planner = Planner(graph, schedule, "f32", n_context=100, joined=lambda n: model.graph)
    program = planner.plan([1, 8], [1, 4, 8])
    joined = [plan for plan in program.plans if plan.kind == JOINED]
    assert [(plan.n_rows, len(plan.calls)) for plan in joined] == [(1, 6), (8, 6)]
    assert [w.value.name for w in program.weights] == ["embed", "w_qkv", "w_o", "head"]
    for plan in joined:
        arguments = [argument for call in plan.calls for argument in call.arguments]
        spaces = {SPACES[argument.space] for argument in arguments}
        assert {"tokens", "logits", "kv"} < spaces
        assert "rows" not in spaces
        (logits,) = (argument for argument in arguments if SPACES[argument.space] == "logits")
        assert logits.n_bytes == 4 * plan.n_rows * program.n_vocab


def test_logits_and_step_inputs_lie_in_their_own_spaces(program: Program) -> None:
    head = program.plans[-1]
    assert SPACES[head.calls[0].arguments[1].space] == "rows"
    assert SPACES[head.calls[1].arguments[2].space] == "logits"
    assert head.calls[1].arguments[2].n_bytes == 4 * 10 * 4


def test_a_dimension_nobody_bound_is_refused() -> None:
    graph = step_graph()
    value = next(node for node in graph if node.op_type == "Add").outputs[0]
    value.shape = ir.Shape(["batch", 32])
    with pytest.raises(LlmcError, match="dimension 'batch' is not one of"):
        Planner(graph, schedule, "f32", n_context=100).plan([1], [1])


def test_memory_is_for_what_a_launch_touches() -> None:
    """Schedules may leave a result out, for some M, with its reader: neither writes it, nor reads it."""
    left_out = {"o": [Operand("output", 0)], "s": [Operand("input", 0), Operand("input", 1)]}

    def implemented(node: ir.Node) -> Implementation:
        (launch,) = (whole := schedule(call_of(node, binding))).launches
        operands = [o for o in launch.operands if o not in left_out.get(str(node.outputs[0].name), [])]
        return replace(whole, launches=(replace(launch, operands=tuple(operands)),))

    graph = step_graph()
    binding = Planner(graph, schedule, "f32", n_context=100).binding(8, 1)
    work = [node for node in graph if node.op_type != "Identity"]
    chosen = [implemented(node) for node in work]
    buffers = live_buffers(work, chosen, alias_roots(graph), binding, set())
    lives = {b.name.name: (b.first, b.last) for b in buffers if isinstance(b.name, ir.Value)}
    assert "o" not in lives
    assert (lives["h"], lives["a"]) == ((0, 1), (2, 3))
