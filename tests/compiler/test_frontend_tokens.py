"""The bytes of each token, and the tokens that begin and end a text."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmc.compiler.frontend.pieces import text_of_pieces
from llmc.compiler.frontend.tokens import Text, byte_level_table, read_ends, read_text, read_vocabulary
from llmc.runtime.errors import LlmcError

TEXT = "Zoë said: 'a naïve 猫 sat — on the mat' 🙂\n\tThe end. The end."


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "the"]
    merges = [("t", "h"), ("th", "e")]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe])
def test_the_bytes_of_a_texts_tokens_are_the_text(make: Any) -> None:
    tokenizer: Tokenizer = make()
    vocabulary = read_vocabulary(json.loads(tokenizer.to_str()), tokenizer.get_vocab_size())
    assert vocabulary is not None
    tokens = tokenizer.encode(TEXT).ids
    assert b"".join(vocabulary[token] for token in tokens) == TEXT.encode()


def test_tokens_that_were_added_are_spelled_as_the_others() -> None:
    tokenizer = sentencepiece_bpe()
    tokenizer.add_tokens(["▁▁"])  # as Gemma's spaces are
    vocabulary, added = read_vocabulary(json.loads(tokenizer.to_str()), 300), tokenizer.token_to_id("▁▁")
    assert vocabulary is not None
    assert added is not None
    assert vocabulary[added].decode() == tokenizer.decode([added]) == "  "


def test_special_tokens_have_no_text_and_ids_without_a_token_neither() -> None:
    vocabulary = read_vocabulary(json.loads(byte_level_bpe().to_str()), 310)
    assert vocabulary is not None
    assert len(vocabulary) == 310
    assert vocabulary[:2] == (b"", b"")
    assert vocabulary[-1] == b""


def test_the_byte_level_table_is_the_tokenizers_librarys_own() -> None:
    table = byte_level_table()
    assert sorted(table) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    assert table["Ġ"] == ord(" ")


def test_a_tokenizer_of_another_kind_gives_no_bytes() -> None:
    assert (
        read_vocabulary({"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}, 1)
        is None
    )


def test_unigram_pieces_are_numbered_in_order() -> None:
    tokenizer = {"model": {"type": "Unigram", "vocab": [["▁a", -1.0], ["b", -2.0]]}, "decoder": {"type": "Metaspace"}}
    assert read_vocabulary(tokenizer, 2) == (b" a", b"b")


def test_a_folder_without_a_tokenizer_has_no_text(tmp_path: Path) -> None:
    assert read_text(tmp_path, 10) == Text()


def test_old_tokenizer_files_are_converted(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "Ġ": 2, "a": 3, "b": 4, "ab": 5, "<unk>": 6, "<|endoftext|>": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = read_text(tmp_path, 8)
    assert text.tokenizer_json is not None
    assert text.vocabulary is not None
    assert text.vocabulary[5] == b"ab"
    assert Tokenizer.from_str(text.tokenizer_json.decode()).encode("ab").ids == [5]


def in_protobuf(*fields: tuple[int, bytes | float | int]) -> bytes:
    """A message of these fields: (number, value)."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
        elif isinstance(value, float):
            parts.append(varint(number << 3 | 5) + struct.pack("<f", value))
        else:
            parts.append(varint(number << 3) + varint(value))
    return b"".join(parts)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def sentencepiece_file(folder: Path, **changes: int) -> None:
    """A tokenizer.model whose pieces do not stand in the order of their scores."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    scored = [("ab", -2.0), ("bc", -1.0), ("▁a", -3.0), ("▁▁", -4.0), ("▁▁a", -5.0), *((c, -9.0) for c in "▁abc")]
    pieces = [*special, *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)), *((*one, 1) for one in scored)]
    training = {3: 2, 35: 1} | {3: changes.get("algorithm", 2)}
    (folder / "tokenizer.model").write_bytes(
        in_protobuf(
            *((1, in_protobuf((1, name.encode()), (2, score), (3, kind))) for name, score, kind in pieces),
            (2, in_protobuf(*training.items())),
            (3, in_protobuf((3, changes.get("first_space", 1)), (4, 0))),
        )
    )


def test_pieces_are_merged_by_their_scores_behind_a_space(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path)
    added = {"268": {"content": "<x>", "special": True}, "270": {"content": "<y>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "add_eos_token": True}))
    text = read_text(tmp_path, 280)
    assert text.tokenizer_json is not None
    assert text.vocabulary is not None
    built = Tokenizer.from_str(text.tokenizer_json.decode())
    assert built.encode("abc").tokens == ["<s>", "▁a", "bc", "</s>"]
    assert built.encode(" a<x>a<y>", add_special_tokens=False).tokens == ["▁▁a", "<x>", "▁a", "<y>"]
    assert built.decode(built.encode("é a").ids) == "é a"
    assert (built.token_to_id("<x>"), built.token_to_id("<y>")) == (268, 270)
    assert text.vocabulary[268:271] == (b"", b"<unused 269>", b"<y>")


def test_a_space_is_put_in_front_of_a_whole_text_alone_where_the_model_is_no_old_one(tmp_path: Path) -> None:
    sentencepiece_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    built = Tokenizer.from_str((read_text(tmp_path, 280).tokenizer_json or b"").decode())
    assert built.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "a"]


@pytest.mark.parametrize("changes", [{"algorithm": 1}, {"first_space": 0}, None])
def test_pieces_of_other_kinds_are_left_to_transformers(changes: dict[str, int] | None, tmp_path: Path) -> None:
    sentencepiece_file(tmp_path, **changes or {})
    if changes is None:  # cut off
        (tmp_path / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes()[:-3])
    assert text_of_pieces(tmp_path / "tokenizer.model", 280) is None


@pytest.mark.parametrize("field", [(1, 3), (1, in_protobuf((1, 3))), (1, in_protobuf((2, 3))), (2, b"\xff"), (9, b"")])
def test_what_is_no_message_of_pieces_is_none(field: tuple[int, bytes | int], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(in_protobuf(field))
    assert text_of_pieces(tmp_path / "tokenizer.model", 280) is None


def test_what_transformers_needs_for_old_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("no sentencepiece")

    sentencepiece_file(tmp_path, algorithm=1)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(LlmcError, match="cannot be converted") as refused:
        read_text(tmp_path, 280)
    assert "pip install sentencepiece" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, ((), None)),
        ({"eos_token_id": 2, "bos_token_id": 1}, None, ((2,), 1)),
        ({"eos_token_id": [2, 3]}, None, ((2, 3), None)),
        ({"eos_token_id": [2, -1, 2, 1000], "bos_token_id": -1}, None, ((2,), None)),
        ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [4, 5]}, ((4, 5), 1)),
    ],
)
def test_ends_come_from_the_generation_configuration_first(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: Any
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_ends(tmp_path, config, 1000, {}) == expected


@pytest.mark.parametrize("name", ["<|im_end|>", {"content": "<|im_end|>"}])
def test_the_end_that_a_tokenizer_names_ends_texts_too(tmp_path: Path, name: object) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    added = read_text(tmp_path, 400).added
    assert added["</s>"] == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
    for ends, expected in ((2, (2, 7)), ([7, 2], (7, 2)), (None, (7,)), ([*range(10, 18)], tuple(range(10, 18)))):
        assert read_ends(tmp_path, {"eos_token_id": ends}, 1000, {"<|im_end|>": 7})[0] == expected
    assert read_ends(tmp_path, {"eos_token_id": 2}, 7, {"<|im_end|>": 7})[0] == (2,)
    assert read_ends(tmp_path, {"eos_token_id": 2}, 1000, added)[0] == (2,)


@pytest.mark.parametrize(
    ("ends", "fact"), [("x", "no token id"), ([[1]], "no token id"), (list(range(9)), "9 end tokens")]
)
def test_ends_that_are_no_token_ids_are_refused(tmp_path: Path, ends: Any, fact: str) -> None:
    with pytest.raises(LlmcError, match=fact):
        read_ends(tmp_path, {"eos_token_id": ends}, 1000, {})
