"""What an artifact needs to know of a tokenizer: its JSON, the bytes of each token, and where texts begin and end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from llmc.compiler.frontend.chat import CONFIG, read_object, text_of
from llmc.runtime.errors import LlmcError
from llmc.runtime.format import MAX_EOS
from llmc.runtime.parse_json import parse_json
from llmc.runtime.text import load_tokenizer

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
PIECES = "tokenizer.model"
OLD_FILES = (PIECES, "vocab.json", "spiece.model")


class Text(NamedTuple):
    """tokenizer_json: as the `tokenizers` library reads it; None: token ids only.
    vocabulary: the bytes of each token's text, by id; special tokens have none.  added: ids of tokens beside those that
    merges make, by name."""

    tokenizer_json: bytes | None = None
    vocabulary: tuple[bytes, ...] | None = None
    added: Mapping[str, int] = MappingProxyType({})


def read_text(folder: Path, n_vocab: int) -> Text:
    """The tokenizer of a model folder; without one, the model takes token ids alone."""
    file = folder / "tokenizer.json"
    if file.is_file():
        data = file.read_bytes()
    elif any((folder / name).is_file() for name in OLD_FILES):
        from llmc.compiler.frontend.pieces import text_of_pieces  # which takes from here what a tokenizer is

        found = text_of_pieces(folder / PIECES, n_vocab) if (folder / PIECES).is_file() else None
        if found is not None:
            return found
        data = _convert(folder)
    else:
        return Text()
    return text_of_json(data, n_vocab, str(file), "remove it to use token ids")


def text_of_json(data: bytes, n_vocab: int, place: str, hint: str | None = None) -> Text:
    """The tokenizer of a tokenizer.json's bytes.  place, hint: of what is said where it is none."""
    try:
        load_tokenizer(data.decode(), place)
        tokenizer = parse_json(data)
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        return Text(data, read_vocabulary(tokenizer, n_vocab), added)
    except LlmcError as error:
        raise LlmcError(error.fact, place=place, hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmcError("the tokenizer cannot be read", place=place, hint=hint) from error


def _convert(folder: Path) -> bytes:
    """The tokenizer's JSON, for a model that has only the files from before it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return str(tokenizer.backend_tokenizer.to_str()).encode()
    except Exception as error:  # transformers raises anything at all
        raise LlmcError(
            "the tokenizer cannot be converted to tokenizer.json",
            place=str(folder),
            hint="pip install sentencepiece protobuf tiktoken, or remove it to use token ids",
        ) from error


def read_vocabulary(tokenizer: dict[str, Any], n_vocab: int) -> tuple[bytes, ...] | None:
    """The bytes of each token's text, `n_vocab` of them, or None for a kind of tokenizer we cannot take apart.

    Byte-level BPE writes each byte as a printable character (GPT-2's table); sentencepiece writes a space as ▁ and a
    byte that no token covers as <0xNN>.
    """
    model = tokenizer["model"]
    pieces = model.get("vocab") or {}
    if isinstance(pieces, list):  # Unigram: [piece, score]
        pieces = {piece: token for token, (piece, _) in enumerate(pieces)}
    kinds = _decoder_kinds(tokenizer.get("decoder"))
    of_piece: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        of_piece = partial(_from_byte_level, table=byte_level_table())
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        of_piece = _from_sentencepiece
    else:
        return None
    texts = {token: of_piece(piece) for piece, token in pieces.items()}
    for added in tokenizer.get("added_tokens") or ():  # decoded as others are: Gemma's "▁▁" is two spaces
        texts[added["id"]] = b"" if added["special"] else of_piece(added["content"])
    return tuple(texts.get(token, b"") for token in range(n_vocab))


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


def _from_byte_level(piece: str, table: dict[str, int]) -> bytes:
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()


def _from_sentencepiece(piece: str) -> bytes:
    byte = BYTE_FALLBACK.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def byte_level_table() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it prints, otherwise the next free one from U+0100."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in prints}
    others = (byte for byte in range(256) if byte not in prints)
    table.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return table


def read_ends(
    folder: Path | None, config: dict[str, Any], n_vocab: int, added: Mapping[str, int]
) -> tuple[tuple[int, ...], int | None]:
    """(tokens that end a text, the token that begins one): generation_config.json's, or else the configuration's.

    An end that the tokenizer names comes to them: who trains a model for chats often changes that alone.  Ids outside
    the vocabulary, which some configurations have for want of a token, are left out.  added: see Text.
    """
    ends, begins = config.get("eos_token_id"), config.get("bos_token_id")
    file = folder / "generation_config.json" if folder else None
    if file and file.is_file():
        try:
            generation = parse_json(file.read_bytes())
            ends, begins = generation.get("eos_token_id", ends), generation.get("bos_token_id", begins)
        except (ValueError, AttributeError) as error:
            raise LlmcError("generation_config.json is not a JSON object", place=str(file)) from error
    place = str(folder) if folder else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for token in [*listed, *([] if begins is None else [begins])]:
        if not isinstance(token, int):
            raise LlmcError(f"eos_token_id or bos_token_id is {token!r}, which is no token id", place=place)
    named = added.get(text_of(read_object(folder / CONFIG).get("eos_token")) or "") if folder else None
    known = tuple(token for token in dict.fromkeys(listed) if 0 <= token < n_vocab)
    if len(known) > MAX_EOS:
        raise LlmcError(f"the model has {len(known)} end tokens; an artifact holds {MAX_EOS}", place=place)
    if named is not None and named not in known and named < n_vocab and len(known) < MAX_EOS:
        known += (named,)
    return known, begins if begins is not None and 0 <= begins < n_vocab else None
