"""Stop strings, templates and counters, each alone."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.meters import Meters, State
from llmc.runtime.serve.probs import token_prob
from llmc.runtime.serve.stops import StopScanner


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ((), ["ab", "c"], ["ab", "c"]),
        (("END",), ["aE", "N", "Db"], ["a", "", ""]),
        (("END",), ["aE", "Nx", "b"], ["a", "ENx", "b"]),
        (("aab",), ["a", "a", "a", "b", "c"], ["", "", "a", ""]),
        (("bc", "b"), ["ab", "c"], ["a"]),
        (("x", "longer"), ["lo", "ngex"], ["", "longe"]),
    ],
)
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(
    stops: tuple[str, ...], pieces: list[str], shown: list[str]
) -> None:
    scanner, said = StopScanner(stops), []
    for piece in pieces:
        text, stopped = scanner.push(piece)
        said.append(text)
        if stopped:
            break
    assert said == shown


def test_nothing_is_held_back_at_the_end() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("aEN") == ("a", False)
    assert scanner.push("", is_last=True) == ("EN", False)


def test_templates_have_what_hugging_face_gives_them() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{{ eos_token }}{%- endfor %}{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}"
    )
    template = ChatTemplate(source, {"eos_token": "</s>"})
    messages = [{"role": "user", "content": "<ä>"}] * 3
    assert template.render(messages, {}) == '{"role": "user", "content": "<ä>"}</s>' * 2 + "4True"


def test_what_training_marks_in_a_template_is_text() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "x"}] * 2, {}) == "x.x."


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ nothing.at.all }}"])
def test_templates_cannot_leave_their_sandbox(source: str) -> None:
    with pytest.raises(ApiError, match="the chat template refuses these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], {})


def test_a_template_that_is_none_is_an_error_of_those_who_chat() -> None:
    with pytest.raises(ApiError, match="the model's chat template cannot be read"):
        ChatTemplate("{% for %}", {})


def test_impossible_tokens_have_a_probability_that_json_can_say() -> None:
    logits = np.array([0, -np.inf, 0, np.nan], np.float32)
    one = token_prob(logits, 0, 4, lambda token: b"%d" % token)
    assert one.logprob == pytest.approx(np.log(0.5))
    assert [(top.token, top.logprob) for top in one.top[2:]] == [(1, -9999.0), (3, -9999.0)]


def test_the_metrics_are_prometheus_text() -> None:
    meters = Meters()
    meters.add("generated_tokens", 3)
    for seconds in (0.001, 0.03, 99):
        meters.step.add(seconds)
    page = meters.page(State(1, 2, 30, 4), {200: 5}, 6).splitlines()
    assert {"llmc_generated_tokens_total 3", "llmc_waiting 2", 'llmc_http_responses_total{status="200"} 5'} <= set(page)
    assert {'llmc_step_seconds_bucket{le="0.05"} 2', 'llmc_step_seconds_bucket{le="+Inf"} 3'} <= set(page)
    names = {line.split()[2] for line in page if line.startswith("# TYPE")}
    assert all(line.split("{")[0].split()[0].startswith(tuple(names)) for line in page if not line.startswith("#"))
