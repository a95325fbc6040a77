"""`llmc chat`: messages of a pipe, of the command line, and typed at a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import llmc
from llmc.cli.chat import kept
from llmc.cli.ending import ENDS, Ending
from llmc.cli.main import main
from llmc.runtime.binding import Model
from llmc.runtime.conversation import Conversation
from llmc.runtime.generation import How
from tests.cli.test_main import COMMAND
from tests.runtime.stub_artifact import EOS, write_stub
from tests.runtime.test_conversation import chatting, chatting_toy
from tests.runtime.toy_artifact import EOS as TOY_EOS
from tests.runtime.toy_artifact import POISON

OPTIONS = ("-n", "4", "--logit-bias", f"{EOS}=-99")


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatting(tmp_path_factory.mktemp("stub") / "stub.so")


def chat(artifact: Path, *arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["chat", str(artifact), *OPTIONS, *arguments], input=typed)


def answer_to(model: Model, prompt: str) -> str:
    ids = model.encode(prompt, special=False)
    return model.decode(model.tokens(ids, 4, logit_bias={EOS: -99}), after=ids)


def test_a_line_is_a_message_and_an_empty_one_begins_anew(stub: Path, model: Model) -> None:
    first = answer_to(model, "uhia")
    result = chat(stub, typed="hi\nyo\n\nhi\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [first, answer_to(model, f"uhia{first}</s>uyoa"), first]


def test_one_message_and_its_answer(stub: Path, model: Model) -> None:
    result = chat(stub, "-p", "hi", "--system", "be", "--set", "also=7")
    assert result.stdout == answer_to(model, "sbeuhi7a") + "\n"
    assert "end: length" in result.stderr
    said = json.loads(chat(stub, "-p", "hi", "--json").stdout)
    assert (said["text"], said["thought"], said["n_prompt_tokens"]) == (answer_to(model, "uhia"), "", 4)


def test_wrong_usage_and_what_is_missing(stub: Path, tmp_path: Path) -> None:
    assert chat(stub, "--json").exit_code == 2
    assert chat(stub, "-p", "x", "--set", "7").exit_code == 2
    refused = chat(stub, "-p", "boo")
    assert (refused.exit_code, "no boo" in refused.stderr, refused.stdout) == (1, True, "")
    plain = chat(write_stub(tmp_path / "plain.so"), "-p", "x")
    assert (plain.exit_code, "no chat template" in plain.stderr) == (1, True)


def test_a_terminal_has_commands_and_lines_together(stub: Path, model: Model) -> None:
    ours, theirs = pty.openpty()
    typed = 'hi\n/again\n/new\n"""h\ni"""\n/help\nboo\n\n/exit\n'
    os.write(ours, typed.encode())
    command = [*COMMAND, "chat", str(stub), *OPTIONS]
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, lines = answer_to(model, "uhia"), answer_to(model, "uh\nia")
    said = done.stdout.replace("> ", "").replace("… ", "")
    assert first + "\n" + first + "\n" in said
    assert lines in said
    assert "/again" in done.stderr
    assert "no boo" in done.stderr


TOY_OPTIONS = ("-n", "3", "--logit-bias", f"{TOY_EOS}=-9999", "--logit-bias", f"{POISON}=-9999")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatting_toy(tmp_path_factory.mktemp("toy"))


def test_a_conversation_goes_on_another_day(toy: Path, tmp_path: Path) -> None:
    def talk(typed: str, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["chat", str(toy), *TOY_OPTIONS, *arguments], input=typed)

    session = ("--session", str(tmp_path / "talk.seq"))
    whole = talk("hi\nyo\nso\n").stdout.splitlines()
    first, second = talk("hi\nyo\n", *session), talk("", *session, "-p", "so")
    assert [*first.stdout.splitlines(), *second.stdout.splitlines()] == whole
    assert "going on after 4 messages" in second.stderr
    other = talk("", *session, "-p", "so", "--system", "be")
    assert (other.exit_code, "the conversation in this file has another --system" in other.stderr) == (1, True)
    (tmp_path / "notes").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "none" / "x"):
        refused = talk("", "-p", "hi", "--session", str(path))
        assert (refused.exit_code, refused.stdout) == (1, "")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("delay_s", [0, 0.001, 0.002, 0.2])  # before it reads, about when it begins to, while it does
def test_a_terminal_that_is_closed_loses_no_conversation(toy: Path, tmp_path: Path, delay_s: float) -> None:
    ours, theirs = pty.openpty()
    file = tmp_path / "talk.seq"
    command = [*COMMAND, "chat", str(toy), *TOY_OPTIONS, "--session", str(file)]
    with (
        os.fdopen(ours),
        os.fdopen(theirs) as terminal,
        subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running,
    ):
        try:
            os.write(ours, b"hi\n")
            assert running.stdout is not None
            assert running.stdout.readline()  # the answer
            time.sleep(delay_s)
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # the kernel's, the shell's, systemd's
                running.send_signal(number)
            assert running.wait(timeout=60) in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
        finally:
            running.kill()
    with llmc.load(toy) as model, Conversation(model) as talk:
        talk.restore(file)
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_signal_ends_an_answer_between_its_pieces_and_keeps_what_was_said(toy: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in ENDS]
    said = []

    def hear(talk: Conversation, ending: Ending) -> None:
        how = How(logit_bias=((TOY_EOS, -9999), (POISON, -9999)))
        with kept(talk, str(tmp_path / "talk.seq"), None, ending):
            for piece in ending.checked(talk.ask("hi", 8, how)):
                said.append(piece.answer)
                if len(said) == 2:
                    signal.raise_signal(signal.SIGTERM)

    with llmc.load(toy) as model, Conversation(model) as talk:
        with pytest.raises(SystemExit) as left:
            hear(talk, Ending())
        assert (left.value.code, len(said)) == (128 + signal.SIGTERM, 2)
        talk.begin_anew()
        talk.restore(tmp_path / "talk.seq")
        assert talk.messages[-1] == {"role": "assistant", "content": "".join(said)}
    assert [signal.getsignal(number) for number in ENDS] == before
