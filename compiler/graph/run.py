"""Run a graph in ONNX Runtime, and write it to a file: llmc's operators go along as the functions that define them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.text import to_text
from llmc.compiler.ops import DOMAIN, OPSET, VERSION, function_of
from llmc.runtime.errors import LlmcError

SMALL_WEIGHT = 4096
"""Elements of the largest weight that a file written by `save_onnx` holds."""


Arrays: TypeAlias = Mapping[str, np.ndarray[Any, Any]]


def runner(model: ir.Model) -> Callable[[Arrays], dict[str, np.ndarray[Any, Any]]]:
    """A function from inputs to results by name, computed by ONNX Runtime on one thread. It ignores inputs that the
    graph lacks. Reads every weight, as float32. Raises LlmcError where ONNX Runtime refuses, or a weight does."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    with what_weights_say():
        data: bytes = ir.to_proto(with_functions(model)).SerializeToString()  # type: ignore[no-untyped-call]
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class for each complaint
        raise not_run(model, error) from error
    inputs = [value.name for value in session.get_inputs()]
    results = [value.name for value in session.get_outputs()]

    def run(feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        given = {name: feeds[name] for name in inputs}
        try:
            return dict(zip(results, session.run(results, given), strict=True))
        except Exception as error:
            raise not_run(model, error) from error

    return run


@contextmanager
def what_weights_say() -> Iterator[None]:
    """While a graph is written: let the LlmcError of a weight that cannot be read through onnx_ir's own error."""
    try:
        yield
    except ir.serde.SerdeError as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, LlmcError):
            reason = reason.__cause__
        raise reason or error from error


def not_run(model: ir.Model, error: Exception) -> LlmcError:
    said = " ".join(str(error).split())[:200]
    names = ", ".join(str(value.name) for value in model.graph.outputs)
    return LlmcError(f"ONNX Runtime does not run a part of the graph: {said}", place=f"value {names}"[:100])


def evaluate(model: ir.Model, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Every result of the graph by name, computed once; see `runner`."""
    return runner(model)(inputs)


def with_functions(model: ir.Model) -> ir.Model:
    """A copy that carries the definition of each llmc operator it uses."""
    copy = model.clone()
    copy.functions.clear()
    for name in sorted({node.op_type for node in copy.graph if node.domain == DOMAIN}):
        function = function_of(name)
        copy.functions[function.identifier()] = function
    copy.graph.opset_imports.setdefault("", OPSET)
    copy.graph.opset_imports[DOMAIN] = VERSION
    return copy


def save_onnx(model: ir.Model, path: Path | str) -> None:
    """Write the graph as a valid ONNX file that any viewer opens. No large weight is read.

    A weight of more than SMALL_WEIGHT elements becomes an input of its name: the file stays small, and runs once the
    weights are given.
    """
    copy = with_functions(model)
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > SMALL_WEIGHT:
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    with what_weights_say():
        ir.save(copy, path)


def dump_stage(model: ir.Model, folder: Path | str, index: int, name: str) -> None:
    """Write `NN_name.onnx` and `NN_name.txt`, making the folder if need be."""
    folder = Path(folder)
    stem = folder / f"{index:02d}_{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_onnx(model, stem.with_suffix(".onnx"))
        stem.with_suffix(".txt").write_text(to_text(model) + "\n", encoding="utf-8")
    except OSError as error:
        raise LlmcError(f"the graph cannot be written: {error.strerror}", place=f"--dump {folder}") from error


def extract(result: ir.Value, inputs: list[ir.Value]) -> ir.Model:
    """A model of its own that computes `result` from `inputs`; it outlives changes to the graph. Reads nothing."""
    copies = {value: ir.Value(name=value.name, shape=value.shape, type=value.type) for value in inputs}
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def copy(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        node = value.producer()
        if node is None:
            twin = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
            initializers.append(twin)
            copies[value] = twin
            return twin
        operands = [None if operand is None else copy(operand) for operand in node.inputs]
        twins = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
        nodes.append(ir.Node(node.domain, node.op_type, operands, node.attributes.values(), outputs=twins))
        copies.update(zip(node.outputs, twins, strict=True))
        return copies[value]

    outputs = [copy(result)]
    imports = {"": OPSET, DOMAIN: VERSION}
    graph = ir.Graph(
        [copies[v] for v in inputs], outputs, nodes=nodes, initializers=initializers, opset_imports=imports, name="part"
    )
    return ir.Model(graph, ir_version=10)
