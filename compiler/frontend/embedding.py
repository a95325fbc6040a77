"""Models that make embeddings of texts: what sentence-transformers says of them, and their graph without a head.

A decoder makes an embedding of what its last norm gives, which its head would make logits of: at the text's last token,
or the mean over all tokens, usually brought to length 1.  The graph gives that in place of logits, filled up with zeros
to as many columns as there are tokens, so that an artifact's steps are those of any other model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from llmc.compiler.graph import emit, ints_constant, replace
from llmc.compiler.graph_shapes import dims
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

Task = Literal["auto", "generate", "embed"]
Pooling = Literal["last", "mean"]
MODULES = "modules.json"
POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
OLD_NAMES = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
KNOWN = ("Transformer", "Pooling", "Normalize")
"""sentence-transformers' modules that are understood."""
TO_TEXT = "--task generate compiles it as a model that writes texts"


@dataclass(frozen=True)
class Embedding:
    """How embeddings are made.  size: elements of one.  pooling: of the last token, or the mean over all.  normalized:
    brought to length 1."""

    size: int
    pooling: Pooling = "last"
    normalized: bool = True

    @property
    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


def embedding_of(graph: ir.Model, folder: Path | None, task: Task) -> Embedding | None:
    """How the model makes embeddings, and its graph without a head; None for one that writes texts.  folder: where
    sentence-transformers' files may lie.  Raises LlmcError."""
    pooling = pooling_of(folder, task)
    return Embedding(drop_head(graph), *pooling) if pooling else None


def pooling_of(folder: Path | None, task: Task) -> tuple[Pooling, bool] | None:
    """(pooling, whether embeddings are normalised) of a model that makes embeddings, None for one that writes texts.

    task: "auto" asks sentence-transformers' files; "embed" makes do without.  Raises LlmcError for what is not known.
    """
    if task == "generate":
        return None
    file = folder / MODULES if folder else None
    if file is None or not file.is_file():
        return ("last", True) if task == "embed" else None
    assert folder is not None
    modules = {str(one.get("type")).rpartition(".")[2]: one for one in read_list(file)}
    if "Pooling" not in modules:
        return ("last", True) if task == "embed" else None
    if strange := next((name for name in modules if name not in KNOWN), None):
        fact = f"embeddings that go through a module {strange!r} are not compiled"
        raise LlmcError(fact, place=str(file), hint=TO_TEXT)
    settings = read_object(folder / str(modules["Pooling"].get("path")) / "config.json")
    asked = settings.get("pooling_mode")
    named = [name for name, old in OLD_NAMES.items() if settings.get(old) is True]
    others = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    mode = asked if isinstance(asked, str) else named[0] if len(named) == len(others) == 1 else ""
    if mode not in POOLINGS:
        fact = "embeddings are compiled of a text's last token, or as the mean over its tokens; this model's are others"
        raise LlmcError(fact, place=str(file), hint=TO_TEXT)
    return POOLINGS[mode], "Normalize" in modules


def read_list(file: Path) -> list[dict[str, Any]]:
    found = read(file)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise LlmcError("it is no list of modules", place=str(file))
    return found


def read_object(file: Path) -> dict[str, Any]:
    found = read(file)
    if not isinstance(found, dict):
        raise LlmcError("it is no object", place=str(file))
    return found


def read(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LlmcError(f"it cannot be read: {error}", place=str(file)) from None


def drop_head(model: ir.Model) -> int:
    """Put what the head is given in the logits' place, filled up with zeros.  -> how many elements it has.

    The head is the product that makes the logits; what follows it has them as its one operand that is no constant.
    Raises LlmcError where there is none.
    """
    graph = model.graph
    logits = graph.outputs[0]
    node = logits.producer()
    while node is not None and node.op_type not in ("MatMul", "Gemm"):
        varying = [value for value in node.inputs if value is not None and not value.is_initializer()]
        node = varying[0].producer() if len(varying) == 1 else None
    x = node.inputs[0] if node is not None else None
    width, n_vocab = dims(x)[-1] if x is not None else None, dims(logits)[-1]
    if node is None or not isinstance(width, int) or not isinstance(n_vocab, int):
        raise LlmcError("no product makes this model's logits whose operand could be embeddings", hint=TO_TEXT)
    if width > n_vocab:
        raise LlmcError(f"embeddings of {width} elements are more than the {n_vocab} tokens of the vocabulary")
    pads, axes = ints_constant(graph, [0, n_vocab - width]), ints_constant(graph, [-1])
    replace(logits, emit(node, "Pad", [x, pads, None, axes])[0])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return width
