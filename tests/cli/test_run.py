"""`llmc run` on a stub artifact: prompts, streams, JSON, timing, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import llmc
from llmc.cli.main import main
from llmc.runtime.binding import Model
from tests.runtime.stub_artifact import N_CONTEXT, N_VOCAB, characters_json, write_stub
from tests.runtime.toy_artifact import build_artifact

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub(tmp_path_factory.mktemp("stub") / "stub.so")


def run(artifact: Path, *arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["run", str(artifact), *map(str, arguments)], input=typed)


def test_text_continues_on_standard_output_and_its_timing_elsewhere(stub: Path, model: Model) -> None:
    result = run(stub, "-p", PROMPT, "-n", 8)
    assert result.exit_code == 0
    assert result.stdout == "".join(model.generate(PROMPT, 8)) + "\n"
    assert "prompt 3 tokens" in result.stderr
    assert "end: length" in result.stderr


def test_ids_continue_as_ids(stub: Path, model: Model) -> None:
    result = run(stub, "--tokens", "1,2,3", "-n", 6)
    assert result.stdout == ",".join(map(str, model.tokens([1, 2, 3], 6))) + "\n"


def test_json_is_one_object_with_the_generated_ids_only(stub: Path, model: Model) -> None:
    result = run(stub, "--tokens", "1,2,3", "-n", 6, "--ignore-eos", "--threads", 3, "--json")
    assert result.stderr == ""
    said = json.loads(result.stdout)
    tokens = model.tokens([1, 2, 3], 6, ignore_eos=True)
    assert said["tokens"] == tokens
    assert said["text"] == model.decode(tokens, after=[1, 2, 3])
    assert (said["n_prompt_tokens"], said["threads"], said["stop"]) == (3, 3, "length")
    assert (said["target"], said["device"]) == ("cpu:x86-64-v3", "CPU")
    numbers = ("prefill_s", "prefill_tokens_per_s", "decode_s", "decode_tokens_per_s", "load_s")
    assert all(said[name] > 0 for name in numbers)


def test_one_token_has_no_decoding_speed(stub: Path) -> None:
    assert json.loads(run(stub, "--tokens", "1", "-n", 1, "--json").stdout)["decode_tokens_per_s"] == 0


def test_json_of_an_artifact_without_tokenizer_has_no_text(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", tokenizer=None)
    assert "text" not in json.loads(run(path, "--tokens", "1,2", "-n", 2, "--json").stdout)


def test_the_reason_for_the_end_is_told(stub: Path, model: Model) -> None:
    def reason(tokens: list[int], *arguments: object) -> str:
        text = ",".join(map(str, tokens))
        return str(json.loads(run(stub, "--tokens", text, *arguments, "--json").stdout)["stop"])

    ending = next([t] for t in range(3, N_VOCAB) if len(model.tokens([t], 30)) < 30)
    assert reason(ending, "-n", 40) == "eos"
    assert reason([5] * 40, "-n", 100, "--ignore-eos") == "context"


def test_a_seed_repeats_a_text(stub: Path) -> None:
    def draw(*seed: object) -> str:
        return run(stub, "-p", PROMPT, "-n", 8, "--temperature", 1, "--ignore-eos", *seed).stdout

    assert draw("--seed", 4) == draw("--seed", 4) != draw("--seed", 5)
    drawn = json.loads(run(stub, "-p", PROMPT, "-n", 8, "--temperature", 1, "--ignore-eos", "--json").stdout)
    assert draw("--seed", drawn["seed"]) == drawn["text"] + "\n"


def test_greedy_json_has_no_seed(stub: Path) -> None:
    assert "seed" not in json.loads(run(stub, "-p", PROMPT, "-n", 1, "--json").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-p", "x", "--tokens", "1"],
        ["-p", "x", "-i"],
        ["-i", "--json"],
        ["--tokens", "1,two"],
        ["--tokens", ""],
        ["-p", "x", "-n", "-1"],
        ["-p", "x", "--temperature", "-1"],
        ["-p", "x", "--top-p", "0"],
        ["-p", "x", "--min-p", "1.5"],
        ["-p", "x", "--repetition-penalty", "0"],
        ["-p", "x", "--logit-bias", "3"],
        ["-p", "x", "--threads", "-1"],
        ["-p", "x", "--device", "gpu"],
        ["-p", "x", "--device", "-1"],
        ["-p", "x", "--prompt-cache-ro"],
        ["-i", "--prompt-cache", "x"],
    ],
)
def test_wrong_usage_ends_with_2(stub: Path, arguments: list[str]) -> None:
    result = run(stub, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_token_out_of_range_ends_with_1(stub: Path) -> None:
    result = run(stub, "--tokens", f"1,{N_VOCAB}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: token {N_VOCAB} is out of range\n  at: {stub} (token 2 of 2)")


def test_a_prompt_past_the_context_ends_with_1(stub: Path) -> None:
    result = run(stub, "--tokens", ",".join(["1"] * (N_CONTEXT + 1)))
    assert result.exit_code == 1
    assert "the text is 49 tokens long; this artifact's context holds 48" in result.stderr


def test_text_without_a_tokenizer_ends_with_1_and_says_how_to_go_on(tmp_path: Path) -> None:
    result = run(write_stub(tmp_path / "a.so", tokenizer=None), "-p", PROMPT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no tokenizer" in result.stderr
    assert "--tokens" in result.stderr


def test_a_text_follows_a_schema(tmp_path: Path) -> None:
    stub, schema = write_stub(tmp_path / "a.so", tokenizer=characters_json()), tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    result = run(stub, "--tokens", "5", "--json-schema", schema, "--json")
    said = json.loads(result.stdout)
    with llmc.load(stub) as model:
        assert model.decode(said["tokens"]) in ('"yes"', '"no"')
    assert said["stop"] == "grammar"
    schema.write_text("{")
    damaged = tmp_path / "b.so"  # is not looked at
    damaged.write_bytes(b"")
    assert run(damaged, "--tokens", "5", "--json-schema", schema).stderr.startswith("error: this is not JSON: ")
    assert run(stub, "--tokens", "5", "--json-schema", "/dev/zero").stderr.startswith(
        "error: the schema is longer than 8"
    )
    assert run(stub, "-i", "--json-schema", schema).exit_code == 2


def test_an_artifact_for_another_machine_ends_with_1(stub: Path) -> None:
    result = run(stub, "-p", PROMPT, "--threads", 99)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: this machine lacks threads\n  at: the stub\n  hint: take fewer\n",
    )


def test_each_line_continues_the_text_and_an_empty_one_begins_anew(stub: Path, model: Model) -> None:
    result = run(stub, "-i", "-n", 4, "--ignore-eos", typed="Once\nupon\n\nOnce\n")
    assert result.exit_code == 0
    first, second, again = result.stdout.splitlines()
    prompt = model.encode("Once")
    tokens = model.tokens(prompt, 4, ignore_eos=True)
    whole = prompt + tokens + model.encode("upon", special=False)
    assert first == again == model.decode(tokens, after=prompt)
    assert second == model.decode(model.tokens(whole, 4, ignore_eos=True), after=whole)


def test_penalties_and_biases_change_the_text(stub: Path, model: Model) -> None:
    prompt = model.encode("Once")
    unlike = run(stub, "-p", "Once", "-n", 20, "--ignore-eos", "--json", "--presence-penalty", 99).stdout
    tokens = json.loads(unlike)["tokens"]
    assert tokens == model.tokens(prompt, 20, presence_penalty=99, ignore_eos=True)
    assert len(set(tokens)) == 20
    biased = run(stub, "-p", "Once", "-n", 3, "--json", "--logit-bias", "7=-9.5", "--logit-bias", "9=99").stdout
    assert json.loads(biased)["tokens"] == [9, 9, 9]
    lines = run(stub, "-i", "-n", 4, "--ignore-eos", "--presence-penalty", 99, typed="Once\nupon\n").stdout.splitlines()
    first = model.tokens(prompt, 4, presence_penalty=99, ignore_eos=True)
    whole = prompt + first + model.encode("upon", special=False)
    assert lines[1] == model.decode(model.tokens(whole, 4, presence_penalty=99, ignore_eos=True), after=whole)
    for wrong in ("nan", "inf"):
        assert run(stub, "-p", "x", "--presence-penalty", wrong).exit_code == 1


def test_guesses_need_a_runtime_that_checks_them_and_a_draft_that_fits(stub: Path, tmp_path: Path) -> None:
    result = run(stub, "-p", PROMPT, "--speculate", 4)
    assert result.exit_code == 1
    assert "cannot check guesses" in result.stderr
    assert run(stub, "-i", "--speculate", 4).exit_code == 2
    missing = run(stub, "-p", PROMPT, "--draft", tmp_path / "none.so")
    assert (missing.exit_code, "no such file" in missing.stderr) == (1, True)


def test_a_text_that_grows_past_the_context_begins_anew(stub: Path) -> None:
    result = run(stub, "-i", "-n", 1000, "--ignore-eos", typed="Once\nupon\nOnce\n")
    assert result.exit_code == 0
    assert "this artifact's context holds 48" in result.stderr
    first, third = result.stdout.splitlines()
    assert first == third


def test_ctrl_c_keeps_the_text_so_far_ends_the_line_and_exits_with_130(stub: Path) -> None:
    code = (
        "import time\nfrom llmc.runtime.sequence import Sequence\nfrom llmc.cli.main import main\n"
        "sample = Sequence.sample\n"
        "def slow(self, how):\n    time.sleep(0.2)\n    return sample(self, how)\n"
        "Sequence.sample = slow\n"
        f"main(['run', {str(stub)!r}, '-p', 'Once upon', '-n', '40', '--ignore-eos'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    start = process.stdout.read(2)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (start + rest).endswith(b"\n")
    assert errors == b""


def test_a_prompt_is_kept_in_a_file_and_read_from_there(tmp_path: Path) -> None:
    toy_so = build_artifact(tmp_path, "-O0")
    file = tmp_path / "prompt.seq"
    asked = ["--tokens", "3,5,9,11,2,4,8", "-n", "4", "--ignore-eos"]
    cached = [*asked, "--prompt-cache", file]
    said = [run(toy_so, *arguments, "--json") for arguments in (asked, cached, cached)]
    plain, first, second = (json.loads(result.stdout) for result in said)
    assert plain["tokens"] == first["tokens"] == second["tokens"]
    assert "n_cached_tokens" not in plain
    assert (first["n_cached_tokens"], second["n_cached_tokens"]) == (0, 7)
    assert (first["prefill_tokens_per_s"] > 0, second["prefill_tokens_per_s"]) == (True, 0)
    before = file.read_bytes()
    result = run(toy_so, "--tokens", "3,5,9,20,21,22,23,24", "-n", 2, "--prompt-cache", file, "--prompt-cache-ro")
    assert f"prompt 8 tokens, 3 of them from {file}, in" in result.stderr
    assert file.read_bytes() == before
    file.write_bytes(before[:-1])
    result = run(toy_so, *cached)
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert result.stderr.startswith("error: the saved sequence is truncated: ")
    assert result.stderr.endswith(f"  at: {file}\n  hint: delete it: the text is read again\n")
