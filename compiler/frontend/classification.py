"""Models that give texts labels: rerankers, classifiers, reward models.

transformers' own head is exported, and the pooling in front of it: it takes a text's first token, the mean over all
tokens, or the last one, and goes on with that alone.  Here it goes on at each token, as if the text ended there.  So
the graph is one over tokens like any other, and what it gives at the last token of a text is what the text gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from llmc.compiler.frontend.config import LABELLED, architecture_of, is_labelled
from llmc.compiler.frontend.embedding import N_TYPES, POOLS, Task, give, is_whole
from llmc.compiler.frontend.sentence_modules import modules_of, read_object
from llmc.compiler.graph import emit, ints_constant, replace
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import DOMAIN, WITH_STATES
from llmc.compiler.weights import Array
from llmc.runtime.classification import Activation, Classification
from llmc.runtime.errors import LlmcError, shortened

ACTIVATIONS: Mapping[str, Activation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
"""Activations of sentence-transformers' cross encoders, by the last part of their names."""
SAID = {"mean": "the mean over its tokens", "cls": "its first token", "last": "its last token"}
"""What pools take of a text, in words."""
PASSES_ON = ("Mul", "Where", "Cast", "Identity")
"""Operators between a model's last values and a mean over them under a mask, which here is all ones."""
ATTENDS = ("Attention", "Softmax")
"""How the names of operators end through which tokens see each other."""
MOST_BEHIND = 4
"""The most nodes of a pooling, counted from the one behind which there is no axis of tokens."""
TEXTS = (2, 5)
"""A pooling is tried with so many texts, of so many tokens each."""


class Cut(NamedTuple):
    """Where a graph pools: `before` [batch, sequence, …] has tokens, and `behind` [batch, …] is their first, their last
    or their mean, as `pool` says: a key of POOLS, or "last"."""

    before: ir.Value
    behind: ir.Value
    pool: str


def as_task(fields: dict[str, Any], folder: Path | None, task: Task) -> dict[str, Any]:
    """The configuration, changed so that it names a classifier first just if texts are to get labels: if that is asked
    for, or if nothing is asked for, it names one already, and sentence-transformers' files speak of no embeddings."""
    architecture = architecture_of(fields)
    labels = is_labelled(architecture)
    wanted = task == "classify" or (task == "auto" and labels and modules_of(folder) is None)
    if labels == wanted:
        return fields
    rest = {name: value for name, value in fields.items() if name != "architectures"}
    stem = (architecture or str(fields.get("model_type"))).partition("For")[0]
    return {**rest, "architectures": [f"{stem}{LABELLED}"]} if wanted else rest


def classification_of(model: ir.Model, fields: Mapping[str, Any], folder: Path | None) -> Classification | None:
    """How the model gives texts labels, and its graph their logits at each token; None for one that gives none.
    fields: of its configuration.  folder: where its tokenizer's settings may lie.  Raises LlmcError."""
    if not is_labelled(architecture_of(dict(fields))):
        return None
    n_labels = dims(model.graph.outputs[0])[-1]
    if any(op_name(node) in (f"{DOMAIN}.{name}" for name in WITH_STATES) for node in model.graph):
        raise LlmcError("labels of models whose layers have a state are not compiled yet")
    if not isinstance(n_labels, int):
        raise LlmcError("its head gives no fixed number of labels")
    whole = is_whole(model)
    label_each_token(model)
    named = fields.get("id2label")
    names = named if isinstance(named, dict) else {}
    labels = tuple(str(names.get(str(number), f"LABEL_{number}")) for number in range(n_labels))
    n_types = int(model.metadata_props.get(N_TYPES, "1"))
    return Classification(labels, activation_of(fields, n_labels), n_types if reads_types(folder) else 1, whole)


def reads_types(folder: Path | None) -> bool:
    """Whether transformers' tokenizer says to which of two texts a token belongs: it does, unless its settings list the
    model's inputs without that one."""
    file = folder / "tokenizer_config.json" if folder else None
    named = read_object(file).get("model_input_names") if file is not None and file.is_file() else None
    return not isinstance(named, list) or "token_type_ids" in named


def activation_of(fields: Mapping[str, Any], n_labels: int) -> Activation:
    """What makes scores of logits: what sentence-transformers' part of a configuration says, or else transformers'.
    Raises LlmcError."""
    said = fields.get("sentence_transformers")
    name = said.get("activation_fn") if isinstance(said, dict) else None
    name = name or fields.get("sbert_ce_default_activation_function")
    if name:
        known = ACTIVATIONS.get(str(name).rpartition(".")[2])
        if known is None:
            raise LlmcError(f"scores that go through {shortened(name)} are not compiled")
        return known
    if fields.get("problem_type") == "regression":
        return "identity"
    return "sigmoid" if n_labels == 1 or fields.get("problem_type") == "multi_label_classification" else "softmax"


def label_each_token(model: ir.Model) -> None:
    """Let the graph give logits [batch, sequence, labels].  In place; raises LlmcError where it is not known how a text
    is made of its tokens."""
    graph = model.graph
    cut = cut_of(model)
    if cut.pool == "last" and not is_whole(model):
        pooled = cut.before
    elif cut.pool in POOLS and is_whole(model):
        pooled = emit(after(cut.behind), POOLS[cut.pool], [cut.before])[0]
    else:
        kind = "an encoder" if is_whole(model) else "a decoder"
        raise LlmcError(f"labels of {kind} that are made of {SAID[cut.pool]} are not compiled")
    logits = graph.outputs[0]
    if cut.behind is logits:
        give(graph, pooled)
        return
    behind = values_behind(graph, cut.behind)
    sizes = [int(str(size)) for size in dims(cut.behind)[1:]]
    flat = shaped(after(cut.behind), pooled, ints_constant(graph, [-1, *sizes]), ["batch*sequence", *sizes])
    replace(cut.behind, flat)
    for value in behind:
        value.shape = ir.Shape(
            [ir.SymbolicDim("batch*sequence") if str(size) == "batch" else size for size in dims(value)]
        )
    end = ir.Node("", "Identity", [logits])
    graph.append(end)
    n_labels = int(str(dims(logits)[-1]))
    n_tokens = emit(end, "Shape", [graph.inputs[0]])[0]
    target = emit(end, "Concat", [n_tokens, ints_constant(graph, [n_labels])], axis=0)[0]
    of_tokens = shaped(end, logits, target, ["batch", "sequence", n_labels])
    graph.remove(end, safe=True)
    give(graph, of_tokens)


def shaped(before: ir.Node, x: ir.Value, target: ir.Value, shape: list[int | str]) -> ir.Value:
    """x reshaped, by a node in front of another."""
    node = ir.Node("", "Reshape", [x, target])
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), x.type
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, node)
    return node.outputs[0]


def cut_of(model: ir.Model) -> Cut:
    """Where the graph lets go of tokens.  Raises LlmcError: nowhere, in several places, or in a way that is not known.

    What is done there is not looked at: it is tried, with numbers."""
    graph = model.graph
    seen = {value for node in graph if node.op_type.endswith(ATTENDS) for value in node.outputs}
    for node in graph:
        if any(value in seen for value in node.inputs):
            seen.update(node.outputs)
    found = [
        (value, node.outputs[0])
        for node in graph
        for value in node.inputs
        if value in seen and value is not None and has_tokens(value) and not has_tokens(node.outputs[0])
    ]
    if len(found) != 1:
        raise LlmcError(f"its labels are made of what {len(found)} poolings give; one is compiled")
    last, first = found[0]
    for behind in chain_from(first):
        for before in starts(last, seen):
            if (pool := pool_of(graph, before, behind)) is not None:
                return Cut(before, behind, pool)
    raise LlmcError("it makes labels of neither a text's first token, nor its last, nor the mean over all")


def has_tokens(value: ir.Value) -> bool:
    return any("sequence" in str(size) for size in dims(value))


def chain_from(value: ir.Value) -> Iterator[ir.Value]:
    """The value, and then what is made of it and nothing else, one after the other."""
    for _ in range(MOST_BEHIND):
        yield value
        users = {use.node for use in value.uses()}
        if len(users) != 1:
            return
        value = next(iter(users)).outputs[0]


def starts(value: ir.Value, seen: set[ir.Value]) -> list[ir.Value]:
    """What may be pooled, the earliest first."""
    found = [value]
    while (node := found[-1].producer()) is not None and node.op_type in PASSES_ON:
        before = [operand for operand in node.inputs if operand in seen and operand is not None]
        if len(before) != 1 or dims(before[0]) != dims(value):
            break
        found.append(before[0])
    return found[::-1]


def pool_of(graph: ir.Graph, before: ir.Value, behind: ir.Value) -> str | None:
    """What of its tokens `before` the value `behind` has; None: something else."""
    sizes = [size for size in dims(before)[2:] if isinstance(size, int)]
    if dims(before)[:2] != dims(graph.inputs[0]) or list(dims(behind)[1:]) != sizes:
        return None
    part = extract(behind, [before, *graph.inputs])
    if any(value.const_value is None for value in part.graph.initializers.values()):
        return None  # a head's own weights
    x = np.random.default_rng(0).normal(size=(*TEXTS, *sizes)).astype(np.float32)
    feeds: dict[str, Array] = {str(value.name): np.broadcast_to(np.arange(TEXTS[1]), TEXTS) for value in graph.inputs}
    found = next(iter(runner(part)({**feeds, str(before.name): x}).values()))
    wanted = {"cls": x[:, 0], "last": x[:, -1], "mean": x.mean(1)}
    return next((pool for pool, y in wanted.items() if np.allclose(found, y, rtol=1e-5, atol=1e-6)), None)


def after(value: ir.Value) -> ir.Node:
    """The node that makes the value: in front of it all is known that it is made of."""
    node = value.producer()
    assert node is not None
    return node


def values_behind(graph: ir.Graph, first: ir.Value) -> list[ir.Value]:
    """What is made of a value, in order."""
    behind = {first: None}
    for node in graph:
        if any(value in behind for value in node.inputs):
            behind.update(dict.fromkeys(node.outputs))
    return [value for value in behind if value is not first]
