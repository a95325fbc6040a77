"""What bench/perplexity.py makes of a record that has more sequences than are asked for, in another order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llmc.bench.perplexity import measured, table

SEQUENCES = [[1, 2, 3], [3, 1, 0], [2, 2, 1]]


def speaker(scale: float) -> SimpleNamespace:
    def logits(tokens: list[int]) -> np.ndarray[Any, Any]:
        return np.outer(np.arange(1, len(tokens) + 1), [1.0, 0.5, tokens[0], -1.0]).astype(np.float32) * scale

    return SimpleNamespace(logits=logits)


def test_a_change_is_of_the_same_sequences(tmp_path: Path) -> None:
    exact, same = Path("exact.so"), Path("same.so")
    record = tmp_path / "record.json"
    measured({exact: speaker(1)}, SEQUENCES, record)
    found = measured({exact: speaker(1), same: speaker(1)}, SEQUENCES[::-1][:2], record)
    assert [len(of_one) for of_one in found.values()] == [2, 2]
    *_, line = table(found, {"exact": 0, "same": 0})
    assert "| +0.00% ± 0.00% | 0.00000 |" in line
