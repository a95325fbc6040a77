"""A tokenizer.model of sentencepiece's, of pairs that are merged by their scores, as Llama 2's and Mistral's are.

It is a message in protobuf: its fields, each a number and a kind, then a number or so many bytes
(sentencepiece_model.proto).  transformers merges by the order of pieces, and forgets the space in front of texts where
it does not know a model's class; here the tokenizer is built as that of a GGUF file, which says the same of itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmc.compiler.frontend.chat import CONFIG, read_object
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.text import CONTROL, FIRST, USER_DEFINED, text_of
from llmc.compiler.frontend.tokens import Text

PIECE, TRAINING, NORMALIZATION = 1, 2, 3
"""Fields of a model."""
NAME, SCORE, KIND = 1, 2, 3
"""Of a piece."""
ALGORITHM, FALLBACK, BEGIN, END = 3, 35, 41, 42
"""Of how it was trained."""
CHARACTERS, FIRST_SPACE, FEWER_SPACES = 2, 3, 4
"""Of what is done to a text before: a table, a space in front, and no others but single ones."""
MERGES = 2
"""The algorithm."""
NORMAL, UNUSED = 1, 5
MOST_TOKENS = 1 << 20


class Pieces(NamedTuple):
    """tokens, scores, kinds: of each token.  ends: (the one that begins a text, the one that ends it)."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    ends: tuple[int, int]


def text_of_pieces(file: Path, n_vocab: int) -> Text | None:
    """The tokenizer of a tokenizer.model, with the tokens that files beside it add; None: it is of another kind."""
    try:
        pieces = read_pieces(file.read_bytes())
    except (ValueError, TypeError, AttributeError, IndexError, struct.error):  # tiktoken's has the name too
        return None
    if pieces is None:
        return None
    config = read_object(file.parent / CONFIG)
    add_tokens(pieces, config, read_object(file.parent / "added_tokens.json"))
    begin, end = pieces.ends
    said = {
        "model": "llama",
        "tokens": pieces.tokens,
        "scores": pieces.scores,
        "token_type": pieces.kinds,
        "bos_token_id": begin,
        "eos_token_id": end,
        "add_bos_token": config.get("add_bos_token", True),
        "add_eos_token": config.get("add_eos_token", False),
        "add_space_prefix": FIRST if config.get("legacy") is False else True,
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    return text_of(GgufFile(file, {"general.architecture": "llama", **fields}, {}), n_vocab)


def read_pieces(data: bytes) -> Pieces | None:
    """None: its texts are not merged by scores behind a space in front, with bytes for what is no token.
    Raises ValueError, TypeError, AttributeError, IndexError, struct.error: this is no such message."""
    tokens, scores, kinds = [], [], []
    training: dict[int, Any] = {}
    normalization: dict[int, Any] = {}
    for number, value in fields_of(data):
        if number == PIECE:
            piece = dict(fields_of(value))
            tokens.append(piece[NAME].decode() if NAME in piece else "")
            scores.append(struct.unpack("<f", piece[SCORE])[0] if SCORE in piece else 0.0)
            kinds.append(piece.get(KIND, NORMAL))
        elif number == TRAINING:
            training = dict(fields_of(value))
        elif number == NORMALIZATION:
            normalization = dict(fields_of(value))
    if not tokens or training.get(ALGORITHM) != MERGES or not training.get(FALLBACK):
        return None
    if normalization.get(CHARACTERS) or not normalization.get(FIRST_SPACE, 1) or normalization.get(FEWER_SPACES, 1):
        return None
    return Pieces(tokens, scores, kinds, (training.get(BEGIN, 1), training.get(END, 2)))


def fields_of(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, a count or bytes) of each field."""
    at = 0
    while at < len(data):
        key, at = number_at(data, at)
        kind = key & 7
        if kind == 0:
            value, at = number_at(data, at)
            yield key >> 3, value
            continue
        n_bytes = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            n_bytes, at = number_at(data, at)
        if n_bytes is None or at + n_bytes > len(data):
            raise ValueError("no field of protobuf")
        yield key >> 3, data[at : at + n_bytes]
        at += n_bytes


def number_at(data: bytes, at: int) -> tuple[int, int]:
    """-> (a number of seven bits a byte, the lowest first, where it ends).  Raises IndexError, ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("no number of protobuf")


def add_tokens(pieces: Pieces, config: dict[str, Any], added: dict[str, Any]) -> None:
    """Those of tokenizer_config.json and added_tokens.json, in their places, and which of all are special."""
    named = {token: (name, USER_DEFINED) for name, token in added.items() if type(token) is int}
    decoder = config.get("added_tokens_decoder")
    for token, value in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(value, dict) and isinstance(value.get("content"), str) and token.isdigit():
            named[int(token)] = value["content"], CONTROL if value.get("special") else USER_DEFINED
    for token, (name, kind) in sorted(named.items()):
        if token < len(pieces.tokens) and pieces.tokens[token] == name and pieces.kinds[token] == NORMAL:
            pieces.kinds[token] = kind
        elif len(pieces.tokens) <= token < MOST_TOKENS:
            n_between = token - len(pieces.tokens)
            pieces.tokens.extend([f"<unused {len(pieces.tokens) + index}>" for index in range(n_between)] + [name])
            pieces.kinds.extend([UNUSED] * n_between + [kind])
            pieces.scores.extend([0.0] * (n_between + 1))
