"""The tokenizer and the chat template of a GGUF file, as a folder of Hugging Face's would have them.

transformers builds the tokenizer of the file's vocabulary and merges; what begins and ends a text is added to it.
"""

from __future__ import annotations

import json
from typing import Any

from llmc.compiler.frontend.chat import section_of
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.tokens import Text, text_of_json
from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.parse_json import parse_json

KINDS = ("gpt2", "llama")
"""What files call byte-level BPE, and sentencepiece."""
PLAIN = (None, "default", "gpt-2", "olmo")
"""How texts are split before they are made tokens, as GPT-2 does it."""
DIGITS = ("command-r", "exaone", "refact", "smollm", "starcoder")
"""As GPT-2 does it, but each digit by itself."""
SAME_SPLITS = {"stablelm2": "qwen2", "glm4": "llama-bpe", "chatglm-bpe": "llama-bpe"}
"""Other names of what transformers' table has."""
CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FA}"
    r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1DF1E}]]"
)
"""The letters that DeepSeek V2 lists: those with cases, but for Georgian, some Armenian and what Unicode has since."""
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]", r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS = {
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{CASED}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
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
        begin_texts(file, tokenizer, described["tokens"])
        data = of_vocabulary(str(tokenizer.to_str()), len(described["tokens"]))
        return text_of_json(data, n_vocab, str(file.path))
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


def of_vocabulary(tokenizer_json: str, n_tokens: int) -> bytes:
    """The tokenizer without the tokens that transformers' class adds to a vocabulary which lacks them."""
    tokenizer = parse_json(tokenizer_json.encode())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < n_tokens]
    return json.dumps(tokenizer).encode()


def begin_texts(file: GgufFile, tokenizer: Any, tokens: list[str]) -> None:
    """Put the token that begins texts before each, where the file says so, as files of sentencepiece do by default."""
    from tokenizers.processors import TemplateProcessing

    kind, begin = (file.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "bos_token_id"))
    asked = file.fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if asked and type(begin) is int and 0 <= begin < len(tokens):
        name = tokens[begin]
        whole: dict[str, Any] = {"single": [name, "$A"], "pair": [name, "$A", "$B"], "special_tokens": [(name, begin)]}
        tokenizer.post_processor = TemplateProcessing(**whole)
    elif kind == "llama":
        tokenizer.post_processor = TemplateProcessing(single=["$A"], pair=["$A", "$B"], special_tokens=[])


def chat_of(file: GgufFile) -> bytes | None:
    """The section "chat" of an artifact; None: the file has no template."""
    template, tokens = file.fields.get("tokenizer.chat_template"), file.fields.get("tokenizer.ggml.tokens")
    if not isinstance(template, str) or not isinstance(tokens, list):
        return None
    ids = {f"{name}_token": file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    named = {name: tokens[id] for name, id in ids.items() if type(id) is int and 0 <= id < len(tokens)}
    return section_of(template, named)
