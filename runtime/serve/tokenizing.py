"""/tokenize and /detokenize, as vLLM has them, and llama.cpp's server: its names for the same are understood too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.fields import ApiError, Fields, is_ids, wrong
from llmc.runtime.serve.requests import read_messages
from llmc.runtime.serve.tools import read_tools
from llmc.runtime.serve.vocabulary import Vocabulary

MOST_CHARACTERS, MOST_IDS = 1 << 19, 1 << 17
"""Of a text, and of a list of ids: a few microseconds a character, ten an id."""
FIELDS = ("model", "prompt", "content", "add_special_tokens", "add_special", "return_token_strs")
CHAT_FIELDS = ("model", "messages", "tools", "tool_choice", "chat_template_kwargs", "return_token_strs")
REFUSED = {
    "add_generation_prompt": ((True,), "an answer is to follow"),
    "continue_final_message": ((False,), "an answer is to follow"),
    "with_pieces": ((False,), "see 'return_token_strs'"),
}
REFUSED_IN_CHATS = {**REFUSED, "add_special_tokens": ((False,), "the template writes them")}


class Text(NamedTuple):
    """write: gives the text, which a template may take long to make.  special: with what begins a prompt.  with_texts:
    of each token too."""

    write: Callable[[], str]
    special: bool
    with_texts: bool


def read_text(body: object, model: str, template: ChatTemplate | ApiError) -> Text:
    """A prompt, or messages by the model's template.  Raises ApiError."""
    fields = Fields(body)
    is_chat = fields.get("messages") is not None
    known, refused = (CHAT_FIELDS, REFUSED_IN_CHATS) if is_chat else (FIELDS, REFUSED)
    fields.refuse(refused)
    fields.refuse_unknown({*known, *refused})
    fields.check_model(model)
    with_texts = fields.boolean("return_token_strs")
    if not is_chat:
        name = fields.one_of("prompt", "content")
        specials = [fields.boolean(one) for one in ("add_special_tokens", "add_special") if fields.get(one) is not None]
        if fields.get(name) is None:
            raise wrong("prompt", "must be a text")
        prompt = fields.of_type(name, str, "", "a text")
        return Text(lambda: prompt, all(specials or [name == "prompt"]), with_texts)
    if isinstance(template, ApiError):
        raise template
    kwargs: dict[str, Any] = fields.of_type("chat_template_kwargs", dict, {}, "an object")
    tools = read_tools(fields)
    messages = read_messages(fields.get("messages"))
    writes = template.for_tools(tools)
    return Text(lambda: writes.render(messages, kwargs, tools.tools if tools else None), False, with_texts)


def tokenized(wanted: Text, vocabulary: Vocabulary) -> dict[str, Any]:
    """The answer.  Raises ApiError: no tokenizer, no text."""
    ids = encoded_text(wanted.write(), wanted.special, vocabulary)
    tokenizer = vocabulary.tokenizer
    texts = [tokenizer.id_to_token(token) for token in ids] if wanted.with_texts and tokenizer else None
    return {"count": len(ids), "max_model_len": vocabulary.room, "tokens": ids, "token_strs": texts}


def encoded_text(text: str, special: bool, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids of a text that need not fit into a context.  Raises ApiError: longer than is looked at, no tokenizer."""
    if len(text) > MOST_CHARACTERS:
        raise wrong("prompt", f"has {len(text)} characters; at most {MOST_CHARACTERS} become tokens at once")
    return vocabulary.encode(text, "prompt", special)


def read_tokens(body: object, model: str) -> tuple[int, ...]:
    """Raises ApiError."""
    fields = Fields(body)
    fields.refuse_unknown(("model", "tokens"))
    fields.check_model(model)
    ids = fields.get("tokens")
    if ids != [] and not is_ids(ids):
        raise wrong("tokens", "must be a list of token ids")
    if len(ids) > MOST_IDS:
        raise wrong("tokens", f"has {len(ids)} ids; at most {MOST_IDS} become a text at once")
    return tuple(ids)


def detokenized(ids: tuple[int, ...], vocabulary: Vocabulary) -> dict[str, Any]:
    """The answer, as vLLM names it and as llama.cpp does.  Raises ApiError: no such token, no tokenizer."""
    vocabulary.check_ids("tokens", ids)
    if vocabulary.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer", param="tokens", code="no_tokenizer")
    text = vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
    return {"prompt": text, "content": text}
