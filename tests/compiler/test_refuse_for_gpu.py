"""What GPUs have no kernels for is refused in one line, before anything is planned."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from llmc.compiler.ops import DOMAIN
from llmc.compiler.refuse_for_gpu import refuse_for_gpu
from llmc.runtime.errors import LlmcError

KINDS = {
    "layers that attend the keys and values of another have": ("RotaryAppendedAttention", 16, 16),
    "values that are normalised have": ("RMSNormValuesPagedAttention", 16, 16),
    "values of another size than keys have": ("SinkPagedAttention", 16, 8),
}


@pytest.mark.parametrize("said", KINDS)
def test_attention_that_gpus_have_no_kernels_for_is_refused(said: str) -> None:
    op, *sizes = KINDS[said]
    caches = [
        ir.Value(name=f"{kind}_cache.0", shape=ir.Shape(["n", 1, 64, size]))
        for kind, size in zip("kv", sizes, strict=True)
    ]
    node = ir.node(op, [ir.Value(name="x"), *caches], domain=DOMAIN)
    model = ir.Model(ir.Graph(caches, node.outputs, nodes=[node], opset_imports={DOMAIN: 1}), ir_version=10)
    with pytest.raises(LlmcError, match=f"{said} no kernels for GPUs yet") as error:
        refuse_for_gpu(model)
    assert error.value.place == "--target cuda"
