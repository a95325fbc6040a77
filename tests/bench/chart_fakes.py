"""Systems that are scripts, for `llmc bench`: they answer like the real ones and write down what they were asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.chart import baselines, measure, subjects
from llmc.bench.chart.record import Panel
from llmc.bench.chart.request import Request
from llmc.bench.chart.subjects import Subject
from llmc.bench.peers.process import PeerProcess
from llmc.bench.peers.quiet import Neighbours

ROOT = Path(__file__).parents[2]

FAKE = """
import os, signal, sys
from llmc.bench.peers.protocol import Refusal, serve

NAME, HOW, DIARY = sys.argv[1:]
SPEED = {"llmc": 0.25, "hf": 1.0}.get(NAME, 0.5)

class Fake:
    def load(self, loading):
        self.note(f"load {loading.precision} {loading.weights}")
        if HOW == "refuses to load":
            raise Refusal("not today")
        return f"{NAME} 1.0"

    def prefill(self, prompt):
        self.note(f"prefill {len(prompt)}")
        return 2.0 * SPEED

    def repeated(self, prompt, batch, context, steps):
        self.note(f"decode {batch}x{context + steps + 1}")
        if HOW == "is killed" and steps > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return [SPEED] * steps

    def hold(self, prompt, batch, context):
        self.note(f"hold {batch}x{context + 5}")

    def step(self):
        self.note("step")
        return [SPEED]

    def note(self, what):
        with open(DIARY, "a") as diary:
            diary.write(f"{NAME} {what}\\n")

serve(Fake())
"""

MANIFEST: dict[str, Any] = {
    "llmc": "0.1.0",
    "created": "2026-01-01T00:00:00+00:00",
    "artifact_bytes": 3_000_000,
    "model": {
        "name": "small",
        "type": "llama",
        "weights": "random",
        "dtype": "bf16",
        "n_layers": 2,
        "n_context": 4096,
        "n_vocab": 1000,
        "config": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
            "max_position_embeddings": 64,
        },
    },
    "quant": None,
    "target": {"name": "cpu:x86-64-v4+bf16"},
    "kv_cache": {"dtype": "bf16", "page_tokens": 64, "bytes_per_token": 256},
    "memory": {"weight_bytes": 2_000_000, "arena_bytes": 1000, "scratch_bytes_per_thread": 0},
    "weights": [{"name": "w", "layout": "panels", "bytes": 2_000_000, "offset": 0}],
}


class Fakes:
    """How each fake behaves ("works" when not named), and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.behaviour = folder, dict[str, str]()
        self.diary = folder / "diary"
        self.artifact = folder / "small.so"
        self.artifact.touch()
        (folder / "fake.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FAKE}")

    def launch(self, name: str, subject: Subject) -> PeerProcess:
        command = [sys.executable, str(self.folder / "fake.py"), name, self.behaviour.get(name, "works")]
        return PeerProcess([*command, str(self.diary)], self.folder / f"{name}.log", ROOT)

    def subjects(self, model: str, request: Request, progress: object) -> list[Subject]:
        panel: Panel = subjects.panel_of(model, MANIFEST, 64, request, "random")
        return [Subject(self.artifact, MANIFEST, str(self.folder), "random", request.lengths, panel)]

    def lines(self) -> list[str]:
        """What was asked, and forget it."""
        said = self.diary.read_text().splitlines() if self.diary.exists() else []
        self.diary.unlink(missing_ok=True)
        return said


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(baselines, "launch", made.launch)
    monkeypatch.setattr("llmc.bench.chart.run.subjects", made.subjects)
    monkeypatch.setattr(measure, "reader", lambda: lambda threads, n_bytes: n_bytes / 20e9)
    monkeypatch.setattr(measure, "arithmetic_peak", lambda threads, kind: 1e12)
    monkeypatch.setattr(measure, "memory_available", lambda device: 8 << 30)
    monkeypatch.setattr(Neighbours, "cores", lambda self: 0.0)
    return made
