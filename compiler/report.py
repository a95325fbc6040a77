"""What an artifact says of itself: its manifest, its graph section, and the report of a compile."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from llmc.compiler import graph
from llmc.compiler.frontend import SourceModel
from llmc.compiler.plan import BODY, Choice, Program
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.target import Target
from llmc.runtime import format as fmt


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran: its name, the rewrites it made, the nodes it left."""

    name: str
    rewrites: int
    nodes: int


def manifest(
    source: SourceModel,
    machine: Target,
    program: Program,
    batch: Sequence[int],
    scheme: Scheme | None,
    kv_dtype: str,
    switched: Sequence[str] = (),
    *,
    version: str,
) -> dict[str, Any]:
    """The manifest, its certificate still to come.  switched: passes that a measurement has turned on, in words."""
    return {
        "format_version": version_of(program),
        "llmc": version,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": source.name,
            "type": source.config.get("model_type"),
            "weights": "random" if source.random else "real",
            "source_sha256": source.digest,
            "notes": list(source.notes),
            "adapters": [adapter.record for adapter in source.adapters],
            **({"named_adapters": [named.record for named in source.named]} if source.named else {}),
            "dtype": source.dtype,
            "n_layers": program.n_layers,
            "n_context": program.n_context,
            "n_vocab": program.n_tokens or program.n_vocab,
            "bos": source.bos,
            "eos": list(source.eos),
            "config": dict(source.config),
        },
        "embedding": source.embedding.record if source.embedding else None,
        **({"classification": source.classification.record} if source.classification else {}),
        **({"images": source.images.tower.record} if source.images else {}),
        "quant": quant_record(scheme) if scheme else None,
        "target": {"name": str(machine), "cpu_features": list(machine.features)},
        "batch": list(batch),
        "kv_cache": cache_record(program, kv_dtype),
        "plans": [
            {"kind": fmt.PLAN_KINDS[plan.kind], "rows": plan.n_rows, "calls": len(plan.calls)} for plan in program.plans
        ],
        "memory": {
            "weight_bytes": program.weight_bytes,
            "arena_bytes": program.arena_bytes,
            "scratch_bytes_per_thread": program.scratch_bytes,
            **({"slot_bytes": program.slot_bytes} if program.slot_bytes else {}),
            **({"row_bytes": 4 * program.n_row} if program.n_row else {}),
        },
        "weights": [
            {"name": str(w.value.name), "layout": str(w.layout), "offset": w.offset, "bytes": w.n_bytes}
            for w in program.weights
        ],
        "schedules": [schedule_record(choice) for choice in program.choices],
        "switched": list(switched),
        "certificate": {"status": "pending"},
    }


def version_of(program: Program) -> int:
    """The version of the format that an artifact with this program needs."""
    of_texts = program.slot_bytes, program.is_whole, program.n_types
    has_grids = program.is_turned or program.sized.patch > 0
    return fmt.version_of(*of_texts, len(program.adapters), program.n_row, has_grids=has_grids)


def cache_record(program: Program, kv_dtype: str) -> dict[str, Any]:
    """How the KV cache is kept: bytes of a page, of each layer that has a part of it; and what a step reads of a
    sequence: so many layers, so many bytes of each token in sight (window: as the operator's, 0 for all tokens)."""
    fewest = min(plan.n_rows for plan in program.plans if plan.kind == BODY)
    reads: Counter[tuple[int, int]] = Counter()
    for choice in program.choices:
        if choice.call.op.endswith("Attention") and (choice.kind, choice.n_rows) == (BODY, fewest):
            layer_bytes = choice.implementation.kv_layer_bytes // program.page_tokens
            reads[layer_bytes, choice.call.attribute("window", 0)] += len(choice.nodes)
    return {
        "dtype": kv_dtype,
        "page_tokens": program.page_tokens,
        "bytes_per_token": program.kv_page_bytes // program.page_tokens,
        "layer_bytes": list(program.layer_bytes),
        "reads": [{"layers": n, "bytes_per_token": size, "window": window} for (size, window), n in reads.items()],
    }


OF_A_PROGRAM = ("target", "kv_cache", "plans", "memory", "weights", "schedules", "switched")


def of_several(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of an artifact with these programs: the first one's.  With several, `targets` has for each what
    differs from that, and its target."""
    first = manifests[0]
    if len(manifests) == 1:
        return first
    targets = [
        {key: said[key] for key in OF_A_PROGRAM if key == "target" or said[key] != first[key]} for said in manifests
    ]
    return {**first, "targets": targets}


def quant_record(scheme: Scheme) -> dict[str, Any]:
    """How weights are quantised, and what they were fitted to."""
    record: dict[str, Any] = {"name": scheme.name, "group": scheme.group, "lm_head": scheme.lm_head}
    if scheme.most_bits is not None:
        record |= {"most_bits": scheme.most_bits, "in_8_bits": sorted(scheme.wide)}
    return record | {"calibration": scheme.calibration.record if scheme.calibration else None}


def schedule_record(choice: Choice) -> dict[str, Any]:
    """A line of `llmc inspect --schedules`: the call, the schedule it took, and what that moves and computes."""
    launches = choice.implementation.launches
    return {
        "plan": fmt.PLAN_KINDS[choice.kind],
        "m": choice.n_rows,
        "op": choice.implementation.op or choice.call.op,
        "call": str(choice.call),
        "nodes": len(choice.nodes),
        "node": choice.nodes[0],
        "rule": choice.implementation.rule,
        "params": choice.implementation.params,
        "family": choice.implementation.family,
        "measured": dict(choice.implementation.measured),
        "layout": ", ".join(str(layout) for layout in choice.implementation.layouts.values()),
        "kernels": [launch.kernel.name for launch in launches],
        "kernel_bytes": [launch.n_bytes for launch in launches],
        "kernel_operations": [launch.n_operations for launch in launches],
        "bytes": sum(launch.n_bytes for launch in launches),
        "operations": sum(launch.n_operations for launch in launches),
    }


def graph_section(model: ir.Model, history: Sequence[PassRecord], exported_layer: Sequence[str]) -> bytes:
    """What each pass left, one layer as it was exported, and the step graph, as text: what `llmc inspect --graph` and
    `--html` show."""
    said = {
        "passes": [asdict(record) for record in history],
        "exported_layer": list(exported_layer),
        "final": graph.to_text(model),
    }
    return json.dumps(said, indent=1).encode()


def compile_report(
    path: Path,
    said: Mapping[str, Any],
    seconds: Mapping[str, float],
    notes: Sequence[str] = (),
    weights: Mapping[tuple[int, ...], int] = MappingProxyType({}),
) -> dict[str, Any]:
    """What `llmc compile --json` prints.  notes: what the user should be told besides.  weights: how many bytes only
    these programs read, said when there are several."""
    certificate = without_prompts(said["certificate"])
    targets = [each["target"]["name"] for each in said.get("targets", ())]
    users = [{"targets": [targets[i] for i in numbers], "bytes": n} for numbers, n in weights.items() if targets]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "model": said["model"]["name"],
        "target": said["target"]["name"],
        **({"targets": targets, "weights": users} if targets else {}),
        "dtype": said["model"]["dtype"],
        "quant": said["quant"],
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "certificate": certificate,
        "notes": list(notes),
        "machine": platform.processor() or platform.machine(),
    }


def without_prompts(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate's numbers, those of its adapters too."""
    numbers = {key: value for key, value in certificate.items() if key != "prompts"}
    if "adapters" in numbers:
        numbers["adapters"] = {name: without_prompts(own) for name, own in certificate["adapters"].items()}
    return numbers


def notes_of_packing(source: SourceModel, programs: Sequence[Program], scheme: Scheme | None) -> list[str]:
    """What became of weights that the checkpoint keeps as codes."""
    packing = source.packing
    if packing is None or not packing.small:
        return []
    if scheme is None:
        kept = f"the checkpoint's weights are in {packing.said}; here they are {source.dtype}"
        return [f"{kept}: --quant {packing.small} keeps them small"]
    constants: list[Any] = [weight.value.const_value for program in programs for weight in program.weights]
    quantized = {weight for weight in constants if isinstance(weight, QuantizedWeight)}
    made = [weight for weight in quantized if weight.kept is not None and weight.source.coded is not None]
    wide = [weight for weight in made if weight.scheme.bits > scheme.bits]
    shares = [(float(weight.kept or 0), prod(weight.dims)) for weight in made if weight not in wide]
    share = sum(kept * size for kept, size in shares) / max(sum(size for _, size in shares), 1)
    own = f"the checkpoint's own numbers ({packing.said})"
    if wide:
        size, all_of_them = (sum(prod(weight.dims) for weight in some) for some in (wide, made))
        own += f", but for {round(100 * size / all_of_them)} %, which are {wide[0].scheme.name}"
    if share == 1:
        return [f"{scheme.name} keeps {own}"]
    if share < 0.01:
        return [f"{scheme.name} cannot hold {own}: they are fitted anew"]
    return [f"{scheme.name} keeps {floor(100 * share)} % of {own}; the others are fitted anew"]


def notes_of_logits(step_graph: ir.Model, dtype: str) -> list[str]:
    """Whether the product that makes the logits has codes, and nobody asked."""
    for node in graph.products_of_logits(step_graph.graph):
        weight = graph.weight_of(node.inputs[1])
        if isinstance(weight, QuantizedWeight) and weight.scheme.lm_head is None:
            coded = weight.source.coded
            kept = f", which the checkpoint keeps in {coded.bits} bits," if coded else ""
            fact = f"the product that makes the logits{kept} is {weight.scheme.name}"
            return [f"{fact}: --no-quant-lm-head makes it {dtype}"]
    return []
