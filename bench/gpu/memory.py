"""A job's operands in the device's memory, and its candidates' launches over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from llmc.bench.gpu import bits, kv_codes
from llmc.bench.gpu.bits import POISON, Array
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.inputs import MOST_CONSTANTS, RUNS, Inputs, constant, make, of_heads
from llmc.bench.gpu.kit import Candidate, Job, Kit
from llmc.compiler.kernel import DTYPE_BYTES, PAGE_TOKENS, Call, Operand, TensorType
from llmc.schedules.states_call import is_stateful

GUARD_BYTES = 256
"""So many bytes behind each output and temporary must be left as they are by kernels."""


def addresses(operand: Operand, places: dict[Operand, int]) -> int:
    return places[Operand(operand.kind) if operand.kind in ("kv", "state", "scratch") else operand]


def launches(device: Device, kit: Kit, candidate: Candidate, places: dict[Operand, int]) -> Callable[[], None]:
    """A function that launches the candidate once, over operands at these addresses."""
    ready = []
    for launch in candidate.launches:
        said = kit.kernel(launch.kernel)
        kernel = device.kernel(kit.cubin(launch.kernel), launch.kernel, **said)
        ready.append((kernel, launch.grid, [addresses(operand, places) for operand in launch.operands]))

    def run() -> None:
        for kernel, grid, pointers in ready:
            device.launch(kernel, grid, pointers)

    return run


class Checked:
    """A job with inputs whose result is known: run(candidate) gives the first output, f32.

    Raises ValueError for what a kernel may not leave behind.
    """

    def __init__(self, device: Device, kit: Kit, job: Job, inputs: Inputs) -> None:
        self.device, self.kit, self.job, self.inputs = device, kit, job, inputs
        self._values = {
            index: device.upload(value_bytes(job.call, index, inputs.array(index)))
            for index in inputs.arrays
            if not is_constant(job.call, index)
        }

    def run(self, candidate: Candidate) -> Array:
        device, call = self.device, self.job.call
        with device.kept():
            places = {Operand("input", index): address for index, address in self._values.items()}
            for index in self.inputs.arrays:
                if is_constant(call, index):
                    layout = candidate.layouts.get(index)
                    places[Operand("input", index)] = device.upload(constant_bytes(call, index, layout))
            guarded = {Operand("output", index): kind.n_bytes for index, kind in enumerate(call.outputs)}
            guarded |= {Operand("temp", index): n_bytes for index, n_bytes in enumerate(candidate.temps)}
            for operand, n_bytes in guarded.items():
                places[operand] = device.allocate(n_bytes + GUARD_BYTES)
                device.fill(places[operand], POISON, n_bytes + GUARD_BYTES)
            if candidate.scratch_bytes:
                places[Operand("scratch")] = scratch = device.allocate(candidate.scratch_bytes)
                device.fill(scratch, 0, candidate.scratch_bytes)
            if candidate.kv_layer_bytes:
                places[Operand("kv")] = upload_cache(device, call, self.inputs, candidate.kv_layer_bytes)
            if is_stateful(call):
                places[Operand("state")] = no_states(device, call)
            run = launches(device, self.kit, candidate, places)
            for _ in range(RUNS if is_stateful(call) else 1):
                run()
                device.wait()  # a step's states are there before it begins: layers with a state rely on that
            if candidate.scratch_bytes and device.read(scratch, candidate.scratch_bytes).any():
                raise ValueError("scratch memory is not left zero")
            for operand, n_bytes in guarded.items():
                if (device.read(places[operand] + n_bytes, GUARD_BYTES) != POISON).any():
                    raise ValueError(f"bytes behind {operand.kind} {operand.index} were written")
            return output_values(call, device.read(places[Operand("output", 0)], call.outputs[0].n_bytes))


def no_states(device: Device, call: Call) -> int:
    """Slots of zeros."""
    state = call.inputs[-1]
    assert state is not None
    n_bytes = state.shape[0] * call.attribute("slot_bytes")
    slots = device.allocate(n_bytes)
    device.fill(slots, 0, n_bytes)
    return slots


def is_constant(call: Call, index: int) -> bool:
    kind = call.inputs[index]
    return kind is not None and kind.constant


def value_bytes(call: Call, index: int, values: Array) -> Array:
    kind = call.inputs[index]
    assert kind is not None
    return bits.tiled(values, kind.dtype) if kind.tiled else bits.raw(bits.bits_of(values, kind.dtype))


def constant_bytes(call: Call, index: int, layout: dict[str, Any] | None) -> Array:
    kind = call.inputs[index]
    assert kind is not None
    return packed_constant(index, kind, json.dumps(layout), of_heads(call, index))


@lru_cache(maxsize=MOST_CONSTANTS)
def packed_constant(index: int, kind: TensorType, layout: str, name: str) -> Array:
    return bits.packed(constant(index, kind, name), kind.dtype, json.loads(layout))


def output_values(call: Call, data: Array) -> Array:
    kind = call.outputs[0]
    if kind.tiled:
        return bits.untiled(data, (kind.shape[0], kind.shape[1]), kind.dtype)
    return bits.view_of(data, kind.dtype, kind.shape)


# -- the KV cache -----------------------------------------------------------------------------------------------------


def upload_cache(device: Device, call: Call, inputs: Inputs, layer_bytes: int) -> int:
    """The pages on the device: of every page the first layer's part; other layers' parts are poison."""
    assert inputs.keys is not None
    n_pages, page_bytes = len(inputs.keys), layer_bytes * call.attribute("n_layers")
    cache = device.allocate(n_pages * page_bytes)
    device.fill(cache, POISON, n_pages * page_bytes)
    for page in range(n_pages):
        device.write(cache + page * page_bytes, page_part(inputs, page, call.attribute("kv_dtype")))
    return cache


def page_part(inputs: Inputs, page: int, dtype: str) -> Array:
    """A page's bytes for one layer: for each key head K, then V, each [D/8][64][8] of 2 bytes or [64][D] of f32; or as
    codes (kv_codes.py)."""
    assert inputs.keys is not None
    parts = [cache[page] for cache in (inputs.keys, inputs.values) if cache is not None]
    both = np.stack(parts, axis=1)  # [KH, 2, 64, D], of latents [1, 1, 64, D]
    if dtype == "int8":
        return kv_codes.page_part(both)
    if DTYPE_BYTES[dtype] == 2:
        heads, _, _, dim = both.shape
        both = both.reshape(heads, len(parts), PAGE_TOKENS, dim // 8, 8).transpose(0, 1, 3, 2, 4)
    return bits.raw(bits.bits_of(np.ascontiguousarray(both), dtype))


@lru_cache(maxsize=4)
def inputs_of(call: Call, length: int | None = None) -> Inputs:
    return make(call, length)
