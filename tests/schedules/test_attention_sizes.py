"""Attention in models whose layers differ: pages of parts of several sizes, values of another size than keys or
normalised, heads of 512 elements, layers that attend the keys and values of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.ops import DOMAIN, OPERATORS
from llmc.compiler.target import Target
from tests.schedules.test_attention import N_PAGES, PAGES, Array, Machine, Model, Row, Run, check_one_sequence

LONG, ALL = "long heads", "all of them"
SIZES = {
    "values of fewer elements": Model(heads=6, kv_heads=2, head_dim=48, rotary_dim=16, own_value_dim=32),
    "values of more": Model(
        heads=3, kv_heads=3, head_dim=16, rotary_dim=0, own_value_dim=40, has_sinks=True, window=30
    ),
    "a layer in front of other size": Model(heads=4, kv_heads=1, other_bytes=64 * 33),
    LONG: Model(heads=3, kv_heads=1, head_dim=512, rotary_dim=128, epsilon=1e-6, norms_values=True),
    ALL: Model(2, 1, 32, 32, own_value_dim=48, other_bytes=64, epsilon=0.5, norms_values=True),
}


@pytest.mark.parametrize(
    ("kv_dtype", "kind"),
    [*(("f32", kind) for kind in SIZES if kind != LONG), ("bf16", ALL), ("int8", LONG)],
)
def test_layers_of_any_size_agree_with_float64_and_are_the_same_in_any_step(
    run: Run, host: Target, kind: str, kv_dtype: str
) -> None:
    check_one_sequence(Machine(replace(SIZES[kind], kv_dtype=kv_dtype), run, host, (131,)))


def test_values_of_another_size_are_right_on_every_level(run: Run, target: Target) -> None:
    check_one_sequence(Machine(replace(SIZES["values of fewer elements"], kv_dtype="bf16"), run, target, (131,)))


class Reader:
    """A layer of the same queries over the same cache, which appends nothing."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.model = machine, machine.model

    def call(self, m: int) -> Call:
        call, model = self.model.call(m), self.model
        queries = TensorType((m, model.heads * model.head_dim), "f32")
        rest = call.inputs[1:] if model.epsilon is None else (call.inputs[1], *call.inputs[3:])
        name = call.op.replace("Paged", "Appended").replace("Values", "")
        return Call(name, (queries, *rest), call.outputs[:1], call.attributes)

    def inputs(self, rows: list[Row]) -> list[Array]:
        qkv, *rest = self.machine.inputs(rows)
        if self.model.epsilon is not None:
            del rest[1]
        return [qkv[:, : self.model.heads * self.model.head_dim], *rest]

    def step(self, rows: list[Row], n_tasks: int) -> Array:
        call, machine = self.call(len(rows)), self.machine
        caches = [np.zeros(kind.shape if kind else (), np.float32) for kind in call.inputs[-2:]]
        memory = machine.pool[machine.first :]
        return machine.run(call, *self.inputs(rows), *caches, target=machine.target, n_tasks=n_tasks, kv=memory)[0]


@pytest.mark.parametrize(
    ("kv_dtype", "model"),
    [
        ("f32", Model(window=70)),
        ("bf16", Model(heads=6, kv_heads=2, head_dim=48, rotary_dim=0, own_value_dim=32, has_sinks=True)),
        ("int8", SIZES[ALL]),
    ],
    ids=str,
)
def test_a_layer_that_shares_a_cache_sees_what_its_owner_sees_to_the_bit(
    run: Run, host: Target, model: Model, kv_dtype: str
) -> None:
    machine = Machine(replace(model, kv_dtype=kv_dtype), run, host, (90, 30))
    owner = [machine.prefill(0, 40), machine.prefill(1, 40)]
    kept = machine.pool.copy()
    rows: list[Row] = [*((0, i) for i in range(33)), None, *((1, i) for i in range(5)), (0, 89)]
    for step in (rows, rows[-2:]):
        for row, result in zip(step, Reader(machine).step(step, n_tasks=3), strict=True):
            np.testing.assert_array_equal(result, owner[row[0]][row[1]] if row else 0 * result)
    np.testing.assert_array_equal(machine.pool, kept)


def test_sharing_is_what_the_operator_is_defined_to_be(run: Run, define: Run, host: Target) -> None:
    """The definition, over caches that paged attention's definition has filled."""
    model = SIZES[ALL]
    machine = Machine(model, run, host, (70,))
    rows: list[Row] = [(0, i) for i in range(70)]
    machine.step(rows)
    kinds = model.call(len(rows), N_PAGES).inputs[-2:]
    caches = [np.zeros(kind.shape if kind else (), np.float32) for kind in kinds]
    filled = define(defined(model.call(len(rows), N_PAGES)), *numbered(machine.inputs(rows)), *caches)[1:]
    reader = Reader(machine)
    call = reader.call(len(rows))
    call = replace(call, inputs=(*call.inputs[:-2], *kinds))
    assert OPERATORS[call.op.removeprefix(f"{DOMAIN}.")].inputs[0] == "queries"
    expected = define(defined(call), *numbered(reader.inputs(rows)), *filled)[0]
    np.testing.assert_allclose(reader.step(rows, n_tasks=2), expected, rtol=1e-4, atol=1e-5)


def defined(call: Call) -> Call:
    dropped = ("n_layers", "kv_dtype", "page_tokens", "page_bytes")
    kept: dict[str, Any] = {name: value for name, value in call.attributes if name not in dropped}
    return replace(call, attributes=tuple({**kept, "layer": 0}.items()))


def numbered(inputs: list[Array]) -> list[Array]:
    assert inputs[-1].shape[1] == PAGES
    return [*inputs[:-2], *(array.astype(np.int64) for array in inputs[-2:])]
