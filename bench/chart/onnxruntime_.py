"""ONNX Runtime beside llmc, with the same weights in float32: its CPU provider multiplies no bfloat16.

The model is the graph that llmc starts from, one Attention node a layer, given keys and values of the past as inputs
and their extensions as outputs, which stay ONNX Runtime's own from step to step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from llmc.bench.chart.request import files_folder
from llmc.bench.peers.protocol import Loading, Refusal, serve, timed
from llmc.compiler.frontend import load_source

KINDS = ("key", "value")
Caches = dict[str, Any]
"""OrtValues float32 [batch, heads, tokens, head_dim] by input name."""


class OnnxRuntime:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        """Nothing to keep: the graph is written when the model is loaded, and removed again."""

    def load(self, loading: Loading) -> str:
        if loading.device != "cpu":
            raise Refusal("only its CPU provider is measured")
        source = load_source(str(loading.path), weights=loading.weights, dtype=loading.precision, seed=loading.seed)
        self.shapes = with_past(source.graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = loading.threads
        options.inter_op_num_threads = 1
        files_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=files_folder()) as folder:
            file = Path(folder) / "model.onnx"
            ir.save(source.graph, file, external_data="model.data", size_threshold_bytes=1 << 10)
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.original: dict[str, np.ndarray[Any, Any]] = {}
        return f"ONNX Runtime {ort.__version__}"

    def prefill(self, prompt: list[int]) -> float:
        caches = self.empty(1)
        return timed(lambda: self.step(np.array([prompt]), 0, caches))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        raise Refusal("llmc bench asks ONNX Runtime for repeated contexts")

    def repeated(self, prompt: list[int], batch: int, context: int, steps: int) -> list[float]:
        if not self.original:
            caches = self.empty(1)
            self.step(np.array([prompt]), 0, caches)
            self.original = {name: value.numpy() for name, value in caches.items()}
        caches = {name: as_value(repeat(array, batch, context)) for name, array in self.original.items()}
        self.token = self.step(np.array([prompt[:1]] * batch), context, caches)
        return [timed(lambda at=at: self.advance(context + at, caches)) for at in range(1, steps + 1)]  # type: ignore[misc]

    def advance(self, position: int, caches: Caches) -> None:
        self.token = self.step(self.token, position, caches)

    def step(self, ids: np.ndarray[Any, Any], position: int, caches: Caches) -> np.ndarray[Any, Any]:
        """[batch, n] token ids, the first at `position` -> [batch, 1] the next ones; the caches grow by n."""
        binding = self.session.io_binding()
        positions = np.broadcast_to(np.arange(position, position + ids.shape[1]), ids.shape)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()
        caches.update(zip(caches, grown, strict=True))
        chosen: np.ndarray[Any, Any] = logits.numpy()[:, -1:].argmax(-1)
        return chosen

    def empty(self, batch: int) -> Caches:
        return {
            name: as_value(np.zeros((batch, heads, 0, size), np.float32)) for name, (heads, size) in self.shapes.items()
        }


def with_past(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Give every Attention a past to read and to extend.  -> (heads, head_dim) of each new input.  In place."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer, node in enumerate([node for node in model.graph if node.op_type == "Attention"]):
        pasts = [past(f"past_{kind}.{layer}", value) for kind, value in zip(KINDS, node.inputs[1:3], strict=True)]
        inputs = [*node.inputs[:3], None, *pasts]
        extended = ir.Node("", "Attention", inputs, node.attributes.values(), num_outputs=3, version=node.version)
        result, *presents = extended.outputs
        for kind, value in zip(KINDS, presents, strict=True):
            value.name, value.type = f"present_{kind}.{layer}", ir.TensorType(ir.DataType.FLOAT)
        old = node.outputs[0]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [extended], [old], [result])
        model.graph.inputs.extend(pasts)
        model.graph.outputs.extend(presents)
        shapes |= {str(value.name): (int(str(value.shape[1])), int(str(value.shape[3]))) for value in pasts}  # type: ignore[index]
    return shapes


def past(name: str, like: ir.Value | None) -> ir.Value:
    """An input for the keys or values before `like`, [batch, heads, tokens, head_dim]."""
    assert like is not None
    assert like.shape is not None
    dims = [ir.SymbolicDim("batch"), like.shape[1], ir.SymbolicDim("past"), like.shape[3]]
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))


def repeat(array: np.ndarray[Any, Any], batch: int, context: int) -> np.ndarray[Any, Any]:
    """[1, heads, n, d] -> [batch, heads, context, d]: the first tokens over and over."""
    tiled = np.tile(array, (batch, 1, -(-context // array.shape[2]), 1))
    return np.ascontiguousarray(tiled[:, :, :context])


def as_value(array: np.ndarray[Any, Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)


if __name__ == "__main__":
    serve(OnnxRuntime())
