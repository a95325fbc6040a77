"""One artifact for two GPUs and a CPU: on each the right program runs, from weights that lie in the file once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

import llmc
from llmc.cli.main import main
from llmc.compiler.target import Target, host_level
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.cuda.conftest import HOPPER, EmulatedGpu

AMPERE = Target("cuda", "sm_80")
PROMPT = [5, 17, 3, 99, 42]
N_TOKENS = 12
NOBODY = "libcuda-of-nobody.so.1"


class Several(NamedTuple):
    """An artifact for HOPPER, AMPERE and this CPU, what its compile reported, and the machine with a GPU."""

    path: Path
    report: dict[str, Any]
    gpu: EmulatedGpu


@pytest.fixture(scope="module")
def several(
    checkpoint: Callable[[str], Path], fake_driver: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Several]:
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CUDA_DRIVER", NOBODY)  # so the certificate is made on the CPU
        gpu = EmulatedGpu(patch, fake_driver, folder / "driver.log")
        path, target = folder / "several.so", f"{HOPPER},{AMPERE},cpu"
        report = gpu.compile(checkpoint("llama"), path, target, verify=True, **OPTIONS)
        yield Several(path, report, gpu)


OPTIONS: dict[str, Any] = {"dtype": "bf16", "batch": (1,), "max_sequence": 48}


def cli(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def said(path: Path, **options: Any) -> tuple[str, str, list[int]]:
    """The target and the device that ran, and what it said."""
    with llmc.load(path, kv_tokens=64, **options) as model:
        return model.target, model.info.device, model.tokens(PROMPT, N_TOKENS, ignore_eos=True)


def test_each_machine_runs_its_program_and_says_the_same(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cpu = several.path, f"cpu:{host_level()}"
    target, device, tokens = said(path, device="cpu")
    assert (target, device, len(tokens)) == (cpu, "CPU", N_TOKENS)
    for gpu in (AMPERE, HOPPER):
        several.gpu.become(gpu)
        assert said(path) == said(path, device="cuda") == (str(gpu), "Fake GPU 0", tokens)
        assert said(path, device="cpu") == (cpu, "CPU", tokens)
    monkeypatch.setenv("LLMC_FAKE_CUDA", "capability=100")
    assert said(path) == (cpu, "CPU", tokens)
    monkeypatch.setenv("LLMC_CUDA_DRIVER", NOBODY)
    assert said(path) == (cpu, "CPU", tokens)
    assert several.gpu.complaints() == []


def test_a_machine_for_none_of_them_is_told_of_each(
    several: Several, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", NOBODY)
    result = CliRunner().invoke(main, ["run", str(several.path), "--tokens", "1", "--device", "cuda"])
    assert result.exit_code == 1
    lacks = f"this machine has no NVIDIA driver ({NOBODY})"
    fact = f"this machine runs none of the artifact's 2 programs for GPUs: {HOPPER} ({lacks}), {AMPERE} ({lacks})"
    hint = "it has programs for other devices: leave the choice to it"
    assert result.stderr == f"error: {fact}\n  at: {several.path}\n  hint: {hint}\n"


def test_gpus_share_their_weights_and_the_cpu_adds_its_own(
    several: Several, checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    emulated_gpu.compile(checkpoint("llama"), tmp_path / "one.so", str(HOPPER), **OPTIONS)
    emulated_gpu.compile(checkpoint("llama"), tmp_path / "two.so", f"{HOPPER},{AMPERE}", **OPTIONS)
    llmc.compile(checkpoint("llama"), out=tmp_path / "cpu.so", verify=False, **OPTIONS)
    weights = {}
    for name in ("one", "two", "cpu"):
        with ArtifactFile.open(tmp_path / f"{name}.so") as file:
            weights[name] = file.sections["weights"]
    assert (weights["two"].n_bytes, weights["two"].sha256) == (weights["one"].n_bytes, weights["one"].sha256)
    with ArtifactFile.open(several.path) as file:
        assert [name for name in file.sections if name.startswith("weights")] == ["weights"]
        n_bytes = file.sections["weights"].n_bytes
    common, both = weights["one"].n_bytes + weights["cpu"].n_bytes - n_bytes, several.report["weights"]
    assert 0 < common < weights["one"].n_bytes
    names = [str(HOPPER), str(AMPERE), f"cpu:{host_level()}"]
    shares = {tuple(each["targets"]): each["bytes"] for each in both}
    assert set(shares) == {tuple(names[:2]), tuple(names[2:]), tuple(names)}
    assert abs(shares[tuple(names)] - common) < 256 * 20  # what lies between weights is counted apart
    assert several.report["targets"] == names


def test_a_gpu_is_sent_its_own_weights_alone(several: Several) -> None:
    several.gpu.become(HOPPER)
    several.gpu.log.write_text("")
    with llmc.load(several.path, kv_tokens=64) as model:
        copied = sum(int(n) for n in re.findall(r"^h2d (\d+)$", several.gpu.log.read_text(), re.MULTILINE))
        assert copied == model.info.weight_bytes
        memory = model.manifest["memory"]["weight_bytes"]
        assert memory - 256 < copied <= memory + 4096
    with ArtifactFile.open(several.path) as file:
        assert copied < file.sections["weights"].n_bytes - 100_000


def test_the_certificate_says_which_target_it_is_of_and_holds_for_the_others(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = f"cpu:{host_level()}"
    assert several.report["certificate"]["status"] == "passed"
    assert several.report["certificate"]["target"] == cpu
    several.gpu.become(AMPERE)
    lines = cli("verify", several.path).splitlines()
    assert f"passed   target: {AMPERE}, the certificate is {cpu}'s" in lines
    assert all(line.startswith("passed") for line in lines)
    monkeypatch.setenv("LLMC_CUDA_DRIVER", NOBODY)
    checks = json.loads(cli("verify", several.path, "--json"))["checks"]
    assert {"name": "target", "status": "passed", "detail": cpu} in checks


def test_another_targets_words_are_judged_too(several: Several, tmp_path: Path) -> None:
    """A certificate whose tokens no target would choose."""
    several.gpu.become(HOPPER)
    with ArtifactFile.open(several.path) as file:
        manifest = file.manifest()
    for prompt in manifest["certificate"]["prompts"]:
        prompt["greedy"] = [(token + 1) % 160 for token in prompt["greedy"]]
    path = tmp_path / "wrong.so"
    path.write_bytes(with_manifest(several.path, manifest))
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 1
    assert "failed   prompt 1: greedy token 1 is" in result.stdout


def with_manifest(path: Path, manifest: dict[str, Any]) -> bytes:
    """The artifact with another manifest."""
    from tests.runtime.toy_artifact import pack_sections

    data = path.read_bytes()
    with ArtifactFile.open(path) as file:
        sections = {name: data[s.offset : s.offset + s.n_bytes] for name, s in file.sections.items()}
    return pack_sections({**sections, "manifest": json.dumps(manifest).encode()})


def test_inspect_shows_the_target_that_is_asked_for(several: Several, tmp_path: Path) -> None:
    path, cpu = several.path, f"cpu:{host_level()}"
    assert f"targets      {HOPPER}, {AMPERE}, {cpu}; shown:" in cli("inspect", path)
    for target, last in ((str(HOPPER), "joined"), (str(AMPERE), "joined"), ("cpu", "head")):
        plan = json.loads(cli("inspect", path, "--plan", "--for", target, "--json"))
        assert plan["plans"][-1]["kind"] == last
        assert any(call["weight"].endswith("down_proj.weight") for call in plan["plans"][0]["calls"])
        schedules = json.loads(cli("inspect", path, "--schedules", "--for", target, "--json"))["schedules"]
        assert {name for s in schedules for name in s["kernels"]} == {k["name"] for k in plan["kernels"]}
    on_cpu, on_gpu = (cli("inspect", path, "--graph", "--for", kind) for kind in ("cpu", "cuda"))
    assert ("RMSNormLinear" in on_gpu, "RMSNormLinear" in on_cpu) == (True, False)
    manifest = json.loads(cli("inspect", path, "--manifest", "--for", cpu))
    assert (manifest["target"]["name"], manifest["plans"][0]["rows"]) == (cpu, 1)
    cli("inspect", path, "--html", tmp_path / "cpu.html", "--for", "cpu")
    page = (tmp_path / "cpu.html").read_text()
    assert cpu in page
    assert f"The file is for {HOPPER}, {AMPERE} too" in page
    result = CliRunner().invoke(main, ["inspect", str(path), "--for", "cuda:sm_89"])
    assert result.exit_code == 1
    assert "error: the artifact has no program for cuda:sm_89" in result.stderr


def test_run_says_what_it_ran_on_and_its_profile_is_of_that(several: Several, tmp_path: Path) -> None:
    several.gpu.become(AMPERE)
    path, trace = several.path, tmp_path / "trace.json"
    for device, target in (("cuda", str(AMPERE)), ("cpu", f"cpu:{host_level()}")):
        run = ("run", path, "--tokens", "5,17,3", "-n", 3, "--device", device, "--profile", trace, "--json")
        result = json.loads(cli(*run))
        assert result["target"] == target
        assert result["profile"]["phases"]
        cli("inspect", path, "--html", tmp_path / "page.html", "--profile", trace)
        assert f"· {target}<" in (tmp_path / "page.html").read_text()
        other = "cpu" if device == "cuda" else str(HOPPER)
        arguments = ["inspect", str(path), "--html", "x.html", "--profile", str(trace), "--for", other]
        assert "the profile is of another artifact" in CliRunner().invoke(main, arguments).stderr


def test_targets_that_cannot_be_are_refused(several: Several, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    with pytest.raises(LlmcError, match="float16 weights are not supported on CPU"):
        llmc.compile(folder, target=["cuda:sm_90a", "cpu"], dtype="f16")
    with pytest.raises(LlmcError, match="the target cuda:sm_80 is given twice"):
        llmc.compile(folder, target="cuda:sm_80, cpu, cuda:sm_80")
