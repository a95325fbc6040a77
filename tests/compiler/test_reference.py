"""The reference says what transformers says, whether the model is in memory or read piece by piece."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.frontend import load_source
from tests.families import save

TinyModel = Callable[[str], Path]
PROMPTS = [[5, 17, 100, 2, 64], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
PRECISION = {"f32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 2e-2)}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "opt-350m", "gemma2"])
def test_logits_are_those_of_each_prompt_alone(family: str, dtype: str, tiny_model: TinyModel) -> None:
    torch_dtype, tolerance = PRECISION[dtype]
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch_dtype)
    for prompt, logits in zip(
        PROMPTS, reference_logits(load_source(str(tiny_model(family))), PROMPTS, dtype), strict=True
    ):
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([prompt])).logits[0].float().numpy()
        assert logits.dtype == np.float32
        assert logits.shape == (len(prompt), 131)
        assert np.abs(logits - alone).max() <= tolerance * np.ptp(alone)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt2"])
def test_a_model_read_piece_by_piece_says_the_same_bits(family: str, dtype: str, tiny_model: TinyModel) -> None:
    source = load_source(str(tiny_model(family)))
    whole = reference_logits(source, PROMPTS, dtype)
    pieces = reference_logits(source, PROMPTS, dtype, resident_bytes=0)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_random_weights_have_a_reference_too(tiny_model: TinyModel) -> None:
    source = load_source(str(tiny_model("llama")), weights="random")
    whole, pieces = (reference_logits(source, PROMPTS, resident_bytes=n) for n in (1 << 30, 0))
    np.testing.assert_array_equal(whole[0], pieces[0])
    (real,) = reference_logits(load_source(str(tiny_model("llama"))), PROMPTS[:1])
    assert not np.allclose(whole[0], real)


def test_onnx_runtime_keeps_what_it_sees_to_itself(tmp_path: Path) -> None:
    """Where it tells its makers of its use, it leaves a file among the temporary ones."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    code = "import llmc.compiler.graph.run, onnxruntime"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mamba", "jamba", "gemma3n_text"])
def test_modules_that_read_others_weights_find_them_piece_by_piece(family: str, tmp_path: Path) -> None:
    """Of a mixer's products, or of a module that runs by another name than forward."""
    source = load_source(str(save(family, tmp_path)))
    whole = reference_logits(source, PROMPTS)
    pieces = reference_logits(source, PROMPTS, resident_bytes=0)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.ptp(one))
