"""Sequences that choose an adapter, and the format that says which there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.plan import unpack_plan
from llmc.runtime.prompt_cache import PromptCache
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_saved_damage import hashed
from tests.runtime.test_whole import refuse

NAMES = ("sql", "a" * fmt.MAX_ADAPTER_NAME)
HEADER = fmt.PLAN_HEADER.size


class AdaptersPlan(toy.ToyPlan):
    """The toy's plan, of the format with adapters, which its kernels know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.header = self.header._replace(adapters=NAMES)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("code")
    sources = toy.toy_sources(folder, plan=AdaptersPlan())
    return toy.link_c(folder / "code.so", sources, "-O2", "-shared").read_bytes()


def written(folder: Path, code: bytes, plan: bytes) -> Path:
    (folder / "adapters.so").write_bytes(toy.pack_sections(toy.toy_sections(code, plan=plan)))
    return folder / "adapters.so"


@pytest.fixture
def model(tmp_path: Path, code: bytes) -> Iterator[Model]:
    with llmc.load(written(tmp_path, code, AdaptersPlan().pack())) as model:
        yield model


def test_a_sequence_chooses_before_its_first_token(model: Model) -> None:
    assert (model.adapters, model.info.n_adapters) == (NAMES, 2)
    with model.sequence("sql") as sequence, model.running() as (api, _):
        sequence.feed(TEXT[:3])
        assert sequence.logits().tolist() == toy.oracle(TEXT[:3])[-1]
        with pytest.raises(LlmcError, match="a sequence of 3 tokens cannot take another adapter"):
            model.check(api.sequence_set_adapter(sequence.handle, 1))
        sequence.truncate(0)
        model.check(api.sequence_set_adapter(sequence.handle, 1))
        for number in (-2, 2, 2**31 - 1):
            with pytest.raises(LlmcError, match=f"there is no adapter {number}: the artifact has 2"):
                model.check(api.sequence_set_adapter(sequence.handle, number))


def test_a_name_that_there_is_not_is_told_at_once(model: Model) -> None:
    with pytest.raises(LlmcError, match="the artifact has no adapter 'chat'") as error:
        model.stream(TEXT[:3], adapter="chat")
    assert error.value.hint == f"it has {', '.join(NAMES)}"


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("adapter", [None, *NAMES])
def test_a_saved_sequence_keeps_its_adapter(model: Model, tmp_path: Path, adapter: str | None, n: int) -> None:
    file = tmp_path / "text.seq"
    with model.sequence(adapter) as sequence:
        sequence.feed(TEXT[:n])
        sequence.save(file)
    with model.restore(file) as back:
        assert (back.adapter, back.tokens) == (adapter, TEXT[:n])
    other = "sql" if adapter is None else None
    with pytest.raises(LlmcError, match="is asked for"):
        list(model.stream(TEXT[:6], adapter=other, cache=PromptCache(file)))
    assert model.info.kv_tokens_free == model.info.kv_tokens


def test_a_saved_sequence_of_an_adapter_that_there_is_not_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "text.seq"
    with model.sequence(NAMES[1]) as sequence:
        sequence.save(file)
    data, at = bytearray(file.read_bytes()), fmt.SAVED.size - 16
    assert data[at] == 2
    data[at] = 3
    file.write_bytes(hashed(bytes(data)))
    with pytest.raises(LlmcError, match="the saved sequence is damaged: its header"):
        model.restore(file)


def test_an_artifact_with_adapters_says_so_in_its_version() -> None:
    plan = AdaptersPlan().pack()
    assert plan[4] == fmt.FORMAT_ADAPTERS
    header = unpack_plan(plan, len(toy.weights_section()), "x").header
    assert header.adapters == NAMES
    with_states = header._replace(slot_bytes=64, default_slots=3)
    assert fmt.unpack_plan_header(fmt.pack_plan_header(with_states)) == with_states
    assert fmt.pack_plan_header(header._replace(adapters=()))[4] == fmt.FORMAT_VERSION


@pytest.mark.parametrize("n_bytes", [HEADER, HEADER + 15, HEADER + 16, HEADER + 16 + 127])
def test_a_header_that_is_cut_off_is_refused(tmp_path: Path, code: bytes, n_bytes: int) -> None:
    plan = AdaptersPlan().pack()[:n_bytes]
    refuse(written(tmp_path, code, plan), plan)


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (12, bytes(4)),  # no adapters
        (12, (fmt.MAX_ADAPTERS + 1).to_bytes(4, "little")),
        (12, b"\xff" * 4),
        (0, b"\1"),  # states that are not aligned
        (0, b"\x40"),  # states, and no slots
        (16, bytes(64)),  # no name
        (16, b"x" * 64),  # a name without an end
    ],
)
def test_hostile_numbers_and_names_are_refused(tmp_path: Path, code: bytes, place: int, data: bytes) -> None:
    plan = bytearray(AdaptersPlan().pack())
    plan[HEADER + place : HEADER + place + len(data)] = data
    refuse(written(tmp_path, code, bytes(plan)), bytes(plan))
