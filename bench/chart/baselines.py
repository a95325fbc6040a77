"""Who llmc is measured beside, and how each is started: in a process of its own, in this environment."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llmc.bench.chart import memory
from llmc.bench.chart.request import Request, Task, files_folder
from llmc.bench.chart.subjects import Subject
from llmc.bench.peers.process import PeerError, PeerProcess
from llmc.runtime.errors import LlmcError

PACKAGE_PARENT = Path(__file__).parents[3]
"""Where `llmc` is imported from."""
LONGEST_LOAD_S = LONGEST_ANSWER_S = 3600.0


class System(NamedTuple):
    """Someone who is measured.

    module: within llmc.bench.  packages: what it imports, and what to pip install for it.
    repeats: whether it takes "repeated" requests.  precisions: for llmc's bf16, int8, …, its own; None: llmc's dtype.
    converted_from: another precision whose files its quantiser reads.
    """

    label: str
    module: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    repeats: bool = False
    precisions: dict[str, str] | None = None
    converted_from: str | None = None
    needs_source: bool = False


SYSTEMS = {
    "llmc": System("llmc", ("chart.llmc_",), (), "", repeats=True),
    "hf": System("Hugging Face (PyTorch)", ("chart.hf",), ("torch", "transformers", "accelerate"), "llmc[bench]", True),
    "hf-compile": System(
        "Hugging Face, torch.compile",
        ("chart.hf", "--compiled"),
        ("torch", "transformers", "accelerate"),
        "llmc[bench]",
        True,
    ),
    "onnxruntime": System(
        "ONNX Runtime",
        ("chart.onnxruntime_",),
        ("onnxruntime", "onnx_ir"),
        "llmc[bench]",
        repeats=True,
        precisions=dict.fromkeys(("f32", "bf16", "int8", "int4", "fp8"), "f32"),
    ),
    "llama.cpp": System(
        "llama.cpp",
        ("peers.llama_cpp",),
        ("llama_cpp", "gguf"),
        "llama-cpp-python gguf",
        precisions={"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
        converted_from="bf16",
    ),
    "openvino": System(
        "OpenVINO",
        ("peers.openvino",),
        ("openvino", "openvino_genai", "optimum"),
        "openvino-genai optimum-intel nncf",
        precisions={"bf16": "bf16", "int8": "int8", "int4": "int4"},
        converted_from="bf16",
        needs_source=True,
    ),
    "onnxruntime-genai": System(
        "ONNX Runtime GenAI",
        ("peers.onnxruntime_genai",),
        ("onnxruntime_genai",),
        "onnxruntime-genai",
        precisions={"int4": "int4"},
        needs_source=True,
    ),
}
BASELINES = tuple(name for name in SYSTEMS if name != "llmc")


def check(names: tuple[str, ...]) -> None:
    """Raise LlmcError for a baseline that does not exist or whose packages are not installed."""
    for name in names:
        if name not in BASELINES:
            raise LlmcError(f"no baseline {name!r}", place="--against", hint=f"there are {', '.join(BASELINES)}")
        missing = [package for package in SYSTEMS[name].packages if importlib.util.find_spec(package) is None]
        if missing:
            fact = f"{name} needs the Python package {missing[0]}, which is not installed"
            raise LlmcError(fact, place="--against", hint=f"pip install '{SYSTEMS[name].install}'")


def precision(name: str, subject: Subject) -> str:
    """What a system runs beside an artifact.  Raises PeerError where it has nothing of the kind."""
    system = SYSTEMS[name]
    ours = subject.quant or subject.dtype
    if name == "llmc":
        return subject.panel.precision
    if system.precisions is None:
        return subject.dtype
    if ours not in system.precisions:
        raise PeerError(f"it is not run in {ours} here, only in {', '.join(system.precisions)}")
    return system.precisions[ours]


def start(name: str, subject: Subject, request: Request, tasks: list[Task]) -> tuple[PeerProcess, dict[str, Any]]:
    """A process with its model loaded, and what it said of itself.  Raises PeerError."""
    system, runs = SYSTEMS[name], precision(name, subject)
    path = model_path(name, subject, runs)
    process = launch(name, subject)
    try:
        answer = process.ask(
            "load",
            timeout_s=LONGEST_LOAD_S,
            path=path,
            config=subject.manifest["model"]["config"],
            precision=runs,
            threads=request.threads,
            room=max(task.length for task in tasks) + 2,
            batches=sorted({task.batch for task in tasks if task.batch}),
            kv_tokens=max(memory.kv_tokens(task) for task in tasks),
            weights=subject.weights,
            device=subject.device if system.repeats else "cpu",
        )
    except PeerError:
        process.close()
        raise
    return process, {**answer, "precision": runs, "label": system.label}


def launch(name: str, subject: Subject) -> PeerProcess:
    module, *options = SYSTEMS[name].module
    log = files_folder() / "logs" / f"{subject.panel.name.replace('/', '-')} {name}.log"
    return PeerProcess([sys.executable, "-m", f"llmc.bench.{module}", *options], log, PACKAGE_PARENT)


def model_path(name: str, subject: Subject, runs: str) -> str:
    """What a system loads; files in its own format are written first, where they are not there yet."""
    system = SYSTEMS[name]
    if name == "llmc":
        return str(subject.artifact.absolute())
    if system.repeats:
        folder = Path(subject.source)
        return str(folder.absolute()) if folder.is_dir() else subject.source
    folder = model_files(subject)
    for each in dict.fromkeys([system.converted_from or runs, runs]):
        path = folder / f"{name}-{each}"
        if not path.exists():
            prepare(name, subject, each, path)
    return str(folder / f"{name}-{runs}")


def model_files(subject: Subject) -> Path:
    return files_folder() / "models" / str(subject.manifest["model"]["name"])


def prepare(name: str, subject: Subject, runs: str, path: Path) -> None:
    source = source_folder(subject) if SYSTEMS[name].needs_source else path.with_name("none")
    config = subject.manifest["model"]["config"]
    with launch(name, subject) as process:
        request = {"config": config, "source": str(source), "out": str(path), "precision": runs}
        process.ask("prepare", timeout_s=LONGEST_LOAD_S, **request)


def source_folder(subject: Subject) -> Path:
    """The model's own folder, or one with random weights that converters can read."""
    if subject.weights == "real" and Path(subject.source).is_dir():
        return Path(subject.source)
    folder = model_files(subject) / "source"
    if folder.exists():
        return folder
    part = folder.with_name("source.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    given = part / "given.json"
    given.write_text(json.dumps(subject.manifest["model"]["config"]))
    command = [sys.executable, "-m", "llmc.bench.peers.source_model", str(given), str(part)]
    made = subprocess.run(command, cwd=PACKAGE_PARENT, capture_output=True, text=True, check=False)
    if made.returncode:
        raise PeerError(f"the source model could not be written: {(made.stderr.strip().splitlines() or ['?'])[-1]}")
    part.replace(folder)
    return folder
