"""A model as the compiler takes it in: its graph, its weights (unread), its text side."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from llmc.compiler.frontend import hub
from llmc.compiler.frontend.adapter import NAME_BASE, Adapter, base_of, is_adapter, read_adapter
from llmc.compiler.frontend.apply_adapters import Bound, bind
from llmc.compiler.frontend.bind_weights import random_weights, unread
from llmc.compiler.frontend.chat import read_chat
from llmc.compiler.frontend.checkpoint import StoredTensor, most_common_dtype, open_checkpoint, sample
from llmc.compiler.frontend.classification import as_task, classification_of
from llmc.compiler.frontend.config import architecture_of, config_dtype, is_labelled, read_config
from llmc.compiler.frontend.embedding import N_TYPES, Embedding, Task, embedding_of, n_tokens
from llmc.compiler.frontend.graph_cache import exported_graph
from llmc.compiler.frontend.known import KNOWN_MODELS
from llmc.compiler.frontend.named_adapters import NamedAdapter, find_named, parse_adapters
from llmc.compiler.frontend.packed import packing_in, without_packing
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.text_part import HEAD, text_fields, text_tensors
from llmc.compiler.frontend.tokens import Text, read_ends, read_text
from llmc.compiler.weights import StoredDType, Weight, choose_dtype
from llmc.runtime.classification import Classification
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend.gguf.file import GgufFile
    from llmc.compiler.frontend.onnx_file import OnnxFile

SPELLED_OUT = "llmc.spelled_out"
POSITIONS = "max_position_embeddings"
MERGE_FIRST = "merge it into the model first, and export that"
GGUF = ".gguf"
LIMITS = (POSITIONS, "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""What configurations call the most tokens of a sequence."""


@dataclass(frozen=True)
class SourceModel:
    """A causal language model or an encoder, ready for the passes.

    name: as a person would call it.  config: the fields of its config.json.
    graph: float32, opset 23; `input_ids`, `position_ids` int64 [batch, sequence] -> `logits` [batch, sequence, V].
        Its initializers are `Weight`s stored in `dtype`, under the checkpoint's names.  Passes may change it.
        Of an .onnx file it is the file's own graph, which `passes.file_steps` turn into one like this.
    weights: the same tensors by name, in the checkpoint's own dtype: what a reference computes with.
    n_context: most tokens of a sequence.  eos: tokens that end a text; bos: the one that begins it, if any.
    tokenizer_json, vocabulary: see frontend.tokens; None for a model without a tokenizer.  chat: see frontend.chat.
    folder: where its files lie; None where there are none.  random: whether the weights are made up.
    digest: SHA-256 of the configuration and of a sample of every tensor.  notes: what the user should be told.
    file: the .onnx file that the graph is from; None for a model of transformers.
    is_part: whether it is the text part of a model that takes more than text; `config` is the part's.
    packing: how the checkpoint keeps weights as codes (frontend/packed); None: as they are.
    adapters: what was merged into the weights, in this order; `weights` are the sums, unrounded (merge_adapter.py).
    named: adapters that stay beside the weights, for sequences to choose (named_adapters.py).
    embedding: how it makes embeddings, which the graph then gives in place of logits; None: it makes none.
    classification: how it gives texts labels, whose logits the graph then gives at each token; None: it gives none.
    """

    name: str
    config: dict[str, Any]
    graph: ir.Model
    weights: Mapping[str, Weight]
    dtype: StoredDType
    n_context: int
    n_vocab: int
    eos: tuple[int, ...]
    bos: int | None
    tokenizer_json: bytes | None
    vocabulary: tuple[bytes, ...] | None
    folder: Path | None
    random: bool
    digest: str
    notes: tuple[str, ...] = ()
    chat: bytes | None = None
    file: OnnxFile | None = None
    is_part: bool = False
    packing: Packing | None = None
    adapters: tuple[Adapter, ...] = ()
    named: tuple[NamedAdapter, ...] = ()
    embedding: Embedding | None = None
    classification: Classification | None = None

    @property
    def architecture(self) -> str:
        """The name of transformers' class for it."""
        return str(self.graph.metadata_props["llmc.architecture"])

    @property
    def n_types(self) -> int:
        """Of tokens, whose numbers say theirs, where texts are given labels; 0 elsewhere."""
        return int(self.graph.metadata_props.get(N_TYPES, "1")) if self.classification else 0

    @property
    def is_spelled_out(self) -> bool:
        """Whether the graph has its attention spelled out: an .onnx file's, or that of a model which does so."""
        return self.file is not None or SPELLED_OUT in self.graph.metadata_props


def load_source(
    model: str,
    weights: str = "real",
    dtype: str | None = None,
    max_sequence: int | None = None,
    seed: int = 0,
    adapters: Sequence[str | Path] = (),
    task: Task = "auto",
    *,
    has_f16: bool = False,
) -> SourceModel:
    """Load MODEL: a folder, a hub id, a short name such as llama2-7b, a .gguf or an .onnx file.  Reads no weight.

    dtype: f32, bf16 or, where the target has it (has_f16), f16; the checkpoint's own by default.  max_sequence: most
    tokens of a sequence; by default what the model was made for, and more than that with random weights only, for
    whose positions any number will do.  seed: of random weights.  adapters: folders or hub ids of adapters, which are
    merged into the weights one after another, or "NAME=…" for one that stays beside them; a MODEL that is an adapter
    itself is its model with that merged first.  task: "embed", "classify", "generate", "auto" for what its files say.
    """
    if weights not in ("real", "random"):
        raise LlmcError(f"unknown kind of weights {weights!r}", place="--weights", hint="one of real, random")
    if Path(model).suffix == ".onnx":
        return _load_file(_expanded(model), weights, dtype, max_sequence, adapters, task, has_f16=has_f16)
    found = _for_task(_open(model, weights, adapters), task)
    folder, checkpoint = found.folder, found.checkpoint
    fields, notes = _with_positions(found, max_sequence if weights == "random" else None)
    stored, note = choose_dtype(most_common_dtype(checkpoint) if checkpoint else _random_dtype(fields), dtype, has_f16)
    graph = exported_graph(fields, place=str(folder or model))
    n_vocab = n_tokens(graph)
    embedding, labels = _made_into(found, graph, fields, task)
    bound, named, contents = _bind(_with_dense(found, embedding), graph, fields, stored, seed)
    fields, graph, tensors = bound.fields, bound.graph, bound.weights
    for initializer in unread(graph):
        initializer.const_value = tensors[initializer.name or ""].stored_as(stored)
    text, chat = found.text(n_vocab)
    eos, bos = read_ends(None if found.gguf else folder, fields, n_vocab)
    return SourceModel(
        name=found.name,
        config=fields,
        graph=graph,
        weights=tensors,
        dtype=stored,
        n_context=_choose_context(graph, max_sequence, embedding),
        n_vocab=n_vocab,
        eos=eos,
        bos=bos,
        tokenizer_json=text.tokenizer_json,
        vocabulary=text.vocabulary,
        folder=folder,
        random=weights == "random",
        digest=hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + contents).hexdigest(),
        notes=(*notes, *([note] if note else ()), *bound.notes),
        chat=chat,
        is_part=found.is_part,
        packing=found.packing,
        adapters=found.adapters,
        named=named,
        embedding=embedding,
        classification=labels,
    )


def _made_into(
    found: _Found, graph: ir.Model, fields: dict[str, Any], task: Task
) -> tuple[Embedding | None, Classification | None]:
    """What the model makes of a text, if it writes none.  Raises LlmcError."""
    try:
        labels = classification_of(graph, fields, found.folder)
    except LlmcError as error:
        place, hint = error.place or str(found.folder or found.name), "--task embed, or generate, leaves its head aside"
        raise LlmcError(error.fact, place=place, hint=hint) from error
    embedding = None if labels else embedding_of(graph, None if found.gguf else found.folder, task)
    if found.named and (labels or embedding):
        fact, hint = "adapters by name are for models that write texts", "--adapter FOLDER merges it into the weights"
        raise LlmcError(fact, place=f"--adapter {next(iter(found.named))}=…", hint=hint)
    return embedding, labels


def _for_task(found: _Found, task: Task) -> _Found:
    """The model with the configuration for what it is to do.  Raises LlmcError where it gives labels, and not to texts
    alone, or its file has no head for them."""
    if found.gguf and task == "classify":
        raise LlmcError("a GGUF file is compiled without a head for labels", place="--task classify")
    if found.is_part and task in ("auto", "classify") and found.labels:
        raise LlmcError("a model that gives labels to more than texts is not compiled", place=str(found.folder))
    return found if found.gguf else replace(found, fields=as_task(found.fields, found.folder, task))


def _with_positions(found: _Found, asked: int | None) -> tuple[dict[str, Any], list[str]]:
    """The configuration with as many positions as random weights are asked for, if that is more; what is to be told."""
    made_for = found.fields.get(POSITIONS)
    if not isinstance(made_for, int) or not 0 < made_for < (asked or 0):
        return found.fields, [*found.notes]
    note = f"made for {made_for} positions; its random weights have {asked}"
    return {**found.fields, POSITIONS: asked}, [*found.notes, note]


def _refuse_for_file(adapters: Sequence[str | Path], task: Task) -> None:
    """What an .onnx file cannot be made."""
    if adapters:
        raise LlmcError("an .onnx file takes no adapter", place=f"--adapter {adapters[0]}", hint=MERGE_FIRST)
    if task in ("embed", "classify"):
        fact, hint = "an .onnx file is compiled as it is", "compile the model it is from"
        raise LlmcError(fact, place=f"--task {task}", hint=hint)


def _bind(
    found: _Found, graph: ir.Model, fields: dict[str, Any], stored: StoredDType, seed: int
) -> tuple[Bound, tuple[NamedAdapter, ...], bytes]:
    """The model with its weights, the adapters that stay beside them, and a digest of all."""
    if found.checkpoint is None:
        std = float(fields.get("initializer_range") or fields.get("init_std") or 0.02)
        bound = Bound(fields, graph, random_weights(graph, stored, std=std, seed=seed))
        return bound, (), f"random {stored} {std} {seed}".encode()
    bound = bind(graph, found.checkpoint, fields, found.adapters, is_part=found.is_part, place=str(found.folder))
    if found.gguf is not None:
        from llmc.compiler.frontend.gguf.model import check_used

        check_used(found.gguf, found.checkpoint, bound.weights)
    said = found.packing.said.encode() if found.packing else b""
    named = [find_named(*each, bound.graph, found.checkpoint, is_part=found.is_part) for each in found.named.items()]
    notes = (*bound.notes, *(note for each in named for note in each.notes))
    digests = b"".join([*(each.digest for each in found.adapters), *(each.digest for each in named)])
    return replace(bound, notes=notes), tuple(named), sample(found.checkpoint) + said + digests


def _load_file(
    path: Path,
    weights: str,
    dtype: str | None,
    max_sequence: int | None,
    adapters: Sequence[str | Path],
    task: Task,
    *,
    has_f16: bool,
) -> SourceModel:
    """An .onnx file, with the configuration and the tokenizer that lie beside it, if any do."""
    _refuse_for_file(adapters, task)
    from llmc.compiler.frontend.onnx_file import open_onnx

    if weights == "random":
        raise LlmcError("an .onnx file has its own weights", place="--weights random")
    file = open_onnx(path)
    folder = path.resolve().parent if not (path.parent / "config.json").is_file() else path.parent
    fields = read_config(folder) if (folder / "config.json").is_file() else {}
    stored, note = choose_dtype(file.dtype, dtype, has_f16)
    for initializer in file.graph.graph.initializers.values():
        if isinstance(initializer.const_value, Weight):
            initializer.const_value = initializer.const_value.stored_as(stored)
    limit = next((limit for name in LIMITS if isinstance(limit := fields.get(name), int) and limit > 0), 0)
    architecture = architecture_of(fields) or path.name
    file.graph.metadata_props.update({"llmc.architecture": architecture, "llmc.n_context": str(limit)})
    text = read_text(folder, file.n_vocab)
    eos, bos = read_ends(folder, fields, file.n_vocab)
    return SourceModel(
        name=path.resolve().parent.name if path.stem == "model" else path.stem,
        config=fields,
        graph=file.graph,
        weights=file.weights,
        dtype=stored,
        n_context=_choose_context(file.graph, max_sequence),
        n_vocab=file.n_vocab,
        eos=eos,
        bos=bos,
        tokenizer_json=text.tokenizer_json,
        vocabulary=text.vocabulary,
        folder=folder,
        random=False,
        digest=hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + file.digest).hexdigest(),
        notes=(note,) if note else (),
        chat=read_chat(folder) if text.tokenizer_json is not None else None,
        file=file,
    )


@dataclass(frozen=True)
class _Found:
    """Where a model is and what is there: see SourceModel.  checkpoint: None for random weights.  named: the adapters
    that stay beside them, by their names.  labels: whether the class that its configuration names gives texts labels,
    that of the whole model where this is a part."""

    name: str
    folder: Path | None
    fields: dict[str, Any]
    checkpoint: dict[str, StoredTensor] | None
    is_part: bool = False
    notes: tuple[str, ...] = ()
    packing: Packing | None = None
    adapters: tuple[Adapter, ...] = ()
    named: Mapping[str, Adapter] = field(default_factory=dict)
    gguf: GgufFile | None = None
    labels: bool = False

    def text(self, n_vocab: int) -> tuple[Text, bytes | None]:
        """The tokenizer and the chat template, if there are any: an adapter's own go before the model's."""
        folders = [adapter.folder for adapter in reversed(self.adapters)]
        folder = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
        if folder is None and self.gguf is not None:
            from llmc.compiler.frontend.gguf.text import chat_of, text_of

            text = text_of(self.gguf, n_vocab)
            return text, chat_of(self.gguf) if text.tokenizer_json is not None else None
        folder = folder or self.folder
        text = read_text(folder, n_vocab) if folder else Text()
        return text, read_chat(folder) if folder and text.tokenizer_json is not None else None


def _open(model: str, weights: str, adapters: Sequence[str | Path]) -> _Found:
    """The model, or the text part of one that takes more than text; with its adapters, read but for their weights."""
    path = _expanded(model)
    is_gguf = path.suffix == GGUF and (os.path.isfile(path) or not (os.path.isdir(path) or hub.is_hub_id(model)))
    name, folder, fields, own = ("", None, {}, None) if is_gguf else _find(model, weights)
    plain, by_name = parse_adapters(adapters)
    folders = [*([own] if own else []), *map(_adapter_folder, plain)]
    if (folders or by_name) and weights == "random":
        raise LlmcError("an adapter cannot be merged into random weights", place="--weights random")
    merged = tuple(read_adapter(each) for each in folders)
    named = {each: read_adapter(_adapter_folder(given)) for each, given in by_name.items()}
    found = _open_gguf(path, weights) if is_gguf else _open_model(name, folder, fields, weights)
    name = "+".join([found.name, *(adapter.name for adapter in merged)])
    return replace(found, name=name, adapters=merged, named=named)


def _expanded(path: str) -> Path:
    """With ~ and ~name as the homes that they are; a ~ of nobody's is a name like others.  Raises LlmcError for bytes
    that are no text: safetensors takes none."""
    try:
        path.encode()
    except UnicodeEncodeError:
        place = path.encode(errors="replace").decode()
        raise LlmcError("the name is no valid Unicode", place=place, hint="give the model another") from None
    return Path(os.path.expanduser(path))


def _adapter_folder(adapter: str) -> Path:
    path = _expanded(adapter)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not hub.is_hub_id(adapter):
        hint = "give the folder that has adapter_config.json, or a hub id (owner/name)"
        raise LlmcError(f"no such folder: {adapter}", place="--adapter", hint=hint)
    return hub.fetch(adapter, weights=False)


def _open_gguf(path: Path, weights: str) -> _Found:
    """The model that a GGUF file holds."""
    from llmc.compiler.frontend.gguf import model as gguf_model
    from llmc.compiler.frontend.gguf.file import open_gguf

    file = open_gguf(path)
    fields, packing = gguf_model.config_of(file), gguf_model.packing_of_file(file)
    checkpoint = gguf_model.checkpoint_of(file, fields) if weights == "real" else None
    return _Found(file.name, path.resolve().parent, fields, checkpoint, packing=packing, gguf=file)


def _open_model(name: str, folder: Path | None, fields: dict[str, Any], weights: str) -> _Found:
    checkpoint = open_checkpoint(folder) if folder and weights == "real" else None
    packing = packing_in(folder, fields) if folder and checkpoint is not None else None
    fields = without_packing(fields)
    if packing and checkpoint is not None:
        checkpoint = packing.join(checkpoint)
    notes = packing.notes if packing else ()
    part = text_fields(fields)
    if part is None:
        return _Found(name, folder, fields, checkpoint, notes=notes, packing=packing)
    if checkpoint is not None:
        checkpoint = text_tensors(checkpoint)
        if HEAD not in checkpoint:  # whether the two are one is said by the whole model's configuration, or its default
            part = {**part, "tie_word_embeddings": True}
    notes = (f"only the text part of {name} is compiled ({part['model_type']})", *notes)
    labels = is_labelled(architecture_of(fields))
    return _Found(name, folder, part, checkpoint, is_part=True, notes=notes, packing=packing, labels=labels)


def _find(model: str, weights: str) -> tuple[str, Path | None, dict[str, Any], Path | None]:
    """The model's name, its folder (None: random weights of a known name), the fields of its configuration, and the
    folder of the adapter that was given in its place, if one was."""
    known = KNOWN_MODELS.get(model.lower())
    if known and weights == "random" and not os.path.exists(model):
        return model.lower(), None, known.config, None
    name, folder = _locate(known.hub_id if known else model, model, weights)
    if not is_adapter(folder):
        return name, folder, read_config(folder), None
    own, base = folder, base_of(folder)
    name, folder = _locate(base, base, weights)
    if is_adapter(folder):
        raise LlmcError("the adapter is for an adapter, not for a model", place=str(own), hint=NAME_BASE)
    return name, folder, read_config(folder), own


def _locate(hub_id: str, given: str, weights: str) -> tuple[str, Path]:
    """The name and the folder of a model, or of an adapter, that is given as a folder or has this hub id."""
    path = _expanded(given)
    if os.path.isdir(path):  # unlike Path's own it is False too for what can be no name
        return path.resolve().name, path
    if os.path.exists(path):
        hint = "give the folder that has config.json and safetensors, a .gguf file, or an .onnx file"
        raise LlmcError("a model is a folder, and this is a file", place=given, hint=hint)
    if not hub.is_hub_id(hub_id):
        names = ", ".join(KNOWN_MODELS)
        raise LlmcError(f"no such folder: {given}", hint=f"or a hub id (owner/name), or one of {names}")
    return hub_id.rpartition("/")[2], hub.fetch(hub_id, weights=weights == "real")


def _random_dtype(fields: dict[str, Any]) -> StoredDType:
    """Random weights are of the configuration's size: two bytes each (bf16) or four."""
    return "bf16" if config_dtype(fields) in ("float16", "bfloat16") else "f32"


def _with_dense(found: _Found, embedding: Embedding | None) -> _Found:
    """The model with the weights of what is behind its pooling, under the paths that they lie at."""
    if found.checkpoint is None or found.folder is None or embedding is None or not embedding.dense:
        return found
    more = {
        f"{dense.path}.{name}": tensor
        for dense in embedding.dense
        for name, tensor in open_checkpoint(found.folder / dense.path).items()
    }
    return replace(found, checkpoint={**found.checkpoint, **more})


def _choose_context(graph: ir.Model, asked: int | None, embedding: Embedding | None = None) -> int:
    """The most tokens of a sequence: those asked for, those that embeddings are made of, or what the model allows."""
    limit = int(graph.metadata_props["llmc.n_context"])
    if embedding is not None and embedding.max_tokens and asked is None:
        asked = min(limit or embedding.max_tokens, embedding.max_tokens)
    if not (asked or limit):
        raise LlmcError("the model has no longest sequence of its own", hint="choose one with --max-seq")
    if asked is not None and not 0 < asked <= (limit or asked):
        raise LlmcError(f"the model takes sequences of 1 to {limit} tokens, not {asked}", place="--max-seq")
    return asked or limit
