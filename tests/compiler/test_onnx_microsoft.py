"""Files with operators of ONNX Runtime, as the builder of onnxruntime-genai writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.compiler import graph
from llmc.compiler.certificate.reference_onnx import file_logits
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.onnx_file import open_onnx
from llmc.compiler.rewrite import rewrite
from llmc.runtime.errors import LlmcError
from tests.compiler.test_onnx_file import serialised

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE, INNER, LENGTH, LAYERS = 23, 64, 4, 2, 16, 96, 12, 2
FLOAT, INT32, INT64, MS = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, "com.microsoft"
KV = KV_HEADS * SIZE
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, LENGTH)


class Builder:
    """A decoder: inputs input_ids, attention_mask, past keys and values.  packed: one weight for q, k and v."""

    def __init__(self, *, packed: bool, window: int, gelu: str, dtype: type = np.float32, split: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.random, self.dtype, self.kv_heads = np.random.default_rng(0), dtype, HEADS if split else KV_HEADS
        self.shapes: list[onnx.ValueInfoProto] = []
        self.type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        angles = np.arange(64)[:, None] * 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
        self.constant("cos_cache", np.cos(angles).astype(dtype))
        self.constant("sin_cache", np.sin(angles).astype(dtype))
        self.lengths()
        x = self.node("Gather", [self.weight("embed", VOCABULARY, WIDTH), "input_ids"])
        normed = self.node("SimplifiedLayerNormalization", [x, self.scale()], epsilon=1e-5, axis=-1, stash_type=1)
        for layer in range(LAYERS):
            turned = (
                self.many_heads(normed, layer) if split else self.attention(normed, layer, packed=packed, window=window)
            )
            x, normed = self.sum_and_norm(x, turned)
            inner = self.node("MatMul", [normed, self.weight(f"up.{layer}", WIDTH, INNER)])
            bias = [self.weight(f"b.{layer}", INNER)] if gelu == "BiasGelu" else []
            inner = self.node(gelu, [inner, *bias], domain=MS)
            fed = self.node("MatMul", [inner, self.weight(f"down.{layer}", INNER, WIDTH)])
            x, normed = self.sum_and_norm(x, fed)
        self.node("MatMul", [normed, self.weight("head", WIDTH, VOCABULARY)], names=["logits"])

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.normal(0, shape[0] ** -0.5, shape).astype(self.dtype))

    def scale(self) -> str:
        return self.constant(f"norm.{len(self.tensors)}", self.random.normal(1, 0.1, WIDTH).astype(self.dtype))

    def node(self, op: str, inputs: list[str], names: list[str] | None = None, **attributes: Any) -> str:
        names = names or [f"{op}.{len(self.nodes)}"]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0]

    def lengths(self) -> None:
        summed = self.node("ReduceSum", ["attention_mask", self.constant("one", np.array([1]))], keepdims=0)
        self.node("Cast", [self.node("Sub", [summed, "one"])], ["seqlens_k"], to=INT32)
        total = self.node("Gather", [self.node("Shape", ["attention_mask"]), self.constant("axis", np.array(1))])
        self.node("Cast", [total], ["total_length"], to=INT32)

    def sum_and_norm(self, x: str, y: str) -> tuple[str, str]:
        names = [f"normed.{len(self.nodes)}", "", "", f"sum.{len(self.nodes)}"]
        self.node("SkipSimplifiedLayerNormalization", [x, y, self.scale()], names, domain=MS, epsilon=1e-5)
        return names[3], names[0]

    def attention(self, x: str, layer: int, *, packed: bool, window: int) -> str:
        if packed:
            qkv = [self.node("MatMul", [x, self.weight(f"qkv.{layer}", WIDTH, WIDTH + 2 * KV)]), "", ""]
        else:
            qkv = [self.node("MatMul", [x, self.weight(f"{name}.{layer}", WIDTH, n)])
                   for name, n in (("q", WIDTH), ("k", KV), ("v", KV))]  # fmt: skip
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [name.replace("past_key_values", "present") for name in past]
        operands = [*qkv, *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"]
        y = self.node("GroupQueryAttention", operands, [f"attended.{layer}", *present], domain=MS, do_rotary=1,
                      num_heads=HEADS, kv_num_heads=KV_HEADS, local_window_size=window)  # fmt: skip
        return self.node("MatMul", [y, self.weight(f"o.{layer}", WIDTH, WIDTH)])

    def many_heads(self, x: str, layer: int) -> str:
        """RotaryEmbedding by itself, and MultiHeadAttention."""
        operands = []
        for name in "qkv":
            y = self.node("MatMul", [x, self.weight(f"{name}.{layer}", WIDTH, WIDTH)])
            self.shapes.append(helper.make_tensor_value_info(y, self.type, ["B", "S", WIDTH]))
            tables = ["position_ids", "cos_cache", "sin_cache"]
            operands.append(self.node("RotaryEmbedding", [y, *tables], domain=MS) if name != "v" else y)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [name.replace("past_key_values", "present") for name in past]
        y = self.node("MultiHeadAttention", [*operands, "", "", "", *past], [f"attended.{layer}", *present], domain=MS,
                      num_heads=HEADS, unidirectional=1)  # fmt: skip
        return self.node("MatMul", [y, self.weight(f"o.{layer}", WIDTH, WIDTH)])

    def model(self) -> onnx.ModelProto:
        def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        caches = [(layer, kind) for layer in range(LAYERS) for kind in ("key", "value")]
        inputs = [value("input_ids", INT64, "B", "S"), value("attention_mask", INT64, "B", "T")]
        inputs += [value("position_ids", INT64, "B", "S")] if self.shapes else []
        inputs += [value(f"past_key_values.{i}.{kind}", self.type, "B", self.kv_heads, "P", SIZE) for i, kind in caches]
        outputs = [value("logits", self.type, "B", "S", VOCABULARY)]
        outputs += [value(f"present.{i}.{kind}", self.type, "B", self.kv_heads, "T", SIZE) for i, kind in caches]
        whole = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.tensors, value_info=self.shapes)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        return helper.make_model(whole, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    "said",
    [
        {"packed": True, "window": -1, "gelu": "FastGelu"},
        {"packed": False, "window": 5, "gelu": "BiasGelu"},
        {"packed": True, "window": -1, "gelu": "QuickGelu", "dtype": np.float16},
        {"packed": False, "window": -1, "gelu": "Gelu", "split": True},
    ],
    ids=["packed", "window", "float16", "many_heads"],
)
def test_a_file_of_the_builder_means_what_onnx_runtime_says(tmp_path: Path, said: dict[str, Any]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(serialised(Builder(**said).model()))
    step, _ = rewrite(load_source(str(path), dtype="f32", max_sequence=32), None, None)
    graph.check_step_graph(step)
    ops = graph.count_ops(step)
    assert (ops["llmc.RotaryPagedAttention"], ops["llmc.AddRMSNorm"]) == (LAYERS, 2 * LAYERS)
    shapes = {str(v.name): s for v, s in graph.bind(step, {"M": 1, "R": 1, "P": 1, "n_pages": 1}).items()}
    places = np.arange(LENGTH)
    feeds = {"tokens": TOKENS, "positions": places, "rows": places, "page_table": np.zeros((LENGTH, 1), np.int64)}
    caches = [str(value.name) for value in step.graph.inputs if "_cache." in str(value.name)]
    feeds |= {name: np.zeros(shapes[name], np.float32) for name in caches}
    wanted = file_logits(open_onnx(path), [TOKENS.tolist()])[0]
    np.testing.assert_allclose(graph.evaluate(step, feeds)["logits"], wanted, atol=2e-5 * float(np.ptp(wanted)))


def test_a_quantised_product_is_refused_by_name(tmp_path: Path) -> None:
    model = Builder(packed=True, window=-1, gelu="Gelu").model()
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "MatMulNBits", MS
    (tmp_path / "model.onnx").write_bytes(serialised(model))
    with pytest.raises(LlmcError, match=r"com.microsoft.MatMulNBits is none of standard ONNX"):
        load_source(str(tmp_path / "model.onnx"), max_sequence=32)
