"""Opening an artifact for a GPU: what is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import How
from tests.runtime import toy_artifact as toy
from tests.runtime.toy_cuda import CUBIN, SHARED_BYTES, FakeCuda, ToyCudaPlan, drawn, sections

HEADER = Path(toy.RUNTIME, "src", "cuda_driver.h")


@pytest.fixture
def written(cuda_so: Path, tmp_path: Path) -> Callable[..., Path]:
    """A file with other sections than the toy artifact's."""

    def write(**changes: bytes) -> Path:
        with ArtifactFile.open(cuda_so) as good:
            code = good.section("code")
        path = tmp_path / f"changed{len(list(tmp_path.iterdir()))}.so"
        path.write_bytes(toy.pack_sections(sections(code, **changes)))
        return path

    return write


def refusal(path: Path, **options: Any) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        llmc.load(path, **options)
    return caught.value


# -- driver and device --------------------------------------------------------------------------------------------


def test_a_machine_without_a_driver_is_told_so(cuda: FakeCuda, cuda_so: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    error = refusal(cuda_so)
    assert error.fact == "this machine has no NVIDIA driver (libcuda-of-nobody.so.1)"
    assert error.hint == "run it on a machine with an NVIDIA GPU, or compile with --target cpu"


def test_an_old_driver_is_named_with_what_it_lacks(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(version=11040, lacks="cuLaunchKernelEx")
    fact = "the NVIDIA driver is for CUDA 11.4 and lacks cuLaunchKernelEx, which came with CUDA 11.6"
    assert refusal(cuda_so).fact == fact


def test_a_driver_without_a_gpu_is_told_from_no_driver(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(devices=0)
    assert refusal(cuda_so).fact == "this machine has an NVIDIA driver but no GPU that it can use"


@pytest.mark.parametrize(
    ("capability", "level"), [(80, "sm_80"), (86, "sm_80"), (89, "sm_89"), (100, "sm_100a"), (121, "sm_120")]
)
def test_another_architecture_is_refused_with_the_target_to_take(
    cuda: FakeCuda, cuda_so: Path, capability: int, level: str
) -> None:
    cuda.set(capability=capability)
    error = refusal(cuda_so)
    has = f"{capability // 10}.{capability % 10}"
    assert error.fact == f"this artifact needs compute capability 9.0; device 0 is Fake GPU 0 with {has}"
    assert error.hint == f"compile with --target cuda:{level}"


def test_a_gpu_that_no_kernels_are_for_is_sent_to_the_cpu(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(capability=75)
    assert refusal(cuda_so).hint == "compile with --target cpu: no kernels are written for this GPU"


def test_code_without_special_instructions_runs_on_later_gpus_of_its_generation(
    cuda: FakeCuda, written: Callable[..., Path]
) -> None:
    path = written(plan=ToyCudaPlan().pack(cuda_arch=80))
    cuda.set(capability=86)
    with llmc.load(path) as model:
        assert model.info.device == "Fake GPU 0"
    for capability in (75, 90):
        cuda.set(capability=capability)
        assert "8.0 or a later one of that generation" in refusal(path).fact


@pytest.mark.parametrize(
    ("capability", "hint"), [(86, "cpu: no kernels are written for so little"), (89, "cuda:sm_89")]
)
def test_a_gpu_with_less_shared_memory_than_kernels_take_is_refused(
    cuda: FakeCuda, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capability: int, hint: str
) -> None:
    monkeypatch.setitem(SHARED_BYTES, "attend", 120 << 10)
    cuda.set(capability=capability)
    error = refusal(written(plan=ToyCudaPlan().pack(cuda_arch=80)))
    assert error.fact == "this artifact's kernels take 120 KB of shared memory; device 0 is Fake GPU 0 with 99"
    assert error.hint == f"compile with --target {hint}"


def test_the_gpu_is_chosen_by_the_option_or_the_environment(
    cuda: FakeCuda, cuda_so: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.set(devices=3)
    monkeypatch.setenv("LLMC_CUDA_DEVICE", "1")
    for option, number in ((None, 1), (0, 0), (2, 2)):
        with llmc.load(cuda_so, device=option) as model:
            assert model.info.device == f"Fake GPU {number}"
    assert refusal(cuda_so, device=3).fact == "there is no GPU '3': this machine has 3, counted from 0"
    for text in ("3", "-1", "x", "1x", "99999999999999999999"):
        monkeypatch.setenv("LLMC_CUDA_DEVICE", text)
        assert refusal(cuda_so).fact == f"there is no GPU '{text}': this machine has 3, counted from 0"


# -- memory -------------------------------------------------------------------------------------------------------


def test_needed_and_free_memory_are_said(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(free=80_000_000)
    error = refusal(cuda_so, kv_tokens=400_000)
    parts = "weights 0.00, KV cache of 400000 tokens 0.05, activations 0.00"
    assert error.fact == f"the model needs 0.12 GB on Fake GPU 0 ({parts}), and 0.08 GB are free"
    assert error.hint == "ask for room for fewer tokens (kv_tokens)"
    cuda.set(free=1000)
    assert refusal(cuda_so).hint == "free memory on the GPU, or take a larger one"


def test_the_default_cache_takes_what_is_free_and_no_more(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    path = written(plan=ToyCudaPlan().pack(default_kv_tokens=1 << 28))
    cuda.set(free=100_000_000)
    with llmc.load(path) as model:
        n_bytes = model.info.kv_tokens * model.info.kv_bytes_per_token
        assert 30_000_000 < n_bytes < 100_000_000
        assert model.tokens([1, 2], 3)


def test_the_default_cache_gives_way_to_graphs(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    """How much of a GPU's memory they take shows only when the driver has no more of it."""
    path = written(plan=ToyCudaPlan().pack(default_kv_tokens=1 << 28))
    cuda.set(free=300_000_000)
    with llmc.load(path) as model:
        alone = model.info.kv_tokens * model.info.kv_bytes_per_token
    cuda.set(free=300_000_000, node=1_000_000)
    with llmc.load(path) as model:
        n_bytes = model.info.kv_tokens * model.info.kv_bytes_per_token
        assert alone / 4 < n_bytes < alone - 20_000_000
        assert model.logits([3, 5]).tolist() == toy.oracle([3, 5])
    assert cuda.live == 0


def test_graphs_that_find_no_room_are_an_error_where_the_cache_gives_no_way(cuda: FakeCuda, cuda_so: Path) -> None:
    cuda.set(free=100_000_000, node=4_000_000)
    error = refusal(cuda_so, kv_tokens=1000)
    assert error.fact == "making a graph of a plan failed on Fake GPU 0: CUDA_ERROR_OUT_OF_MEMORY (2: out of memory)"
    assert error.hint == "free memory on the GPU, or ask for room for fewer tokens (kv_tokens)"
    cuda.set(free=100_000_000, node=90_000_000)
    assert refusal(cuda_so).fact == error.fact  # one page would not help either
    assert cuda.live == 0


def test_weights_are_copied_in_pieces_and_reported(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    weights = toy.weights_section() + bytes(70 << 20)
    path = written(weights=weights, plan=ToyCudaPlan().read_weights(len(weights)).pack())
    said: list[tuple[int, int]] = []
    with llmc.load(path, progress=lambda done, total: said.append((done, total))) as model:
        assert model.logits([3, 5]).tolist() == toy.oracle([3, 5])
    n, piece = len(weights), 32 << 20
    assert said == [(0, n), (piece, n), (2 * piece, n), (n, n)]
    copies = [line for line in cuda.calls() if line.startswith("h2d")][:3]
    assert copies == [f"h2d {piece}", f"h2d {piece}", f"h2d {n - 2 * piece}"]


def test_an_exception_while_weights_are_copied_stops_it(cuda: FakeCuda, cuda_so: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmc.load(cuda_so, progress=interrupt)


# -- damage -------------------------------------------------------------------------------------------------------


def images(n: int, *table: tuple[int, int]) -> bytes:
    return struct.pack("<II", n, 0) + b"".join(fmt.IMAGE.pack(*entry) for entry in table) + CUBIN


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        bytes(7),
        images(0),
        images(2**32 - 1),
        images(2, (0, 0)),
        images(2, (40, 8), (2**64 - 1, 8)),
        images(2, (40, 8), (40, 2**64 - 1)),
        images(2, (40, 8), (40, len(CUBIN) + 1)),
    ],
)
def test_damaged_images_are_refused(cuda: FakeCuda, written: Callable[..., Path], damaged: bytes) -> None:
    fact = refusal(written(cuda=damaged)).fact
    assert "image" in fact or "no kernels" in fact


@pytest.mark.parametrize(
    "change", [{"n_threads": 0}, {"n_threads": 1025}, {"shared_bytes": 2**31}, {"flags": 2}, {"image": 2}]
)
def test_damaged_kernels_are_refused(cuda: FakeCuda, written: Callable[..., Path], change: dict[str, Any]) -> None:
    class Damaged(ToyCudaPlan):
        def kernel_record(self, name: str, n_pointers: int) -> fmt.KernelRecord:
            return super().kernel_record(name, n_pointers)._replace(**change)

    path = written(plan=Damaged().pack())
    assert "kernel 'embed_2'" in refusal(path).fact


def test_plans_of_another_device_are_refused(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    assert "device 2" in refusal(written(plan=ToyCudaPlan().pack(device=2))).fact
    assert "architecture 0" in refusal(written(plan=ToyCudaPlan().pack(cuda_arch=0))).fact
    assert "kernels, the code has 0" in refusal(written(plan=ToyCudaPlan().pack(device=0, cuda_arch=0))).fact


def test_a_kernel_that_its_image_lacks_is_named(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    plan = ToyCudaPlan()
    plan.kernels[3] = ("turned_2", 2)
    assert refusal(written(plan=plan.pack())).fact.startswith("preparing kernel 'turned_2' failed on Fake GPU 0")


def test_an_image_that_the_driver_refuses_is_an_error(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    path = written(cuda=fmt.pack_images([CUBIN, b"not a cubin at all"]))
    assert refusal(path).fact.endswith("CUDA_ERROR_INVALID_IMAGE (200: device kernel image is invalid)")


FUNCTIONS = dict(re.findall(r"X\((cu\w+), (\d+),", HEADER.read_text()))
GIVING_BACK = re.compile(r"cuMemFree|cuModuleUnload|Destroy|Release|PopCurrent")
NOT_CALLED = ("cuEventElapsedTime", "cuFuncSetAttribute")
CALLED_TO_CLOSE = ("cuCtxPushCurrent", "cuStreamSynchronize")
CANNOT_FAIL = ("cuGetErrorName", "cuGetErrorString", "cuDriverGetVersion")


@pytest.mark.parametrize(
    "function", [name for name in FUNCTIONS if not GIVING_BACK.search(name) and name not in (*CANNOT_FAIL, *NOT_CALLED)]
)
def test_every_call_that_fails_is_an_error_and_leaks_nothing(cuda: FakeCuda, cuda_so: Path, function: str) -> None:
    """The n-th call of each function fails, for every n that opening, a step and a draw come to."""
    for n in range(1, 100):
        cuda.set(fail=f"{function}:{n}:2")
        error = use(cuda_so)
        assert cuda.live == 0
        failed = any("fails with" in line for line in cuda.calls())
        assert failed == (error is not None) or function in CALLED_TO_CLOSE
        if not failed:
            break
    assert 1 < n < 99


def use(path: Path) -> LlmcError | None:
    """Open, feed, draw, fork, feed; the first error."""
    try:
        with llmc.load(path) as model, model.sequence() as sequence:
            sequence.feed([1, 2, 3])
            sequence.sample(How(temperature=1))
            with sequence.fork() as fork:
                fork.feed([4])
                fork.sample()
    except LlmcError as error:
        return error
    return None


# -- the same in Python -------------------------------------------------------------------------------------------


def test_a_model_on_a_gpu_generates_like_any(cuda: FakeCuda, cuda_so: Path) -> None:
    text = [3, 1, 4]
    for _ in range(5):
        row = toy.oracle(text)[-1]
        text.append(row.index(max(row)))
    with llmc.load(cuda_so) as model:
        assert (model.info.device, model.info.n_threads) == ("Fake GPU 0", 1)
        assert model.tokens(text[:3], 5, ignore_eos=True) == text[3:]
        with model.sequence() as one, model.sequence() as two:
            model.step([(one, [1]), (two, [2])])
            best = [row.index(max(row)) for row in (toy.oracle([1])[-1], toy.oracle([2])[-1])]
            tokens = model.sample([(one, How()), (two, How(temperature=1, seed=5))])
            assert tokens == [best[0], drawn(5, 1, 1, 0, 1, best[1])]


def test_a_profile_times_each_kernel(cuda: FakeCuda, cuda_so: Path) -> None:
    with llmc.load(cuda_so) as model, model.sequence() as sequence, model.profile() as profile:
        sequence.feed([1, 2, 3])
        sequence.feed([4])
    assert [step.phase for step in profile.steps] == ["prefill", "decode"]
    body, head = 1 + 3 * toy.LAYERS, 3
    for step in profile.steps:
        assert len(step.events) == body + head
        took = step.events["end_ns"] - step.events["start_ns"]
        assert abs(took.astype(float) - 1e6).max() < 1e3  # a millisecond each on the fake GPU


def test_the_python_reader_checks_the_same(cuda_so: Path, written: Callable[..., Path]) -> None:
    with ArtifactFile.open(cuda_so) as file:
        tables = file.plan()
    assert (tables.header.device, tables.header.cuda_arch) == (1, 90 | fmt.CUDA_EXACT)
    assert tables.kernels[2] == fmt.KernelRecord("attend_2", 6, 32, 65536, fmt.KERNEL_DEPENDENT, 0)
    plan = ToyCudaPlan()
    plan.plans = plan.plans[:-2]
    for damaged in (plan.pack(), ToyCudaPlan().pack(device=7), ToyCudaPlan().pack(device=0, cuda_arch=0)):
        with ArtifactFile.open(written(plan=damaged)) as file, pytest.raises(LlmcError, match="plan section"):
            file.plan()


# -- the driver's interface ---------------------------------------------------------------------------------------


SAME_SIZES = """
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cstddef>
#include <cstdint>
template <class... T> struct List {};
template <class A, class B> constexpr bool same_sizes = false;
template <> constexpr bool same_sizes<List<>, List<>> = true;
template <class A, class... As, class B, class... Bs>
constexpr bool same_sizes<List<A, As...>, List<B, Bs...>> =
    sizeof(A) == sizeof(B) && same_sizes<List<As...>, List<Bs...>>;
template <class F> struct Parameters;
template <class R, class... P> struct Parameters<R (*)(P...)> { using type = List<P...>; };
template <class A, class B> constexpr bool same() {
    return same_sizes<typename Parameters<A>::type, typename Parameters<B>::type>;
}
static_assert(sizeof(CUlaunchAttribute) == 72 && sizeof(CUlaunchConfig) == 56);
static_assert(offsetof(CUlaunchAttribute, value) == 8 && offsetof(CUlaunchConfig, hStream) == 32);
"""


def test_functions_and_constants_are_those_of_cuda(tmp_path: Path) -> None:
    """Compared with NVIDIA's own headers, where they are: versions and sizes of parameters, constants, structs."""
    include = next((p for p in Path("/usr/local").glob("cuda*/include") if (p / "cudaTypedefs.h").exists()), None)
    if not include:
        pytest.skip("CUDA's headers are not here")
    header = HEADER.read_text()
    constants = re.findall(r"^    (CU\w+) = (\d+),", header, re.MULTILINE)
    functions = re.findall(r"X\((cu\w+), (\d+),[\s\\]*\((.*?)\)\)", header, re.DOTALL)
    assert len(functions) == len(FUNCTIONS) > 35
    checks = [f'static_assert({name} == {value}, "{name}");' for name, value in constants]
    for name, version, parameters in functions:
        checks.append(f'static_assert(same<PFN_{name}_v{version}, int (*)({parameters})>(), "{name}");')
    source = tmp_path / "check.cpp"
    source.write_text(SAME_SIZES + "\n".join(checks) + "\n")
    command = ["g++", "-std=c++17", f"-I{include}", "-c", str(source), "-o", str(tmp_path / "check.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
