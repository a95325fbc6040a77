"""A model as the compiler takes it in: its graph, its weights (unread), its text side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from llmc.compiler.frontend.adapter import Adapter
from llmc.compiler.frontend.apply_adapters import Bound, bind
from llmc.compiler.frontend.bind_weights import random_weights, unread
from llmc.compiler.frontend.chat import read_chat
from llmc.compiler.frontend.checkpoint import most_common_dtype, sample
from llmc.compiler.frontend.classification import classification_of
from llmc.compiler.frontend.config import architecture_of, config_dtype, read_config
from llmc.compiler.frontend.embedding import N_TYPES, TASKS, Embedding, Task, embedding_of, n_tokens
from llmc.compiler.frontend.find_model import Found, expanded, find_model, for_task, with_dense
from llmc.compiler.frontend.graph_cache import exported_graph
from llmc.compiler.frontend.named_adapters import NamedAdapter, find_named
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.processor import LEAVE_OUT
from llmc.compiler.frontend.text_part import text_tensors
from llmc.compiler.frontend.tokens import read_ends, read_text
from llmc.compiler.frontend.tower import FEWEST_ROWS, LARGEST_ROWS, MOST_ROWS, Images, load_images
from llmc.compiler.weights import StoredDType, Weight, choose_dtype
from llmc.runtime.classification import Classification
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend.onnx_file import OnnxFile

TAKES_PICTURES = "vision_config"
"""A field of the configurations of models that take pictures."""
SPELLED_OUT = "llmc.spelled_out"
POSITIONS = "max_position_embeddings"
MERGE_FIRST = "merge it into the model first, and export that"
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
    takes_rows: whether rows of numbers may stand for tokens, where the graph has its `llmc.Embedded`.
    is_turned: whether positions have three directions, in which pictures' rows are at places of their own.
    n_deep: how many of the first layers such rows add to, where the graph has its `llmc.Deepened`.
    images: how it takes pictures; None: it takes none, or was not asked to.
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
    takes_rows: bool = False
    is_turned: bool = False
    n_deep: int = 0
    images: Images | None = None

    @property
    def architecture(self) -> str:
        """The name of transformers' class for it."""
        return str(self.graph.metadata_props["llmc.architecture"])

    @property
    def n_types(self) -> int:
        """Of tokens, whose numbers say theirs, where texts are given labels; 0 elsewhere."""
        return int(self.graph.metadata_props.get(N_TYPES, "1")) if self.classification else 0

    @property
    def sees_ahead(self) -> bool:
        """Whether a picture's rows see each other, those that are behind them too."""
        return self.images is not None and self.images.tower.sees_ahead

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
    images: bool = False,
    max_image_rows: int = MOST_ROWS,
    has_f16: bool = False,
    rows: bool = False,
    turned: bool = False,
    deep: int = 0,
) -> SourceModel:
    """Load MODEL: a folder, a hub id, a short name such as llama2-7b, a .gguf or an .onnx file.  Reads no weight.

    dtype: f32, bf16 or, where the target has it (has_f16), f16; the checkpoint's own by default.  max_sequence: most
    tokens of a sequence; by default what the model was made for, and more than that with random weights only, for
    whose positions any number will do.  seed: of random weights.  adapters: folders or hub ids of adapters, which are
    merged into the weights one after another, or "NAME=…" for one that stays beside them; a MODEL that is an adapter
    itself is its model with that merged first.  task: "embed", "classify", "generate", "auto" for what its files say.
    rows: let rows of numbers stand for tokens, as those of images do; turned: at positions in three directions; deep:
    and add to the results of so many of the first layers.
    images: with what makes rows of pictures, which then may stand for tokens too.  max_image_rows: of a picture, where
    they are of any size; larger ones are made smaller.
    """
    if not FEWEST_ROWS <= max_image_rows <= LARGEST_ROWS:
        fact = f"pictures of up to {max_image_rows} rows"
        raise LlmcError(fact, place="--max-image-rows", hint=f"between {FEWEST_ROWS} and {LARGEST_ROWS}")
    if weights not in ("real", "random"):
        raise LlmcError(f"unknown kind of weights {weights!r}", place="--weights", hint="one of real, random")
    if task not in TASKS:
        raise LlmcError(f"unknown task {task!r}", place="--task", hint=f"one of {', '.join(TASKS)}")
    if Path(model).suffix == ".onnx":
        _refuse_for_file(adapters, task, rows=rows, images=images)
        return _load_file(expanded(model), weights, dtype, max_sequence, has_f16=has_f16)
    found = for_task(find_model(model, weights, adapters), task)
    own = most_common_dtype(found.checkpoint) if found.checkpoint else _random_dtype(found.fields)
    stored, note = choose_dtype(own, dtype, has_f16)
    found = replace(found, notes=(*found.notes, *([note] if note else ())))
    most_rows = min(max_image_rows, max_sequence or max_image_rows)
    looked = _load_images(found, stored, seed, most_rows) if images else None
    if looked is not None:
        turned, deep = looked.tower.is_turned, _n_deep(found, looked)
    source = _load_found(found, stored, max_sequence, seed, task, rows=rows or images, turned=turned, deep=deep)
    if looked is not None:
        digest = hashlib.sha256(f"{source.digest} {looked.tower.digest}".encode()).hexdigest()
        return replace(source, images=looked, digest=digest, notes=(*source.notes, *looked.notes))
    return replace(source, notes=(*source.notes, *_note_of_part(found)))


def _load_found(
    found: Found,
    stored: StoredDType,
    max_sequence: int | None,
    seed: int,
    task: Task,
    *,
    rows: bool,
    turned: bool,
    deep: int,
) -> SourceModel:
    """The model, or the text part, that was found."""
    folder, checkpoint, place = found.folder, found.checkpoint, str(found.folder or found.name)
    fields, notes = _with_positions(found, max_sequence if checkpoint is None else None)
    graph = exported_graph(fields, place, takes_rows=rows, is_turned=turned, n_deep=deep)
    n_vocab = n_tokens(graph)
    embedding, labels = _made_into(found, graph, fields, task, rows)
    bound, named, contents = _bind(with_dense(found, embedding), graph, fields, stored, seed)
    fields, graph, tensors = _stored(bound, stored)
    text, chat = found.text(n_vocab)
    eos, bos = read_ends(None if found.gguf else folder, fields, n_vocab, text.added)
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
        random=checkpoint is None,
        digest=hashlib.sha256(json.dumps(fields, sort_keys=True).encode() + contents).hexdigest(),
        notes=(*notes, *bound.notes),
        chat=chat,
        is_part=found.is_part,
        packing=found.packing,
        adapters=found.adapters,
        named=named,
        embedding=embedding,
        classification=labels,
        takes_rows=rows,
        is_turned=turned,
        n_deep=deep,
    )


def _n_deep(found: Found, images: Images) -> int:
    """How many of the text's layers a picture's rows add to.  Raises LlmcError for rows that are no whole number of
    embeddings."""
    if not images.tower.is_deep:
        return 0
    size = found.fields.get("hidden_size")
    if not isinstance(size, int) or size < 1 or images.tower.size % size or images.tower.size == size:
        fact = f"its rows go into later layers too: its tower makes {images.tower.size} numbers, embeddings have {size}"
        raise LlmcError(fact, place=str(found.folder or found.name))
    return images.tower.size // size - 1


def _load_images(found: Found, stored: StoredDType, seed: int, most_rows: int) -> Images:
    """What takes pictures.  Raises LlmcError for a model that takes none, and for adapters of what makes their rows."""
    if found.whole is None:
        raise LlmcError("the model takes no pictures", place=f"--images {found.name}", hint=LEAVE_OUT)
    for adapter in (*found.adapters, *found.named.values()):
        if len(text_tensors(adapter.changes)) < len(adapter.changes):
            fact = f"the adapter {adapter.name} changes more than the text part"
            raise LlmcError(fact, place=f"--images {adapter.folder}", hint="merge it into the whole model first")
    place, std, text = str(found.folder or found.name), _std(found.fields), found.text(0)[0].tokenizer_json
    how = {"place": place, "std": std, "seed": seed, "most_rows": most_rows}
    return load_images(found.whole, stored, found.folder, text, **how)  # type: ignore[arg-type]


def _note_of_part(found: Found) -> tuple[str, ...]:
    """What the user should be told of a model that takes more than text, of which that part is compiled."""
    if found.whole is None:
        return ()
    note = f"only the text part of {found.name} is compiled ({found.fields['model_type']})"
    return (f"{note}; --images asks for pictures too" if TAKES_PICTURES in found.whole.fields else note,)


def _std(fields: dict[str, Any]) -> float:
    """Of random weights."""
    return float(fields.get("initializer_range") or fields.get("init_std") or 0.02)


def _made_into(
    found: Found, graph: ir.Model, fields: dict[str, Any], task: Task, rows: bool
) -> tuple[Embedding | None, Classification | None]:
    """What the model makes of a text where it writes none: an embedding, or labels.  Raises LlmcError."""
    try:
        labels = classification_of(graph, fields, found.folder)
    except LlmcError as error:
        place, hint = error.place or str(found.folder or found.name), "--task embed, or generate, leaves its head aside"
        raise LlmcError(error.fact, place=place, hint=hint) from error
    embedding = None if labels else embedding_of(graph, None if found.gguf else found.folder, task)
    if found.named and (labels or embedding):
        fact, hint = "adapters by name are for models that write texts", "--adapter FOLDER merges it into the weights"
        raise LlmcError(fact, place=f"--adapter {next(iter(found.named))}=…", hint=hint)
    if rows and (labels or embedding):
        raise LlmcError("images are for models that write texts", place="--images")
    return embedding, labels


def _with_positions(found: Found, asked: int | None) -> tuple[dict[str, Any], list[str]]:
    """The configuration, with as many positions as were asked for if that is more than it has; and notes for the user.
    `asked` is None unless the weights are random."""
    made_for = found.fields.get(POSITIONS)
    if not isinstance(made_for, int) or not 0 < made_for < (asked or 0):
        return found.fields, [*found.notes]
    note = f"made for {made_for} positions; its random weights have {asked}"
    return {**found.fields, POSITIONS: asked}, [*found.notes, note]


def _refuse_for_file(adapters: Sequence[str | Path], task: Task, *, rows: bool, images: bool) -> None:
    """Raises LlmcError for what an .onnx file cannot be compiled with."""
    if adapters:
        raise LlmcError("an .onnx file takes no adapter", place=f"--adapter {adapters[0]}", hint=MERGE_FIRST)
    if images or task in ("embed", "classify"):
        fact, hint = "an .onnx file is compiled as it is", "compile the model it is from"
        raise LlmcError(fact, place="--images" if images else f"--task {task}", hint=hint)
    if rows:
        raise LlmcError("an .onnx file takes tokens alone", place="rows", hint="compile the model it is from")


def _bind(
    found: Found, graph: ir.Model, fields: dict[str, Any], stored: StoredDType, seed: int
) -> tuple[Bound, tuple[NamedAdapter, ...], bytes]:
    """The model with its weights, the adapters that stay beside them, and a digest of all."""
    if found.checkpoint is None:
        std = _std(fields)
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


def _stored(bound: Bound, stored: StoredDType) -> tuple[dict[str, Any], ir.Model, Mapping[str, Weight]]:
    """Its parts: the graph has the weights as they are to be stored."""
    for initializer in unread(bound.graph):
        initializer.const_value = bound.weights[initializer.name or ""].stored_as(stored)
    return bound.fields, bound.graph, bound.weights


def _load_file(
    path: Path,
    weights: str,
    dtype: str | None,
    max_sequence: int | None,
    *,
    has_f16: bool,
) -> SourceModel:
    """An .onnx file, with the configuration and the tokenizer that lie beside it, if any do."""
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
    eos, bos = read_ends(folder, fields, file.n_vocab, text.added)
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


def _random_dtype(fields: dict[str, Any]) -> StoredDType:
    """Random weights are of the configuration's size: two bytes each (bf16) or four."""
    return "bf16" if config_dtype(fields) in ("float16", "bfloat16") else "f32"


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
