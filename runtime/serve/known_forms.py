"""The forms of calls that are known, and which one a chat template shows."""

from __future__ import annotations

from dataclasses import replace

from llmc.runtime.serve.field_forms import Around, FieldForm
from llmc.runtime.serve.forms import Form, JsonForm, NamedForm, Within
from llmc.runtime.serve.gemma_form import QUOTE, GemmaForm
from llmc.runtime.serve.python_form import PythonForm

TOGETHER, LISTED, IN_LINES = Within("", "", ""), Within("[", ", ", "]"), Within("", "\n", "")
HERMES = JsonForm(  # Qwen too
    "<tool_call>", ("<function=", "<arg_key>", "<invoke name=", "<tool_calls>"), "<tool_call>\n", "\n</tool_call>"
)
MISTRAL = JsonForm("[TOOL_CALLS]", ("[ARGS]",), "[TOOL_CALLS]", "", LISTED)  # up to v7
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
FUNCTION = NamedForm("<function=", (), "<function=", "</function>", between=">")  # Functionary 3.1
APRIEL = JsonForm("<tool_calls>[", (), "<tool_calls>", "</tool_calls>", LISTED)  # Hunyuan too
MINIMAX_1 = JsonForm("<tool_calls>", ("<tool_calls>[",), "<tool_calls>\n", "\n</tool_calls>", IN_LINES)
NEMOTRON = JsonForm("<TOOLCALL>", (), "<TOOLCALL>", "</TOOLCALL>", LISTED)  # Nano 2
GRANITE = JsonForm("<|tool_call|>", (), "<|tool_call|>", "", LISTED)  # 3.3
PHI = JsonForm("<|/tool|>", (), "<|tool_call|>", "<|/tool_call|>", LISTED)  # 4 mini
FUNCTOOLS = JsonForm("functools", (), "functools", "", LISTED)  # Firefunction, Phi 4 mini in vLLM's template
XLAM = JsonForm('[{"name": "tool_call_name", "arguments"', (), "", "", LISTED)
GIGACHAT = JsonForm("<|function_call|>", (), "<|function_call|>", "", repeats=False)
APERTUS = JsonForm("<|tools_prefix|>", (), "<|tools_prefix|>", "<|tools_suffix|>", LISTED, name_key="")
COMMAND = JsonForm(  # R7B, A
    "<|START_ACTION|>",
    (),
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    LISTED,
    key="parameters",
    name_key="tool_name",
    id_key="tool_call_id",
)
INTERN = JsonForm(
    "<|action_start|><|plugin|>",
    (),
    "<|action_start|><|plugin|>\n",
    "<|action_end|>",
    special=("<|action_start|>", "<|plugin|>"),
)
LFM = PythonForm("<|tool_call_start|>", (), "<|tool_call_start|>", "<|tool_call_end|>", LISTED)
LFM_2 = replace(LFM, shown_by="List of tools: ")
OLMO = PythonForm("<function_calls>", (), "<function_calls>\n", "\n</function_calls>", IN_LINES)  # 3
PYTHON = PythonForm("[func_name1(", (), "", "", LISTED)  # Llama 3.2 and 4, ToolACE, Gemma 3
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
MINICPM = FieldForm(  # 5
    '<param name="',
    (),
    '<function name="',
    "</function>",
    name=Around("", '">'),
    key=Around('<param name="', '">'),
    value=Around("", "</param>"),
    quote=Around("<![CDATA[", "]]>"),
)
DSML = FieldForm(  # DeepSeek V4
    "'｜DSML｜'",
    ("'function_calls>",),
    "<｜DSML｜tool_calls>\n",
    "\n</｜DSML｜tool_calls>",
    IN_LINES,
    name=Around('<｜DSML｜invoke name="', '">\n'),
    key=Around('<｜DSML｜parameter name="', '" string='),
    value=Around("", "</｜DSML｜parameter>\n"),
    ending="</｜DSML｜invoke>",
    typed=('"true">', '"false">'),
)
DSML_32 = replace(
    DSML, never=(), opening="<｜DSML｜function_calls>\n", closing="\n</｜DSML｜function_calls>"
)  # DeepSeek V3.2
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
    *(HERMES, MISTRAL, MISTRAL_11, MISTRAL_13, LLAMA, QWEN, SEED, GLM, GLM_47, MINIMAX, GEMMA, HARMONY),
    *(DEEPSEEK_31, DEEPSEEK, DSML, DSML_32, KIMI, APRIEL, MINIMAX_1, NEMOTRON, GRANITE, PHI, FUNCTOOLS, XLAM, GIGACHAT),
    *(APERTUS, COMMAND, INTERN, LFM, LFM_2, OLMO, PYTHON, MINICPM, FUNCTION),
)
PLAIN = JsonForm("", (), "", "")
"""The form of calls that have to come, where the template shows no form."""


def form_of(template: str) -> Form | None:
    """The form that a chat template shows."""
    for form in FORMS:
        if form.shown_by in template and not any(other in template for other in form.never):
            return form
    return None
