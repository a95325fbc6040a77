"""Models that make embeddings of texts: the graph that gives these in place of logits.

A decoder's embedding is made of what its last norm gives: that at the text's last token, or the mean over all tokens,
usually brought to length 1.  The graph gives what the norm gives in place of logits, filled up with zeros to as many
columns as logits would have, so that the artifact's steps are those of any other model.

An encoder, whose tokens see what is behind them, has all of a text in one step.  So its graph can pool, and do what
sentence-transformers does behind that: it gives embeddings, which are only not yet brought to length 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from llmc.compiler.frontend.sentence_modules import TO_TEXT, Dense, Modules, Pooling, modules_of
from llmc.compiler.graph import attribute, emit, ints_constant, prune, replace
from llmc.compiler.graph.shapes import dims
from llmc.runtime.errors import LlmcError

Task = Literal["auto", "generate", "embed", "classify"]
TASKS = get_args(Task)
HEADLESS = "llmc.headless"
"""In a graph's metadata: how many tokens there are, where its `logits` are an encoder's hidden states, or of labels."""
N_TYPES = "llmc.n_types"
"""In a graph's metadata: how many types of tokens there are, where a token's number says its type
(export/token_types.py)."""
BOTH_WAYS = "llmc.both_ways"
"""In a graph's metadata: its attention is spelled out, and an encoder's."""
POOLS = {"mean": "llmc.PoolMean", "cls": "llmc.PoolFirst"}


@dataclass(frozen=True)
class Embedding:
    """How embeddings are made.

    size: elements of one.  pooling: "cls" takes the first token, "last" the last, "mean" all.  normalized: whether they
    are brought to length 1.  whole: whether texts are read whole, by a graph that pools; for such: dense: what is done
    behind the pooling, and max_tokens: of a text, 0 where nobody says.
    """

    size: int
    pooling: Pooling = "last"
    normalized: bool = True
    whole: bool = False
    dense: tuple[Dense, ...] = ()
    max_tokens: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        record = {"size": self.size, "pooling": self.pooling, "normalized": self.normalized}
        return record | ({"whole": True, "dense": [asdict(dense) for dense in self.dense]} if self.whole else {})


def embedding_of(graph: ir.Model, folder: Path | None, task: Task) -> Embedding | None:
    """How the model makes embeddings, and its graph without a head; None for one that writes texts.  folder: where
    sentence-transformers' files may lie.  task: "auto" asks these; "embed" makes do without.  Raises LlmcError."""
    if is_whole(graph):
        return whole_embedding(graph, folder, task)
    modules = None if task == "generate" else modules_of(folder)
    if modules is None:
        modules = Modules("last", True) if task == "embed" else None
    if modules is None:
        return None
    if modules.pooling == "cls":
        fact = "a decoder's embeddings are of a text's last token, or the mean over its tokens; this model's are others"
        raise LlmcError(fact, place=str(folder), hint=TO_TEXT)
    return Embedding(drop_head(graph), modules.pooling, modules.normalized)


def is_whole(model: ir.Model) -> bool:
    """Whether a token sees what is behind it."""
    return BOTH_WAYS in model.metadata_props or any(
        node.op_type == "Attention" and not attribute(node, "is_causal", 0) for node in model.graph
    )


def n_tokens(model: ir.Model) -> int:
    """How many tokens there are: columns of the logits, where there are some."""
    return int(model.metadata_props.get(HEADLESS) or str(dims(model.graph.outputs[0])[-1]))


def whole_embedding(model: ir.Model, folder: Path | None, task: Task) -> Embedding:
    """How a model makes embeddings whose tokens see what is behind them; its graph gives them then."""
    if task == "generate":
        fact = "its tokens see what is behind them: it makes embeddings, and writes no texts"
        raise LlmcError(fact, place="--task generate", hint="--task embed")
    modules = modules_of(folder, None, with_dense=True) or Modules("mean", True)
    states = model.graph.outputs[0] if HEADLESS in model.metadata_props else before_head(model)[0]
    value = pooled(model.graph, states, modules)
    size = dims(value)[-1]
    assert isinstance(size, int)
    if value is not model.graph.outputs[0]:
        give(model.graph, value)
    return Embedding(size, modules.pooling, modules.normalized, True, modules.dense, modules.max_tokens)


def pooled(graph: ir.Graph, states: ir.Value, modules: Modules) -> ir.Value:
    """Nodes at the graph's end that pool and do what comes then; -> what they give."""
    end = ir.Node("", "Identity", [states])
    graph.append(end)
    value = states if modules.pooling == "last" else emit(end, POOLS[modules.pooling], [states])[0]
    for dense in modules.dense:
        if dims(value)[-1] != dense.n_inputs:
            fact = f"a Dense module takes {dense.n_inputs} elements; it is given {dims(value)[-1]}"
            raise LlmcError(fact, place=dense.path)
        weight = parameter(graph, f"{dense.path}.linear.weight", (dense.n_outputs, dense.n_inputs))
        value = emit(end, "MatMul", [value, emit(end, "Transpose", [weight], perm=[1, 0])[0]])[0]
        if dense.bias:
            value = emit(end, "Add", [value, parameter(graph, f"{dense.path}.linear.bias", (dense.n_outputs,))])[0]
        value = emit(end, dense.activation, [value])[0] if dense.activation else value
    graph.remove(end, safe=True)
    return value


def parameter(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    """A weight that is not read yet."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.initializers[name] = value
    return value


def give(graph: ir.Graph, value: ir.Value) -> None:
    """Put a value in the logits' place, and let go of what only these needed."""
    logits = graph.outputs[0]
    value.name, logits.name = logits.name, f"{logits.name}.before"
    graph.outputs[0] = value
    prune([maker] if (maker := logits.producer()) else [])


def before_head(model: ir.Model) -> tuple[ir.Value, ir.Node]:
    """What the head is given, and the product that it is: it makes the logits; what follows it has them as its one
    operand that is no constant.  Raises LlmcError where there is none."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type not in ("MatMul", "Gemm"):
        varying = [value for value in node.inputs if value is not None and not value.is_initializer()]
        node = varying[0].producer() if len(varying) == 1 else None
    x = node.inputs[0] if node is not None else None
    if node is None or x is None:
        raise LlmcError("no product makes this model's logits whose operand could be embeddings", hint=TO_TEXT)
    return x, node


def drop_head(model: ir.Model) -> int:
    """Put what the head is given in the logits' place, filled up with zeros.  -> how many elements it has.  Raises
    LlmcError where there is none."""
    graph = model.graph
    logits = graph.outputs[0]
    x, node = before_head(model)
    width, n_vocab = dims(x)[-1], dims(logits)[-1]
    if not isinstance(width, int) or not isinstance(n_vocab, int):
        raise LlmcError("no product makes this model's logits whose operand could be embeddings", hint=TO_TEXT)
    if width > n_vocab:
        raise LlmcError(f"embeddings of {width} elements are more than the {n_vocab} tokens of the vocabulary")
    pads, axes = ints_constant(graph, [0, n_vocab - width]), ints_constant(graph, [-1])
    replace(logits, emit(node, "Pad", [x, pads, None, axes])[0])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return width
