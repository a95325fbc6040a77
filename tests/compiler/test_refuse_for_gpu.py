"""What has kernels for CPUs alone is refused in one line."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from llmc.compiler.ops import DOMAIN
from llmc.compiler.refuse_for_gpu import LACKING, refuse_for_gpu
from llmc.runtime.errors import LlmcError


@pytest.mark.parametrize("op", LACKING)
def test_an_operator_without_kernels_is_refused_by_what_has_it(op: str) -> None:
    node = ir.Node(DOMAIN, op.removeprefix(f"{DOMAIN}."), [], num_outputs=1)
    model = ir.Model(ir.Graph([], [], nodes=[node], opset_imports={DOMAIN: 1}), ir_version=10)
    with pytest.raises(LlmcError, match="have no kernels for GPUs yet") as error:
        refuse_for_gpu(model)
    assert error.value.fact.startswith(LACKING[op])
