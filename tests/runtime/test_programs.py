"""An artifact for several machines: which program is taken, what it reads of the weights, and what is refused."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.capi import Options
from llmc.runtime.errors import LlmcError
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_model
from tests.runtime.toy_cuda import CUBIN, FakeCuda, ToyCudaPlan

ABSENT = 1 << 31
"""A CPU feature that no machine has."""
IMAGES = fmt.pack_images([CUBIN, CUBIN])
SM_80 = 80
V3, V4 = sum(fmt.CPU_FEATURES[name] for name in list(fmt.CPU_FEATURES)[:6]), (1 << 11) - 1
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def codes(toy_so: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """Code with the kernels of one and of two programs for CPUs."""
    with ArtifactFile.open(toy_so) as file:
        return {1: file.section("code"), 2: toy.build_code(tmp_path_factory.mktemp("two"), n_programs=2)}


@pytest.fixture
def write(codes: dict[int, bytes], tmp_path: Path) -> Write:
    """write(plan, plan, …, n_cpus=1, **sections) -> an artifact with these programs over the toy's weights."""

    def run(*plans: bytes, n_cpus: int = 1, **changes: bytes) -> Path:
        sections = toy.toy_sections(codes[n_cpus])
        del sections["plan"]
        for i, plan in enumerate(plans):
            number = f".{i}" if i else ""
            sections[f"plan{number}"] = plan
            if fmt.PLAN_HEADER.size <= len(plan) and fmt.unpack_plan_header(plan).device:
                sections[f"cuda{number}"] = IMAGES
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
        path.write_bytes(toy.pack_sections({**sections, **changes}))
        return path

    return run


def refusal(path: Path, **options: Any) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        llmc.load(path, **options)
    return caught.value


def opened(path: Path, **options: Any) -> tuple[int, str]:
    """Which program was opened, and on what; it computes what the toy does."""
    with llmc.load(path, **options) as model:
        assert model.logits([3, 5]).tolist() == toy.oracle([3, 5])
        return model.info.program, model.info.device


# -- which one ----------------------------------------------------------------------------------------------------


def test_the_first_program_that_runs_here_is_taken(
    cuda: FakeCuda, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ToyCudaPlan().pack(), ToyCudaPlan().pack(cuda_arch=SM_80), toy.ToyPlan().pack())
    with ArtifactFile.open(path) as file:
        assert [file.plan(i).header.device for i in range(file.n_programs)] == [1, 1, 0]
    for capability, program in ((90, 0), (80, 1), (86, 1)):
        cuda.set(capability=capability)
        assert opened(path) == (program, "Fake GPU 0")
    cuda.set(capability=100)
    assert opened(path) == (2, "CPU")
    cuda.set(fail="cuMemAlloc:1:2")  # no reason to pass over a program, but to say so
    assert "taking memory for the weights failed" in refusal(path).fact
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    assert opened(path) == (2, "CPU")


def test_the_order_of_programs_is_that_of_preference(cuda: FakeCuda, write: Write) -> None:
    assert opened(write(toy.ToyPlan().pack(), ToyCudaPlan().pack())) == (0, "CPU")


def test_of_two_programs_for_cpus_the_first_that_runs_here_is_taken(write: Write) -> None:
    good, absent = toy.ToyPlan().pack(), toy.ToyPlan().pack(cpu_features=ABSENT)
    assert opened(write(good, absent, n_cpus=2)) == (0, "CPU")
    assert opened(write(absent, good, n_cpus=2)) == (1, "CPU")


def test_a_program_may_have_weights_of_its_own(cuda: FakeCuda, write: Write) -> None:
    weights = {"weights.1": toy.weights_section(), "weights": bytes(len(toy.weights_section()))}
    path = write(ToyCudaPlan().pack(), toy.ToyPlan().pack(), **weights)
    cuda.set(capability=80)
    assert opened(path) == (1, "CPU")
    with ArtifactFile.open(path) as file:
        file.check_weights()


def test_when_none_runs_here_each_says_why(cuda: FakeCuda, write: Write) -> None:
    plans = [ToyCudaPlan().pack(), ToyCudaPlan().pack(cuda_arch=SM_80)]
    path = write(
        *plans, toy.ToyPlan().pack(cpu_features=V4 | ABSENT), toy.ToyPlan().pack(cpu_features=ABSENT), n_cpus=2
    )
    cuda.set(capability=100)
    error = refusal(path)
    has = "device 0 is Fake GPU 0 with 10.0"
    lacks = "this artifact needs the CPU feature unknown bit 31, which this machine lacks"
    assert error.fact == (
        "this machine runs none of the artifact's 4 programs: "
        f"cuda:sm_90a (this artifact needs compute capability 9.0; {has}), "
        f"cuda:sm_80 (this artifact needs compute capability 8.0 or a later one of that generation; {has}), "
        f"cpu ({lacks}), cpu ({lacks})"
    )
    assert error.hint == "compile for this machine too: --target cpu, or --target cuda"
    assert error.place == str(path)


# -- what is asked for --------------------------------------------------------------------------------------------


def test_the_device_that_is_asked_for_is_taken(cuda: FakeCuda, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(ToyCudaPlan().pack(), toy.ToyPlan().pack())
    cuda.set(devices=2)
    assert opened(path, device="cpu") == (1, "CPU")
    assert opened(path, device="cuda") == (0, "Fake GPU 0")
    assert opened(path, device="cuda:1") == opened(path, device=1) == opened(path, device="1") == (0, "Fake GPU 1")
    assert refusal(path, device="cuda:2").fact == "there is no GPU '2': this machine has 2, counted from 0"
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    assert refusal(path, device="cuda").fact == "this machine has no NVIDIA driver (libcuda-of-nobody.so.1)"
    assert opened(path, device=1) == (1, "CPU")


def test_a_device_that_the_artifact_is_not_for_is_named_with_those_that_it_is_for(cuda: FakeCuda, write: Write) -> None:
    on_gpus = write(ToyCudaPlan().pack(), ToyCudaPlan().pack(cuda_arch=89))
    error = refusal(on_gpus, device="cpu")
    assert error.fact == "the artifact has no program for a CPU: it was compiled for cuda:sm_90a, cuda:sm_89"
    assert error.hint == "compile with --target cpu too"
    error = refusal(write(toy.ToyPlan().pack(cpu_features=V3)), device="cuda")
    assert error.fact == "the artifact has no program for a GPU: it was compiled for cpu:x86-64-v3"


def test_no_device_in_particular_is_any(write: Write) -> None:
    assert opened(write(toy.ToyPlan().pack()), device="") == (0, "CPU")


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:", "cuda:x", "-1", -1, "cuda:1234567"])
def test_a_device_that_nobody_knows_is_refused(write: Write, device: str | int) -> None:
    error = refusal(write(toy.ToyPlan().pack()), device=device)
    assert error.fact == f"there is no device {device!r}"
    assert error.hint == "cpu, cuda, cuda:1, or the number of a GPU"


def test_options_of_before_open_any_program_and_wild_ones_none(toy_so: Path) -> None:
    with toy_model.Model(toy_so) as model:
        handle = c.c_void_p()
        for run_on, expected in (
            (0, toy_model.OK),
            (1, toy_model.OK),
            (3, toy_model.ARGUMENT),
            (-1, toy_model.ARGUMENT),
        ):
            options = Options(c.sizeof(Options), run_on=run_on)
            assert model.api.open(c.byref(options), c.byref(handle)) == expected
            model.api.close(handle)
        wild = Options(Options.run_on.offset, run_on=99)  # of a caller that knows no run_on
        assert model.api.open(c.byref(wild), c.byref(handle)) == toy_model.OK
        model.api.close(handle)


# -- what it reads of the weights -------------------------------------------------------------------------------------


def spread_weights(*, gap: int, end: int) -> tuple[bytes, int, int]:
    """The toy's weights with others before, between and behind them; where its two parts lie."""
    size = toy.VOCAB * 4 * toy.CHANNELS
    table, output = 8192, (8192 + size + gap) // 256 * 256
    data = bytearray(b"\xff" * (output + size + end))
    data[table : table + size] = toy.weights_section()[:size]
    data[output : output + size] = toy.weights_section()[size:]
    return bytes(data), table, output


@pytest.mark.parametrize("gap", [300, 4000, 5000, 40 << 20])
@pytest.mark.parametrize("end", [0, 5, 70000])
def test_a_gpu_gets_what_its_program_reads(cuda: FakeCuda, write: Write, gap: int, end: int) -> None:
    weights, table, output = spread_weights(gap=gap, end=end)
    path = write(ToyCudaPlan().move_weights(table, output).pack(), toy.ToyPlan().pack(), weights=weights)
    with llmc.load(path) as model:
        used, copied = model.info.weight_bytes, cuda.calls()
        assert model.logits([3, 5]).tolist() == toy.oracle([3, 5])
    sizes = [int(line.split()[1]) for line in copied if line.startswith("h2d")]
    assert sum(sizes) == used
    assert used < 2 * toy.VOCAB * 4 * toy.CHANNELS + 512 + (gap if gap < 4096 else 0)
    cuda.set(free=(64 << 20) + 1_000_000 + used)  # and is asked for little more room than that, graphs' among it
    with llmc.load(path, kv_tokens=64):
        pass


def test_a_cpu_reads_where_its_calls_say(write: Write) -> None:
    weights, table, output = spread_weights(gap=1 << 20, end=9)
    plan = toy.ToyPlan().move_weights(table, output)
    path = write(plan.pack(cpu_features=ABSENT), plan.pack(), weights=weights, n_cpus=2)
    assert opened(path) == (1, "CPU")
    with llmc.load(path) as model:
        assert model.info.weight_bytes < 2 * toy.VOCAB * 4 * toy.CHANNELS + 512


# -- damage -------------------------------------------------------------------------------------------------------


def test_damaged_programs_are_refused_when_they_are_taken(cuda: FakeCuda, write: Write) -> None:
    outside = toy.ToyPlan()
    outside.arguments[1] = ("weights", 1 << 20, 64)
    for damaged, fact in (
        (outside.pack(), "argument 1, 64 bytes at 1048576, is not in the"),
        (toy.ToyPlan().pack()[:-1], "its tables take"),
        (toy.ToyPlan().pack()[:100], "less than its header"),
        (b"", "less than its header"),
        (toy.ToyPlan().pack(n_kernels=2**32 - 1), "its tables take"),
        (toy.ToyPlan().pack(device=2), "device 2"),
    ):
        path = write(ToyCudaPlan().pack(), damaged)
        cuda.set(capability=90)
        assert opened(path) == (0, "Fake GPU 0")
        cuda.set(capability=80)
        assert fact in refusal(path).fact


def test_kernels_of_all_programs_for_cpus_are_those_of_the_code(write: Write) -> None:
    good, absent = toy.ToyPlan().pack(), toy.ToyPlan().pack(cpu_features=ABSENT)
    assert refusal(write(absent, good)).fact == "the plan names 32 kernels, the code has 16"
    assert refusal(write(good, n_cpus=2)).fact == "the plan names 16 kernels, the code has 32"
    other = toy.ToyPlan()
    other.kernels[2] = ("stone_2", other.kernels[2][1])
    fact = "kernel 2 of the plan is 'stone_2' with 6 pointers; the code has 'attend_2' with 6"
    assert refusal(write(absent, other.pack(), n_cpus=2)).fact == fact


def test_programs_end_with_the_first_number_that_is_not_there(cuda: FakeCuda, write: Write) -> None:
    path = write(ToyCudaPlan().pack(), **{"plan.2": toy.ToyPlan().pack()})
    with ArtifactFile.open(path) as file:
        assert file.n_programs == 1
    cuda.set(capability=80)
    assert "compute capability" in refusal(path).fact


def test_the_python_reader_bounds_every_program_by_the_weights_it_reads(write: Write) -> None:
    outside = toy.ToyPlan()
    outside.arguments[1] = ("weights", 1 << 20, 64)
    path = write(toy.ToyPlan().pack(), outside.pack(), n_cpus=2)
    with ArtifactFile.open(path) as file:
        assert file.plan(0).header.device == 0
        with pytest.raises(LlmcError, match="plan section"):
            file.plan(1)


# -- what it says of itself -------------------------------------------------------------------------------------------


MANIFEST = b"""{"model": {"name": "toy"}, "target": {"name": "cuda:sm_90a"}, "memory": {"weight_bytes": 1}, "targets": [
    {"target": {"name": "cuda:sm_90a"}}, {"target": {"name": "cpu:x86-64-v3"}, "memory": {"weight_bytes": 2}}]}"""


@pytest.mark.parametrize("targets", [b"3", b"{}", b"[3]", b"[[]]", b'"cpu"'])
def test_a_manifest_that_says_nonsense_of_programs_is_damaged(write: Write, targets: bytes) -> None:
    path = write(toy.ToyPlan().pack(), toy.ToyPlan().pack(), manifest=b'{"targets": ' + targets + b"}")
    with ArtifactFile.open(path) as file:
        for read in (file.manifest, lambda: file.targets, lambda: file.program_for("cpu")):
            with pytest.raises(LlmcError, match="section 'manifest' is not what was written"):
                read()


def test_a_manifest_says_of_each_program_what_differs(cuda: FakeCuda, write: Write) -> None:
    path = write(ToyCudaPlan().pack(), toy.ToyPlan().pack(), manifest=MANIFEST)
    with ArtifactFile.open(path) as file:
        assert file.targets == ["cuda:sm_90a", "cpu:x86-64-v3"]
        assert [file.program_for(name) for name in ("cuda:sm_90a", "cuda", "cpu", "cpu:x86-64-v3")] == [0, 0, 1, 1]
        assert file.manifest(1)["memory"] == {"weight_bytes": 2}
        assert file.manifest()["target"]["name"] == "cuda:sm_90a"
        with pytest.raises(LlmcError, match="no program for cuda:sm_80") as caught:
            file.program_for("cuda:sm_80")
        assert caught.value.hint == "it has cuda:sm_90a, cpu:x86-64-v3"
    with llmc.load(path) as model:
        assert (model.target, model.manifest["memory"]) == ("cuda:sm_90a", {"weight_bytes": 1})
    with llmc.load(path, device="cpu") as model:
        assert (model.target, model.manifest["memory"]) == ("cpu:x86-64-v3", {"weight_bytes": 2})
