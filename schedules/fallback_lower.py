"""A model of one node to PrimFuncs in llmc's calling convention, through TVM's Relax."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx
import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.frontend.onnx import from_onnx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import Operand
from llmc.runtime.errors import LlmcError
from llmc.schedules.fallback_legalize import LEGALIZE

LARGEST_CONSTANT = 64
"""Constants of up to so many elements are written into a kernel's code: as arrays on its stack, below 1 KiB."""

Place: TypeAlias = "Operand | list[Place] | np.ndarray[Any, Any]"


class Lowering:
    """steps: (PrimFunc, operands) in order; temps: bytes of each temporary.

    inputs: the index that each of the model's inputs has in the call.  Raises LlmcError where TVM has no loops.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, int], n_outputs: int) -> None:
        self.steps: list[tuple[Any, tuple[Operand, ...]]] = []
        self.temps: list[int] = []
        self.module = import_model(model)
        main = self.module["main"]
        self.places: dict[Any, Place] = {x: Operand("input", inputs[x.name]) for x in main.params}
        for block in main.body.blocks:
            for binding in block.bindings:
                self.places[binding.var] = self.place(binding.value, binding.var.ty)
        results = self.place(main.body.body, None)
        types = main.ret_ty.fields if isinstance(results, list) else [main.ret_ty]
        self.hand_over(results if isinstance(results, list) else [results], types, n_outputs)

    def place(self, value: Any, kind: Any) -> Place:
        """Where a Relax value lies, after the steps that compute it."""
        if (known := self.places.get(value)) is not None:
            return known
        if isinstance(value, relax.Tuple):
            return [self.place(field, None) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            parts = self.place(value.tuple_value, None)
            assert isinstance(parts, list)
            part: Place = parts[value.index]
            return part
        if isinstance(value, tvm.ir.GenericConst):
            array: np.ndarray[Any, Any] = value.value.numpy()
            return array
        if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
            return self.launch(value, kind)
        name = getattr(getattr(value, "op", None), "name", type(value).__name__)
        raise LlmcError(f"TVM has no loops for {name}", hint="this operator needs a schedule of its own")

    def launch(self, call: Any, kind: Any) -> Place:
        """A step for `call_tir(function, arguments) -> results`."""
        arguments = [self.place(argument, None) for argument in call.args[1].fields]
        types = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
        results = [self.temporary(n_bytes(shape_of(each), str(each.dtype))) for each in types]
        function, inner = in_our_convention(self.module[call.args[0]], arguments)
        operands = [place for place in arguments if isinstance(place, Operand)]
        self.steps.append((function, (*operands, *results, *map(self.temporary, inner))))
        return list[Place](results) if isinstance(kind, relax.TupleType) else results[0]

    def temporary(self, size: int) -> Operand:
        self.temps.append(size)
        return Operand("temp", len(self.temps) - 1)

    def hand_over(self, results: list[Place], types: list[Any], n_outputs: int) -> None:
        """Results into the call's outputs: a temporary becomes the output, anything else is copied there."""
        renamed: dict[Operand, Operand] = {}
        for index, (place, kind) in enumerate(zip(results[:n_outputs], types, strict=False)):
            output = Operand("output", index)
            if isinstance(place, Operand) and place.kind == "temp" and place not in renamed:
                renamed[place] = output
            else:
                source = (renamed.get(place, place),) if isinstance(place, Operand) else ()
                copy = copy_function(shape_of(kind), str(kind.dtype))
                function, _ = in_our_convention(copy, [place])
                self.steps.append((function, (*source, output)))
        kept = [Operand("temp", index) for index in range(len(self.temps)) if Operand("temp", index) not in renamed]
        renamed |= {old: replace(old, index=new) for new, old in enumerate(kept)}
        self.temps = [self.temps[old.index] for old in kept]
        self.steps = [(function, tuple(renamed.get(o, o) for o in operands)) for function, operands in self.steps]


def import_model(model: onnx.ModelProto) -> Any:
    """The model as an IRModule: PrimFuncs, and a `main` that calls them."""
    passes = relax.transform
    target = tvm.target.Target({"kind": "llvm"})
    logging.getLogger("tvm.relax.frontend.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), target:
        warnings.simplefilter("ignore")
        to_loops = [
            passes.DecomposeOpsForInference(),
            passes.LegalizeOps(LEGALIZE),
            passes.AnnotateTIROpPattern(),
            passes.FoldConstant(),
            passes.FuseOps(2),
            passes.FuseTIR(),
            passes.DeadCodeElimination(),
        ]
        return tvm.ir.transform.Sequential(to_loops)(from_onnx(model))


def shape_of(kind: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in kind.shape.values)


def n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return max(1, prod(shape)) * (1 if dtype == "bool" else np.dtype(dtype).itemsize)


def in_our_convention(function: Any, arguments: list[Place]) -> tuple[Any, list[int]]:
    """The PrimFunc with its buffers' memory among its parameters, and task and n_tasks last; the sizes of that memory.

    An argument that is a constant becomes an array in the code.
    """
    root = function.body.block
    if "call_packed" in function.script():
        raise LlmcError("TVM lowers it to a call of its own runtime", hint="it needs a schedule of its own")
    parameters, constants = [], []
    for index, parameter in enumerate(function.params):
        value = arguments[index] if index < len(arguments) else None
        if isinstance(value, np.ndarray):
            constants.append((parameter, value))
        else:
            parameters.append(parameter)
    inner = list(root.alloc_buffers)
    sizes = [n_bytes(tuple(int(extent) for extent in buffer.shape), str(buffer.dtype)) for buffer in inner]
    body = tirx.SeqStmt([*(s for pair in constants for s in written_out(*pair)), root.body]) if constants else root.body
    block = s_tir.SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, body, root.init, [
        parameter for parameter, _ in constants
    ], root.match_buffers, root.annotations)  # fmt: skip
    realize = s_tir.SBlockRealize(function.body.iter_values, function.body.predicate, block)
    tasks = [tirx.Var("task", "int32"), tirx.Var("n_tasks", "int32")]
    made = tirx.PrimFunc([*parameters, *inner, *tasks], realize)
    return made.with_attr({"s_tir": True, "tirx.noalias": True}), sizes


def written_out(buffer: Any, array: np.ndarray[Any, Any]) -> list[Any]:
    """Stores that fill a buffer with a constant."""
    if array.size > LARGEST_CONSTANT:
        fact = f"it holds a constant of {array.size} elements"
        raise LlmcError(fact, hint=f"at most {LARGEST_CONSTANT} are supported")
    return [
        tirx.BufferStore(buffer, tirx.const(array[index].item(), str(array.dtype)), list(index))
        for index in np.ndindex(array.shape)
    ]


def copy_function(shape: tuple[int, ...], dtype: str) -> Any:
    """(x, y): y = x."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("copy")
        x, y = (T.arg(name, T.buffer((max(1, prod(shape)),), dtype)) for name in ("x", "y"))
        with T.sblock("root"), T.serial(max(1, prod(shape))) as i:
            T.buffer_store(y, x[i], [i])
    return builder.get()
