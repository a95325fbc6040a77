"""`llmc compile` around a stand-in for the driver: options, progress, summary, failures."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.cli.main import main
from llmc.cli.progress import StageBars
from llmc.runtime import LlmcError

REPORT = {
    "path": "m.so",
    "bytes": 5_200_000,
    "model": "m",
    "target": "cpu:x86-64-v4",
    "dtype": "bf16",
    "seconds": {"load": 0.25, "kernels": 61.5},
    "certificate": {"status": "passed", "relative_error": 3e-6, "top1_agreement": 1.0, "kl_mean": 1e-9},
}
Driver = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the driver was asked for."""
    asked: dict[str, Any] = {}

    def compile_model(model: str, **options: Any) -> dict[str, Any]:
        asked.update(options, model=model)
        work(options["progress"])
        return REPORT

    install(monkeypatch, compile_model)
    return asked


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    module = ModuleType("llmc.compiler.driver")
    vars(module)["compile_model"] = driver
    monkeypatch.setitem(sys.modules, "llmc.compiler.driver", module)


def work(progress: Callable[[str, int, int], None]) -> None:
    """The calls that a driver makes."""
    progress("load", 0, 0)
    print("what a library has to say")
    progress("load", 1, 1)
    progress("kernels", 0, 0)
    for done in range(1, 4):
        progress("kernels", done, 3)
    progress("kernels", 3, 3)


def compile_(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compile", *map(str, arguments)])


def test_options_reach_the_driver(asked: dict[str, Any], tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--batch", "1,16", "--max-seq", "99", "--weights", "random", "--seed", "3"]
    options += ["--adapter", "a"]
    result = compile_("m", "-o", tmp_path / "m.so", *options, "--verify", "off", "--dump", tmp_path, "--target", "cpu")
    assert result.exit_code == 0
    del asked["progress"]
    assert asked == {
        "model": "m",
        "out": tmp_path / "m.so",
        "target": "cpu",
        "dtype": "bf16",
        "kv_dtype": None,
        "task": "auto",
        "quant": "none",
        "quant_group": None,
        "quant_lm_head": None,
        "quant_bits": None,
        "calibrate": None,
        "batch": (1, 16),
        "max_sequence": 99,
        "weights": "random",
        "verify": False,
        "dump": tmp_path,
        "seed": 3,
        "adapters": ("a",),
        "images": False,
        "max_image_rows": 1024,
    }


def test_several_targets_reach_the_driver_in_their_order(asked: dict[str, Any]) -> None:
    compile_("m", "--target", "cuda:sm_90a,cuda:sm_80", "--target", "cpu")
    assert asked["target"] == "cuda:sm_90a,cuda:sm_80,cpu"
    compile_("m")
    assert asked["target"] == "cpu"


def test_the_summary_says_which_targets_the_weights_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["cuda:sm_90a", "cuda:sm_80", "cpu:x86-64-v4"]
    users = (targets[:2], targets[2:], targets)
    weights = [{"targets": names, "bytes": n * 10**6} for names, n in zip(users, (9, 8, 1), strict=True)]
    install(monkeypatch, lambda model, **options: {**REPORT, "targets": targets, "weights": weights})
    path, shares, *_ = compile_("m").stdout.splitlines()
    assert path == "m.so  5.2 MB  m, bf16, cuda:sm_90a, cuda:sm_80, cpu:x86-64-v4"
    assert shares == "weights      9.0 MB for cuda:sm_90a and cuda:sm_80, 8.0 MB for cpu:x86-64-v4, 1.0 MB for all"


def test_what_is_not_said_is_left_to_the_driver(asked: dict[str, Any]) -> None:
    compile_("m")
    assert (asked["out"], asked["dtype"], asked["max_sequence"]) == (None, None, None)
    assert (asked["batch"], asked["verify"], asked["weights"]) == ((1, 2, 4, 8), True, "real")


def test_each_stage_is_a_line_and_the_summary_says_the_rest(asked: dict[str, Any]) -> None:
    result = compile_("m")
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["what", "load", "kernels"]
    path, time, certificate = result.stdout.splitlines()
    assert path == "m.so  5.2 MB  m, bf16, cpu:x86-64-v4"
    assert time == "time         61.8 s: load 250 ms, kernels 61.5 s"
    assert certificate.startswith("certificate  passed: logits within 3.0e-06 of their range, 100.0% of most likely")


def test_json_is_the_report_alone(asked: dict[str, Any]) -> None:
    result = compile_("m", "--json")
    assert json.loads(result.stdout) == REPORT
    assert result.stderr


def test_bars_take_the_same_calls() -> None:
    with StageBars() as bars:
        work(bars)


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "--batch", "1,x"],
        ["m", "--dtype", "f8"],
        ["m", "--max-seq", "0"],
        ["m", "--quant-group", "64"],
        ["m", "--verify", "maybe"],
        ["a", "b"],
    ],
)
def test_wrong_usage_ends_with_2(asked: dict[str, Any], arguments: list[str]) -> None:
    assert compile_(*arguments).exit_code == 2


def test_how_to_quantise_reaches_the_driver(asked: dict[str, Any]) -> None:
    bits = ("--quant-bits", "4.5")
    compile_("m", "--quant", "int4", "--quant-group", "128", "--quant-lm-head", *bits, "--calibrate", "text.txt")
    assert (asked["quant"], asked["quant_group"], asked["quant_lm_head"]) == ("int4", 128, True)
    assert (asked["quant_bits"], asked["calibrate"]) == (4.5, Path("text.txt"))


def test_a_failure_ends_with_1_after_the_stages_that_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_model(model: str, **options: Any) -> dict[str, Any]:
        options["progress"]("load", 1, 1)
        options["progress"]("export", 0, 0)
        raise LlmcError("a tensor is missing", place="w", hint="find it")

    install(monkeypatch, compile_model)
    result = compile_("m")
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["load", "error:", "at:", "hint:"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_130_and_lets_the_driver_clean_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    def compile_model(model: str, **options: Any) -> dict[str, Any]:
        partial = tmp_path / "partial"
        partial.touch()
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            partial.unlink()
        return REPORT

    install(monkeypatch, compile_model)
    before = signal.getsignal(number)
    assert compile_("m").exit_code == 130
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_without_the_compiler_installed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_model(model: str, **options: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'tvm.tirx'", name="tvm.tirx")

    install(monkeypatch, compile_model)
    result = compile_("m")
    assert result.exit_code == 1
    assert "compiling needs the Python package tvm, which is not installed" in result.stderr
    assert "hint: pip install 'llmc[compiler]'" in result.stderr
