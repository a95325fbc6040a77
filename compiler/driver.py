"""`llmc compile`, top to bottom: load, rewrite, plan, compile kernels, link, pack weights, certify."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmc import __version__, passes, schedules
from llmc.compiler import artifact, certify, graph, report
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.link import c_compiler, link
from llmc.compiler.plan import Program
from llmc.compiler.planner import Planner
from llmc.compiler.quantize import Scheme
from llmc.compiler.target import Target, host_features, parse_target
from llmc.passes.quantize_weights import quantize_weights
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache, records

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total); total 0 where it is not known."""

PREFILL_CHUNKS = (32, 128, 512)
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
    quant: "none", or how linear layers' weights are stored: "int8", "int4".  quant_group: weights that share a scale in
    int4, 32 (when None) or 128.  quant_lm_head: quantise the product that makes the logits too.
    kv_dtype: how keys and values are kept: "f32", "bf16" or "int8", `dtype` when None.
    max_sequence: the most tokens of a sequence, the model's own limit when None.  weights: "real" or "random".
    verify: compare the artifact with its source, and fail below the bar.  dump: a folder for every stage of the graph.
    Returns a report: path, bytes, seconds by stage, certificate.  Raises LlmcError; leaves no partial file behind.
    """
    stages = Stages(progress)
    machine = parse_target(target)
    scheme = Scheme.parse(quant, quant_group, quant_lm_head)
    check_batch(batch)
    c_compiler()  # what is missing at the end is better said before the work
    with stages("load"):
        source = load_source(str(model), weights=weights, dtype=dtype, max_sequence=max_sequence, seed=seed)
    path = Path(out) if out is not None else Path(f"{source.name}.so")
    artifact.check_place(path)
    with stages("passes"):
        step_graph, history = rewrite(source, scheme, Path(dump) if dump else None)
    with stages("plan"):
        kv_dtype = kv_dtype or source.dtype
        tuned = records.installed(machine)
        program = plan(step_graph, source, machine, batch, kv_dtype, tuned)
        artifact.check_room(path, program.weight_bytes)
    with stages("kernels") as tick:
        objects = cache.compile_kernels(program.kernels, machine, progress=tick)
    with stages("link"):
        pointers = artifact.pointer_counts(program)
        code = link([(k.name, pointers[i]) for i, k in enumerate(program.kernels)], objects, cache.folder())
    manifest = report.manifest(source, machine, program, batch, scheme, kv_dtype, version=__version__)
    with artifact.ArtifactWriter(path) as writer:
        with stages("weights") as tick:
            write_sections(writer, code, program, source, machine, report.graph_section(step_graph, history), tick)
            writer.finish(manifest)
        with stages("verify"):
            manifest["certificate"] = certificate(writer.partial, source, machine, scheme, kv_dtype, verify)
            writer.finish(manifest)
        writer.publish()
    return report.compile_report(path, manifest, stages.seconds, tuned.notes)


def check_batch(batch: Sequence[int]) -> None:
    if not batch or any(not 1 <= size <= MAX_BATCH for size in batch):
        raise LlmcError(f"batch sizes must lie between 1 and {MAX_BATCH}", place=f"--batch {','.join(map(str, batch))}")


def rewrite(source: SourceModel, scheme: Scheme | None, dump: Path | None) -> tuple[ir.Model, list[report.PassRecord]]:
    """Run the passes, then quantise if asked, keeping what each did; every stage goes to `dump` as numbered ONNX and
    text."""
    history: list[report.PassRecord] = []

    def observe(name: str, model: ir.Model, n_rewrites: int) -> None:
        if dump is not None:
            graph.dump_stage(model, dump, len(history), name)
        history.append(report.PassRecord(name, n_rewrites, sum(1 for _ in model.graph)))

    observe("export", source.graph, 0)
    try:
        step_graph = passes.run(source.graph, n_context=source.n_context, observe=observe)
    except LlmcError as error:
        fact = f"the architecture {source.architecture} is not supported: {error.fact}"
        raise LlmcError(fact, place=error.place, hint=error.hint) from error
    if scheme is not None:
        observe("quantize_weights", step_graph, quantize_weights(step_graph, scheme))
    graph.check_step_graph(step_graph)
    return step_graph, history


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

    chunks = [chunk for chunk in PREFILL_CHUNKS if chunk <= source.n_context]
    planner = Planner(step_graph.graph, implement, kv_dtype, source.n_context)
    return planner.plan(sorted({1, *batch, *chunks}), sorted({1, *batch}))


def write_sections(
    writer: artifact.ArtifactWriter,
    code: bytes,
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
    if source.vocabulary is not None:
        writer.add("vocabulary", iter([artifact.encode_vocabulary(source.vocabulary)]))
    if source.tokenizer_json is not None:
        writer.add("tokenizer", iter([source.tokenizer_json]))
    writer.add("graph", iter([graph_section]))


def certificate(
    path: Path, source: SourceModel, machine: Target, scheme: Scheme | None, kv_dtype: str, verify: bool
) -> dict[str, Any]:
    """Run the artifact against its source, unless there is a reason not to."""
    missing = sorted(set(machine.features) - host_features())
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
