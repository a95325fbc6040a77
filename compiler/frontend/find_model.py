"""Finds the model that a user names: its folder, configuration and tensors, and the adapters given with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.frontend import hub
from llmc.compiler.frontend.adapter import NAME_BASE, Adapter, base_of, is_adapter, read_adapter
from llmc.compiler.frontend.chat import read_chat
from llmc.compiler.frontend.checkpoint import StoredTensor, open_checkpoint
from llmc.compiler.frontend.classification import as_task
from llmc.compiler.frontend.config import architecture_of, is_labelled, read_config
from llmc.compiler.frontend.embedding import Embedding, Task
from llmc.compiler.frontend.known import KNOWN_MODELS
from llmc.compiler.frontend.named_adapters import parse_adapters
from llmc.compiler.frontend.packed import packing_in, without_packing
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.text_part import HEAD, TIED, text_fields, text_tensors
from llmc.compiler.frontend.tokens import Text, read_text
from llmc.compiler.frontend.tower import Whole
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend.gguf.file import GgufFile

GGUF = ".gguf"


@dataclass(frozen=True)
class Found:
    """Where a model is and what lies there.

    name, folder, is_part, notes, packing, adapters: see SourceModel.  fields: of its config.json.
    checkpoint: its tensors by name; None for random weights.  gguf: the GGUF file that it is in; None: in no such file.
    named: the adapters that stay beside the weights, by the names that sequences choose them by.
    labels: whether the class that its configuration names (that of the whole model, for a part) gives texts labels.
    whole: the model of which it is the text part; None for one of text alone.
    """

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
    whole: Whole | None = None

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


def find_model(model: str, weights: str, adapters: Sequence[str | Path]) -> Found:
    """The model that MODEL names, or the text part of one that takes more than text, with its adapters.

    Arguments are those of load_source.  No weight is read, neither of the model nor of an adapter.  Raises LlmcError.
    """
    path = expanded(model)
    is_gguf = path.suffix == GGUF and (os.path.isfile(path) or not (os.path.isdir(path) or hub.is_hub_id(model)))
    name, folder, fields, own = ("", None, {}, None) if is_gguf else _find_folder(model, weights)
    plain, by_name = parse_adapters(adapters)
    folders = [*([own] if own else []), *map(_adapter_folder, plain)]
    if (folders or by_name) and weights == "random":
        raise LlmcError("an adapter cannot be merged into random weights", place="--weights random")
    merged = tuple(read_adapter(each) for each in folders)
    named = {each: read_adapter(_adapter_folder(given)) for each, given in by_name.items()}
    found = _open_gguf(path, weights) if is_gguf else _open_model(name, folder, fields, weights)
    name = "+".join([found.name, *(adapter.name for adapter in merged)])
    return replace(found, name=name, adapters=merged, named=named)


def for_task(found: Found, task: Task) -> Found:
    """The model with the configuration for `task`.

    Raises LlmcError for labels where the model gives them to more than texts, or its file is compiled without a head.
    """
    if found.gguf and task == "classify":
        raise LlmcError("a GGUF file is compiled without a head for labels", place="--task classify")
    if found.is_part and task in ("auto", "classify") and found.labels:
        raise LlmcError("a model that gives labels to more than texts is not compiled", place=str(found.folder))
    return found if found.gguf else replace(found, fields=as_task(found.fields, found.folder, task))


def with_dense(found: Found, embedding: Embedding | None) -> Found:
    """The model with the weights of the dense layers after its pooling too, each under its folder's path."""
    if found.checkpoint is None or found.folder is None or embedding is None or not embedding.dense:
        return found
    more = {
        f"{dense.path}.{name}": tensor
        for dense in embedding.dense
        for name, tensor in open_checkpoint(found.folder / dense.path).items()
    }
    return replace(found, checkpoint={**found.checkpoint, **more})


def expanded(path: str) -> Path:
    """The path with a leading ~ or ~name replaced by that home folder, where there is such a user.

    Raises LlmcError for a path that is no valid Unicode, since safetensors takes none, and for an empty one, as a shell
    makes of a variable that is not set: it would be the current folder.
    """
    if not path:
        raise LlmcError("an empty name names no folder", place='""', hint="the current folder is .")
    try:
        path.encode()
    except UnicodeEncodeError:
        place = path.encode(errors="replace").decode()
        raise LlmcError("the name is no valid Unicode", place=place, hint="give the model another") from None
    return Path(os.path.expanduser(path))


def _adapter_folder(adapter: str) -> Path:
    """The folder of an adapter given as a folder or as a hub id, from which it is then fetched."""
    path = expanded(adapter)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not hub.is_hub_id(adapter):
        hint = "give the folder that has adapter_config.json, or a hub id (owner/name)"
        raise LlmcError(f"no such folder: {adapter}", place="--adapter", hint=hint)
    return hub.fetch(adapter, weights=False)


def _open_gguf(path: Path, weights: str) -> Found:
    """The model that a GGUF file holds."""
    from llmc.compiler.frontend.gguf import model as gguf_model
    from llmc.compiler.frontend.gguf.file import open_gguf

    file = open_gguf(path)
    fields, packing = gguf_model.config_of(file), gguf_model.packing_of_file(file)
    checkpoint = gguf_model.checkpoint_of(file, fields) if weights == "real" else None
    return Found(file.name, path.resolve().parent, fields, checkpoint, packing=packing, gguf=file)


def _open_model(name: str, folder: Path | None, fields: dict[str, Any], weights: str) -> Found:
    """The model in a folder, or its text part.  folder: None for random weights of a known model."""
    checkpoint = open_checkpoint(folder) if folder and weights == "real" else None
    packing = packing_in(folder, fields) if folder and checkpoint is not None else None
    fields = without_packing(fields)
    if packing and checkpoint is not None:
        checkpoint = packing.join(checkpoint)
    notes = packing.notes if packing else ()
    part = text_fields(fields, str(folder or name))
    if part is None:
        return Found(name, folder, fields, checkpoint, notes=notes, packing=packing)
    whole = Whole(fields, checkpoint)
    if checkpoint is not None:
        checkpoint = text_tensors(checkpoint)
        if HEAD not in checkpoint:  # then it is the embedding: the part's own fields need not say so
            part = {**part, TIED: True}
    labels = is_labelled(architecture_of(fields))
    return Found(name, folder, part, checkpoint, is_part=True, notes=notes, packing=packing, labels=labels, whole=whole)


def _find_folder(model: str, weights: str) -> tuple[str, Path | None, dict[str, Any], Path | None]:
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
    path = expanded(given)
    if os.path.isdir(path):  # unlike Path's own it is False too for what can be no name
        return path.resolve().name, path
    if os.path.exists(path):
        hint = "give the folder that has config.json and safetensors, a .gguf file, or an .onnx file"
        raise LlmcError("a model is a folder, and this is a file", place=given, hint=hint)
    if not hub.is_hub_id(hub_id):
        names = ", ".join(KNOWN_MODELS)
        raise LlmcError(f"no such folder: {given}", hint=f"or a hub id (owner/name), or one of {names}")
    return hub_id.rpartition("/")[2], hub.fetch(hub_id, weights=weights == "real")
