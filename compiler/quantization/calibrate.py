"""Fit quantised weights to the inputs that a text gives their layers: `llmc compile --calibrate FILE`.

The step graph runs over the text layer by layer (graph/stream.py).  When a weight is read, it is fitted to what reaches
its layer (feedback.py), the layers before it being quantised already.  Weights are packed in the graph's order, so
codes need not be kept, in memory or on disk; to read a weight that the run has passed starts it again.  Where one is
packed before its turn, as a table that makes the logits too, codes that were passed on the way are kept, if there are
few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.frontend import SourceModel
from llmc.compiler.graph.stream import Stream
from llmc.compiler.quantization import feedback
from llmc.compiler.quantization.quantize import Quantized, QuantizedWeight, Scheme, quantize
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.runtime.text import load_tokenizer

SEQUENCE_TOKENS = 512
MOST_TOKENS = 8192
"""A longer text is not used whole: sequences are taken from it at even distances."""
LEAST_TOKENS = 128
MOST_CHARACTERS = 4 << 20
"""A text is read this far."""
KEPT_BYTES = 2 << 30
"""Codes and scales that are kept at most."""


@dataclass(frozen=True)
class Calibration:
    """What weights are fitted to.

    file: its name.  sha256: of its bytes.  sequences: token ids int64, each read from position 0.
    """

    file: str
    sha256: str
    sequences: tuple[Array, ...]

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        n_tokens = sum(map(len, self.sequences))
        facts = {"method": "gptq", "damping": feedback.DAMPING, "tokens": n_tokens, "sequences": len(self.sequences)}
        return facts | {"file": self.file, "sha256": self.sha256}


# -- the text ------------------------------------------------------------------------------------------------------


def check_file(file: str | Path | None, scheme: Scheme | None) -> None:
    """Refuse, before any work is done, a file that cannot be used, and one for weights that are not to be fitted."""
    if file is None:
        if scheme is not None and scheme.most_bits is not None:
            fact = "which products need 8 bits is measured on a text, and none is given"
            hint = f"--calibrate FILE, of at least {LEAST_TOKENS} tokens"
            raise LlmcError(fact, place=f"--quant-bits {scheme.most_bits:g}", hint=hint)
        return
    file = Path(file)
    place = f"--calibrate {file}"
    if scheme is None:
        fact = "--calibrate says how to quantise, but nothing is"
        raise LlmcError(fact, place="--quant none", hint="use --quant int4")
    if scheme.of_experts_alone:
        raise LlmcError(f"{scheme.name} is not fitted to a text", place=place, hint="use --quant int4")
    if not file.exists():
        raise LlmcError("the calibration text does not exist", place=place)
    if not file.is_file():
        raise LlmcError("the calibration text is not a file", place=place)
    if file.stat().st_size == 0:
        raise LlmcError("the calibration text is empty", place=place, hint=f"it needs at least {LEAST_TOKENS} tokens")


def calibrated(scheme: Scheme | None, file: str | Path | None, source: SourceModel) -> Scheme | None:
    """The scheme, with the text of `file` to calibrate by, if one is given."""
    return scheme if scheme is None or file is None else replace(scheme, calibration=read(Path(file), source))


def read(file: Path, source: SourceModel) -> Calibration:
    """The tokens of a text, or those that a .json file lists.  Raises LlmcError: too few, or none of this model's."""
    place = f"--calibrate {file}"
    try:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        begin, texts = listed(file) if file.suffix == ".json" else tokenised(file, source)
    except OSError as error:
        raise LlmcError(f"the calibration text cannot be read: {error.strerror}", place=place) from error
    n_tokens = sum(map(len, texts))
    if n_tokens < LEAST_TOKENS:
        hint = f"give at least {LEAST_TOKENS}, better {MOST_TOKENS}, of the kind of text that the model will meet"
        raise LlmcError(f"{n_tokens} tokens are too few to calibrate with", place=place, hint=hint)
    for token in (token for tokens in texts for token in tokens):
        if not 0 <= token < source.n_vocab:
            raise LlmcError(f"the model has {source.n_vocab} tokens, and none of the id {token}", place=place)
    sequences = cut(texts, begin, min(SEQUENCE_TOKENS, source.n_context))
    return Calibration(file.name, digest.hexdigest(), spread(sequences, MOST_TOKENS))


def tokenised(file: Path, source: SourceModel) -> tuple[list[int], list[list[int]]]:
    """The token that begins a text, if the model has one, and the text's tokens."""
    place = f"--calibrate {file}"
    if source.tokenizer_json is None:
        hint = "give token ids: a list of numbers in a file that is named .json"
        raise LlmcError("the model has no tokenizer to read a text with", place=place, hint=hint)
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MOST_CHARACTERS)
    except UnicodeDecodeError as error:
        raise LlmcError("the calibration text is not UTF-8", place=place) from error
    tokenizer = load_tokenizer(source.tokenizer_json.decode(), source.name)
    begins = tokenizer.encode("").ids[:1] == [source.bos]
    begin = [source.bos] if begins and source.bos is not None else []
    return begin, [tokenizer.encode(text, add_special_tokens=False).ids]


def listed(file: Path) -> tuple[list[int], list[list[int]]]:
    """The token ids of a JSON list of numbers, which is one sequence, or of such lists; behind an empty list, since
    they bring their own first tokens."""
    place, hint = f"--calibrate {file}", "a text has another name: .txt"
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise LlmcError("the file is not JSON", place=place, hint=hint) from error
    sequences = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    if not all(isinstance(tokens, list) and all(type(token) is int for token in tokens) for tokens in sequences):
        fact = "the file holds no list of token ids, nor a list of such lists"
        raise LlmcError(fact, place=place, hint=hint)
    return [], sequences


def cut(texts: Iterable[Sequence[int]], begin: list[int], n_tokens: int) -> list[Array]:
    """Sequences of up to `n_tokens` that each begin with `begin`."""
    step = max(1, n_tokens - len(begin))
    return [
        np.array([*begin, *tokens[start : start + step]], np.int64)
        for tokens in texts
        for start in range(0, len(tokens), step)
    ]


def spread(sequences: Sequence[Array], n_tokens: int) -> tuple[Array, ...]:
    """Sequences at even distances from each other, of about `n_tokens` in all; all of them, if they have no more."""
    n_all = len(sequences)
    n_kept = min(n_all, max(1, n_all * n_tokens // sum(map(len, sequences))))
    return tuple(sequences[i * n_all // n_kept] for i in range(n_kept))


# -- the weights ---------------------------------------------------------------------------------------------------


def fit_weights(model: ir.Model, calibration: Calibration) -> None:
    """Have the quantised weights of a step graph fitted when they are read.

    The graph is taken as it is now: passes may go on changing it.
    """
    fitting = Fitting(model.clone().graph, calibration)
    for weight in fitting.weights.values():
        weight.fit = partial(fitting.quantized, weight)


class Fitting:
    """Runs a step graph as far as the weight that is asked for, and from the start again for one that it has passed."""

    def __init__(self, graph: ir.Graph, calibration: Calibration) -> None:
        self.graph, self.calibration = graph, calibration
        self.weights: dict[ir.Node, QuantizedWeight] = {
            node: tensor
            for node in graph
            for value in node.inputs[1:2]
            if value is not None and isinstance(tensor := value.const_value, QuantizedWeight)
        }
        self.passed: set[QuantizedWeight] = set()
        self.given: set[QuantizedWeight] = set()
        self.kept: dict[QuantizedWeight, Quantized] = {}
        self.fitted: Iterator[tuple[QuantizedWeight, Quantized]] = iter(())

    def quantized(self, weight: QuantizedWeight) -> Quantized:
        """The weight's codes and scales, from this run if it has not passed the weight, else from a new one."""
        self.given.add(weight)
        if weight in self.kept:
            return self.kept.pop(weight)
        if weight in self.passed or not self.passed:
            self.fitted, self.passed = self.run(), set()
        for fitted, quantized in self.fitted:
            self.passed.add(fitted)
            if fitted is weight:
                return quantized
            self.keep(fitted, quantized)
        raise AssertionError(f"{weight.name} is not in the graph")

    def keep(self, weight: QuantizedWeight, quantized: Quantized) -> None:
        """For when it is asked for, unless it was, or too many are kept."""
        n_bytes = sum(each.n_bytes for each in (*self.kept.values(), quantized))
        if weight not in self.given and n_bytes <= KEPT_BYTES:
            self.kept[weight] = quantized

    def run(self) -> Iterator[tuple[QuantizedWeight, Quantized]]:
        """Every quantised weight and what it becomes, in the graph's order.  One that several layers share is fitted to
        the first of them."""
        stream = Stream(self.graph, self.calibration.sequences)
        shared: dict[QuantizedWeight, Quantized] = {}
        n_left = len(self.weights)
        for node in self.graph:
            x, value = node.inputs[:2] if node in self.weights else (None, None)
            if x is None or value is None:
                stream.run(node)
                continue
            weight = self.weights[node]
            result = shared.get(weight) or fitted(weight, stream.values[x])
            if weight not in shared:
                yield weight, result
            if len(value.uses()) > 1:
                shared[weight] = result
            n_left -= 1
            if n_left == 0:
                return
            stream.run(node, {value: result.values()})


def own(array: Array, weight: QuantizedWeight) -> Quantized | None:
    """The codes and scales of a weight [rows, K] whose values are exactly that already; None for another weight."""
    for n_rows in (64, len(array)):  # a few tell of most that they aren't
        quantized = quantize(array[:n_rows], weight.scheme, str(weight.source.name))
        if quantized.kept < 1:
            return None
    return quantized


def fitted(weight: QuantizedWeight, inputs: Sequence[Array]) -> Quantized:
    """The codes and scales of a weight for a layer's inputs, float32 [tokens, K] of each sequence."""
    products = np.zeros((weight.dims[1],) * 2, np.float32)
    for x in inputs:
        products += x.T @ x
    if not np.isfinite(products).all():
        fact = "the calibration text leads to activations that are not finite numbers"
        raise LlmcError(fact, place=f"input of weight {weight.source.name}", hint="try another text")
    array = weight.source.unrounded()
    return own(array, weight) or feedback.fit_to_inputs(array, products, weight.scheme, str(weight.source.name))
