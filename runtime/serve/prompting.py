"""A chat's prompt, by the model's template, and how the answer behind it is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llmc.runtime.serve.answers import Answer
from llmc.runtime.serve.calls import CallScanner
from llmc.runtime.serve.chat import ChatTemplate, needs_form
from llmc.runtime.serve.fields import unsupported, wrong
from llmc.runtime.serve.formats import Format
from llmc.runtime.serve.forms import Form
from llmc.runtime.serve.job import Thinking
from llmc.runtime.serve.requests import Chat
from llmc.runtime.serve.thoughts import Frame, Marks
from llmc.runtime.serve.tools import MIXED_KINDS, Tools, framed
from llmc.runtime.serve.vocabulary import Vocabulary
from llmc.runtime.serve.wanted import Wanted


@dataclass(frozen=True)
class Prompted:
    """wanted: with the format of a call where one has to come.  answer: makes what takes a text apart.  shown,
    thinking: of Ask."""

    text: str
    wanted: Wanted
    answer: Callable[[], Answer]
    shown: Mapping[int, str]
    thinking: Thinking | None


def prompted(chat: Chat, template: ChatTemplate, vocabulary: Vocabulary) -> Prompted:
    """Raises ApiError: what the template refuses or does not take."""
    template = template.for_tools(chat.tools)
    tools, wanted, marks = chat.tools, chat.wanted, template.marks
    variables = template.variables(chat.effort, chat.thinks, chat.template_kwargs)
    text = template.render(chat.messages, variables, tools.tools if tools else None)
    form = needs_form(template, tools) if tools else None
    written = (*(marks.special if marks else ()), *(form.marks if form else ()))
    shown, added = vocabulary.shown(written), vocabulary.added(written)
    thinking = None
    if marks is not None:
        text, thinking = begin_thought(marks, text, chat, vocabulary)
    frame = marks.frame if marks is not None and thinking is not None else None
    wanted = replace(wanted, format=format_of(tools, form, wanted.format, added, frame))
    if form is not None and tools is not None and tools.must_call:
        text += form.opening
    if chat.prefix and wanted.format is not None:
        raise wrong("messages", "cannot end with the assistant's where the answer has to be a call, or of a format")

    def answer() -> Answer:
        scan = CallScanner(tools, form) if tools and form else None
        split = marks.scanner(thinking.is_open, scan is not None) if marks and thinking and chat.splits else None
        return Answer(split, scan, chat.with_thoughts)

    return Prompted(text + chat.prefix, wanted, answer, shown, thinking)


def format_of(
    tools: Tools | None, form: Form | None, answer: Format | None, special: Mapping[int, str], frame: Frame | None
) -> Format | None:
    """The format of a text: a call, where one must come; else that of the answer, with calls allowed in its place.

    special: see Tools.grammar.  frame: what is around the thought before it, where that is a part of the format.
    """
    if tools is not None and form is not None and tools.must_call:
        return Format("tools", tools.grammar(form, special))
    if answer is None:
        return None
    if tools is not None and form is not None:
        return Format(answer.param, tools.grammar(form, special, answer.grammar, frame))
    return Format(answer.param, framed(answer.grammar, frame, special)) if frame else answer


def begin_thought(marks: Marks, prompt: str, chat: Chat, vocabulary: Vocabulary) -> tuple[str, Thinking | None]:
    """-> (the prompt, how a thought may come behind it: None: there is none).

    Where a call has to come nothing is thought before it, nor where the answer has begun, where nothing is to be
    thought, or where the end of a thought cannot be told from a format that is to follow: what the template has begun
    is ended.
    """
    opening, closing = vocabulary.token_of(marks.opening), vocabulary.token_of(marks.closing)
    if marks.is_over(prompt):
        return prompt, None
    behind = marks.answer_behind(prompt)
    must_call = chat.tools is not None and chat.tools.must_call
    form = chat.wanted.format
    is_bound = form is not None and closing is None and not (marks.frame and form.grammar.kind in MIXED_KINDS)
    if must_call:
        return prompt + marks.call_behind(prompt), None
    if is_bound or chat.prefix or (chat.thinks is False and behind):
        return prompt + behind, None
    most, ending = None, None
    if chat.budget is not None and closing is not None:
        most, ending = chat.budget.tokens, vocabulary.only(closing)
    elif chat.budget is not None and chat.budget.param is not None:
        raise unsupported(chat.budget.param, "no one token ends a thought of this model")
    return prompt, Thinking(opening, closing, marks.is_open(prompt), most, ending)
