"""compiler/share_weights.py: programs for several targets over one weights section."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import artifact, driver
from llmc.compiler.driver import Part
from llmc.compiler.frontend import load_source
from llmc.compiler.plan import PlacedWeight, Program
from llmc.compiler.quantization import calibrate
from llmc.compiler.quantization.quantize import Quantized, QuantizedWeight, Scheme
from llmc.compiler.rewrite import rewrite_each
from llmc.compiler.share_weights import WEIGHTS, SharedWeights
from llmc.compiler.target import parse_targets
from llmc.compiler.weights import Weight

CUDA, BOTH, LEVELS = (
    "cuda:sm_90a,cuda:sm_80",
    "cuda:sm_90a,cuda:sm_80,cpu:x86-64-v4+bf16",
    "cpu:x86-64-v4,cpu:x86-64-v3",
)
Planned = tuple[list[Part], SharedWeights]
Plan = Callable[..., Planned]


@pytest.fixture
def plan(tiny_model: Callable[[str], Path]) -> Plan:
    """plan(targets, model, dtype, quant) -> the parts of an artifact that is not written."""

    def run(targets: str, model: str = "llama", dtype: str = "bf16", quant: str = "none") -> Planned:
        machines = parse_targets(targets)
        source = load_source(str(tiny_model(model)), "real", dtype)
        scheme = Scheme.parse(quant, None)
        graphs = rewrite_each(source, scheme, None, [machine.kind for machine in machines])
        return driver.plan_each(graphs, source, machines, (1,), dtype)

    return run


def packed(shared: SharedWeights) -> bytes:
    return b"".join(artifact.packed_weights(shared.placed, lambda done, total: None))


def contents(program: Program, section: bytes) -> dict[tuple[str, str], str]:
    """The hash of each constant, as it lies in the section where the program's calls read it."""

    def digest(weight: PlacedWeight) -> str:
        return hashlib.sha256(section[weight.offset : weight.offset + weight.n_bytes]).hexdigest()

    return {(str(weight.value.name), str(weight.layout)): digest(weight) for weight in program.weights}


@pytest.mark.parametrize("model", ["llama", "llama-tied", "opt"])
@pytest.mark.parametrize("quant", ["none", "int8", "fp8"])
def test_every_program_reads_what_it_would_read_alone(plan: Plan, model: str, quant: str) -> None:
    parts, shared = plan(BOTH, model, quant=quant)
    section = packed(shared)
    for part in parts:
        (alone,), own = plan(str(part.machine), model, quant=quant)
        assert contents(part.program, section) == contents(alone.program, packed(own))
        assert part.program.weight_bytes == alone.program.weight_bytes
        for plan_of_part, plan_alone in zip(part.program.plans, alone.program.plans, strict=True):
            for a, b in zip(plan_of_part.calls, plan_alone.calls, strict=True):
                assert [x.space for x in a.arguments] == [x.space for x in b.arguments]
                assert [x.n_bytes for x in a.arguments] == [x.n_bytes for x in b.arguments]


def test_one_target_is_written_as_ever(plan: Plan) -> None:
    (part,), shared = plan("cuda:sm_90a", "opt")
    assert shared.placed == part.program.weights
    assert shared.n_bytes == part.program.weight_bytes


def test_architectures_of_gpus_share_all_weights(plan: Plan) -> None:
    (one,), alone = plan("cuda:sm_90a")
    parts, shared = plan(CUDA)
    assert packed(shared) == packed(alone)
    assert set(shared.users) == {(0, 1)}
    assert parts[0].program.plans == one.program.plans


def test_a_cpu_adds_its_products_weights_and_no_more(plan: Plan) -> None:
    parts, shared = plan(BOTH)
    by_users = shared.bytes_by_users()
    assert set(by_users) == {(0, 1), (2,), (0, 1, 2)}
    common = {str(w.value.name) for w, users in zip(shared.placed, shared.users, strict=True) if len(users) == 3}
    assert "model.embed_tokens.weight" in common
    assert "model.layers.0.input_layernorm.weight" in common
    used = {placed.value.name for placed in parts[2].program.weights}
    assert len(used) == len(parts[2].program.weights)
    assert shared.n_bytes < parts[0].program.weight_bytes + parts[2].program.weight_bytes


def test_levels_of_cpus_share_weights_that_lie_alike(plan: Plan) -> None:
    _, shared = plan(LEVELS, dtype="bf16")
    assert (0, 1) in shared.bytes_by_users()


def test_weights_lie_apart_and_every_call_reads_one_of_them(plan: Plan) -> None:
    parts, shared = plan(f"{BOTH},{LEVELS}", dtype="f32")
    ends = [w.offset + w.n_bytes for w in shared.placed]
    assert all(end <= w.offset for end, w in zip(ends, shared.placed[1:], strict=False))
    assert ends[-1] <= shared.n_bytes
    for part in parts:
        places = {(weight.offset, weight.n_bytes) for weight in part.program.weights}
        calls = [call for step in part.program.plans for call in step.calls]
        read = {(a.offset, a.n_bytes) for call in calls for a in call.arguments if a.space == WEIGHTS}
        assert read == places


def test_a_weight_in_several_layouts_is_quantised_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised: list[str] = []
    quantize = QuantizedWeight.quantized

    def counting(self: QuantizedWeight) -> object:
        quantised.append(str(self.name))
        return quantize(self)

    _, shared = plan(BOTH, quant="int8")
    monkeypatch.setattr(QuantizedWeight, "quantized", counting)
    packed(shared)
    assert len(quantised) == len(set(quantised))
    assert len(quantised) == len({w.value.name for w in shared.placed if "int8" in str(w.value.name)}) > 0


def test_a_weight_in_several_layouts_is_fitted_once(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "ids.json"
    text.write_text(json.dumps([(7 * i) % 130 for i in range(300)]))
    source = load_source(str(tiny_model("llama")), "real", "bf16")
    scheme = calibrate.calibrated(Scheme.parse("int4"), text, source)
    machines, fitted = parse_targets(BOTH), []
    fit = calibrate.fitted

    def counting(weight: QuantizedWeight, inputs: Sequence[np.ndarray[Any, Any]]) -> Quantized:
        fitted.append(str(weight.name))
        return fit(weight, inputs)

    monkeypatch.setattr(calibrate, "fitted", counting)
    graphs = rewrite_each(source, scheme, None, [machine.kind for machine in machines])
    _, shared = driver.plan_each(graphs, source, machines, (1,), "bf16")
    packed(shared)
    assert len(fitted) == len(set(fitted)) == len({w.value.name for w in shared.placed if ".int" in str(w.value.name)})


def test_stages_of_each_kind_are_dumped_apart(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """What kinds have in common is in both folders; each is what one kind alone is dumped as."""
    for kinds, folder in ((["cuda", "cpu", "cuda"], tmp_path / "both"), (["cpu"], tmp_path / "cpu")):
        rewrite_each(load_source(str(tiny_model("llama"))), None, folder, kinds)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["cpu", "cuda"]
    alone = {path.name: path.read_text() for path in (tmp_path / "cpu").glob("*.txt")}
    assert alone == {path.name: path.read_text() for path in (tmp_path / "both" / "cpu").glob("*.txt")}
    assert len(alone) > 10
    assert list((tmp_path / "both" / "cuda").glob("*fuse_norm_linear.txt"))


def test_kernels_of_a_second_cpu_have_names_of_their_own(plan: Plan) -> None:
    (best, other, gpu), _ = plan("cpu:x86-64-v4+bf16,cpu:x86-64-v4,cuda:sm_90a", dtype="bf16")
    names = [{kernel.name for kernel in part.program.kernels} for part in (best, other, gpu)]
    assert not names[0] & names[1]
    assert all(name.endswith("_v4") for name in names[1])
    assert max(map(len, names[1])) < 100
    assert {c.implementation.launches[0].kernel.name for c in other.program.choices} <= names[1]


def test_a_constant_of_two_layouts_is_read_once() -> None:
    reads: list[str] = []

    class Layout:
        def n_bytes(self, shape: tuple[int, ...]) -> int:
            return 8

        def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return array

    def read() -> np.ndarray[Any, Any]:
        reads.append("w")
        return np.zeros(2, np.float32)

    value = ir.Value(name="w", const_value=Weight("w", (2,), read))
    placed = [PlacedWeight(value, Layout(), 0, 8), PlacedWeight(value, Layout(), 256, 8)]
    assert len(b"".join(artifact.packed_weights(placed, lambda done, total: None))) == 264
    assert reads == ["w"]
