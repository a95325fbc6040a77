"""From a source's graph to a step graph for each kind of device: the passes, quantisation, and a record of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from llmc import passes
from llmc.compiler import graph, report
from llmc.compiler.frontend import SourceModel
from llmc.compiler.frontend.named_adapters import added_by
from llmc.compiler.frontend.tower import Tower
from llmc.compiler.layer_text import one_layer
from llmc.compiler.quantization.calibrate import fit_weights
from llmc.compiler.quantization.columns import Columns
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.refuse_for_gpu import refuse_experts, refuse_for_gpu
from llmc.passes.adapt_products import adapt_products
from llmc.passes.defer_norm import defer_norm
from llmc.passes.fuse_experts import fuse_experts
from llmc.passes.fuse_gated_norm import fuse_gated_norm
from llmc.passes.fuse_gates import fuse_gates
from llmc.passes.fuse_norm_linear import fuse_norm_linear
from llmc.passes.fuse_router import fuse_router
from llmc.passes.gather_together import gather_together
from llmc.passes.part_gates import part_gates
from llmc.passes.quantize_table import quantize_table
from llmc.passes.quantize_weights import quantize_weights
from llmc.passes.scale_columns import scale_columns
from llmc.passes.share_table import share_table
from llmc.runtime.errors import LlmcError

ADAPTED = "cuda, adapted"
"""What `rewrite_each` calls the graph of a GPU's steps in which a row has an adapter."""
SUMS_TO: Mapping[str, passes.SumsTo] = {"cpu": "norms", "cuda": "products"}


def rewrite(
    source: SourceModel, scheme: Scheme | None, dump: Path | None, device: str = "cpu"
) -> tuple[ir.Model, bytes]:
    """The step graph for one kind of device, and its graph section: see `rewrite_each`."""
    return rewrite_each(source, scheme, dump, [device])[device]


def rewrite_each(
    source: SourceModel, scheme: Scheme | None, dump: Path | None, devices: Sequence[str]
) -> dict[str, tuple[ir.Model, bytes]]:
    """Run the passes, then quantise if asked, then what only one kind of device wants.  -> for each kind the step
    graph, and the graph section: what each pass did.  Where there are adapters by name, GPUs have a second, ADAPTED.

    Every stage goes to `dump` as numbered ONNX and text, for several kinds to a folder each.  Kinds part where passes
    begin to differ: up to there a weight is one object in all of the graphs.
    """
    kinds = list(dict.fromkeys(devices))
    if "cuda" in kinds:
        refuse_experts(source.graph, source.dtype)
    histories = {kind: History(dump / kind if dump and len(kinds) > 1 else dump) for kind in kinds}

    def observe(name: str, model: ir.Model, n_rewrites: int) -> None:
        for history in histories.values():
            history.add(name, model, n_rewrites)

    with said_of(source):
        if source.is_spelled_out:
            make_plain(source, observe)
        exported_layer = one_layer(graph.to_text(source.graph))
        observe("plain" if source.is_spelled_out else "export", source.graph, 0)
        passes.run_steps(source.graph, passes.first_steps(source.n_context, is_turned=source.is_turned), observe)
        if source.takes_rows:
            passes.run_steps(source.graph, passes.given_steps(), observe)
    graphs = {kind: source.graph if kind == kinds[-1] else source.graph.clone() for kind in kinds}
    if source.named and "cpu" in kinds:
        passes.run_steps(graphs["cpu"], passes.adapter_steps(added_by(source.named)), histories["cpu"].add)
    with said_of(source):
        for kind, model in graphs.items():
            passes.run_steps(model, passes.last_steps(SUMS_TO[kind]), histories[kind].add)
            if source.sees_ahead:
                passes.run_steps(model, passes.ahead_steps(), histories[kind].add)
    text = scheme.calibration if scheme is not None and not source.named else None  # adapters read x undivided
    columns = Columns(text) if text is not None else None
    for kind, model in graphs.items():
        finish_graph(model, scheme, kind, histories[kind].add, columns)
    if source.named and "cuda" in kinds:
        graphs[ADAPTED] = adapted(graphs["cuda"], source, histories["cuda"])
        histories[ADAPTED] = histories["cuda"]
    return {
        kind: (model, report.graph_section(model, histories[kind].passes, exported_layer))
        for kind, model in graphs.items()
    }


def rewrite_tower(source: SourceModel, dump: Path | None) -> tuple[ir.Model, bytes] | None:
    """The graph that is planned for the model's tower, and its graph section; None where it has none.  Stages go to the
    folder `tower` in `dump`."""
    if source.images is None:
        return None
    model, history = source.images.tower.graph, History(dump / "tower" if dump else None)
    exported_layer = one_layer(graph.to_text(model))
    history.add("export", model, 0)
    try:
        passes.run_steps(model, steps_of(source.images.tower), history.add)
    except LlmcError as error:
        if isinstance(error.__cause__, OSError):  # a dump that cannot be written
            raise
        fact = f"the tower of {model.metadata_props['llmc.architecture']} is not supported: {error.fact}"
        raise LlmcError(fact, place=error.place, hint=error.hint) from error
    for name, value in list(model.graph.initializers.items()):  # those of the text's graph may have the same names
        del model.graph.initializers[name]
        value.name = f"tower.{name}"
        model.graph.initializers[value.name] = value
    graph.check_tower_graph(model)
    return model, report.graph_section(model, history.passes, exported_layer)


def steps_of(tower: Tower) -> passes.Steps:
    """A tower's passes."""
    return passes.tower_steps() if tower.sized is None else passes.picture_steps(tower.n_places)


def adapted(step_graph: ir.Model, source: SourceModel, history: History) -> ir.Model:
    """The step graph of a GPU for steps in which a row has an adapter."""
    model = graph.clone(step_graph)
    history.add("adapt_products", model, adapt_products(model, added=added_by(source.named)))
    graph.check_step_graph(model)
    return model


@contextmanager
def said_of(source: SourceModel) -> Iterator[None]:
    """Around the passes: what they refuse is the model's."""
    try:
        yield
    except LlmcError as error:
        if isinstance(error.__cause__, OSError):  # a dump that cannot be written
            raise
        what = "graph" if source.file is not None else f"architecture {source.architecture}"
        fact = f"the {what} is not supported: {error.fact}"
        raise LlmcError(fact, place=error.place, hint=error.hint) from error


def make_plain(source: SourceModel, observe: passes.Observe) -> None:
    """Turn a graph with its attention spelled out into one like our exporter's.  Whatever goes wrong is said of it."""
    steps = passes.spelled_out_steps if source.file is None else passes.file_steps
    try:
        passes.run_steps(source.graph, steps(source.n_context), observe)
    except LlmcError as error:
        if source.file is not None:
            raise
        raise LlmcError(error.fact, place=error.place) from error  # hints are for who exported a file
    except Exception as error:  # a file is anybody's, and ONNX Runtime raises anything at all
        said = " ".join(str(error).split())[:200]
        raise LlmcError(f"{type(error).__name__}: {said}", place=source.name) from error


class History:
    """What passes did to one graph; a stage each in `dump`, if that is a folder."""

    def __init__(self, dump: Path | None) -> None:
        self.dump = dump
        self.passes: list[report.PassRecord] = []

    def add(self, name: str, model: ir.Model, n_rewrites: int) -> None:
        if self.dump is not None:
            graph.dump_stage(model, self.dump, len(self.passes), name)
        self.passes.append(report.PassRecord(name, n_rewrites, sum(1 for _ in model.graph)))


def finish_graph(
    step_graph: ir.Model, scheme: Scheme | None, device: str, observe: passes.Observe, columns: Columns | None = None
) -> None:
    """Quantise if asked, then what only this kind of device wants.  columns: what a calibration text says of them."""
    if scheme is not None:
        observe("part_gates", step_graph, part_gates(step_graph))
        if columns is not None:
            observe("scale_columns", step_graph, scale_columns(step_graph, scheme, columns))
        n_weights = quantize_weights(step_graph, scheme)
        observe("quantize_weights", step_graph, n_weights)
        if scheme.calibration is not None:
            fit_weights(step_graph, scheme.calibration)
    if device == "cuda":
        observe("fuse_router", step_graph, fuse_router(step_graph))
        observe("fuse_gates", step_graph, fuse_gates(step_graph))
        observe("fuse_gated_norm", step_graph, fuse_gated_norm(step_graph))
        refuse_for_gpu(step_graph)
        observe("fuse_experts", step_graph, fuse_experts(step_graph))
        observe("fuse_norm_linear", step_graph, fuse_norm_linear(step_graph))
        observe("defer_norm", step_graph, defer_norm(step_graph))
        observe("gather_together", step_graph, gather_together(step_graph))
    else:
        observe("share_table", step_graph, share_table(step_graph))
        if scheme is not None:
            observe("quantize_table", step_graph, quantize_table(step_graph))
    graph.check_step_graph(step_graph)
