"""The forms of calls that are known, and which one a chat template shows."""

from __future__ import annotations

from dataclasses import replace

from llmc.runtime.serve.field_forms import Around, FieldForm
from llmc.runtime.serve.forms import Form, JsonForm, NamedForm, Within
from llmc.runtime.serve.gemma_form import QUOTE, GemmaForm

TOGETHER = Within("", "", "")
HERMES = JsonForm(  # Qwen too
    "<tool_call>", ("<function=", "<arg_key>", "<invoke name=", "<tool_calls>"), "<tool_call>\n", "\n</tool_call>"
)
MISTRAL = JsonForm("[TOOL_CALLS]", ("[ARGS]",), "[TOOL_CALLS]", "", Within("[", ", ", "]"))  # up to v7
MISTRAL_11 = NamedForm(
    "[CALL_ID]",
    (),
    "[TOOL_CALLS]",
    "",
    special=("[CALL_ID]", "[ARGS]"),
    id_mark="[CALL_ID]",
    id_pattern="[a-zA-Z0-9]{9}",
    between="[ARGS]",
)
MISTRAL_13 = NamedForm("[ARGS]", ("[CALL_ID]",), "[TOOL_CALLS]", "", special=("[ARGS]",), between="[ARGS]")
LLAMA = JsonForm('{"name": function name, "parameters"', ("<tool_call>",), "", "", key="parameters")  # Llama 3
QWEN = FieldForm(  # Qwen 3.5, Qwen 3 Coder, Nemotron 3
    "<parameter=",
    ("<seed:tool_call>",),
    "<tool_call>\n",
    "\n</tool_call>",
    name=Around("<function=", ">\n"),
    key=Around("<parameter=", ">"),
    value=Around("\n", "\n</parameter>\n"),
    ending="</function>",
)
SEED = FieldForm(
    "<seed:tool_call>",
    (),
    "<seed:tool_call>\n",
    "\n</seed:tool_call>",
    name=Around("<function=", ">\n"),
    key=Around("<parameter=", ">"),
    value=Around("", "</parameter>\n"),
    ending="</function>",
)
GLM = FieldForm(  # 4.5, 4.6
    "<arg_key>",
    ("</arg_key><arg_value>",),
    "<tool_call>",
    "</tool_call>",
    special=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    name=Around("", "\n"),
    key=Around("<arg_key>", "</arg_key>\n"),
    value=Around("<arg_value>", "</arg_value>\n"),
)
GLM_47 = FieldForm(
    "</arg_key><arg_value>",
    (),
    "<tool_call>",
    "</tool_call>",
    special=GLM.special,
    key=Around("<arg_key>", "</arg_key>"),
    value=Around("<arg_value>", "</arg_value>"),
)
MINIMAX = FieldForm(  # M2
    "<minimax:tool_call>",
    (),
    "<minimax:tool_call>\n",
    "\n</minimax:tool_call>",
    Within("", "\n", ""),
    name=Around('<invoke name="', '">\n'),
    key=Around('<parameter name="', '">'),
    value=Around("", "</parameter>\n"),
    ending="</invoke>",
)
GEMMA = GemmaForm("<|tool_call>", (), "<|tool_call>", "<tool_call|>", special=(QUOTE,))  # Gemma 4
HARMONY = NamedForm(  # gpt-oss; thoughts.py leaves of a message's head what a call needs
    "<|channel|>commentary",
    (),
    "<|channel|>commentary to=functions.",
    "",
    special=("<|channel|>", "<|constrain|>", "<|message|>"),
    repeats=False,  # <|call|> ends the text
    id_mark=" <|constrain|>",
    id_pattern="json",
    between="<|message|>",
)
DEEPSEEK_31 = NamedForm(
    "<｜tool▁calls▁begin｜>",
    ("```json",),
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    TOGETHER,
    ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    head="<｜tool▁call▁begin｜>",
    between="<｜tool▁sep｜>",
    tail="<｜tool▁call▁end｜>",
)
DEEPSEEK = replace(  # V3, R1
    DEEPSEEK_31,
    never=(),
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    between="\n```json\n",
    tail="\n```<｜tool▁call▁end｜>",
)
KIMI = NamedForm(  # K2
    "<|tool_calls_section_begin|>",
    (),
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    TOGETHER,
    ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    head="<|tool_call_begin|>functions.",
    id_mark=":",
    id_pattern="[0-9]{1,3}",
    between="<|tool_call_argument_begin|>",
    tail="<|tool_call_end|>",
)
FORMS: tuple[Form, ...] = (
    HERMES,
    MISTRAL,
    MISTRAL_11,
    MISTRAL_13,
    LLAMA,
    QWEN,
    SEED,
    GLM,
    GLM_47,
    MINIMAX,
    GEMMA,
    HARMONY,
    DEEPSEEK_31,
    DEEPSEEK,
    KIMI,
)
PLAIN = JsonForm("", (), "", "")
"""The form of calls that have to come, where the template shows no form."""


def form_of(template: str) -> Form | None:
    """The form that a chat template shows."""
    for form in FORMS:
        if form.shown_by in template and not any(other in template for other in form.never):
            return form
    return None
