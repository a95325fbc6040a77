"""`llmc compile`, top to bottom: load, rewrite, plan, compile kernels, link, pack weights, certify."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmc import __version__, schedules
from llmc.compiler import artifact, report
from llmc.compiler.certificate import bars, certify
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.frontend.embedding import Task
from llmc.compiler.frontend.named_adapters import parse_adapters
from llmc.compiler.frontend.tower import MOST_ROWS
from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.link import c_compiler, link
from llmc.compiler.plan import Program
from llmc.compiler.plan_tower import with_sized_tower, with_tower
from llmc.compiler.planner import Planner
from llmc.compiler.quantization.calibrate import calibrated, check_file
from llmc.compiler.quantization.mixed import with_wide
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.rewrite import ADAPTED, rewrite_each, rewrite_tower
from llmc.compiler.share_weights import SharedWeights, share_weights
from llmc.compiler.target import Target, architecture_of, missing, never_chosen, parse_targets
from llmc.passes.quantize_weights import are_logits_quantized
from llmc.passes.rewritten import Rewritten
from llmc.runtime import format as fmt
from llmc.runtime.artifact import program_section
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache, records

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total); total 0 where it is not known."""

PREFILL_CHUNKS = {"cpu": (32, 128, 512), "cuda": (64, 128, 256, 512, 1024, 2048)}
PICTURE_ROWS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Rows of the plans of a tower of pictures of any size, which takes as long as a plan is large."""
BESIDE_PICTURE = 32
"""Tokens of the text for which a step of a picture has room: what stands around it, and a question."""
WHOLE_ROWS = {
    "cpu": (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144),
    "cuda": (16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144),
}
"""Rows of the steps of a model that reads texts whole, and cannot make two steps of one: a third or a half apart, but
where all of few rows take as long as one."""
LEAST_WHOLE = {"cpu": 512, "cuda": 2048}
"""Rows of its largest step at least: several texts are read in one; on a GPU no more than `batch` of the longest."""
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


@dataclass(frozen=True)
class Part:
    """One target of an artifact.  graph_section: how its step graph came to be.  notes: what the user should know.
    switched: the passes that a measurement has turned on for it, in words."""

    machine: Target
    program: Program
    graph_section: bytes
    notes: tuple[str, ...] = ()
    switched: tuple[str, ...] = ()


def compile_model(
    model: str | Path,
    *,
    out: str | Path | None = None,
    target: str | Sequence[str] = "cpu",
    dtype: str | None = None,
    quant: str = "none",
    quant_group: int | None = None,
    quant_lm_head: bool | None = None,
    quant_bits: float | None = None,
    calibrate: str | Path | None = None,
    kv_dtype: str | None = None,
    batch: Sequence[int] = (1, 2, 4, 8),
    max_sequence: int | None = None,
    weights: str = "real",
    verify: bool = True,
    dump: str | Path | None = None,
    seed: int = 0,
    adapters: Sequence[str | Path] = (),
    task: Task = "auto",
    images: bool = False,
    max_image_rows: int = MOST_ROWS,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Compile a model into an artifact.

    model, weights, seed, adapters, task, images, max_image_rows: see `load_source`.  out: the artifact's path, else
    "<name>.so".  target: machines, the best first: a list, or "cuda:sm_90a,cpu".  dtype: "f32" or "bf16", else the
    checkpoint's.  batch: sizes that decode is planned for.  quant: of linear layers' weights: "none", "int8", "int4",
    "fp8", "mxfp4".  quant_group: weights that share a scale in int4: 32, or 128.  quant_lm_head: the logits' product as
    the others, else in 8 bits.  quant_bits: of a weight, on average: products that need them have 8.  calibrate: a file
    of text, or of token ids (.json), that codes are fitted to.  kv_dtype: of keys and values: "f32", "bf16", "int8",
    else `dtype`.  max_sequence: most tokens, else the model's limit.  dump: a folder for every stage of the graph.
    verify: fail where its source is too far away.  -> path, bytes, seconds by stage, certificate.  Raises LlmcError.
    """
    stages, how = Stages(progress), (weights, dtype, max_sequence, seed, adapters, task)
    machines, scheme = parse_targets(target), Scheme.parse(quant, quant_group, quant_lm_head, quant_bits)
    check_request(machines, batch, scheme, calibrate, out, adapters, images=images)
    with stages("load"):
        source = load_source(str(model), *how, images=images, max_image_rows=max_image_rows, has_f16=have_f16(machines))
    path = artifact.check_place(Path(f"{source.name}.so" if out is None else out), source.folder)
    scheme, chosen = fitted_to(calibrate, scheme, source, machines, stages)
    with stages("passes"):
        graphs, tower = rewritten(source, scheme, machines, Path(dump) if dump else None)
    with stages("plan"):
        kv_dtype, became = kv_dtype or source.dtype, settled(scheme, graphs)
        parts, shared = plan_each(graphs, source, machines, batch, kv_dtype, tower and tower[0])
        artifact.check_room(path, shared.n_bytes)
    code, objects = compiled(parts, stages)
    manifest = manifest_of(parts, source, batch, became, kv_dtype)
    with artifact.ArtifactWriter(path) as writer:
        with stages("weights") as tick:
            write_sections(writer, code, parts, objects, shared, source, tower, tick)
            writer.finish(manifest)
        with stages("verify"):
            manifest["certificate"] = certificate(writer.partial, source, machines, scheme, kv_dtype, verify)
            writer.finish(manifest)
        writer.publish()
    said = [*notes(source, parts, scheme), *chosen, *bars.notes_of(manifest["certificate"])]
    return report.compile_report(path, manifest, stages.seconds, said, shared.bytes_by_users())


def fitted_to(
    text: str | Path | None, scheme: Scheme | None, source: SourceModel, machines: Sequence[Target], stages: Stages
) -> tuple[Scheme | None, list[str]]:
    """The scheme with a text to calibrate by, if there is one, and with the products that get 8 bits, if some are to.
    And what to tell the user."""
    scheme = calibrated(scheme, text, source)
    if scheme is None or scheme.most_bits is None:
        return scheme, []
    with stages("importance"):
        return with_wide(scheme, source, inputs=any(machine.kind == "cpu" for machine in machines))


def rewritten(
    source: SourceModel, scheme: Scheme | None, machines: Sequence[Target], dump: Path | None
) -> tuple[dict[str, tuple[ir.Model, bytes]], tuple[ir.Model, bytes] | None]:
    """The step graph of each kind of device, and that of the tower, if there is one; each with its graph section."""
    graphs = rewrite_each(source, scheme, dump, [machine.kind for machine in machines])
    return graphs, rewrite_tower(source, dump)


def compiled(parts: Sequence[Part], stages: Stages) -> tuple[bytes, list[list[bytes]]]:
    """The artifact's code, and the compiled kernels of each program."""
    with stages("kernels") as tick:
        objects = compile_each(parts, tick)
    with stages("link"):
        return link_code(parts, objects), objects


def check_request(
    machines: Sequence[Target],
    batch: Sequence[int],
    scheme: Scheme | None,
    calibrate: str | Path | None,
    out: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    *,
    images: bool = False,
) -> None:
    """Say before the work what would end it."""
    check_batch(batch)
    parse_adapters(adapters)
    if out is not None:
        artifact.check_place(Path(out))
    check_file(calibrate, scheme)
    c_compiler(architecture_of(machines))
    if any(machine.kind == "cuda" for machine in machines):
        if images:
            hint = "without --images a model's text part is compiled alone"
            raise LlmcError("pictures have no kernels for GPUs yet", place="--images", hint=hint)
        from llmc.schedules.cuda import compile as cuda

        cuda.compiler()


def notes(source: SourceModel, parts: Sequence[Part], scheme: Scheme | None) -> list[str]:
    """What the user should be told."""
    of_parts = dict.fromkeys(note for part in parts for note in part.notes)
    packing = report.notes_of_packing(source, [part.program for part in parts], scheme)
    return [*source.notes, *packing, *never_chosen([part.machine for part in parts]), *of_parts]


def settled(scheme: Scheme | None, graphs: Mapping[str, tuple[ir.Model, bytes]]) -> Scheme | None:
    """The scheme, with what became of the product that makes the logits."""
    return scheme and replace(scheme, lm_head=any(are_logits_quantized(model) for model, _ in graphs.values()))


def have_f16(machines: Sequence[Target]) -> bool:
    """Whether there are kernels for float16 for all of these: CPUs have none."""
    return not any(machine.kind == "cpu" for machine in machines)


def check_batch(batch: Sequence[int]) -> None:
    if not batch or any(not 1 <= size <= MAX_BATCH for size in batch):
        raise LlmcError(f"batch sizes must lie between 1 and {MAX_BATCH}", place=f"--batch {','.join(map(str, batch))}")


def plan_each(
    graphs: Mapping[str, tuple[ir.Model, bytes]],
    source: SourceModel,
    machines: Sequence[Target],
    batch: Sequence[int],
    kv_dtype: str,
    tower: ir.Model | None = None,
) -> tuple[list[Part], SharedWeights]:
    """A program for each target, over one weights section.  tower: the graph of what makes rows of pictures."""
    parts = []
    for index, machine in enumerate(machines):
        step_graph, graph_section = graphs[machine.kind]
        tuned = records.installed(machine)
        is_second = any(other.kind == machine.kind == "cpu" for other in machines[:index])
        suffix = f"_{machine.level.removeprefix('x86-64-').replace('+', '')}" if is_second else ""
        adapted = graphs[ADAPTED][0] if ADAPTED in graphs and machine.kind == "cuda" else None
        program = plan(step_graph, source, machine, batch, kv_dtype, tuned, suffix, tower, adapted)
        switched = tuple(map(str, tuned.on(machine)))
        said = [] if source.embedding or source.classification else report.notes_of_logits(step_graph, source.dtype)
        parts.append(Part(machine, program, graph_section, (*said, *tuned.notes), switched))
    programs, shared = share_weights([part.program for part in parts])
    return [replace(part, program=program) for part, program in zip(parts, programs, strict=True)], shared


def plan(
    step_graph: ir.Model,
    source: SourceModel,
    machine: Target,
    batch: Sequence[int],
    kv_dtype: str,
    tuned: records.Tuned | None = None,
    suffix: str = "",
    tower: ir.Model | None = None,
    adapted: ir.Model | None = None,
) -> Program:
    """Bodies for the batch sizes and a few prefill chunks, heads for the batch sizes; with what was tuned, if anything.

    suffix: of the kernels' names, which are those of functions: programs for CPUs have their kernels in one library.
    adapted: of a GPU: the graph of steps in which a row has an adapter, where it is not the same.
    """
    tuned = tuned or records.Tuned()

    def implement(call: Call) -> Implementation:
        found = schedules.implement(call, machine, tuned)
        return with_suffix(found, suffix) if suffix else found

    switched = tuned.switched if tuned.on(machine) else None
    rewritten = Rewritten(step_graph, kv_dtype, switched)
    joined = rewritten.joined if machine.kind == "cuda" else None
    sizes = (source.n_context, machine.kind, source.n_vocab, source.n_types)
    names = tuple(named.name for named in source.named)
    planner = Planner(step_graph.graph, implement, kv_dtype, *sizes, names, rewritten.graph, joined)
    if adapted is not None:
        with_adapters = Rewritten(adapted, kv_dtype, switched)
        planner.adapted, planner.joined_adapted = with_adapters.graph, with_adapters.joined
    heads = sorted({1, *batch})
    if planner.is_whole:
        return planner.plan(whole_rows(source.n_context, machine.kind, max(heads)), heads)
    chunks = [chunk for chunk in PREFILL_CHUNKS[machine.kind] if chunk <= source.n_context]
    if source.sees_ahead:
        chunks = with_picture(chunks, source)
    program = planner.plan(sorted({*heads, *chunks}), heads)
    if tower is None or source.images is None:
        return program
    sized = source.images.tower.sized
    if sized is None:
        return with_tower(planner, program, tower.graph, source.dtype)
    rows = picture_rows(source.images.tower.n_rows, sized.merge)
    return with_sized_tower(planner, program, tower.graph, source.dtype, sized, rows)


def picture_rows(most: int, merge: int) -> list[int]:
    """Rows of the plans of a tower that takes pictures of up to so many: each of a whole number of cache lines of
    patches."""
    step = max(16 // merge**2, 1)
    most = -(-most // step) * step
    return [rows for rows in PICTURE_ROWS if rows < most] + [most]


def with_picture(chunks: list[int], source: SourceModel) -> list[int]:
    """Prefill chunks and one for all rows of a tile of a picture, which see each other, and a few tokens beside them.

    Raises LlmcError where a text has no room for them.
    """
    assert source.images is not None
    n_rows = source.images.tower.n_rows
    if n_rows > source.n_context:
        fact = f"a picture becomes {n_rows} tokens, which see each other, and a text has {source.n_context}"
        raise LlmcError(fact, place=f"--max-seq {source.n_context}", hint=f"ask for {n_rows} or more")
    return [*chunks, min(n_rows + BESIDE_PICTURE, source.n_context)]


def whole_rows(n_context: int, kind: str, n_texts: int) -> list[int]:
    """Rows of the bodies of a model that reads texts of up to n_context tokens whole, on a kind of device; n_texts: so
    many at a time are enough for a GPU."""
    least = min(LEAST_WHOLE[kind], n_texts * n_context) if kind == "cuda" else LEAST_WHOLE[kind]
    most = max(n_context, least)
    return [rows for rows in WHOLE_ROWS[kind] if rows < most] + [-(-most // 16) * 16]


def with_suffix(implementation: Implementation, suffix: str) -> Implementation:
    kernels = [replace(launch.kernel, name=launch.kernel.name + suffix) for launch in implementation.launches]
    launches = (replace(launch, kernel=k) for launch, k in zip(implementation.launches, kernels, strict=True))
    return replace(implementation, launches=tuple(launches))


def compile_each(parts: Sequence[Part], tick: Callable[[int, int], None]) -> list[list[bytes]]:
    """The compiled kernels of each program."""
    total = sum(len(part.program.kernels) for part in parts)
    objects: list[list[bytes]] = []
    n_done = 0

    def progress(done: int, _: int) -> None:
        tick(n_done + done, total)

    for part in parts:
        objects.append(cache.compile_kernels(part.program.kernels, part.machine, progress))
        n_done += len(objects[-1])
    return objects


def link_code(parts: Sequence[Part], objects: Sequence[Sequence[bytes]]) -> bytes:
    """The runtime and the kernels of all CPUs in one shared library."""
    kernels: list[tuple[str, int]] = []
    files: list[bytes] = []
    for part, compiled in zip(parts, objects, strict=True):
        if part.machine.kind == "cpu":
            pointers = artifact.pointer_counts(part.program)
            kernels += [(kernel.name, pointers[i]) for i, kernel in enumerate(part.program.kernels)]
            files += compiled
    return link(kernels, files, cache.folder(), architecture_of([part.machine for part in parts]))


def linked(program: Program, machine: Target, objects: Sequence[bytes]) -> tuple[bytes, Sequence[bytes]]:
    """The code of an artifact for one target; beside it the kernels of a GPU."""
    return link_code([Part(machine, program, b"")], [objects]), objects if machine.kind == "cuda" else []


def manifest_of(
    parts: Sequence[Part], source: SourceModel, batch: Sequence[int], scheme: Scheme | None, kv_dtype: str
) -> dict[str, Any]:
    return report.of_several(
        [
            report.manifest(source, p.machine, p.program, batch, scheme, kv_dtype, p.switched, version=__version__)
            for p in parts
        ]
    )


def write_sections(
    writer: artifact.ArtifactWriter,
    code: bytes,
    parts: Sequence[Part],
    objects: Sequence[Sequence[bytes]],
    shared: SharedWeights,
    source: SourceModel,
    tower: tuple[ir.Model, bytes] | None,
    tick: Callable[[int, int], None],
) -> None:
    """Every section but the manifest, in the file's order."""
    writer.add("code", iter([code]))
    writer.add("weights", artifact.packed_weights(shared.placed, tick), alignment=4096)
    bos = -1 if source.bos is None else source.bos
    for number, (part, images) in enumerate(zip(parts, objects, strict=True)):
        plan = artifact.encode_plan(part.program, part.machine, source.eos, bos)
        writer.add(program_section("plan", number), iter([plan]))
        if part.machine.kind == "cuda":
            writer.add(program_section("cuda", number), iter([fmt.pack_images(images)]))
    if source.vocabulary is not None:
        writer.add("vocabulary", iter([artifact.encode_vocabulary(source.vocabulary)]))
    if source.tokenizer_json is not None:
        writer.add("tokenizer", iter([source.tokenizer_json]))
    if source.chat is not None:
        writer.add("chat", iter([source.chat]))
    if source.images is not None and source.images.processor is not None:
        writer.add("processor", iter([source.images.processor]))
    for number, part in enumerate(parts):
        if number == 0 or part.graph_section != parts[0].graph_section:
            writer.add(program_section("graph", number), iter([part.graph_section]))
    if tower is not None:
        writer.add("tower", iter([tower[1]]))


def certificate(
    path: Path, source: SourceModel, machines: Sequence[Target], scheme: Scheme | None, kv_dtype: str, verify: bool
) -> dict[str, Any]:
    """Compare the first program that this machine can run with its source, unless there is a reason not to."""
    lacking = {str(machine): ", ".join(missing(machine)) for machine in machines}
    lacks = [what if len(machines) == 1 else f"{what} for {name}" for name, what in lacking.items()]
    reasons = {
        "--verify off": not verify,
        "random weights": source.random,
        f"this machine lacks {'; '.join(lacks)}": all(lacking.values()),
    }
    for reason, holds in reasons.items():
        if holds:
            return {"status": "skipped", "reason": reason}
    judged_as = certify.judged_as(scheme.name if scheme else None, source.dtype, kv_dtype)
    return certify.certify_source(path, source, judged_as, scheme)
