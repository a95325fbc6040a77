"""Tokenizers of GGUF files: what texts become, where they begin, and what ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.text import chat_of, ends_of, text_of
from llmc.compiler.frontend.tokens import byte_level_table
from llmc.runtime.text import load_tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def file_of(tokens: dict[str, int], **fields: Any) -> GgufFile:
    """tokens: by name, of which type."""
    said = {"tokens": list(tokens), "token_type": list(tokens.values()), **fields}
    named = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    return GgufFile(Path("m.gguf"), {"general.architecture": "llama", **named}, {})


def byte_level(tokens: dict[str, int], merges: list[str], **fields: Any) -> GgufFile:
    """With all bytes in front."""
    whole = {**dict.fromkeys(byte_level_table(), NORMAL), **tokens}
    return file_of(whole, **{"model": "gpt2", "pre": "llama-bpe", "merges": merges, **fields})


def sentencepiece(**fields: Any) -> GgufFile:
    pieces = ["▁", "a", "b", "▁▁", "▁a", "▁▁a"]
    tokens = {"<unk>": 2, "<s>": CONTROL, "</s>": CONTROL, "<x>": CONTROL, **dict.fromkeys(pieces, NORMAL)}
    scores = [float(-index) for index in range(len(tokens))]
    return file_of(tokens, model="llama", scores=scores, bos_token_id=1, eos_token_id=2, **fields)


def tokenizer_of(file: GgufFile) -> Tokenizer:
    found = text_of(file, 400).tokenizer_json
    assert found is not None
    return load_tokenizer(found.decode(), "m")


def test_names_of_special_tokens_are_found_whatever_they_are_written_in() -> None:
    file = byte_level({"<｜User｜>": CONTROL, "<think>": USER_DEFINED, "\t\t": USER_DEFINED, "ab": NORMAL}, ["a b"])
    built, tokens = tokenizer_of(file), file.fields["tokenizer.ggml.tokens"]
    ids = built.encode("<｜User｜>ab\t\t<think>").ids
    assert [tokens[token] for token in ids] == ["<｜User｜>", "ab", "\t\t", "<think>"]
    assert built.decode(ids) == "ab\t\t<think>"


def test_spaces_that_were_added_take_the_place_of_none_that_merges_make() -> None:
    file = byte_level({"ĠĠ": NORMAL, "  ": USER_DEFINED}, ["Ġ Ġ"])
    built, tokens = tokenizer_of(file), file.fields["tokenizer.ggml.tokens"]
    assert built.encode("a  b").ids[1] == tokens.index("  ")
    assert built.decode([tokens.index("ĠĠ"), tokens.index("a")]) == "  a"


@pytest.mark.parametrize(("pre", "wanted"), [("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])])
def test_a_part_that_is_a_token_is_this_one_where_merges_are_ignored(pre: str, wanted: list[str]) -> None:
    file = byte_level({"bc": NORMAL, "ab": NORMAL, "abc": NORMAL}, ["b c", "ab c"], pre=pre)
    assert tokenizer_of(file).encode("abc", add_special_tokens=False).tokens == wanted


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("exaone4", ["a", "!", "b", "1234", "ĊĊ"]),
        ("minerva-7b", ["a", "!", "b", "1", "2", "3", "4", "ĊĊ"]),
        ("falcon", ["a", "!", "b", "123", "4", "ĊĊ"]),
        ("deepseek-coder", ["a", "!", "b", "1", "2", "3", "4", "Ċ", "Ċ"]),
        ("minicpm5", ["a", "!b", "123", "4", "ĊĊ"]),
        ("seed-coder", ["a", "!b", "1", "2", "3", "4", "ĊĊ"]),
        ("hunyuan-dense", ["a", "!b", "123", "4", "ĊĊ"]),
    ],
)
def test_texts_are_split_as_the_file_says_before_they_are_merged(pre: str, wanted: list[str]) -> None:
    merges = ["a !", "! b", "a! b", "1 2", "12 3", "123 4", "Ċ Ċ"]
    file = byte_level({"".join(merge.split()): NORMAL for merge in merges}, merges, pre=pre)
    assert tokenizer_of(file).encode("a!b1234\n\n", add_special_tokens=False).tokens == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, ["<s>", "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"pre": "qwen2"}, ["a"]),
        ({"pre": "qwen2", "add_eos_token": True}, ["a", "</s>"]),
        ({"add_eos_token": True}, ["<s>", "a", "</s>"]),
        ({"bos_token_id": 9999}, ["a"]),
    ],
)
def test_texts_begin_and_end_as_the_file_or_llama_cpp_says(fields: dict[str, Any], wanted: list[str]) -> None:
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    file = byte_level({"<s>": CONTROL, "</s>": CONTROL}, [], **{**ends, **fields})
    assert tokenizer_of(file).encode("a").tokens == wanted


def test_a_space_is_put_in_front_of_spaces_too() -> None:
    built = tokenizer_of(sentencepiece())
    assert built.encode(" a").tokens == ["<s>", "▁▁a"]
    assert built.encode("a<x>a").tokens == ["<s>", "▁a", "<x>", "▁a"]
    assert built.decode(built.encode(" ab a").ids) == " ab a"


def test_no_space_is_put_in_front_where_the_file_says_so() -> None:
    built = tokenizer_of(sentencepiece(add_space_prefix=False))
    assert built.encode("a a<x>a").tokens == ["<s>", "a", "▁a", "<x>", "a"]
    assert built.decode(built.encode(" a").ids) == " a"


@pytest.mark.parametrize(
    ("tokens", "fields", "wanted"),
    [
        (["<|endoftext|>", "<|end|>", "<|user|>"], {"eos_token_id": 0}, [0, 1]),
        (["a", "<end_of_turn>", "<eos>"], {"eos_token_id": 2}, [2, 1]),
        (["<|return|>", "<|call|>", "<|end|>"], {"eos_token_id": 0}, [0, 1]),
        (["a", "b", "c"], {"eos_token_id": 0, "eot_token_id": 1, "eom_token_id": 2}, [0, 1, 2]),
        (["a"], {"eos_token_id": [1]}, []),
    ],
)
def test_what_ends_an_answer(tokens: list[str], fields: dict[str, Any], wanted: list[int]) -> None:
    assert ends_of(file_of(dict.fromkeys(tokens, CONTROL), **fields)) == wanted


def test_a_word_that_is_called_like_an_end_is_none() -> None:
    assert ends_of(file_of({"<|end|>": NORMAL})) == []


def test_a_template_for_tools_comes_with_the_other() -> None:
    file = byte_level({"<s>": CONTROL}, [], bos_token_id=256)
    assert chat_of(file) is None
    file.fields["tokenizer.chat_template"] = "d"
    file.fields["tokenizer.chat_template.tool_use"] = "t"
    assert json.loads(chat_of(file) or b"") == {"template": "d", "tool_use": "t", "tokens": {"bos_token": "<s>"}}
