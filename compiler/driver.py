"""`llmc compile`, top to bottom: load, rewrite, plan, compile kernels, link, pack weights, certify."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from llmc import __version__, passes, schedules
from llmc.compiler import artifact, certify, graph, report
from llmc.compiler.calibrate import calibrated, check_file, fit_weights
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.layer_text import one_layer
from llmc.compiler.link import c_compiler, link
from llmc.compiler.plan import Program
from llmc.compiler.planner import Planner
from llmc.compiler.quantize import Scheme
from llmc.compiler.target import Target, host_features, missing_device, parse_target
from llmc.passes.defer_norm import defer_norm
from llmc.passes.fuse_norm_linear import fuse_norm_linear
from llmc.passes.quantize_weights import quantize_weights
from llmc.runtime import format as fmt
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache, records

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total); total 0 where it is not known."""

PREFILL_CHUNKS = {"cpu": (32, 128, 512), "cuda": (64, 128, 512, 2048)}
MAX_BATCH = 512


@dataclass
class Stages:
    """Reports progress and keeps the seconds each stage took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[int, int], None]]:
        began = time.perf_counter()
        self.progress(name, 0, 0)
        last = (0, 0)

        def tick(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            self.progress(name, done, total)

        yield tick
        self.seconds[name] = time.perf_counter() - began
        self.progress(name, max(last[1], 1), max(last[1], 1))


def compile_model(
    model: str | Path,
    *,
    out: str | Path | None = None,
    target: str = "cpu",
    dtype: str | None = None,
    quant: str = "none",
    quant_group: int | None = None,
    quant_lm_head: bool = False,
    calibrate: str | Path | None = None,
    kv_dtype: str | None = None,
    batch: Sequence[int] = (1, 2, 4, 8),
    max_sequence: int | None = None,
    weights: str = "real",
    verify: bool = True,
    dump: str | Path | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compile a model into an artifact.

    model: a folder, a hub id or a known name.  out: the artifact's path; "<name>.so" when None.
    dtype: "f32" or "bf16", the checkpoint's own when None.  batch: the batch sizes decode is planned for.
    quant: "none", or how linear layers' weights are stored: "int8", "int4", "fp8".  quant_group: weights that share a
    scale in int4, 32 (when None) or 128.  quant_lm_head: quantise the product that makes the logits too.
    calibrate: a file of text, or of token ids (.json), whose like the quantised weights are to do best on.
    kv_dtype: how keys and values are kept: "f32", "bf16" or "int8", `dtype` when None.
    max_sequence: the most tokens of a sequence, the model's own limit when None.  weights: "real" or "random".
    verify: compare the artifact with its source, and fail below the bar.  dump: a folder for every stage of the graph.
    Returns a report: path, bytes, seconds by stage, certificate.  Raises LlmcError; leaves no partial file behind.
    """
    stages = Stages(progress)
    machine = parse_target(target)
    scheme = Scheme.parse(quant, quant_group, quant_lm_head)
    check_request(machine, batch, scheme, calibrate)
    with stages("load"):
        source = load_source(str(model), weights, dtype, max_sequence, seed, has_f16=machine.kind == "cuda")
        scheme = calibrated(scheme, calibrate, source)
    path = artifact.check_place(Path(out) if out is not None else Path(f"{source.name}.so"))
    with stages("passes"):
        step_graph, graphs = rewrite(source, scheme, Path(dump) if dump else None, machine.kind)
    with stages("plan"):
        kv_dtype = kv_dtype or source.dtype
        tuned = records.installed(machine)
        program = plan(step_graph, source, machine, batch, kv_dtype, tuned)
        artifact.check_room(path, program.weight_bytes)
    with stages("kernels") as tick:
        objects = cache.compile_kernels(program.kernels, machine, progress=tick)
    with stages("link"):
        code, images = linked(program, machine, objects)
    manifest = report.manifest(source, machine, program, batch, scheme, kv_dtype, version=__version__)
    with artifact.ArtifactWriter(path) as writer:
        with stages("weights") as tick:
            write_sections(writer, code, images, program, source, machine, graphs, tick)
            writer.finish(manifest)
        with stages("verify"):
            manifest["certificate"] = certificate(writer.partial, source, machine, scheme, kv_dtype, verify)
            writer.finish(manifest)
        writer.publish()
    return report.compile_report(path, manifest, stages.seconds, (*source.notes, *tuned.notes))


def check_request(machine: Target, batch: Sequence[int], scheme: Scheme | None, calibrate: str | Path | None) -> None:
    """Say before the work what would end it."""
    check_batch(batch)
    check_file(calibrate, scheme)
    c_compiler()
    if machine.kind == "cuda":
        from llmc.schedules.cuda import compile as cuda

        cuda.compiler()


def check_batch(batch: Sequence[int]) -> None:
    if not batch or any(not 1 <= size <= MAX_BATCH for size in batch):
        raise LlmcError(f"batch sizes must lie between 1 and {MAX_BATCH}", place=f"--batch {','.join(map(str, batch))}")


def rewrite(
    source: SourceModel, scheme: Scheme | None, dump: Path | None, device: str = "cpu"
) -> tuple[ir.Model, bytes]:
    """Run the passes, then quantise if asked, then what only this kind of device wants; every stage goes to `dump` as
    numbered ONNX and text.  -> the step graph, and the graph section: what each pass did."""
    history: list[report.PassRecord] = []
    exported_layer = one_layer(graph.to_text(source.graph))

    def observe(name: str, model: ir.Model, n_rewrites: int) -> None:
        if dump is not None:
            graph.dump_stage(model, dump, len(history), name)
        history.append(report.PassRecord(name, n_rewrites, sum(1 for _ in model.graph)))

    observe("export", source.graph, 0)
    try:
        sums_to: Literal["norms", "products"] = "products" if device == "cuda" else "norms"
        step_graph = passes.run(source.graph, n_context=source.n_context, sums_to=sums_to, observe=observe)
    except LlmcError as error:
        fact = f"the architecture {source.architecture} is not supported: {error.fact}"
        raise LlmcError(fact, place=error.place, hint=error.hint) from error
    if scheme is not None:
        observe("quantize_weights", step_graph, quantize_weights(step_graph, scheme))
        if scheme.calibration is not None:
            fit_weights(step_graph, scheme.calibration)
    if device == "cuda":
        observe("fuse_norm_linear", step_graph, fuse_norm_linear(step_graph))
        observe("defer_norm", step_graph, defer_norm(step_graph))
    graph.check_step_graph(step_graph)
    return step_graph, report.graph_section(step_graph, history, exported_layer)


def plan(
    step_graph: ir.Model,
    source: SourceModel,
    machine: Target,
    batch: Sequence[int],
    kv_dtype: str,
    tuned: records.Tuned | None = None,
) -> Program:
    """Bodies for the batch sizes and a few prefill chunks, heads for the batch sizes; with tuned schedules, if any."""

    def implement(call: Call) -> Implementation:
        return schedules.implement(call, machine, tuned)

    chunks = [chunk for chunk in PREFILL_CHUNKS[machine.kind] if chunk <= source.n_context]
    planner = Planner(step_graph.graph, implement, kv_dtype, source.n_context, machine.kind)
    return planner.plan(sorted({1, *batch, *chunks}), sorted({1, *batch}))


def linked(program: Program, machine: Target, objects: Sequence[bytes]) -> tuple[bytes, Sequence[bytes]]:
    """The runtime and the kernels of a CPU in one shared library; beside it the kernels of a GPU."""
    if machine.kind == "cuda":
        return link([], [], cache.folder()), objects
    pointers = artifact.pointer_counts(program)
    return link([(k.name, pointers[i]) for i, k in enumerate(program.kernels)], objects, cache.folder()), []


def write_sections(
    writer: artifact.ArtifactWriter,
    code: bytes,
    images: Sequence[bytes],
    program: Program,
    source: SourceModel,
    machine: Target,
    graph_section: bytes,
    tick: Callable[[int, int], None],
) -> None:
    """Every section but the manifest, in the file's order."""
    writer.add("code", iter([code]))
    writer.add("weights", artifact.packed_weights(program.weights, tick), alignment=4096)
    bos = -1 if source.bos is None else source.bos
    writer.add("plan", iter([artifact.encode_plan(program, machine, source.eos, bos)]))
    if images:
        writer.add("cuda", iter([fmt.pack_images(images)]))
    if source.vocabulary is not None:
        writer.add("vocabulary", iter([artifact.encode_vocabulary(source.vocabulary)]))
    if source.tokenizer_json is not None:
        writer.add("tokenizer", iter([source.tokenizer_json]))
    writer.add("graph", iter([graph_section]))


def certificate(
    path: Path, source: SourceModel, machine: Target, scheme: Scheme | None, kv_dtype: str, verify: bool
) -> dict[str, Any]:
    """Run the artifact against its source, unless there is a reason not to."""
    missing = sorted(set(machine.features) - host_features()) if machine.kind == "cpu" else missing_device(machine)
    reasons = {
        "--verify off": not verify,
        "random weights": source.random,
        f"this machine lacks {', '.join(missing)}": bool(missing),
    }
    for reason, holds in reasons.items():
        if holds:
            return {"status": "skipped", "reason": reason}
    judged_as = certify.judged_as(scheme.name if scheme else None, source.dtype, kv_dtype)
    return certify.certify_source(path, source, judged_as)
