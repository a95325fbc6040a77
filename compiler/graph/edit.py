"""Changes of a graph, in place: nodes and constants put in, values replaced, what nothing uses removed; and names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.shapes import infer
from llmc.compiler.ops import DOMAIN, VERSION
from llmc.compiler.weights import Weight


def clone(model: ir.Model) -> ir.Model:
    """A copy whose nodes and values may be changed; weights are shared."""
    return model.clone()


def emit(
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    *,
    n_results: int = 1,
    like: ir.Node | None = None,
    **attributes: Any,
) -> list[ir.Value]:
    """Insert a node in front of `before`; its results have shapes and types. `like` gives its metadata."""
    domain, _, op_type = op.rpartition(".")
    converted = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    node = ir.Node(domain, op_type, inputs, converted, num_outputs=n_results)
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    if domain == DOMAIN:
        graph.opset_imports.setdefault(DOMAIN, VERSION)
    infer(node)
    if like is not None:
        node.metadata_props.update(like.metadata_props)
    graph.insert_before(before, node)
    return list(node.outputs)


def add_constant(graph: ir.Graph, tensor: ir.TensorProtocol | np.ndarray[Any, Any], name: str) -> ir.Value:
    """The initializer that holds this tensor, registered now under this name unless it is there already.

    Another tensor may have the name, since an .onnx file names its own as it likes: then the name is varied.
    """
    tensor = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
    known = graph.initializers.get(name)
    while known is not None and not same_tensor(known.const_value, tensor):
        name = f"{name}.ours"
        known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor.name = name
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def same_tensor(a: ir.TensorProtocol | None, b: ir.TensorProtocol) -> bool:
    """Whether both hold the same numbers.  Weights are not read: they do if they are made of the same weights in the
    same way."""
    if a is b:
        return True
    if a is None or (a.dtype, tuple(a.shape)) != (b.dtype, tuple(b.shape)):
        return False
    if isinstance(a, Weight) or isinstance(b, Weight):
        return isinstance(a, Weight) and isinstance(b, Weight) and a.made_of == b.made_of != ()
    return a.tobytes() == b.tobytes()


def ints_constant(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """A constant vector of int64: axes, a shape, sizes. Equal ones are shared."""
    name = f"ints.{'_'.join(map(str, numbers))}".replace("-", "m")
    return add_constant(graph, np.array(numbers, dtype=np.int64), name)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take every use of `old`, as a result of the graph too, and prune what that leaves unused."""
    node = old.producer()
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if node is not None:
        prune([node])


def prune(nodes: Iterable[ir.Node]) -> int:
    """Remove those of these nodes that nothing uses, then what only they used. Returns their number."""
    n_removed, queue = 0, list(nodes)
    while queue:
        node = queue.pop()
        graph = node.graph
        if graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        n_removed += 1
        for value in inputs:
            maker = value.producer()
            if maker is not None:
                queue.append(maker)
            elif value.is_initializer() and not value.uses() and isinstance(graph, ir.Graph):
                graph.initializers.pop(str(value.name), None)
    return n_removed


# -- names ---------------------------------------------------------------------------------------------------------


def family_name(names: Sequence[str]) -> str:
    """One name for weights that are joined: "mlp.gate.weight" and "mlp.up.weight" are "mlp.{gate,up}.weight"."""
    prefix = shared_start(names)
    suffix = shared_start([name[len(prefix) :][::-1] for name in names])[::-1]
    middles = [name[len(prefix) : len(name) - len(suffix)] for name in names]
    return f"{prefix}{{{','.join(middles)}}}{suffix}"


def shared_start(names: Sequence[str]) -> str:
    """The letters that all names begin with."""
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)


def unused_name(graph: ir.Graph, name: str) -> str:
    """This name, or one like it that no initializer has."""
    names = (name, *(f"{name}.{i}" for i in range(1, len(graph.initializers) + 2)))
    return next(candidate for candidate in names if candidate not in graph.initializers)


def number_values(graph: ir.Graph) -> None:
    """Name nodes and values in order, as `to_text` does; inputs, results and weights of the graph keep theirs."""
    for index, node in enumerate(graph):
        node.name = f"{index}.{node.op_type}"
    name_results(graph, "%")


def name_results(graph: ir.Graph, prefix: str) -> None:
    """Name what nodes make prefix0, prefix1, … in order, but for results of the graph; no input and no weight has
    such a name."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    results = [value for node in graph for value in node.outputs]
    for index, value in enumerate(results):
        if not value.is_graph_output() and value.name != "":  # which is a result that the node does not give
            name = f"{prefix}{index}"
            while name in taken:
                name += "_"
            value.name = name
