"""The next tokens and the step on them in one call: on a CPU one after the other, on a GPU while the host goes on."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from llmc.runtime.capi import Profile as RawProfile
from llmc.runtime.profile import EVENT
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_cuda_steps import INPUT_BYTES
from tests.runtime.toy_cuda import FakeCuda, drawn
from tests.runtime.toy_model import ARGUMENT, KERNEL, MEMORY, Model, Refused, Text

How = tuple[float, int, float, int]
HOWS: dict[str, Callable[[int], How | None]] = {
    "greedy": lambda _: None,
    "drawn": lambda i: (1.5, 5, 0.5, 3 + i),
    "mixed": lambda i: (2.0, 0, 1.0, 17 * i) if i % 2 else (0.0, 0, 1.0, 0),
}
INPUT = f"h2d {INPUT_BYTES - 64 + 4 * 4 * toy.PAGES}"
"""Of a body of 4, without tokens."""
BESIDE = " (stream 2)"
SENT = [INPUT + BESIDE, "wait" + BESIDE]
"""While the step before runs."""
TOKENS = "h2d 16"
GRAPH = f"graph {1 + 3 * toy.LAYERS + 3}"
"""A body and its head."""


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def artifact(device: str, cuda: FakeCuda, toy_so: Path, cuda_so: Path) -> Path:
    return toy_so if device == "cpu" else cuda_so


@pytest.fixture
def model(artifact: Path) -> Iterator[Model]:
    with Model(artifact, kv_tokens=640) as model:
        yield model


@pytest.fixture
def gpu(cuda: FakeCuda, cuda_so: Path) -> Iterator[Model]:
    with Model(cuda_so, kv_tokens=640) as model:
        yield model


def best(text: Sequence[int]) -> int:
    """The most likely token behind a text."""
    logits = toy.oracle(text)[-1]
    return logits.index(max(logits))


def begun(model: Model, n: int) -> tuple[list[Text], list[list[int]]]:
    """Sequences of 3 and more tokens, and what they say; none of them goes on to a token that makes kernels fail."""
    texts = [TEXT[i : i + 3 + i] for i in range(n)]
    return [model.sequence(text) for text in texts], texts


def follow(model: Model, inputs: Sequence[tuple[Text, list[int], How | None]]) -> None:
    """Advance once; the tokens must be those that follow the texts, which get them."""
    tokens = model.advance([(sequence, how) for sequence, _, how in inputs])
    for token, (sequence, text, how) in zip(tokens, inputs, strict=True):
        if how is None or not how[0]:
            assert token == best(text)
        text.append(token)
        assert len(sequence) == len(text)


def check(sequences: list[Text], texts: list[list[int]]) -> None:
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.logits() == toy.oracle(text)[-1]
        assert sequence.sample() == best(text)


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
@pytest.mark.parametrize("kind", HOWS)
def test_tokens_and_logits_are_those_of_sample_and_step(model: Model, batch: int, kind: str) -> None:
    sequences, texts = begun(model, batch)
    hows = [HOWS[kind](i) for i in range(batch)]
    others = [sequence.fork() for sequence in sequences]
    for _ in range(5):
        tokens = model.sample_many(list(zip(others, hows, strict=True)))
        model.step([(other, [token]) for other, token in zip(others, tokens, strict=True)])
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
    wanted = [text[-5:] for text in texts]
    said = [model.advance(list(zip(sequences, hows, strict=True))) for _ in range(5)]
    assert [list(column) for column in zip(*said, strict=True)] == wanted
    check(sequences, texts)


def test_in_the_steady_state_nothing_is_copied_between_two_steps(gpu: Model, cuda: FakeCuda) -> None:
    sequences, texts = begun(gpu, 3)
    follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
    for _ in range(3):
        cuda.calls()
        follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
        assert cuda.calls() == [*SENT, GRAPH, "wait for an event"]
    check(sequences, texts)


def test_draws_are_made_between_two_steps(gpu: Model, cuda: FakeCuda) -> None:
    sequences, texts = begun(gpu, 3)
    hows = [HOWS["drawn"](i) for i in range(3)]
    for _ in range(3):
        cuda.calls()
        wanted = [drawn(3 + i, len(text), 1.5, 5, 0.5, best(text)) for i, text in enumerate(texts)]
        follow(gpu, list(zip(sequences, texts, hows, strict=True)))
        draws = "h2d 128" + BESIDE
        assert cuda.calls()[-6:] == [SENT[0], draws, SENT[1], "graph 1", GRAPH, "wait for an event"]
        assert [text[-1] for text in texts] == wanted
    check(sequences, texts)


def test_sequences_may_change_places_and_drop_out(gpu: Model, cuda: FakeCuda) -> None:
    sequences, texts = begun(gpu, 4)
    follow(gpu, [(sequence, text, None) for sequence, text in zip(sequences, texts, strict=True)])
    placed = [TOKENS, "d2d 4", "d2d 8", "d2d 4", "d2h 16"]
    for order, copies in (([3, 1, 2, 0], placed), ([3, 1, 2, 0], []), ([0, 1, 2, 3], placed), ([0, 1, 2, 3], [])):
        cuda.calls()
        follow(gpu, [(sequences[i], texts[i], None) for i in order])
        assert cuda.calls() == [*SENT, *copies, GRAPH, "wait for an event"]
    sequences.pop(1).free()
    texts.pop(1)
    cuda.calls()
    follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
    assert cuda.calls() == [*SENT, TOKENS, "d2d 4", "d2d 8", "d2h 12", GRAPH, "wait for an event"]
    check(sequences, texts)


def test_a_sequence_may_join(gpu: Model, cuda: FakeCuda) -> None:
    """In front or behind; the step under way goes on when nobody has to be looked after."""
    sequences, texts = begun(gpu, 2)
    for place in (0, 3):
        for _ in range(3):
            follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
        texts.insert(place, TEXT[place + 4 : place + 9])
        sequences.insert(place, gpu.sequence(texts[place]))
        follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
        cuda.calls()
        follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
        assert cuda.calls() == [*SENT, GRAPH, "wait for an event"]
    check(sequences, texts)


@pytest.mark.parametrize("hasty", [0, 1])
def test_some_are_drawn_beside_others_in_turn(cuda: FakeCuda, cuda_so: Path, hasty: int) -> None:
    """Who is drawn changes from step to step, and with it where tokens come from."""
    cuda.set(hasty=hasty)
    with Model(cuda_so, kv_tokens=640) as model:
        sequences, texts = begun(model, 4)
        for mask in (0, 0, 5, 5, 15, 15, 0, 8, 15, 6, 0, 0):
            hows = [HOWS["drawn"](i) if mask >> i & 1 else None for i in range(4)]
            wanted = [
                drawn(3 + i, len(text), 1.5, 5, 0.5, best(text)) if how else best(text)
                for i, (text, how) in enumerate(zip(texts, hows, strict=True))
            ]
            follow(model, list(zip(sequences, texts, hows, strict=True)))
            assert [text[-1] for text in texts] == wanted
        check(sequences, texts)


@pytest.mark.parametrize("kind", HOWS)
def test_a_gpu_may_be_done_before_the_host_looks(cuda: FakeCuda, cuda_so: Path, kind: str) -> None:
    """The next step has chosen its tokens by the time that those of this one are read."""
    cuda.set(hasty=1)
    with Model(cuda_so, kv_tokens=640) as model:
        test_tokens_and_logits_are_those_of_sample_and_step(model, 4, kind)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", HOWS)
def test_plans_without_a_graph_of_both_take_their_turn(cuda: FakeCuda, cuda_so: Path, kind: str, n: int) -> None:
    """While steps are profiled there is no graph: all use the input of turn 0, and then others take turns again."""
    with Model(cuda_so, kv_tokens=640) as model:
        sequences, texts = begun(model, n)
        hows = [HOWS[kind](i) for i in range(n)]
        events = (c.c_char * 65536)()
        for is_profiled in (0, 1, 1, 1, 0, 1, 0, 0, 1, 0):
            into = RawProfile(c.sizeof(RawProfile), 65536 // EVENT.itemsize, 0, 0, c.addressof(events))
            model.check(model.api.profile(model.handle, c.byref(into) if is_profiled else None))
            wanted = [
                drawn(3 + i, len(text), 1.5, 5, 0.5, best(text)) if kind == "drawn" else None
                for i, text in enumerate(texts)
            ]
            follow(model, list(zip(sequences, texts, hows, strict=True)))
            assert kind != "drawn" or [text[-1] for text in texts] == wanted
        model.check(model.api.profile(model.handle, None))
        check(sequences, texts)


def test_who_sits_out_keeps_its_logits(gpu: Model, cuda: FakeCuda) -> None:
    sequences, texts = begun(gpu, 4)
    everyone = list(zip(sequences, texts, [None] * 4, strict=True))
    follow(gpu, everyone)
    for some in ([0, 2], [3], [1, 3, 0], [2, 1], [0, 1, 2, 3]):
        follow(gpu, [everyone[i] for i in some])
    check(sequences, texts)


@pytest.mark.parametrize("kind", HOWS)
def test_anything_may_come_between(model: Model, kind: str) -> None:
    sequences, texts = begun(model, 3)
    inputs = [(s, t, HOWS[kind](i)) for i, (s, t) in enumerate(zip(sequences, texts, strict=True))]
    follow(model, inputs)
    fork = sequences[1].fork()
    assert fork.logits() == toy.oracle(texts[1])[-1]
    follow(model, inputs)
    model.step([(sequences[0], [4, 5])])
    texts[0] += [4, 5]
    follow(model, inputs)
    assert sequences[2].sample(temperature=1.0, seed=4) == model.sequence(texts[2]).sample(temperature=1.0, seed=4)
    follow(model, inputs)
    before = len(sequences[1])
    sequences[1].truncate(before - 2)
    del texts[1][before - 2 :]
    with pytest.raises(Refused, match="the sequence has no logits"):
        model.advance([(s, None) for s in sequences])
    sequences[1].feed([9])
    texts[1].append(9)
    follow(model, inputs)
    fork.free()
    check(sequences, texts)


def test_a_token_is_taken_back_without_waiting(gpu: Model, cuda: FakeCuda) -> None:
    sequences, texts = begun(gpu, 2)
    free = gpu.info().kv_tokens_free
    follow(gpu, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
    cuda.calls()
    sequences[0].truncate(len(texts[0]) - 1)
    sequences[1].free()
    assert cuda.calls() == []
    assert gpu.info().kv_tokens_free == free + 2 * toy.PAGE_TOKENS - toy.PAGE_TOKENS
    sequences[0].feed([11])
    assert sequences[0].logits() == toy.oracle([*texts[0][:-1], 11])[-1]


def test_pages_given_back_meanwhile_are_written_in_order(gpu: Model) -> None:
    """The step that is under way still writes to a page that another sequence has got."""
    with_room, texts = begun(gpu, 1)
    follow(gpu, [(with_room[0], texts[0], None)])
    with_room[0].free()
    other = gpu.sequence(TEXT[5:20])
    assert other.logits() == toy.oracle(TEXT[5:20])[-1]


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(model: Model, inputs: list[Text], words: str, status: int) -> None:
    with pytest.raises(Refused, match=words) as error:
        model.advance([(sequence, None) for sequence in inputs])
    assert error.value.status == status


def test_what_is_refused_changes_nothing(model: Model, artifact: Path) -> None:
    sequences, texts = begun(model, 2)
    full, empty = model.sequence(TEXT), model.sequence()
    follow(model, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
    free = model.info().kv_tokens_free
    refused(model, [sequences[0], full], "1 tokens after 30 are more than the context of 30", ARGUMENT)
    refused(model, [sequences[0], empty], "the sequence has no logits", ARGUMENT)
    refused(model, [sequences[0], sequences[1], sequences[0]], "input 2 of the step is there twice", ARGUMENT)
    with Model(artifact) as other:
        refused(model, [sequences[0], other.sequence([1])], "input 1 of the step is a sequence of another", ARGUMENT)
    refused(model, [model.sequence([1, 2]) for _ in range(17)], "17 sequences are more than the 16", ARGUMENT)
    with pytest.raises(Refused, match="the temperature is -1"):
        model.advance([(sequences[0], (-1.0, 0, 1.0, 0))])
    assert model.info().kv_tokens_free == free - 17 * toy.PAGE_TOKENS
    assert model.advance([]) == []
    check(sequences, texts)
    assert full.logits() == toy.oracle(TEXT)[-1]


def test_a_full_cache_loses_nothing(artifact: Path) -> None:
    with Model(artifact, kv_tokens=28) as model:
        first, second = model.sequence(TEXT[:12]), model.sequence(TEXT[:7])
        texts = [TEXT[:12], TEXT[:7]]
        follow(model, [(second, texts[1], None)])
        holder = model.sequence([1])
        refused(model, [second, first], "the KV cache is full: the step has 2 tokens", MEMORY)
        check([first, second], texts)
        holder.free()
        follow(model, [(second, texts[1], None), (first, texts[0], None)])
        check([first, second], texts)
        assert model.info().kv_tokens_free == 0


def test_logits_that_come_back_to_a_row_meanwhile_keep_their_choice(cuda: FakeCuda, cuda_so: Path) -> None:
    """A sequence that is drawn, whose logits are on the host, gets a row that the step under way would have had."""
    with Model(cuda_so, kv_tokens=20) as model:
        waiting = model.sequence(TEXT[5:9])  # another token is most likely behind it than behind the row's last
        sequences = [model.sequence([i, i + 1, 5]) for i in range(3)]
        model.advance([(sequence, None) for sequence in sequences])
        sequences.pop(1).free()
        with pytest.raises(Refused, match="the KV cache is full: the step has 3 tokens"):
            model.advance([*((sequence, None) for sequence in sequences), (waiting, HOWS["drawn"](0))])
        assert waiting.sample() == best(TEXT[5:9])
        assert waiting.logits() == toy.oracle(TEXT[5:9])[-1]


def test_a_kernel_that_fails_behind_the_hosts_back_is_reported_by_the_next_call(cuda: FakeCuda, cuda_so: Path) -> None:
    for call in ("advance", "sample", "logits", "feed"):
        cuda.set(kernel="pick_4")
        with Model(cuda_so) as model:
            sequences, texts = begun(model, 3)
            follow(model, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
            do: dict[str, Callable[[], object]] = {
                "advance": lambda s=sequences, m=model: m.advance([(each, None) for each in s]),  # type: ignore[misc]
                "sample": sequences[0].sample,
                "logits": sequences[1].logits,
                "feed": lambda s=sequences: s[2].feed([1]),  # type: ignore[misc]
            }
            with pytest.raises(Refused, match=r"^a kernel failed on Fake GPU 0: CUDA_ERROR_LAUNCH_FAILED") as error:
                do[call]()
            assert error.value.status == KERNEL
            for again in do.values():
                with pytest.raises(Refused):
                    again()


def test_without_the_wait_the_tokens_and_the_input_would_be_wrong(cuda: FakeCuda, cuda_so: Path) -> None:
    """What the tests above rely on: here the driver forgets to wait, and it shows."""
    cuda.set(deaf="cuEventSynchronize")
    with Model(cuda_so) as model:
        sequences, texts = begun(model, 2)
        wanted = [best(text) for text in texts]
        pairs: list[tuple[Text, How | None]] = [(sequence, None) for sequence in sequences]
        model.advance(pairs)
        assert model.advance(pairs) != [best([*text, token]) for text, token in zip(texts, wanted, strict=True)]
        assert sequences[0].logits() != toy.oracle([*texts[0], wanted[0], best([*texts[0], wanted[0]])])[-1]


def test_kernels_one_by_one_say_the_same(cuda: FakeCuda, cuda_so: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_SYNC", "1")
    with Model(cuda_so) as model:
        sequences, texts = begun(model, 3)
        for _ in range(3):
            follow(model, list(zip(sequences, texts, [None, HOWS["drawn"](1), None], strict=True)))
        check(sequences, texts)


def test_a_head_is_begun_while_its_body_ends(cuda: FakeCuda, cuda_so: Path) -> None:
    with Model(cuda_so):
        captured = [line for line in cuda.calls() if line.startswith(("capture", "instantiate"))]
    pairs = "\n".join(captured).split("instantiate")[-3:-1]
    for lines, (m, r) in zip(pairs, ((2, 1), (4, 4)), strict=True):
        kernels = [line.split() for line in lines.splitlines() if line.startswith("capture")]
        assert [kernels[0][1], kernels[-3][1]] == [f"embed_{m}", f"pick_{r}"]
        assert all(kernel[-1] == "dependent" for kernel in kernels[1:])
