"""The tokenizer and the chat template of a GGUF file, as a folder of Hugging Face's would have them.

transformers builds the tokenizer of the file's vocabulary and merges; what begins and ends a text is added to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmc.compiler.frontend.chat import DEFAULT, TOOL_USE, section_of
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.tokens import Text, byte_level_table, text_of_json
from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.format import MAX_EOS
from llmc.runtime.parse_json import parse_json

KINDS = ("gpt2", "llama")
"""What files call byte-level BPE, and sentencepiece."""
PLAIN = (
    *(None, "default", "gpt-2", "olmo", "phi-2", "exaone4", "gigachat", "mpt", "jais", "trillion", "mellum", "a.x-4.0"),
    "granite-docling",
)
"""How texts are split before they are made tokens, as GPT-2 does it."""
DIGITS = ("command-r", "exaone", "refact", "smollm", "starcoder", "codeshell", "minerva-7b", "mellum2")
"""As GPT-2 does it, but each digit by itself."""
SAME_SPLITS = {
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), "qwen2"),
    **dict.fromkeys(("glm4", "glm5", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("hunyuan-dense", "hy_v4", "joyai-llm"), "deepseek-v3"),
}
"""Other names of what transformers' table, or SPLITS, has."""
BEGINS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
)
"""How texts are split where a token begins them unless the file says otherwise, as llama.cpp knows."""
WHOLE = (*BEGINS, "glm4", "glm5", "llama4", "minicpm5")
"""Where a part that is a token as a whole is this token, whatever merges would make of it: tiktoken's way."""
NAMED = CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are found in texts by their names."""
ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|return|>", "<|call|>", "[EOT]", "[EOS]"),
)
"""What llama.cpp ends an answer at, also where a file names another token alone."""
OF_PARTS = frozenset({"<|return|>", "<|call|>"}), "<|end|>"
"""Where there are the first two, as in gpt-oss, the last one ends a part of an answer."""
SPACE = "▁"
"""What sentencepiece writes in place of a space."""
FIRST = "first"
"""Where a space is put in front of a whole text alone, as transformers does of itself, unless it begins with one."""
CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FA}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1DF1E}]]"
)
"""The letters that DeepSeek V2 lists: those with cases, but for Georgian, some Armenian and what Unicode has since."""
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]", r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORDS = rf"{ENDING[:-1]}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{CASED}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "falcon": (r"[\p{P}$+<=>^~|`]+", GPT_2, "[0-9]{3}"),
    "minicpm5": (r"\p{N}{1,3}", rf"{WORDS}|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"),
    "seed-coder": (rf"{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BLANKS}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "kimi-k2": (
        rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ENDING}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ENDING}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""What texts are split by before they are made tokens, one after another, as the models' own tokenizers have it."""
FIELDS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}


def text_of(file: GgufFile, n_vocab: int) -> Text:
    """The file's tokenizer; none where it has no vocabulary."""
    found = {own: file.fields.get(f"tokenizer.ggml.{name}") for own, name in FIELDS.items()}
    described = {name: value for name, value in found.items() if value is not None}
    if "tokens" not in described or described.get("tokenizer_type") == "none":
        return Text()
    check(file, described)
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError as error:
        fact = "the installed transformers does not build tokenizers of GGUF files"
        raise LlmcError(fact, place=str(file.path), hint="pip install 'transformers>=5.23'") from error
    split = described.get("pre_tokenizer_type")
    split = described["pre_tokenizer_type"] = SAME_SPLITS.get(str(split), split)
    if described["tokenizer_type"] == "gpt2" and split not in (
        *PLAIN,
        *DIGITS,
        *SPLITS,
        *GGUF_PRE_TOKENIZER_SPLITS,
    ):
        raise LlmcError(
            f"a tokenizer that splits texts as {shortened(split)!r} does is not read",
            place=str(file.path),
            hint="give the model's folder",
        )
    try:
        tokenizer, _ = convert_gguf_tokenizer(file.architecture, described)
        if described["tokenizer_type"] == "gpt2" and split in DIGITS:
            split_digits(tokenizer)
        if described["tokenizer_type"] == "gpt2" and split in SPLITS:
            split_by(tokenizer, SPLITS[split])
        frame_texts(file, tokenizer, described["tokens"])
        built = parse_json(str(tokenizer.to_str()).encode())
        if described["tokenizer_type"] == "gpt2":
            name_as_written(built, described["tokens"], described.get("token_type") or ())
            built["model"]["ignore_merges"] = file.fields.get("tokenizer.ggml.pre") in WHOLE
        else:
            begin_with_space(built, file.fields.get("tokenizer.ggml.add_space_prefix", True))
        keep_within(built, len(described["tokens"]))
        return text_of_json(json.dumps(built).encode(), n_vocab, str(file.path))
    except LlmcError:
        raise
    except Exception as error:  # transformers raises anything at all
        said = " ".join(str(error).split())[:200]
        raise LlmcError(f"the file's tokenizer cannot be read: {said}", place=str(file.path)) from error


def check(file: GgufFile, described: dict[str, Any]) -> None:
    """Refuse a vocabulary that is none, and kinds of tokenizers that are not built."""
    if described.get("tokenizer_type") not in KINDS:
        fact = f"a tokenizer of the kind {shortened(described.get('tokenizer_type'))!r} is not read"
        raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    lists = [described[name] for name in ("tokens", "merges") if name in described]
    if not all(isinstance(each, list) and all(isinstance(one, str) for one in each) for each in lists):
        raise LlmcError("the file's vocabulary is no list of texts", place=str(file.path))


def split_digits(tokenizer: Any) -> None:
    """Let texts be split as DIGITS says."""
    from tokenizers import pre_tokenizers

    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def split_by(tokenizer: Any, expressions: tuple[str, ...]) -> None:
    """Let texts be split at what each of these finds, of what the one before has left."""
    from tokenizers import Regex, pre_tokenizers

    parts = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions]
    whole = [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(whole)


def name_as_written(tokenizer: dict[str, Any], tokens: list[str], types: Sequence[int]) -> None:
    """Find special tokens, and those that were added to a vocabulary, by the names that the file has for them.

    transformers writes these as bytes are written: "<｜User｜>" is found in no text then, and two spaces that were
    added take the place of two that merges make.
    """
    spelling = {byte: character for character, byte in byte_level_table().items()}
    alphabet, vocabulary = set(spelling.values()), dict[str, int]()
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    named = {index: token for index, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind in NAMED}
    for index, token in enumerate(tokens):
        if index not in named:
            spelled = token if alphabet.issuperset(token) else "".join(spelling[byte] for byte in token.encode())
            vocabulary[spelled] = index
    for index, token in named.items():
        if vocabulary.setdefault(token, index) == index and token not in added:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[token] = {"id": index, "content": token, **flags, "special": types[index] == CONTROL}
    tokenizer["model"]["vocab"] = vocabulary
    known = [token for token in added.values() if vocabulary.get(token["content"]) == token["id"]]
    tokenizer["added_tokens"] = sorted(known, key=lambda token: int(token["id"]))


def begin_with_space(tokenizer: dict[str, Any], is_first: object) -> None:
    """Put a space in front of each text, and of what follows a special token, as sentencepiece and llama.cpp do, also
    of one that begins with a space; of none where the file says so.

    transformers builds another tokenizer for Gemma, which never does, and Phi 3, which does.
    """
    if (tokenizer["pre_tokenizer"] or {}).get("type") != "Metaspace" or is_first == FIRST:
        return
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if is_first else []
    tokenizer["pre_tokenizer"], tokenizer["normalizer"] = None, {"type": "Sequence", "normalizers": [*first, spaces]}
    if not is_first:
        decoders = tokenizer["decoder"]["decoders"]
        tokenizer["decoder"]["decoders"] = [part for part in decoders if part["type"] != "Strip"]


def keep_within(tokenizer: dict[str, Any], n_tokens: int) -> None:
    """Drop the tokens that transformers' class adds to a vocabulary which lacks them."""
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < n_tokens]


def frame_texts(file: GgufFile, tokenizer: Any, tokens: list[str]) -> None:
    """Put the token that begins texts before each, where the file says so, or where llama.cpp knows it, and the one
    that ends them behind each, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    told = {name.removeprefix("tokenizer.ggml."): value for name, value in file.fields.items()}
    begins = told.get("add_bos_token", told["model"] == "llama" or told.get("pre") in BEGINS)
    asked = {"bos_token_id": begins, "eos_token_id": told.get("add_eos_token")}
    known = {name: id for name in asked if type(id := told.get(name)) is int and 0 <= id < len(tokens)}
    before, after = ([tokens[known[name]]] if name in known and is_asked else [] for name, is_asked in asked.items())
    if before or after or told["model"] == "llama":
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, "$B", *after],
            special_tokens=[(tokens[id], id) for id in known.values()],
        )


def ends_of(file: GgufFile) -> list[int]:
    """The tokens that end an answer: the file's own, and those that are called as such tokens are."""
    tokens, types = (file.fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    own = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    named: dict[str, int] = {}
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        named = {token: index for index, (token, kind) in pairs if kind in NAMED and token in ENDS}
    whole, part = OF_PARTS
    if whole <= set(named):
        named.pop(part, None)
    return list(dict.fromkeys(end for end in [*own, *named.values()] if type(end) is int))[:MAX_EOS]


def chat_of(file: GgufFile) -> bytes | None:
    """The section "chat" of an artifact; None: the file has no template."""
    names = {DEFAULT: "tokenizer.chat_template", TOOL_USE: f"tokenizer.chat_template.{TOOL_USE}"}
    templates = {name: said for name, field in names.items() if isinstance(said := file.fields.get(field), str)}
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if DEFAULT not in templates or not isinstance(tokens, list):
        return None
    ids = {f"{name}_token": file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    named = {name: tokens[id] for name, id in ids.items() if type(id) is int and 0 <= id < len(tokens)}
    return section_of(templates, named)
