"""Whether a mask is the causal one: worked out, not recognised, since exporters write it in many ways."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

SHORT = 13
LONGEST = 4608
"""Masks are worked out for sequences of up to so many tokens, enough to see sliding windows of 4096."""
CHANGES = ("Add", "Cast", "Div", "Mul", "Reshape", "Where")
"""Operators between a product and a softmax."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
LARGE = 1 << 40
"""Numbers from here on are no windows: they are the ends of slices, or hide scores."""
MASKED = -1e4
"""A key is hidden by this number or a smaller one, down to -inf, added to its score or in place of it.  In float32
exp(x) is 0 for x < -104, so such a key counts for nothing, unless its score is larger than all others by 9896."""
ALIBI = "the attention adds to its scores a bias by distance (ALiBi) in a form that is not compiled"
FILLS = ("Cast", "Expand", "Mul", "Where")
"""Operators that take what scores are filled with, and no size of a window."""


def read_mask(
    result: ir.Value,
    scores: ir.Value | None,
    n_context: int,
    place: str,
    *,
    causal: bool = False,
    biases: Sequence[ir.Value] = (),
) -> int:
    """The sliding window of a mask; 0 if it has none; -n if each token sees the chunk of n tokens that it is
    in.  Raises LlmcError if the mask is not causal.

    result: the mask itself, true where a key counts, or added to the scores; or what becomes of `scores` under it.
    causal: whether keys after a token do not count anyway.  biases: what is added too, and is no matter here.
    """
    cut = (*([scores] if scores is not None else []), *biases)
    n_tokens = enough_tokens(result, cut, n_context, place)

    def kept(n_tokens: int) -> Array:
        counts = evaluated(result, scores, biases, n_tokens, place)
        return counts & in_sight(n_tokens, 0) if causal else counts

    counts = kept(n_tokens)
    least = int(counts[:, 0].sum())
    window = next((window for window in (least, -least) if (counts == in_sight(n_tokens, window)).all()), 0)
    if window < 0:  # not only the first chunk ends there
        n_tokens = min(n_context, LONGEST, max(n_tokens, 2 * least + 2))
        counts = kept(n_tokens)
    if (counts != in_sight(n_tokens, window)).any():
        seen = "all keys count" if counts.all() else "other keys than those before a token count"
        raise LlmcError(f"the attention is not causal: {seen}", place=place)
    return 0 if least == n_tokens else window


def enough_tokens(result: ir.Value, cut: Sequence[ir.Value], n_context: int, place: str) -> int:
    """How many tokens a sequence must have for every window in a mask to show.  cut: values whose makers are not looked
    at.  Raises LlmcError if these are more than a mask is worked out for."""
    n_tokens = min(n_context, max(SHORT, *(number + 2 for number in numbers_in(result, cut, n_context))))
    if n_tokens > LONGEST:
        fact = f"the attention's mask has the number {n_tokens - 2} in it, and may be"
        hint = f"ask for a --max-seq of at most {LONGEST}"
        raise LlmcError(f"{fact} a sliding window of so many tokens", place=place, hint=hint)
    return n_tokens


def in_sight(n_tokens: int, window: int) -> Array:
    """bool [n_tokens, n_tokens]: whether a token (row) attends a key (column) within this window, or chunk of -window;
    ops.attention_parts.in_sight as numbers."""
    tokens = np.arange(n_tokens)
    distance = tokens[:, None] - tokens
    if window < 0:
        return np.array((distance >= 0) & (tokens // -window == (tokens // -window)[:, None]))
    return np.array((distance >= 0) & (distance < (window or n_tokens)))


def near(n_tokens: int, window: int) -> Array:
    """bool [n_tokens, n_tokens]: whether two tokens are less than `window` apart; ops.attention_parts.near as
    numbers."""
    tokens = np.arange(n_tokens)
    return np.array(np.abs(tokens[:, None] - tokens) < window)


def window_of(counts: Array, place: str) -> int:
    """n, where the keys that count are less than n away on either side; 0, where all count."""
    reach = max(int(counts[0].sum()), 1)  # a token sees itself
    others = np.argwhere(counts != near(len(counts), reach))
    if len(others):
        row, column = (int(index) for index in others[0])
        says = "counts" if counts[row, column] else "does not count"
        fact = "its attention's mask is neither causal nor that of an encoder"
        raise LlmcError(f"{fact}: for token {row} the key {column} {says}", place=place)
    return 0 if reach == len(counts) else reach


def numbers_in(result: ir.Value, cut: Sequence[ir.Value], n_context: int) -> list[int]:
    """Whole numbers that the mask is made of and that may be a window's size; of a table, its size less 2.  cut: values
    whose makers are not looked at."""
    found: set[int] = {0}
    seen = {*cut, None}
    queue: list[ir.Value | None] = [result]
    while queue:
        value = queue.pop()
        if value in seen or value is None:
            continue
        seen.add(value)
        tensor = value.const_value
        if tensor is not None and tensor.size > SHORT:  # a mask for the longest sequence, of which a part is cut
            found.add(min(n_context, *(int(size) for size in tensor.shape.numpy() if size > 1)) - 2)
        elif tensor is not None and tensor.dtype != ir.DataType.BOOL and not is_fill(value):
            numbers = tensor.numpy().astype(np.float64).reshape(-1)
            found.update(int(abs(number)) for number in numbers if number == np.round(number) and abs(number) < LARGE)
        node = value.producer()
        queue += node.inputs if node is not None and node.op_type != "Shape" else ()
    return [number for number in found if number < n_context]


def is_fill(value: ir.Value) -> bool:
    """Whether the number is what hides keys: -10000.0, say, which is no window of 10000 tokens."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or tensor.dtype not in FLOATS:
        return False
    return float(tensor.numpy().reshape(-1)[0]) <= MASKED and all(use.node.op_type in FILLS for use in value.uses())


def evaluated(
    result: ir.Value, scores: ir.Value | None, biases: Sequence[ir.Value], n_tokens: int, place: str
) -> Array:
    """bool [n_tokens, n_tokens]: whether a token (row) attends a key (column)."""
    cut = (*([scores] if scores is not None else []), *biases)
    leaves = [value for value in ancestors(result, cut) if value.is_graph_input()]
    part = extract(result, [*leaves, *cut])
    for value in [*part.graph.inputs, *(value for node in part.graph for value in node.outputs)]:
        value.shape = None  # of one head, where the graph has several
    feeds = {str(value.name): np.arange(n_tokens)[None] for value in leaves}
    if scores is not None:
        feeds[str(scores.name)] = np.zeros(shape_of(scores, part.graph, n_tokens), np.float32)
    feeds |= {str(bias.name): np.zeros((1,) * len(dims(bias)), np.float32) for bias in biases}
    found = next(iter(runner(part)(feeds).values()))
    try:
        found = np.broadcast_to(found, (*found.shape[:-2], n_tokens, n_tokens)).reshape(-1, n_tokens, n_tokens)
    except ValueError as error:
        raise LlmcError(f"the attention's mask has the shape {found.shape}", place=place) from error
    if found.dtype != np.bool_ and is_alibi(found[:, -1]):
        raise LlmcError(ALIBI, place=place)
    if (found != found[0]).any():
        raise LlmcError("the attention's mask is not the same for all heads", place=place)
    if found.dtype == np.bool_:
        return np.array(found[0])
    counts = found[0] == 0
    others = found[0][~counts & (found[0] > MASKED)]
    if others.size and np.isin(found[0], (0, others[0])).all():
        fact = f"the attention hides keys by adding {others[0]:g} to their scores, after which they may still count"
        raise LlmcError(fact, place=place, hint=f"a mask has {MASKED:g} or less where keys are hidden")
    if others.size:
        raise LlmcError("the attention adds to its scores what is no mask: a bias by position", place=place)
    return np.array(counts)


def shape_of(scores: ir.Value, part: ir.Graph, n_tokens: int) -> tuple[int, ...]:
    """The shape of the scores of one sequence; of one head, unless the part tells heads from the batch."""
    made = {value for value in part.inputs if value.name == scores.name}
    for node in part:
        if any(value in made for value in node.inputs):
            if node.op_type == "Reshape":
                outer = [size if isinstance(size, int) else times(size, "batch") for size in dims(scores)[:-2]]
                return (*outer, n_tokens, n_tokens)
            made.update(node.outputs)
    return (1, 1, n_tokens, n_tokens)


def times(size: ir.SymbolicDim, name: str) -> int:
    """4, if the size is "batch*4"."""
    whole, _, number = str(size).partition("*")
    return int(number) if whole == name and number.isdigit() else 1


def is_alibi(last: Array) -> bool:
    """Whether a bias [heads, keys] of the last token, for which all keys count, goes with their distance."""
    steps = np.diff(last.astype(np.float64), axis=-1)
    return bool((last > MASKED).all() and steps.any() and np.allclose(steps, steps[:, :1], rtol=1e-3))


def adds_alibi(scores: ir.Value | None, sized: Container[ir.Value]) -> bool:
    """Whether such a bias is among what is added on the way to scores that are not recognised."""
    queue, seen = [scores], set[ir.Value | None]()
    while queue:
        value = queue.pop()
        node = value.producer() if value is not None and value not in sized and value not in seen else None
        seen.add(value)
        if node is None or node.op_type not in CHANGES:
            continue
        queue += node.inputs
        for bias in node.inputs if node.op_type == "Add" else ():
            if bias is None or bias not in sized or bias.is_initializer() or dims(bias)[-1:] != dims(value)[-1:]:
                continue
            leaves = [leaf for leaf in ancestors(bias, ()) if leaf.is_graph_input()]
            feeds = {str(leaf.name): np.arange(SHORT)[None] for leaf in leaves}
            found = next(iter(runner(extract(bias, leaves))(feeds).values()))
            if is_alibi(found.reshape(-1, SHORT)):
                return True
    return False


def ancestors(result: ir.Value, cut: Container[ir.Value]) -> Iterable[ir.Value]:
    """The values that the result is made from, those that are cut off and what is before them left out."""
    seen: dict[ir.Value, None] = {}
    queue = [result]
    while queue:
        value = queue.pop()
        if value in cut or value in seen:
            continue
        seen[value] = None
        node = value.producer()
        queue += [operand for operand in (node.inputs if node is not None else ()) if operand is not None]
    return seen
