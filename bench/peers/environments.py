"""The peers' environments and model files, all under build/peers: made once, kept.

Each peer NAME has requirements/NAME.txt and a virtual environment build/peers/NAME; llmc runs in the environment that
runs the comparison.  Model files are build/peers/models/MODEL/PEER-PRECISION, or MODEL/source for what is converted;
of a model in shapes.py MODEL/KIND.gguf, which llama.cpp reads as it is and llmc compiles.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llmc.bench.peers.process import PeerError, PeerProcess
from llmc.bench.peers.random_gguf import write_gguf
from llmc.bench.peers.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "peers"
LONGEST_PREPARATION_S = 3600.0


class System(NamedTuple):
    """A system that can be measured: its module in bench/peers, and whether its models are converted from `source`."""

    module: str
    precisions: tuple[str, ...]
    converts: bool = False


SYSTEMS = {
    "llmc": System("llmc_", ("f32", "bf16", "int8", "int4", "int8+head", "int4+head", "mxfp4", "mxfp4+head")),
    "hf": System("hf", ("f32", "bf16")),
    "llama.cpp": System("llama_cpp", ("bf16", "q8_0", "q4_0", "mxfp4")),
    "openvino": System("openvino", ("bf16", "int8", "int4"), converts=True),
    "onnxruntime-genai": System("onnxruntime_genai", ("int4",), converts=True),
    "ctranslate2": System("ctranslate2", ("int8",), converts=True),
}

GGUF_KINDS = {"int8": "q8_0", "int4": "q4_0"}
"""What llmc compiles to these."""


class Entry(NamedTuple):
    """A system at a precision, as "llama.cpp:q8_0"."""

    system: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Raises ValueError naming what there is."""
        name, _, precision = text.partition(":")
        if name not in SYSTEMS:
            raise ValueError(f"no peer {name!r}; there are {', '.join(SYSTEMS)}")
        if precision not in SYSTEMS[name].precisions:
            raise ValueError(f"{name} is measured at {', '.join(SYSTEMS[name].precisions)}, not {precision!r}")
        return cls(name, precision)

    @property
    def bits(self) -> int:
        """Bits of a weight, nominally."""
        digits = "".join(c for c in self.precision.partition("_")[0] if c.isdigit())
        return int(digits)

    def __str__(self) -> str:
        return f"{self.system}:{self.precision}"


def command(system: str) -> list[str]:
    """How the process of a system is started, from the root of the project."""
    return [str(python(system)), "-m", f"llmc.bench.peers.{SYSTEMS[system].module}"]


def python(system: str) -> Path:
    return Path(sys.executable) if system == "llmc" else BUILD / SYSTEMS[system].module / "bin" / "python"


def start(entry: Entry) -> PeerProcess:
    """Raises PeerError with a hint when the environment is not there."""
    if not python(entry.system).exists():
        raise PeerError("not installed; run with --setup")
    return PeerProcess(command(entry.system), BUILD / "logs" / f"{entry}.log", ROOT)


def model_path(model: str, entry: Entry) -> Path:
    if model in SHAPES and entry.system == "llama.cpp":
        return gguf_path(model, entry)
    return BUILD / "models" / model / f"{entry.system}-{entry.precision}"


def gguf_path(model: str, entry: Entry) -> Path:
    """The file of a model in shapes.py that both sides read."""
    kind = entry.precision.partition("+")[0]
    return BUILD / "models" / model / f"{GGUF_KINDS.get(kind, kind)}.gguf"


def set_up(model: str, config: dict[str, Any], entry: Entry) -> None:
    """Make what is missing of an entry's environment and model files.  Raises PeerError."""
    make_environment(entry.system)
    path = model_path(model, entry)
    source = BUILD / "models" / model / "source"
    if model in SHAPES:
        source = make_gguf(model, entry)
    if path.exists():
        return
    if SYSTEMS[entry.system].converts and not source.exists():
        make_source(config, source)
    with start(entry) as process:
        request = {"config": config, "source": str(source), "out": str(path), "precision": entry.precision}
        process.ask("prepare", timeout_s=LONGEST_PREPARATION_S, **request)


def make_environment(system: str) -> None:
    """A virtual environment with the peer's pinned packages; made again when the pins change."""
    if system == "llmc":
        return
    pins = Path(__file__).parent / "requirements" / f"{SYSTEMS[system].module}.txt"
    folder = BUILD / SYSTEMS[system].module
    stamp = folder / "requirements.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip")]
        subprocess.run([*pip, "install", "-q", "-r", str(pins)], check=True)
        # optimum-intel brings one that does not match a CPU build of torch, and then nothing can be imported.
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
    except subprocess.CalledProcessError as error:
        raise PeerError(f"{' '.join(error.cmd[:3])} … failed; its output is above") from error
    stamp.write_text(pins.read_text())


def make_gguf(model: str, entry: Entry) -> Path:
    """The model's file at an entry's precision."""
    if entry.system not in ("llmc", "llama.cpp"):
        raise PeerError(f"{entry.system} does not read {model}")
    path = gguf_path(model, entry)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write_gguf(SHAPES[model](), path.stem, part)
        part.replace(path)
    return path


def make_source(config: dict[str, Any], folder: Path) -> None:
    """The folder that converters read, drawn in the environment of hf."""
    make_environment("hf")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    given = part / "given.json"
    given.write_text(json.dumps(config))
    made = subprocess.run(
        [str(python("hf")), "-m", "llmc.bench.peers.source_model", str(given), str(part)], cwd=ROOT, check=False
    )
    if made.returncode:
        raise PeerError("the source model could not be written; its output is above")
    part.replace(folder)
