"""Adapters of sequences on the emulated GPU: each says what the CPU's artifact says, and steps without one are those of
the model alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.compiler.driver import plan_each
from llmc.compiler.frontend import load_source
from llmc.compiler.plan import ADAPTED, JOINED, JOINED_ADAPTED, Program, StepPlan
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.rewrite import rewrite_each
from llmc.runtime.binding import Model
from tests.cuda.conftest import HOPPER, LLAMA, EmulatedGpu
from tests.families import ALL, save_adapter

PROMPT = [(7 * i * i + 3) % 160 for i in range(60)]
OPT = ("q_proj", "v_proj", "out_proj", "fc1", "fc2")
WANTED: dict[str, dict[str, tuple[int, Sequence[str]]]] = {
    "llama": {"sql": (3, ALL), "chat": (9, ("q_proj", "down_proj"))},
    "opt": {"sql": (8, OPT), "chat": (2, OPT)},
}
"""The adapters of each family: rank, and what each changes."""


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"dtype": "bf16", "quant": "fp8", "batch": (1, 20), "max_sequence": 64}),
        ("opt", {"dtype": "bf16", "batch": (1,), "max_sequence": 64}),
    ],
    ids=str,
)
def test_each_sequence_says_what_it_says_on_a_cpu(
    checkpoint: Callable[[str], Path],
    emulated_gpu: EmulatedGpu,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
) -> None:
    folder = checkpoint(family)
    adapters = [f"{name}={save_adapter(folder, tmp_path / name, *of)}" for name, of in WANTED[family].items()]
    llmc.compile(folder, out=tmp_path / "cpu.so", adapters=adapters, verify=False, **options)
    with llmc.load(tmp_path / "cpu.so", kv_tokens=1024) as model:
        wanted = {name: model.logits(PROMPT, name) for name in (None, *model.adapters)}
    emulated_gpu.compile(folder, tmp_path / "gpu.so", adapters=adapters, **options)
    with llmc.load(tmp_path / "gpu.so", kv_tokens=2048) as model:
        assert model.adapters == ("sql", "chat")
        error = 2e-4 if options["dtype"] == "f32" else 0.03
        for name, logits in wanted.items():
            found = model.logits(PROMPT, name)
            assert np.abs(found - logits).max() <= error * np.ptp(logits), name
            assert name is None or np.abs(found - wanted[None]).max() > 3 * error * np.ptp(logits)
        together(model, wanted, max(options["batch"]), error)
    assert emulated_gpu.complaints() == []


def together(model: Model, wanted: dict[str | None, Any], n: int, error: float) -> None:
    """Sequences of all adapters in one step, then their tokens one by one; and a text of one, ahead."""
    names = [[*wanted][i % len(wanted)] for i in range(n)]
    sequences = [model.sequence(name) for name in names]
    lengths = [5 + i % 7 for i in range(n)]
    model.step([(sequence, PROMPT[:length]) for sequence, length in zip(sequences, lengths, strict=True)])
    for turn in range(2):
        tokens = [[PROMPT[length + turn]] for length in lengths]
        model.step(list(zip(sequences, tokens, strict=True)))
    for sequence, name, length in zip(sequences, names, lengths, strict=True):
        logits = wanted[name]
        assert np.abs(sequence.logits() - logits[length + 1]).max() <= error * np.ptp(logits)
        sequence.close()
    text = PROMPT[:9]
    for token in model.tokens(PROMPT[:9], 4, ignore_eos=True, adapter="chat"):
        assert token == int(model.logits(text, "chat")[-1].argmax())
        text.append(token)


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_weights_lie_once_and_steps_without_an_adapter_are_the_models(
    checkpoint: Callable[[str], Path], tmp_path: Path, quant: str
) -> None:
    folder, scheme = checkpoint("llama"), Scheme.parse(quant)
    adapter = f"sql={save_adapter(folder, tmp_path / 'sql', 8, ALL)}"
    programs = []
    for adapters in ([], [adapter]):
        source = load_source(str(folder), dtype="bf16", adapters=adapters)
        graphs = rewrite_each(source, scheme, None, ["cuda"])
        (part,), shared = plan_each(graphs, source, [HOPPER], (1, 8), "bf16")
        programs.append((part.program, shared.n_bytes))
    (alone, alone_bytes), (both, both_bytes) = programs
    assert both_bytes - alone_bytes < 0.7 * alone_bytes, "adapters of rank 8 of a model of 128 columns"
    large = [str(placed.value.name) for placed in both.weights if placed.n_bytes > 1 << 12]
    assert len(large) == len(set(large))
    calls = {plan: names_of(program, plan) for program in (alone, both) for plan in program.plans}
    wanted = {(plan.kind, plan.n_rows): calls[plan] for plan in alone.plans}
    found = {(plan.kind, plan.n_rows): calls[plan] for plan in both.plans}
    assert {key: found[key] for key in wanted} == wanted
    assert {key[0] for key in found.keys() - wanted.keys()} == {ADAPTED, JOINED_ADAPTED}
    assert len(found[JOINED_ADAPTED, 1]) == len(wanted[JOINED, 1]) + 8 * LLAMA.num_hidden_layers


def names_of(program: Program, plan: StepPlan) -> list[str]:
    return [program.kernels[call.kernel].name for call in plan.calls]
