"""Make the folder that is carried to a machine with a GPU.

    python bench/gpu/prepare.py -o build/gpu-kit [--models llama2-7b,opt-6.7b] [--quant llama2-7b:int8,…] [--most 5]

Kernels are compiled here, models planned here; nothing there needs more than Python, NumPy and the driver.  What is
compiled is kept in the kernel cache: a preparation that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

import llmc
from llmc.bench.gpu import micro, whole
from llmc.bench.gpu.chains import add_chains
from llmc.bench.gpu.jobs import Jobs, add_experts, add_model, add_odd
from llmc.bench.gpu.kit import write_cubins
from llmc.bench.gpu.latent_jobs import add_latents
from llmc.bench.gpu.small_models import add_small
from llmc.compiler import driver
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.source import SourceModel
from llmc.compiler.kernel import FEW_ROWS, Kernel
from llmc.compiler.plan import Program
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.rewrite import rewrite
from llmc.compiler.target import Target, parse_target
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache, records
from llmc.schedules.switches import PASSES, toggled

HERE = Path(__file__).resolve().parent
PACKAGE = Path(llmc.__file__).parent
PARTS = (
    "__init__.py",
    "bench/__init__.py",
    "bench/contexts.py",
    "bench/steps.py",
    "bench/gpu/*.py",
    "compiler/__init__.py",
    "compiler/fold_norm.py",
    "compiler/kernel.py",
    "compiler/target.py",
    "runtime/*.py",
    "schedules/__init__.py",
    "schedules/attention_call.py",
    "schedules/fp8_words.py",
    "schedules/mxfp4_words.py",
    "schedules/record_fields.py",
    "schedules/records.py",
    "schedules/rule.py",
    "schedules/states_call.py",
    "schedules/switches.py",
    "schedules/cuda/__init__.py",
    "schedules/cuda/deferred_norm.py",
    "schedules/cuda/quant_strips.py",
    "schedules/cuda/tile_layout.py",
    "schedules/tuning/__init__.py",
    "schedules/tuning/in_place.py",
    "schedules/tuning/limits.py",
    "schedules/tuning/lines.py",
)
"""The files of llmc that the programs in a kit import."""
ONLY_HERE = (
    "prepare.py",
    "jobs.py",
    "latent_jobs.py",
    "state_jobs.py",
    "recipes.py",
    "small_models.py",
    "carry.py",
    "chains.py",
    "chart.py",
    "conversation.py",
)
Odd = Literal["all", "few", "none"]
BATCH = (1, 2, 4, 8, 16, 32, 64)
QUANTISED_BATCH = (1, 2, 4, 8)
SETTINGS: dict[str, Any] = {
    "micro_times": micro.TIMES,
    "copy_bytes": 2 << 30,
    "launches": 200,
    "products": [[8192, 8192, 8192], [2048, 12288, 4096], [2048, 4096, 4096], [2048, 22016, 4096], [2048, 4096, 11008]],
    "sustained_s": 1.0,
    "l2_bytes": 60 << 20,
    "shortest_ms": 1.0,
    "replays": 7,
    "switched_prompts": [1024, 2048, 4096],
    "pairs": 12,
    "in_place": [
        *([1, 128], [8, 128], [1, 1024], [8, 1024]),
        *([2, 128], [4, 128], [16, 128], [64, 128]),
        *([2048, 2048], [1024, 1024], [512, 512]),
    ],
    **whole.SETTINGS,
}
"""in_place: rows, and the length of context, of the layers in which candidates are measured."""


@dataclass(frozen=True)
class Wanted:
    """A model to carry: its name or folder, how it is quantised (as in compile_model), how long its sequences are, and
    its batch sizes.  quant_lm_head: not, as in what was measured before.  switch: a pass that is turned to what it is
    not (schedules/switches.py)."""

    model: str
    quant: str = "none"
    quant_group: int | None = None
    quant_lm_head: bool | None = False
    max_sequence: int | None = 4096
    batch: tuple[int, ...] = BATCH
    switch: str = ""

    @property
    def name(self) -> str:
        quant = f"-{self.quant}" if self.quant != "none" else ""
        return Path(self.model).name + quant + (f"@{self.switch}" if self.switch else "")


@dataclass(frozen=True)
class Planned:
    """A model, planned for a GPU.  plain: without passes that are switched on, as calls are checked and tuned."""

    wanted: Wanted
    source: SourceModel
    scheme: Scheme | None
    step_graph: ir.Model
    graph_section: bytes
    tuned: records.Tuned
    program: Program
    plain: Program


def plan_model(wanted: Wanted, target: Target) -> Planned:
    """The model's plans as compiling makes them, and what passes made of it; no weight is read."""
    scheme = Scheme.parse(wanted.quant, wanted.quant_group, wanted.quant_lm_head)
    source = load_source(wanted.model, weights="random", dtype="bf16", max_sequence=wanted.max_sequence, has_f16=True)
    return plan_graph(wanted, target, source, scheme, rewrite(source, scheme, None, target.kind))


def plan_graph(
    wanted: Wanted, target: Target, source: SourceModel, scheme: Scheme | None, graph: tuple[ir.Model, bytes]
) -> Planned:
    """graph: the step graph, and its section."""
    tuned = records.installed(target)
    if wanted.switch:
        tuned.switches[wanted.switch] = toggled(tuned.switches.values(), wanted.switch, FEW_ROWS + 1)

    def planned(tuned: records.Tuned) -> Program:
        return driver.plan(graph[0], source, target, wanted.batch, source.dtype, tuned)

    program = planned(tuned)
    plain = planned(replace(tuned, switches={})) if tuned.on(target) else program
    return Planned(wanted, source, scheme, *graph, tuned, program, plain)


def prepare(
    out: Path,
    target: Target,
    models: Sequence[Wanted],
    *,
    most: int = 5,
    carried: bool = True,
    odd: Odd = "all",
    settings: dict[str, Any] | None = None,
    switched: Sequence[str] = (),
    experts: bool = False,
    small: Path | None = None,
) -> dict[str, Any]:
    """Write a kit.  most: candidates a job.  carried: artifacts without weights too.  odd: which odd shapes.  switched:
    the models, by name, that are carried once more for each pass with a switch, turned to what it is not.  small: a
    folder of small checkpoints, carried whole.

    Returns a report: path, jobs, candidates, kernels, bytes.  Raises LlmcError: the folder is another's.
    """
    if (out / "llmc").exists() and not (out / "kit.json").exists():  # it would be replaced
        raise LlmcError("the folder has an llmc that is no kit's", place=str(out), hint="name a folder of its own")
    planned = [plan_model(wanted, target) for wanted in models]
    settings = {**SETTINGS, **(settings or {})}
    jobs, chains = jobs_of(planned, target, most, settings["in_place"], odd)
    layers = add_experts(jobs) if experts else []
    if experts:
        add_latents(jobs, most)
    kernels = {**jobs.kernels, **micro_kernels()}
    out.mkdir(parents=True, exist_ok=True)
    cubins = cache.compile_kernels(list(kernels.values()), target, progress=show)
    write_cubins(out, dict(zip(kernels, cubins, strict=True)))
    others = with_others(planned, switched, target) if carried else []
    if carried:
        write_models(out, [*planned, *others], target)
    said = {
        "target": str(target),
        "settings": settings,
        "kernels": {name: kernel_to_json(kernel) for name, kernel in kernels.items()},
        "jobs": list(jobs.said.values()),
        "models": [each.wanted.name for each in planned] if carried else [],
        "chains": chains,
        "experts": layers,
        "switched": [pair_of(each) for each in others],
        "families": add_small(out, small, target) if small else {},
    }
    (out / "kit.json").write_text(json.dumps(said))
    write_programs(out)
    return {
        "path": str(out),
        "jobs": len(jobs.said),
        "candidates": sum(len(job["candidates"]) for job in jobs.said.values()),
        "kernels": len(kernels),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def jobs_of(
    planned: Sequence[Planned], target: Target, most: int, in_place: Sequence[Sequence[int]], odd: Odd
) -> tuple[Jobs, list[dict[str, Any]]]:
    """The calls of models, of chains of their layers, and of odd shapes; those chains."""
    jobs = Jobs(target, {}, {}, records.installed(target))
    for each in planned:
        add_model(jobs, (choice.call for choice in each.plain.choices), most)
    chains = [chain for each in planned for chain in add_chains(jobs, each.wanted.name, each.plain, most, in_place)]
    if odd != "none":
        add_odd(jobs, 2 if most > 1 else 1, few=odd == "few")
    return jobs, chains


def with_others(planned: Sequence[Planned], names: Sequence[str], target: Target) -> list[Planned]:
    """The models of these names once more for each pass with a switch, turned."""
    models = [each for each in planned if each.wanted.name in names]
    wanted = [(each, replace(each.wanted, switch=name, batch=(1,))) for each in models for name in PASSES]
    return [plan_graph(w, target, m.source, m.scheme, (m.step_graph, m.graph_section)) for m, w in wanted]


def write_models(out: Path, models: Sequence[Planned], target: Target) -> None:
    from llmc.bench.gpu.carry import write_model

    for each in models:
        print(f"{each.wanted.name}: how its weights are made", file=sys.stderr)
        write_model(out / "models" / each.wanted.name, each, target)


def pair_of(planned: Planned) -> dict[str, Any]:
    """What a kit says of an artifact beside that of the same model.  adds: whether it is the one with the pass."""
    wanted = planned.wanted
    return {
        "model": replace(wanted, switch="").name,
        "artifact": wanted.name,
        "pass": wanted.switch,
        "adds": planned.tuned.switches[wanted.switch].is_on,
        "n_context": planned.source.n_context,
    }


def micro_kernels() -> dict[str, Kernel]:
    """Kernels of micro/*.cu under the names that they define."""
    found = {}
    for each in micro.MICROS.values():
        source = (HERE / "micro" / f"{each.name}.cu").read_text()
        name = f"micro_{each.name}"
        kernel = Kernel(name, source, source.__str__, each.n_threads, each.shared_bytes, dependent=each.launches > 1)
        found[name] = kernel
    return found


def kernel_to_json(kernel: Kernel) -> dict[str, Any]:
    return {"n_threads": kernel.n_threads, "shared_bytes": kernel.shared_bytes, "dependent": kernel.dependent}


def write_programs(out: Path) -> None:
    """run.py, and the part of llmc that it imports."""
    shutil.copyfile(HERE / "run.py", out / "run.py")
    package = out / "llmc"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for pattern in PARTS:
        for path in sorted(PACKAGE.glob(pattern)):
            if path.name not in ONLY_HERE:
                place = package / path.relative_to(PACKAGE)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


def show(done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        print(f"{done} of {total} kernels compiled", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("build/gpu-kit"))
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--models", default="llama2-7b,opt-6.7b")
    parser.add_argument("--quant", default="llama2-7b:int8,llama2-7b:fp8,llama2-7b:int4", help="MODEL:SCHEME,…")
    parser.add_argument(
        "--switched", default="llama2-7b", help="models to carry with passes turned on that are off, too"
    )
    parser.add_argument("--small", type=Path, metavar="FOLDER", help="of small checkpoints, to carry whole")
    parser.add_argument("--most", type=int, default=5, help="candidates of a call [default: 5]")
    options = parser.parse_args()
    wanted = [Wanted(model) for model in options.models.split(",") if model]
    for pair in filter(None, options.quant.split(",")):
        model, _, quant = pair.partition(":")
        wanted.append(Wanted(model, quant, batch=QUANTISED_BATCH))
    target, switched = parse_target(options.target), [name for name in options.switched.split(",") if name]
    report = prepare(
        options.out, target, wanted, most=options.most, switched=switched, experts=True, small=options.small
    )
    print(json.dumps(report, indent=1))
    print(f"carry {options.out} to the machine with the GPU; there: python run.py --visit 1 -o OUT", file=sys.stderr)


if __name__ == "__main__":
    main()
