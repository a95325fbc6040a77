"""What an .onnx file says, by ONNX Runtime: the judge of an artifact that was compiled from one.

A file in float32 is run as it is.  Of one in float16 or bfloat16 the same graph is run in float32, with its weights as
they are kept.  What such a model would say in 16 bits is worked out by rounding what its operators give: products,
sums, activations and norms, but not the statistics within a norm, which models keep in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from llmc.compiler.frontend.onnx_file import OnnxFile, activations, open_onnx
from llmc.compiler.graph import number
from llmc.compiler.weights import Weight

Logits = np.ndarray[Any, np.dtype[np.float32]]
ROUNDED_TO = {"bf16": ir.DataType.BFLOAT16, "f16": ir.DataType.FLOAT16}
ROUNDED = frozenset(
    (
        *("Add", "Attention", "Div", "Erf", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Neg"),
        *("BiasGelu", "FastGelu", "FusedGemm", "FusedMatMul", "GroupQueryAttention", "MultiHeadAttention"),
        *("QuickGelu", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
        *("RMSNormalization", "Relu", "RotaryEmbedding", "Sigmoid", "Softmax", "Sub", "Tanh"),
    )
)
"""Operators whose results a model in 16 bits rounds."""
TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(float)": np.float32}


def file_logits(file: OnnxFile, prompts: Sequence[Sequence[int]], dtype: str = "f32") -> list[Logits]:
    """The logits at every position of each prompt, float32 [n_tokens, n_vocab], computed in `dtype`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if dtype == "f32" and file.is_float32:
        session = ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    else:
        session = widened_session(open_onnx(file.path).graph, dtype, options)
    return [session.run(["logits"], feeds(session, prompt))[0][0] for prompt in prompts]


def widened_session(model: ir.Model, dtype: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """The graph in float32, its results rounded to `dtype`; its weights are held in memory."""
    if dtype != "f32":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # a cast and back is meant here
        round_results(model.graph, ROUNDED_TO[dtype])
    names, values = [], []
    for name, value in model.graph.initializers.items():
        if isinstance(weight := value.const_value, Weight):
            array = (weight.stored_as(dtype) if dtype in ROUNDED_TO else weight).numpy()  # type: ignore[arg-type]
            names.append(name)
            values.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
            shape = ir.Shape(array.shape)
            value.const_value = ir.ExternalTensor("", 0, array.nbytes, ir.DataType.FLOAT, shape=shape, name=name)
    options.add_external_initializers(names, values)
    data: bytes = ir.to_proto(model).SerializeToString()  # type: ignore[no-untyped-call]
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def round_results(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Put a cast to `dtype` and back behind every operator that rounds in a model of this type."""
    acts = activations(graph)
    for node in list(graph):
        result = node.outputs[0]
        statistic = node.op_type in ("Add", "Div") and any(number(value) is not None for value in node.inputs)
        if result not in acts or node.op_type not in ROUNDED or statistic or result.is_graph_output():
            continue
        narrow = ir.node("Cast", [result], {"to": int(dtype)})
        wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        result.replace_all_uses_with(wide.outputs[0])
        narrow.replace_input_with(0, result)
        graph.insert_after(node, [narrow, wide])


def feeds(session: ort.InferenceSession, prompt: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """One sequence that begins: nothing masked, nothing cached."""
    given: dict[str, np.ndarray[Any, Any]] = {}
    for value in session.get_inputs():
        dtype = TYPES.get(value.type, np.float32)
        if value.name == "input_ids":
            given[value.name] = np.array([list(prompt)], dtype)
        elif value.name == "attention_mask":
            given[value.name] = np.ones((1, len(prompt)), dtype)
        elif value.name in ("position_ids", "cache_position"):
            positions: np.ndarray[Any, Any] = np.arange(len(prompt), dtype=dtype)
            given[value.name] = positions if len(value.shape) == 1 else positions[None]
        else:  # keys or values of no token, as passes/drop_cache.py sees them
            given[value.name] = np.zeros(
                [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], dtype
            )
    return given
