"""Layers with a state that do not become nodes are refused."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import Qwen3_5TextConfig

from llmc.compiler.frontend.export import states
from llmc.runtime.errors import LlmcError

CONFIG = Qwen3_5TextConfig(num_hidden_layers=4)
X = torch.zeros(1, 2, 2, 4)


class FakeModel:
    """A model whose module has functions of transformers' names."""

    config = CONFIG


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = ModuleType("a_models_module")
    made.torch_chunk_gated_delta_rule = made.causal_conv1d_fn = made.other = "its own"
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(FakeModel, "__module__", made.__name__)
    return made


def test_the_modules_own_functions_are_back_afterwards(module: Any) -> None:
    with states.as_nodes(FakeModel()):
        assert callable(module.causal_conv1d_fn)
        assert module.other == "its own"
    assert module.causal_conv1d_fn == module.torch_chunk_gated_delta_rule == "its own"
    assert not hasattr(module, "mamba2_chunk_scan")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "its delta rule takes queries and keys that are not normalised"),
        ({"use_qk_l2norm_in_kernel": True, "initial_state": X}, "its layers with a state take initial_state"),
    ],
)
def test_what_a_node_does_not_say_is_refused(module: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LlmcError, match=f"Qwen3_5ForCausalLM is not supported: {said}"), states.as_nodes(FakeModel()):
        module.torch_chunk_gated_delta_rule(X, X, X, X[..., 0], X[..., 0], **options)


@pytest.mark.parametrize(
    ("lacking", "options", "said"),
    [
        ("z", {}, "its selective scan has no gate"),
        ("delta_softplus", {}, "its selective scan has no softplus of its steps"),
        ("", {"return_last_state": True}, "its selective scan gives its last state"),
    ],
)
def test_a_scan_that_is_not_the_nodes_is_refused(module: Any, lacking: str, options: dict[str, Any], said: str) -> None:
    module.mamba_selective_scan = "its own"
    x, state, vector = torch.zeros(1, 4, 2), torch.zeros(1, 3, 2), torch.zeros(4)
    known = {"D": vector, "z": x, "delta_bias": vector, "delta_softplus": True, **options}
    known.pop(lacking, None)
    with pytest.raises(LlmcError, match=f"Qwen3_5ForCausalLM is not supported: {said}"), states.as_nodes(FakeModel()):
        module.mamba_selective_scan(x, x, torch.zeros(4, 3), state, state, **known)


def test_layers_that_did_not_become_nodes_are_counted() -> None:
    kinds = ["linear_attention", "linear_attention", "mlp", "hybrid", "full_attention"]
    nodes = [ir.Node("llmc", "GatedDeltaRule", [], num_outputs=1) for _ in range(3)]
    whole = ir.Graph([], [], nodes=nodes, opset_imports={"llmc": 1})
    assert states.count_without_attention(CONFIG, kinds, whole) == 3
    whole.remove(nodes[0])
    with pytest.raises(LlmcError, match="2 of its 3 layers with a state go through transformers' functions for them"):
        states.count_without_attention(CONFIG, kinds, whole)
