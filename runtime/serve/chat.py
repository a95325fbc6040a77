"""Messages as one text, by the template that the model was trained with."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmc.runtime.serve.fields import ApiError, unsupported
from llmc.runtime.serve.forms import Form
from llmc.runtime.serve.known_forms import PLAIN, form_of
from llmc.runtime.serve.thoughts import marks_of
from llmc.runtime.serve.tools import Tools

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from llmc.runtime.serve.requests import Effort

EFFORT, THINKS = "reasoning_effort", "enable_thinking"
"""Variables of templates: gpt-oss' and others', Qwen's and others'."""


class ChatTemplate:
    """A template in Jinja, as Hugging Face's tokenizers have it.  It runs in a sandbox: it is a program of others'."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """tokens: bos_token, eos_token and so on, as text.  Raises ApiError, for those who chat."""
        self._tokens = dict(tokens)
        self.takes_effort, self.takes_thinks = EFFORT in source, THINKS in source
        self.takes_developer = "developer" in source
        self.form, self.takes_tools, self.marks = form_of(source), "tools" in source, marks_of(source)
        try:
            self._template = compiled(source)
        except Exception as error:  # jinja2's TemplateError, or whatever its parser stumbles over
            raise ApiError(400, f"the model's chat template cannot be read: {error}", code="no_chat_template") from None

    def variables(self, effort: Effort | None, thinks: bool | None, also: Mapping[str, Any]) -> dict[str, Any]:
        """`also`, and how much is to be thought, or whether anything is.  Raises ApiError where it does not ask."""
        said: dict[str, Any] = {}
        if thinks is None and self.takes_thinks and effort is not None and effort.value == "none":
            effort, thinks = None, False
        if thinks is not None:
            said[THINKS] = thinks
        if effort is not None and self.takes_effort:
            said[EFFORT] = effort.value
        elif effort is not None and effort.param is not None:
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
            try:
                return self._template.render({**variables, "messages": known})
            except TypeError:  # DeepSeek's puts arguments together with other texts
                return self._template.render({**variables, "messages": [*map(with_text_arguments, known)]})
        except Exception as error:  # of the template's making
            fact = f"the chat template refuses these messages: {error}"
            raise ApiError(400, fact, param="messages", code="invalid_value") from None

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As it knows them: developers are OpenAI's newer word for who speaks as the system."""
        said = dict(message)
        if said.get("role") == "developer" and not self.takes_developer:
            said["role"] = "system"
        return said


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """With the arguments of its calls, if it has some, as JSON."""
    said, calls = dict(message), message.get("tool_calls")
    if isinstance(calls, list):
        said["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": to_json(call["function"]["arguments"])}}
            for call in calls
        ]
    return said


def needs_form(template: ChatTemplate, tools: Tools) -> Form:
    """How calls of these tools are written.  Raises ApiError where the template does not take any, or where it is not
    known how they are told from text."""
    if not template.takes_tools:
        raise ApiError(400, "the model's chat template takes no tools", param="tools", code="unsupported_parameter")
    if template.form is None and not tools.must_call:
        fact = "how this model's chat template writes calls is not known here: ask for one by 'tool_choice'"
        raise ApiError(400, fact, param="tools", code="unsupported_parameter")
    return template.form or PLAIN


def compiled(source: str) -> Template:
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, by which training finds the answers: what stands between."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment.from_string(source)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: str) -> None:
    raise ValueError(message)


def now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
