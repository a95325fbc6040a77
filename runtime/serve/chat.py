"""Messages as one text, by the template that the model was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmc.runtime.serve.contents import Content, in_parts, in_text
from llmc.runtime.serve.fields import ApiError, unsupported
from llmc.runtime.serve.forms import Form
from llmc.runtime.serve.known_forms import PLAIN, form_of
from llmc.runtime.serve.thoughts import marks_of
from llmc.runtime.serve.tools import NO_PARAMETERS, Tools

if TYPE_CHECKING:
    from llmc.runtime.serve.requests import Effort

EFFORT, THINKS = "reasoning_effort", "enable_thinking"
"""Variables of templates: gpt-oss' and others', Qwen's and others'."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What clients and templates call that which the assistant thought before it said something."""
PROBE = "a text to be seen again"


class ChatTemplate:
    """A template in Jinja, as Hugging Face's tokenizers have it.  It runs in a sandbox, within bounds: see jinja.py."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str],
        tool_use: str | None = None,
        mark: Callable[[], str] = lambda: "",
    ) -> None:
        """tokens: bos_token, eos_token and so on, as text.  tool_use: another template, for messages with tools.
        mark: gives what stands for a picture in a text.  Raises ApiError, for those who chat."""
        from llmc.runtime.serve.jinja import Templates  # jinja2 is an extra

        self._tokens, self._mark, self._knows_parts = dict(tokens), mark, re.search(r"\btype\b", source) is not None
        self.takes_effort, self.takes_thinks = EFFORT in source, THINKS in source
        self.takes_developer = "developer" in source
        self._thoughts = [name for name in THOUGHTS if re.search(rf"\b{name}\b", source)]
        self.form, self.takes_tools, self.marks = form_of(source), "tools" in source, marks_of(source)
        self._with_tools = ChatTemplate(tool_use, tokens, mark=mark) if tool_use else self
        self._templates = Templates()
        try:
            self._template = self._templates.from_string(source)
        except Exception as error:  # jinja2's TemplateError, or whatever its parser stumbles over
            raise ApiError(400, f"the model's chat template cannot be read: {error}", code="no_chat_template") from None

    def for_tools(self, tools: Tools | None) -> ChatTemplate:
        """The template of messages with these tools."""
        return self._with_tools if tools else self

    def variables(self, effort: Effort | None, thinks: bool | None, also: Mapping[str, Any]) -> dict[str, Any]:
        """`also`, and how much is to be thought, or whether anything is.  Raises ApiError where it does not ask."""
        said: dict[str, Any] = {}
        if thinks is None and self.takes_thinks and effort is not None and effort.value == "none":
            effort, thinks = None, False
        if thinks is not None:
            said[THINKS] = thinks
        if effort is not None and self.takes_effort:
            said[EFFORT] = effort.value
        elif effort is not None and effort.param is not None and (effort.value != "none" or self.marks is not None):
            raise unsupported(effort.param, "the model's chat template does not take it")
        return said | dict(also)

    def render(
        self, messages: Sequence[Mapping[str, Any]], also: Mapping[str, Any], tools: Sequence[Any] | None = None
    ) -> str:
        """The prompt, up to where the answer begins.  also: more variables.  tools: that may be called.  Raises
        ApiError when it refuses."""
        offered = list(tools) if tools else None
        variables = {"add_generation_prompt": True, "tools": offered, "documents": None, **self._tokens, **also}
        known = [self._message(one) for one in messages]
        try:
            self._templates.start_clock()
            try:
                return self._tried(variables, known)
            except Exception:  # gpt-oss' and Command's write descriptions, which clients may leave out
                told = [*map(described, offered or ())]
                if told == (offered or []):
                    raise
                return self._tried({**variables, "tools": told}, known)
        except MemoryError:
            raise refusal("it needs more memory than there is") from None
        except Exception as error:  # of the template's making
            raise refusal(str(error)) from None

    def _tried(self, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._written(variables, messages)
        except ValueError:  # gpt-oss' has no place for a thought beside what was said before a call
            fewer = [*map(without_thought_beside_words, messages)]
            if fewer == messages:
                raise
            return self._written(variables, fewer)

    def _written(self, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._template.render({**variables, "messages": messages})
        except TypeError:  # DeepSeek's puts arguments together with other texts
            return self._template.render({**variables, "messages": [*map(with_text_arguments, messages)]})

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As it knows them: developers are OpenAI's newer word for who speaks as the system, and thoughts have several
        names."""
        said = dict(message)
        thought = next((said[name] for name in THOUGHTS if said.get(name)), None)
        if thought is not None and said.get("role") == "assistant":
            said |= {name: thought for name in self._thoughts if not said.get(name)}
        if said.get("role") == "developer" and not self.takes_developer:
            said["role"] = "system"
        if isinstance(said.get("content"), str | list):
            said["content"] = self._content(said["content"])
        return said

    def _content(self, content: Content) -> Content:
        if isinstance(content, list):
            return in_parts(content) if self.takes_parts else in_text(content, self._mark())
        return content if self.takes_texts else in_parts(content)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether what a message says may come in parts, which others would write as Python or JSON has them."""
        written = self._written_alone([{"type": "text", "text": PROBE}]) if self._knows_parts else ""
        return PROBE in written and not re.search(f"['\"]{PROBE}", written)

    @cached_property
    def takes_texts(self) -> bool:
        """Whether it may be a text: templates that know parts alone leave one out, and say nothing."""
        return not self.takes_parts or PROBE in self._written_alone(PROBE)

    def _written_alone(self, content: Content) -> str:
        """A user's message of this content; "" where the template refuses it."""
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, **self._tokens}
        self._templates.start_clock()
        try:
            return self._written(variables, [{"role": "user", "content": content}])
        except Exception:  # of the template's making
            return ""


def refusal(why: str) -> ApiError:
    fact = f"the chat template refuses these messages: {why}"
    return ApiError(400, fact, param="messages", code="invalid_value")


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message, with the arguments of its calls, if it has some, as JSON."""
    said, calls = dict(message), message.get("tool_calls")
    if isinstance(calls, list):
        functions = [call["function"] for call in calls]
        texts = [json.dumps(each["arguments"], ensure_ascii=False) for each in functions]
        said["tool_calls"] = [
            {**call, "function": {**each, "arguments": text}}
            for call, each, text in zip(calls, functions, texts, strict=True)
        ]
    return said


def described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool with parameters, and with descriptions of itself and of those, empty ones where it has none."""
    function = {"description": "", "parameters": NO_PARAMETERS, **tool["function"]}
    schema = function["parameters"]
    fields = schema.get("properties")
    if isinstance(fields, Mapping):
        told = {name: {"description": "", **one} if isinstance(one, Mapping) else one for name, one in fields.items()}
        function["parameters"] = {**schema, "properties": told}
    return {**tool, "function": function}


def without_thought_beside_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without what was thought, if there are words and calls too."""
    if message.get("content") and message.get("tool_calls"):
        return {name: value for name, value in message.items() if name not in THOUGHTS}
    return dict(message)


def needs_form(template: ChatTemplate, tools: Tools) -> Form:
    """How calls of these tools are written.  Raises ApiError where the template does not take any, or where it is not
    known how they are told from text."""
    if not template.takes_tools:
        raise ApiError(400, "the model's chat template takes no tools", param="tools", code="unsupported_parameter")
    if template.form is None and not tools.must_call:
        fact = "how this model's chat template writes calls is not known here: ask for one by 'tool_choice'"
        raise ApiError(400, fact, param="tools", code="unsupported_parameter")
    return template.form or PLAIN
