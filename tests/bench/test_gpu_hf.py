"""What the kit measures beside llmc: every way to run transformers takes the same steps, and the step that is recorded
as a CUDA graph waits for nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.bench.gpu import fill, hf
from llmc.bench.gpu.bits import values_of
from tests.bench.fake_gpu import LLAMA, OPT

SETTINGS = {"read": 24, "first": 1, "steps": 6, "eager_steps": 4, "prompts": 2}
WAITS = ("aten::item", "_local_scalar_dense", "nonzero", "masked_select")
"""Operators whose result the CPU must see."""


class Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the names of operators that a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in WAITS):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=[LLAMA, OPT], ids=["llama", "opt"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> hf.HuggingFace:
    config, root = request.param, tmp_path_factory.mktemp("kit")
    folder = root / "models" / "tiny"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    names = {name: name for name, _ in network.named_parameters()}
    said = {"config": config, "dtype": "bf16", "std": 0.3, "seed": 0, "names": names, "n_vocab": 160, "n_context": 192}
    (folder / "model.json").write_text(json.dumps(said))
    kit: Any = SimpleNamespace(folder=root, said={"settings": SETTINGS})
    return hf.HuggingFace(kit, "tiny")


def test_weights_drawn_on_the_device_are_those_that_llmc_draws(subject: hf.HuggingFace) -> None:
    for name, parameter in subject.network.named_parameters():
        expected = fill.draw(name, tuple(parameter.shape), "bf16", 0.3, 0)
        np.testing.assert_array_equal(parameter.float().numpy(), values_of(expected, "bf16"))


@torch.inference_mode()
def tokens_of(subject: hf.HuggingFace, system: str, context: int) -> list[list[int]]:
    """The tokens of six steps of two sequences."""
    with subject.steps(2, context, context + 6, system) as step:
        return [step()[:, 0].tolist() for _ in range(6)]


@pytest.mark.parametrize("context", [20, 60])
def test_every_system_takes_the_same_steps(subject: hf.HuggingFace, context: int) -> None:
    expected = tokens_of(subject, "hf", context)
    assert len({tuple(step) for step in expected}) > 2
    for system in ("hf-graph", "hf-flash"):
        assert tokens_of(subject, system, context) == expected


@torch.inference_mode()
def test_a_step_that_is_recorded_waits_for_nothing(subject: hf.HuggingFace) -> None:
    with subject.steps(2, 20, 30, "hf-graph") as step, Waiting() as waiting:
        step()
    assert waiting.found == []
    with Waiting() as waiting:
        torch.ones(1).item()
    assert waiting.found


def test_times_are_of_the_steps_that_count(subject: hf.HuggingFace) -> None:
    assert len(subject.decode(2, 40, "hf-graph")) == SETTINGS["steps"]
    assert len(subject.decode(1, 40, "hf")) == SETTINGS["eager_steps"]
    assert len(subject.prefill(30)) == SETTINGS["prompts"] - 1


def test_logits_in_float32_are_of_the_same_weights(subject: hf.HuggingFace) -> None:
    own, exact = (make([5, 9, 11, 7]) for make in (subject.logits, subject.exact_logits))
    assert own.shape == exact.shape == (4, 160)
    assert np.abs(own - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(own - exact).max() > 0
