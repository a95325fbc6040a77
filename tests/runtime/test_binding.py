"""The binding, on a stub model whose next token depends on all before it."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.generation import How
from tests.runtime.stub_artifact import EOS, MAX_STEP, N_CONTEXT, N_VOCAB, pack, stub_code, stub_sections, write_stub

KV_TOKENS = 160


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub(tmp_path_factory.mktemp("stub") / "stub.so")


@pytest.fixture
def model(stub: Path) -> Iterator[Model]:
    with llmc.load(stub) as model:
        yield model
        assert model.info.kv_tokens_free == KV_TOKENS, "a sequence was left open"


def argmax_by_hand(model: Model, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_info_comes_from_the_runtime(model: Model) -> None:
    assert model.info[:5] == (N_VOCAB, N_CONTEXT, 2, MAX_STEP, 1)
    assert model.manifest["model"]["name"] == "stub"
    assert model.token_bytes(7) == b"<7>"


def test_pages_are_as_large_as_the_runtime_says_or_an_older_one_was_planned_for(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with llmc.load(stub) as model:
        assert model.page_tokens == 1
    with llmc.load(stub) as model:
        monkeypatch.setattr(Model, "info", model.info._replace(page_tokens=0))
        assert model.page_tokens == 64


def test_greedy_tokens_are_the_most_likely_ones(model: Model) -> None:
    prompt = list(range(3, 3 + 2 * MAX_STEP + 3))
    assert model.tokens(prompt, max_tokens=9, ignore_eos=True) == argmax_by_hand(model, prompt, 9)


def test_logits_have_a_row_for_each_token_however_long_the_prompt(model: Model) -> None:
    prompt = list(range(30))
    logits = model.logits(prompt)
    assert logits.shape == (30, N_VOCAB)
    assert logits.dtype == np.float32
    with model.sequence() as sequence:
        for row, token in zip(logits, prompt, strict=True):
            sequence.feed([token])
            assert (sequence.logits() == row).all()


def test_text_streams_and_equals_the_text_of_the_tokens(model: Model) -> None:
    prompt = model.encode("Once upon")
    assert prompt[0] == 1
    pieces = list(model.generate("Once upon", max_tokens=12, ignore_eos=True))
    assert len(pieces) > 1
    assert "".join(pieces) == model.decode(model.tokens(prompt, 12, ignore_eos=True), after=prompt)


def test_a_text_ends_at_its_end_token_which_is_the_last_id(model: Model) -> None:
    ended = next(g for t in range(3, N_VOCAB) if (g := model.tokens([t], 30)) and g[-1] == EOS)
    assert len(ended) < 30
    assert EOS not in ended[:-1]


def test_the_end_token_can_be_ignored(model: Model) -> None:
    prompt = next([t] for t in range(3, N_VOCAB) if len(model.tokens([t], 30)) < 30)
    assert len(model.tokens(prompt, 30, ignore_eos=True)) == 30


def test_why_it_ended_and_how_long_it_took_are_known(model: Model) -> None:
    generation = model.stream([1, 2, 3], 5, ignore_eos=True)
    tokens = list(generation)
    assert generation.tokens == tokens
    assert generation.stop == "length"
    assert generation.prefill_s > 0 < generation.decode_s
    assert generation.prefill_tokens_per_s == 3 / generation.prefill_s
    assert generation.decode_tokens_per_s == 4 / generation.decode_s


def test_generation_ends_where_the_context_does(model: Model) -> None:
    generation = model.stream([5] * 40, 1000, ignore_eos=True)
    assert len(list(generation)) == N_CONTEXT - 40 + 1  # the last one is known, but has no room
    assert generation.stop == "context"
    assert len(model.tokens([5] * N_CONTEXT, 1000, ignore_eos=True)) == 1


def test_no_tokens_can_be_asked_for(model: Model) -> None:
    assert model.tokens([1, 2], max_tokens=0) == []


def test_a_prompt_past_the_context_is_refused_with_both_numbers(model: Model) -> None:
    with pytest.raises(LlmcError, match="the text is 49 tokens long; this artifact's context holds 48"):
        model.generate([1] * 49)


def test_a_token_out_of_range_is_named(model: Model) -> None:
    bad: Any
    for bad in (-1, N_VOCAB, 1 << 40, 1.5, "a"):
        with pytest.raises(LlmcError, match=f"token {bad} is out of range") as refused:
            model.tokens([1, bad, 3])
        assert "token 2 of 3" in str(refused.value.place)
    for bad in (-1, N_VOCAB, 1 << 40):
        with pytest.raises(LlmcError, match=f"token {bad} is out of range"):
            model.decode([1, bad])
        with pytest.raises(LlmcError, match=f"token {bad} is out of range"):
            model.decode([1], after=[bad])
    assert model.is_eos(EOS)
    assert not model.is_eos((1 << 32) + EOS)


@pytest.mark.parametrize("n", [-1, 64, 1 << 40])
def test_guesses_are_as_many_as_a_step_may_have(model: Model, n: int) -> None:
    with pytest.raises(LlmcError, match=f"there cannot be {n} guesses"):
        model.tokens([1], speculate=n)


@pytest.mark.parametrize("said", [{"a": 1}, "last", [7], {"pooling": "last", "normalized": True, "size": "x"}])
def test_embeddings_that_the_manifest_does_not_describe_are_refused(said: object, tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", manifest={"embedding": said})
    with llmc.load(path) as model, pytest.raises(LlmcError, match="does not say how embeddings are made"):
        model.embed([[1]])


def test_an_empty_prompt_is_refused(model: Model) -> None:
    with pytest.raises(LlmcError, match="the prompt has no tokens"):
        model.tokens([])


def test_sampling_follows_the_seed(model: Model) -> None:
    def draw(seed: int | None) -> list[int]:
        return model.tokens([1, 2], 6, temperature=1.0, seed=seed, ignore_eos=True)

    assert draw(5) == draw(5) != draw(6)
    assert len({tuple(draw(None)) for _ in range(8)}) > 1


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_options_are_checked(model: Model, wrong: dict[str, float]) -> None:
    with pytest.raises(LlmcError):
        model.tokens([1], **wrong)  # type: ignore[arg-type]


def test_sequences_fork_and_truncate(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed([1, 2, 3])
        with sequence.fork() as copy:
            copy.feed([4])
            assert (copy.length, sequence.length) == (4, 3)
            copy.truncate(2)
            copy.feed([3])
            assert (copy.logits() == sequence.logits()).all()
            assert copy.sample() == sequence.sample()


def test_a_step_feeds_several_sequences(model: Model) -> None:
    with model.sequence() as one, model.sequence() as two:
        model.step([(one, [1, 2]), (two, [3])])
        assert (one.length, two.length) == (2, 1)
        assert one.sample() == model.tokens([1, 2], 1)[0]
        assert two.sample() == model.tokens([3], 1)[0]


def test_a_failed_feed_appends_nothing(stub: Path) -> None:
    with llmc.load(stub, kv_tokens=20) as model, model.sequence() as sequence:
        sequence.feed([1, 2, 3])
        with pytest.raises(LlmcError, match="the KV cache is full") as refused:
            sequence.feed([4] * 18)
        assert refused.value.hint == "ask for more kv_tokens"
        assert sequence.length == 3
        assert model.info.kv_tokens_free == 17


def test_stopping_early_gives_the_pages_back(model: Model) -> None:
    generation = model.stream([1, 2, 3], 20)
    next(generation)
    generation.close()
    assert model.info.kv_tokens_free == KV_TOKENS


def test_an_interrupted_generation_gives_the_pages_back(model: Model) -> None:
    def interrupted() -> None:
        for _ in model.generate([1, 2, 3], 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert model.info.kv_tokens_free == KV_TOKENS


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_models_and_sequences_cannot_be_copied(model: Model, copied: Callable[[object], object]) -> None:
    """A copy that goes would close what the other one has."""
    with model.sequence() as sequence, pytest.raises(TypeError, match="a sequence cannot be copied"):
        copied(sequence)
    with pytest.raises(TypeError, match="a model cannot be copied"):
        copied(model)
    gc.collect()
    assert model.tokens([1, 2], 1)


def test_a_closed_model_says_so(stub: Path) -> None:
    model = llmc.load(stub)
    sequence = model.sequence()
    model.close()
    model.close()
    sequence.close()
    with pytest.raises(LlmcError, match="the model is closed"):
        model.tokens([1])
    with pytest.raises(LlmcError, match="the model is closed"):
        sequence.feed([1])


def test_a_closed_sequence_says_so(model: Model) -> None:
    sequence = model.sequence()
    sequence.close()
    sequence.close()
    with pytest.raises(LlmcError, match="the sequence is closed"):
        sequence.feed([1])


def test_the_words_of_the_runtime_become_fact_place_and_hint(stub: Path) -> None:
    with pytest.raises(LlmcError) as refused:
        llmc.load(stub, threads=99)
    error = refused.value
    said = (error.fact, error.place, error.hint, error.status)
    assert said == ("this machine lacks threads", "the stub", "take fewer", 3)


def test_an_artifact_opens_twice_and_outlives_its_first_model(stub: Path) -> None:
    first, second = llmc.load(stub), llmc.load(str(stub))
    wanted = first.tokens([1, 2, 3], 8)
    first.close()
    with second:
        assert second.tokens([1, 2, 3], 8) == wanted


def test_a_new_artifact_at_an_old_path_is_the_new_one(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "model.so")
    with llmc.load(path) as old:
        pack(tmp_path / "new.so", stub_sections(code=stub_code(n_vocab=32), plan=b"", graph=None))
        (tmp_path / "new.so").replace(path)
        with llmc.load(path) as new:
            assert (old.info.n_vocab, new.info.n_vocab) == (64, 32)


def test_a_file_written_over_under_an_open_model_is_refused(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "model.so")
    with llmc.load(path) as model:
        os.utime(path, ns=(0, 0))
        with pytest.raises(LlmcError, match="written over while this process has it loaded"):
            llmc.load(path)
        assert model.tokens([1], 1)


def test_a_file_written_over_after_its_model_was_closed_is_loaded_anew(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "model.so")
    llmc.load(path).close()
    write_stub(path, code=stub_code(n_vocab=32))
    with llmc.load(path) as model:
        assert model.info.n_vocab == 32


def test_a_closed_model_leaves_neither_code_nor_open_files(tmp_path: Path) -> None:
    def held() -> tuple[int, bool]:
        return len(os.listdir("/proc/self/fd")), str(path) in Path("/proc/self/maps").read_text()

    path = write_stub(tmp_path / "model.so")
    before = held()
    with llmc.load(path) as model, model.sequence() as sequence:
        sequence.feed([1])
        assert held()[1]
    assert held() == before
    with pytest.raises(LlmcError):
        llmc.load(path, threads=99)
    assert held() == before


def test_damage_is_found_before_any_code_is_loaded(stub: Path, tmp_path: Path) -> None:
    data = bytearray(stub.read_bytes())
    data[9000] ^= 1
    (tmp_path / "a.so").write_bytes(data)
    with pytest.raises(LlmcError, match="section 'code' is not what was written"):
        llmc.load(tmp_path / "a.so")


def test_code_that_does_not_load_is_a_clear_error(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", code=b"\x7fELF" + bytes(2000))
    with pytest.raises(LlmcError, match="the artifact's code cannot be loaded") as refused:
        llmc.load(path)
    assert "/proc/self" not in str(refused.value)


def test_a_file_system_without_programs_is_suspected(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> None:
        raise OSError(f"{name}: failed to map segment from shared object")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    with pytest.raises(LlmcError, match="cannot be loaded: failed to map segment") as refused:
        llmc.load(stub)
    assert "noexec" in str(refused.value.hint)


def test_without_a_tokenizer_only_text_is_refused(tmp_path: Path) -> None:
    with llmc.load(write_stub(tmp_path / "a.so", tokenizer=None)) as model:
        assert not model.has_tokenizer
        assert len(model.tokens([1, 2, 3], 4, ignore_eos=True)) == 4
        with pytest.raises(LlmcError, match="the artifact has no tokenizer") as refused:
            model.generate("Once")
        assert "--tokens" in str(refused.value.hint)


def test_threads_may_share_a_model(model: Model) -> None:
    wanted = [model.tokens([t], 10, ignore_eos=True) for t in range(8)]
    got: dict[int, list[int]] = {}
    workers = [
        threading.Thread(target=lambda t=t: got.__setitem__(t, model.tokens([t], 10, ignore_eos=True)))
        for t in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [got[t] for t in range(8)] == wanted


def test_how_is_checked_once() -> None:
    assert How.choose(0.5, 3, 0.9, 7) == How(0.5, 3, 0.9, 7)


def test_running_needs_neither_torch_nor_tvm_nor_onnx(stub: Path) -> None:
    code = (
        "import sys, llmc\n"
        f"print(len(list(llmc.load({str(stub)!r}).generate('Once', 5))) > 0)\n"
        "print([m for m in ('torch', 'tvm', 'onnx', 'onnx_ir', 'transformers') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout == "True\n[]\n"
