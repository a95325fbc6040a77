"""What a kit's runs found of whole models, as records of `llmc bench`: the same table, the same picture.

llmc's samples are those of the artifact that was measured last; of the others all files' count.  Beside quantised
weights Hugging Face runs in the dtype they were quantised from, as in `llmc bench`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from llmc.bench.chart import memory
from llmc.bench.chart.record import Panel, Record, Sample
from llmc.bench.chart.request import Task, in_k
from llmc.bench.chart.subjects import title
from llmc.bench.gpu import facts, limits, whole
from llmc.bench.gpu.journal import Entry, Journal
from llmc.runtime.errors import LlmcError

LABELS = {
    whole.HF: "Hugging Face (PyTorch)",
    whole.GRAPH: "Hugging Face, CUDA graph",
    whole.COMPILED: "Hugging Face, torch.compile",
    whole.FLASH: "Hugging Face, FlashAttention",
}
MOST_SHOWN = 8
"""Sequences of a point that the picture has room for; more are kept in the record."""


@dataclass
class Measured:
    """What one card measured with one driver.  loads, samples: by model and system; failed: by item."""

    machine: dict[str, Any]
    rates: dict[str, float]
    at: float = 0.0
    loads: dict[tuple[str, str], Entry] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def records_of(paths: Sequence[Path]) -> list[Record]:
    """A record for each card and driver in these results.jsonl.  Raises LlmcError: no whole model was measured."""
    found: dict[str, Measured] = {}
    for path in paths:
        if not path.is_file():
            raise LlmcError("the measurements cannot be read", place=str(path), hint="name a results.jsonl")
    names, places = " ".join(path.name for path in paths), ", ".join(map(str, paths))
    try:
        for path in paths:
            add(Journal(path), found)
        records = [record_of(measured, names) for measured in found.values()]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        fact = f"the measurements cannot be understood: {type(error).__name__}: {error}"
        raise LlmcError(fact, place=places, hint="name the results.jsonl of a run of the kit") from None
    if not any(panel.samples for record in records for panel in record.panels):
        hint = "it must be the results.jsonl of a run with the stages a, e and g"
        raise LlmcError("the file has no whole model in it", place=places, hint=hint)
    return records


def add(journal: Journal, found: dict[str, Measured]) -> None:
    machine = machine_of(journal)
    rates = limits.found(journal)
    measured = found.setdefault(f"{machine['gpu']} {machine['driver']}", Measured(machine, rates))
    measured.rates = {n: max(r.get(n, 0.0) for r in (rates, measured.rates)) for n in rates | measured.rates}
    latest = journal.latest(whole.STAGE)
    read = round(rates.get(limits.COPY_LIMIT, 0.0) / 1e9, 2)
    for (model, system), entry in loads_in(latest):
        before = measured.loads.get((model, system), {})
        if system == whole.LLMC and before and before.get("created") != entry.get("created"):
            if not any(item.startswith(f"{model} {system} decode") and seconds_of(e) for item, e in latest.items()):
                continue  # another artifact, and the machine was lost before it made a step
            measured.samples.pop((model, system), None)
        measured.loads[model, system] = entry
    for item, entry in latest.items():
        model, system, task, *rest = item.split()
        if entry["event"] == "failed":
            measured.failed[item] = str(entry.get("error", ""))
        elif rest and (seconds := seconds_of(entry)):
            measured.at = max(measured.at, float(entry["at"]))
            sample = Sample(system, f"{task} {rest[0]}", seconds, read, 0.0)
            measured.samples.setdefault((model, system), []).append(sample)


def machine_of(journal: Journal) -> dict[str, Any]:
    device, machine = (journal.one(facts.STAGE, name) for name in (facts.DEVICE, facts.MACHINE))
    return {
        "name": str(device.get("name", "an unknown GPU")),
        "gpu": str(device.get("name", "an unknown GPU")),
        "driver": machine.get("driver"),
        "cuda": device.get("cuda"),
        "memory_bytes": int(device.get("memory_bytes") or 0),
        "python": machine.get("python"),
    }


def loads_in(latest: dict[str, Entry]) -> Iterator[tuple[tuple[str, str], Entry]]:
    for item, entry in latest.items():
        model, system, task, *_ = item.split()
        if task == "load" and entry["event"] == "done":
            yield (model, system), entry


def seconds_of(entry: Entry) -> list[float]:
    """The times of its steps; none if they are no numbers that could be times."""
    seconds = entry.get("seconds")
    if not isinstance(seconds, list) or not all(isinstance(s, int | float) and isfinite(s) for s in seconds):
        return []
    rounded = [round(float(s), 7) for s in seconds]
    return rounded if all(s > 0 for s in rounded) else []


def record_of(measured: Measured, names: str) -> Record:
    panels = [panel_of(measured, model) for model, system in measured.loads if system == whole.LLMC]
    steps = max((len(s.seconds) for panel in panels for s in panel.samples if s.task.startswith("decode")), default=0)
    date = time.strftime("%Y-%m-%d", time.gmtime(measured.at))
    return Record(None, measured.machine, steps, 1, 0.0, date, [f"llmc bench --from {names}"], panels)


def panel_of(measured: Measured, model: str) -> Panel:
    said = measured.loads[model, whole.LLMC]
    quant = None if said["quant"] == "none" else str(said["quant"])
    base = model.removesuffix(f"-{quant}")
    ours = list(measured.samples.get((model, whole.LLMC), []))
    samples = {whole.LLMC: ours} | {s: of for (m, s), of in measured.samples.items() if m == base and s != whole.LLMC}
    tasks = [task for sample in ours if (task := task_of(sample.task)).batch]
    published = published_context(base, int(said["n_context"]))
    panel = Panel(
        name=f"{base} {quant or said['dtype']}",
        title=title(base),
        precision=quant or str(said["dtype"]),
        weights="random",
        batches=sorted({task.batch for task in tasks if task.batch <= MOST_SHOWN}),
        lengths=sorted({task.length for task in tasks}),
        published_context=published,
        model=model_facts(said, base, quant),
        peak_operations_per_s=measured.rates.get(limits.PRODUCT_LIMIT, 0.0),
        samples=[sample for system in (whole.LLMC, *LABELS) for sample in samples.get(system, [])],
    )
    if any(length > published for length in panel.lengths):
        panel.notes.append(
            f"* beyond the model's own {published} positions: random weights, {in_k(max(panel.lengths))} positions"
        )
    panel.systems = dict(systems_of(measured, model, base, panel))
    panel.unfit = dict(reasons(measured, model, base, panel))
    return panel


def model_facts(said: Entry, base: str, quant: str | None) -> dict[str, Any]:
    manifest = {"quant": {"name": quant} if quant else None, "model": {"dtype": said["dtype"]}}
    return {
        "dtype": said["dtype"],
        "artifact_bytes": said["weight_bytes"],
        "step_bytes": said["step_bytes"],
        "kv_bytes_per_token": said["kv_bytes_per_token"],
        **({"kv_cache": said["kv_cache"]} if "kv_cache" in said else {}),
        "n_weights": said.get("n_weights") or round(8 * said["step_bytes"] / memory.bits(manifest)),
        **shape_of(said, base),
        "target": said["target"],
        "compiled": {base: said["created"]},
    }


def shape_of(said: Entry, base: str) -> dict[str, int]:
    """What of a prompt's operations its weights don't tell; nothing where a model's configuration is not known."""
    config = said.get("config") or known_config(base)
    if not config:
        return {}
    model = {"config": config, "n_layers": config["num_hidden_layers"], "n_vocab": config["vocab_size"]}
    return {"head_weights": memory.head_weights(model), "attention_width": memory.attention_width(model)}


def systems_of(measured: Measured, model: str, base: str, panel: Panel) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is known of each: llmc, then those who have a sample."""
    ours = measured.loads[model, whole.LLMC]
    yield "llmc", {**of_load(ours), "precision": panel.precision, "label": "llmc"}
    theirs = measured.loads.get((base, whole.HF), {})
    present = {sample.system for sample in panel.samples}
    for system, label in LABELS.items():
        if system in present:
            yield system, {**of_load(theirs), "precision": ours["dtype"], "label": label}


def of_load(entry: Entry) -> dict[str, Any]:
    return {name: entry[name] for name in ("version", "load_s") if name in entry}


def reasons(measured: Measured, model: str, base: str, panel: Panel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Why a point is missing, where it was tried."""
    for item, error in measured.failed.items():
        of, system, task, *rest = item.split()
        if rest and of == (model if system == whole.LLMC else base) and system in panel.systems:
            short = "no room" if "memory" in error.lower() else "failed"
            yield f"{system} {task} {rest[0]}", {"reason": short}


def task_of(text: str) -> Task:
    """decode 1x128, or prefill 128."""
    kind, _, rest = text.partition(" ")
    batch, _, length = rest.rpartition("x")
    return Task(int(batch or 0), int(length)) if kind == "decode" else Task(0, int(rest))


def published_context(name: str, otherwise: int) -> int:
    return int(known_config(name).get("max_position_embeddings", otherwise))


def known_config(name: str) -> dict[str, Any]:
    """The configuration of a known model; nothing for others."""
    from llmc.compiler.frontend.known import KNOWN_MODELS

    known = KNOWN_MODELS.get(name.lower())
    return dict(known.config) if known else {}


def saved(records: Iterable[Record], path: Path) -> list[Record]:
    """The one record, in a file.  Raises LlmcError for several."""
    listed = list(records)
    if len(listed) > 1:
        fact = f"the results are of {len(listed)} machines: {', '.join(r.machine['gpu'] for r in listed)}"
        raise LlmcError(fact, place=str(path), hint="make a record of each")
    listed[0].path = path
    listed[0].save()
    return listed
