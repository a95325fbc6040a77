"""A whole model on the emulated GPU says what the CPU's artifact says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.compiler import driver
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import How
from llmc.schedules import records, switches
from llmc.schedules.cuda import deferred_norm
from tests.compiler.test_packed import in_gptq
from tests.cuda.conftest import BATCH, HOPPER, LLAMA, EmulatedGpu

PROMPTS = [[5 + i, 17, 3, 99 - i, 42, *range(20 + i, 20 + 9 * i)] for i in range(12)]
N_TOKENS = 6


@dataclass
class Decoded:
    """Greedy choices of n sequences in a batch, and how far ahead of the second best each was; [tokens, n]."""

    tokens: list[list[int]]
    leads: list[list[float]]


def decoded(model: Model, prompts: list[list[int]], text: Decoded | None = None, n_tokens: int = N_TOKENS) -> Decoded:
    """Prompts in one step, then token by token in one batch: the sequences' own choices, or those of `text`."""
    sequences = [model.sequence() for _ in prompts]
    model.step(list(zip(sequences, prompts, strict=True)))
    found = Decoded([], [])
    for turn in range(n_tokens):
        found.tokens.append([sequence.sample() for sequence in sequences])
        found.leads.append([float(np.diff(np.sort(sequence.logits())[-2:])[0]) for sequence in sequences])
        said = text.tokens[turn] if text else found.tokens[turn]
        model.step([(sequence, [token]) for sequence, token in zip(sequences, said, strict=True)])
    for sequence in sequences:
        sequence.close()
    return found


@pytest.mark.parametrize(
    ("family", "kv_dtype", "quant"),
    [
        ("llama", "bf16", "none"),
        ("opt", "bf16", "none"),
        ("llama", "int8", "none"),
        ("opt", "int8", "none"),
        ("llama", "bf16", "fp8"),
    ],
)
def test_greedy_tokens_are_the_cpus(
    family: str,
    kv_dtype: str,
    quant: str,
    checkpoint: Callable[[str], Path],
    emulated_gpu: EmulatedGpu,
    tmp_path: Path,
) -> None:
    """Where the two best are closer together than twice the error of bf16, either may win.  Beside an int8 cache it is
    larger: the GPU rounds queries and weights to 11 bits, the CPU to 15; and an element near the middle between two
    codes takes the one or the other."""
    folder, batch = checkpoint(family), BATCH if quant == "none" else (1, 8)
    options: dict[str, Any] = {"dtype": "bf16", "quant": quant, "kv_dtype": kv_dtype, "batch": batch}
    llmc.compile(folder, out=tmp_path / "cpu.so", verify=False, **options)
    with llmc.load(tmp_path / "cpu.so", kv_tokens=2048) as model:
        wanted = {n: decoded(model, PROMPTS[:n]) for n in batch}
        logits = model.logits(PROMPTS[7])
    emulated_gpu.compile(folder, tmp_path / "gpu.so", **options)
    n_ties = 0
    with llmc.load(tmp_path / "gpu.so", kv_tokens=2048) as model:
        error = np.abs(model.logits(PROMPTS[7]) - logits).max()
        assert error < {"bf16": 0.01, "int8": 0.025}[kv_dtype] * np.ptp(logits)
        for n in batch:
            n_ties += count_ties(decoded(model, PROMPTS[:n], wanted[n]), wanted[n], error)
        goes_on_from_a_file(model, tmp_path / "text.seq")
    assert n_ties <= sum(batch) * N_TOKENS / {"bf16": 36, "int8": 18}[kv_dtype]
    assert emulated_gpu.complaints() == []


def goes_on_from_a_file(model: Model, path: Path) -> None:
    """What was saved says the same bits as what was not."""
    with model.sequence() as sequence:
        sequence.feed(PROMPTS[7])
        sequence.save(path)
        with model.restore(path) as back:
            for token in (PROMPTS[7][-1], 3):
                assert back.logits().tobytes() == sequence.logits().tobytes()
                for one in (sequence, back):
                    one.feed([token])


def test_layers_that_differ_and_share_say_what_they_say_on_a_cpu(
    checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    """Typically: where two experts are equally good a position may take the other one."""
    options: dict[str, Any] = {"dtype": "bf16", "batch": (1,)}
    llmc.compile(checkpoint("gemma4"), out=tmp_path / "cpu.so", verify=False, **options)
    with llmc.load(tmp_path / "cpu.so") as model:
        logits = model.logits(PROMPTS[7])
    emulated_gpu.compile(checkpoint("gemma4"), tmp_path / "gpu.so", **options)
    with llmc.load(tmp_path / "gpu.so") as model:
        errors = np.abs(model.logits(PROMPTS[7]) - logits).max(1)
    assert np.median(errors) < 0.01 * np.ptp(logits)
    assert emulated_gpu.complaints() == []


def count_ties(found: Decoded, wanted: Decoded, error: float) -> int:
    """How many choices differ; fails when one does that was further ahead than twice the error."""
    n_ties = 0
    for turn, leads in enumerate(wanted.leads):
        for a, b, lead in zip(found.tokens[turn], wanted.tokens[turn], leads, strict=True):
            assert a == b or lead < 2 * error, f"batch {len(leads)}, token {turn}: {a}, not {b}, {lead:.3f} ahead"
            n_ties += a != b
    return n_ties


WIDE = frozenset(
    f"model.layers.{name}_proj.weight"
    for name in ("0.self_attn.q", "0.self_attn.k", "0.self_attn.v", "0.mlp.down", "1.mlp.gate", "1.mlp.up")
)


@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize(("quant", "wide"), [("int8", frozenset()), ("int4", frozenset()), ("int4", WIDE)])
def test_sequences_with_quantised_weights_say_what_float32_says_with_their_values(
    quant: str,
    wide: frozenset[str],
    n: int,
    checkpoint: Callable[[str], Path],
    emulated_gpu: EmulatedGpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference: a checkpoint whose weights are codes times scales, in float32 on the CPU.  (This model makes 4 %
    of bf16's roundings of x alone, and 10 % and more of the weights'.)  The head's norm is deferred to it, though it is
    in bf16, and of few tokens a GEMV has prepared it: here, as of wide models, also where they are narrow.  wide: what
    has 8 bits beside 4."""
    monkeypatch.setattr(deferred_norm, "WIDE", 64)
    scheme = Scheme.parse(quant)
    assert scheme
    monkeypatch.setattr(driver, "fitted_to", lambda _, asked, *how: (asked and replace(asked, wide=wide), []))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
    reference.save_pretrained(tmp_path / "rounded")
    reference = reference.float()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name.endswith("_proj.weight"):
                of_this = scheme.in_8_bits if name in wide else scheme
                weight.copy_(torch.from_numpy(quantize(weight.numpy(), of_this).values()))
    reference.save_pretrained(tmp_path / "values")
    prompts = [[3 + i, 90 - i, 42, 7 + 2 * i] for i in range(n)]
    llmc.compile(tmp_path / "values", out=tmp_path / "cpu.so", dtype="f32", batch=[n], verify=False)
    with llmc.load(tmp_path / "cpu.so", kv_tokens=2048) as model:
        wanted, logits = decoded(model, prompts, n_tokens=3), model.logits(PROMPTS[7])
    emulated_gpu.compile(tmp_path / "rounded", tmp_path / "gpu.so", dtype="bf16", quant=quant, batch=[n])
    with llmc.load(tmp_path / "gpu.so", kv_tokens=2048) as model:
        of_steps = {record["op"] for record in model.manifest["schedules"] if record["plan"] == "joined"}
        assert "llmc.DeferredRMSNormLinear" in of_steps
        error = np.abs(model.logits(PROMPTS[7]) - logits).max()
        assert error < 0.05 * np.ptp(logits)
        assert count_ties(decoded(model, prompts, wanted, n_tokens=3), wanted, error) <= 6 * n / 20
    assert emulated_gpu.complaints() == []


def test_a_checkpoint_whose_codes_have_zeros_keeps_its_numbers(
    checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    folder = in_gptq(checkpoint("llama"), tmp_path / "gptq", zeros=True)
    llmc.compile(folder, out=tmp_path / "cpu.so", dtype="f32", batch=[1], verify=False)
    with llmc.load(tmp_path / "cpu.so", kv_tokens=512) as model:
        wanted = model.logits(PROMPTS[7])
    emulated_gpu.compile(folder, tmp_path / "gpu.so", dtype="bf16", quant="int4", batch=[1])
    with llmc.load(tmp_path / "gpu.so", kv_tokens=512) as model:
        assert {"z4"} <= {weight["layout"][:2] for weight in model.manifest["weights"]}
        for prompt, logits in ((PROMPTS[7], wanted), (PROMPTS[7][:1], wanted[:1])):
            assert np.abs(model.logits(prompt) - logits).max() < 0.05 * np.ptp(wanted)
    assert emulated_gpu.complaints() == []


def test_running_ahead_says_the_same_to_the_bit(
    checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    """Greedy ones and drawn ones side by side; three sequences in a body of eight, too."""
    emulated_gpu.compile(checkpoint("llama"), tmp_path / "gpu.so", dtype="bf16", batch=(1, 8))
    with llmc.load(tmp_path / "gpu.so", kv_tokens=2048) as model:
        for hows in ([How()], [How(0.8, 20, 0.9, 5)], [How(), How(0.8, seed=3), How()]):
            sequences = [model.sequence() for _ in hows]
            model.step(list(zip(sequences, PROMPTS, strict=False)))
            others = [sequence.fork() for sequence in sequences]
            wanted = []
            for _ in range(3):
                wanted.append(model.sample(zip(others, hows, strict=True)))
                model.step([(other, [token]) for other, token in zip(others, wanted[-1], strict=True)])
            assert [model.advance(zip(sequences, hows, strict=True)) for _ in range(3)] == wanted
            for sequence, other in zip(sequences, others, strict=True):
                assert (sequence.logits() == other.logits()).all()
    assert emulated_gpu.complaints() == []


def one_layer(folder: Path, head_dim: int) -> Path:
    """A Llama of two heads that are as wide."""
    torch.manual_seed(2)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim}
    AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA.to_dict(), **sizes})).save_pretrained(folder)
    return folder


def test_heads_that_fill_no_power_of_two_run(emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    folder = one_layer(tmp_path / "model", 80)
    emulated_gpu.compile(folder, tmp_path / "gpu.so", dtype="bf16", batch=[1])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = reference(torch.tensor([PROMPTS[7]])).logits[0].detach().numpy()
    with llmc.load(tmp_path / "gpu.so", kv_tokens=512) as model:
        assert np.abs(model.logits(PROMPTS[7]) - wanted).max() < 0.03 * np.ptp(wanted)
    assert emulated_gpu.complaints() == []


def test_heads_too_wide_for_a_gpus_registers_are_refused(emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"takes heads of 16, 32 … 512 elements, not 528"):
        emulated_gpu.compile(one_layer(tmp_path / "model", 528), tmp_path / "gpu.so", dtype="bf16", batch=[1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_passes_that_are_switched_on_change_no_bit_or_round_elsewhere(
    checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's steps; those of few rows are as they were.  A product that appends gives the same to the bit; a norm
    that is deferred rounds before it divides."""
    folder, found = checkpoint("llama"), []
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    append, defer = switches.APPEND_IN_PRODUCT, switches.DEFER_NORM_IN_PROMPTS
    for names in ((), (append,), (append, defer)):
        on = [switches.toggled((), name, 65) for name in names]
        records.save(tmp_path / "tuned" / records.file_name(HOPPER), HOPPER, [], on)
        emulated_gpu.compile(folder, tmp_path / "gpu.so", dtype="bf16", batch=[1])
        prompt = [3 + i % 150 for i in range(150)]
        with llmc.load(tmp_path / "gpu.so", kv_tokens=512) as model:
            said = model.manifest["schedules"]
            found.append((model.logits(prompt), model.tokens(prompt[:130], 2)))
        prompts = {record["op"].removeprefix("llmc.") for record in said if record["m"] == 128}
        assert ("LinearResidualTileMoments" in prompts) == (defer in names)
        assert ("DeferredRMSNormGatedLinearSilu" in prompts) == (defer in names)
        assert {op for op in prompts if op.endswith("Append")} == APPENDING[names]
        assert not [r for r in said if r["m"] < 65 and r["op"].endswith(("Append", "TileMoments"))]
    plain, appended, both = found
    np.testing.assert_array_equal(appended[0], plain[0])
    assert appended[1] == plain[1]
    assert 0 < np.abs(both[0] - plain[0]).max() < 0.01 * np.ptp(plain[0])
    assert emulated_gpu.complaints() == []


APPENDING: dict[tuple[str, ...], set[str]] = {
    (): set(),
    (switches.APPEND_IN_PRODUCT,): {"RMSNormLinearRotaryAppend"},
    (switches.APPEND_IN_PRODUCT, switches.DEFER_NORM_IN_PROMPTS): {
        "RMSNormLinearRotaryAppend",  # the first layer's, behind no product
        "DeferredRMSNormLinearRotaryAppend",
    },
}
