"""Models that give texts labels: tokens whose numbers say their types, and the format that says how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.classification import Classification, best_first, encode
from llmc.runtime.plan import unpack_plan
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_whole import refuse

N_TOKENS = 20
"""Of each type; the toy's kernels take what both have together for so many tokens."""


class LabelsPlan(toy.ToyPlan):
    """The toy's plan, of the format whose texts are given labels: as many as it has logits."""

    def __init__(self) -> None:
        super().__init__()
        self.header = self.header._replace(n_tokens=N_TOKENS, n_types=2)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("code")
    sources = toy.toy_sources(folder, plan=LabelsPlan())
    return toy.link_c(folder / "code.so", sources, "-O2", "-shared").read_bytes()


def written(folder: Path, code: bytes, plan: bytes) -> Path:
    (folder / "labels.so").write_bytes(toy.pack_sections(toy.toy_sections(code, plan=plan)))
    return folder / "labels.so"


@pytest.fixture
def model(tmp_path: Path, code: bytes) -> Iterator[Model]:
    with llmc.load(written(tmp_path, code, LabelsPlan().pack())) as model:
        yield model


def test_a_token_of_the_second_type_is_another_number(model: Model) -> None:
    assert (model.is_whole, model.info.n_tokens, model.info.n_types, model.info.n_ids) == (False, N_TOKENS, 2, 40)
    with model.sequence() as sequence:
        sequence.feed(TEXT[:3])
        sequence.feed([2 * N_TOKENS - 1])
        assert sequence.logits().tolist() == toy.oracle([*TEXT[:3], 2 * N_TOKENS - 1])[-1]
        with pytest.raises(LlmcError, match="token 40 is out of range"):
            model.run_step([(sequence, np.array([2 * N_TOKENS], np.int32), None)])
        with pytest.raises(LlmcError, match="gives texts labels, and chooses no tokens"):
            sequence.sample()


def test_an_artifact_that_gives_labels_says_so_in_its_version() -> None:
    plan = LabelsPlan().pack()
    assert plan[4] == fmt.FORMAT_LABELS
    header = unpack_plan(plan, len(toy.weights_section()), "x").header
    assert (header.n_tokens, header.n_types, header.is_whole) == (N_TOKENS, 2, False)
    assert fmt.version_of(0, is_whole=True, n_types=1) == fmt.FORMAT_LABELS > fmt.FORMAT_WHOLE


@pytest.mark.parametrize("n_bytes", [120, 128, 135])
def test_a_header_that_is_cut_off_is_refused(tmp_path: Path, code: bytes, n_bytes: int) -> None:
    refuse(written(tmp_path, code, LabelsPlan().pack()[:n_bytes]), LabelsPlan().pack()[:n_bytes])


@pytest.mark.parametrize(("n_tokens", "n_types", "whole"), [(0, 1, 0), (20, 0, 0), (2**29, 4, 0), (20, 1, 2)])
def test_hostile_numbers_are_refused(tmp_path: Path, code: bytes, n_tokens: int, n_types: int, whole: int) -> None:
    plan = bytearray(LabelsPlan().pack())
    plan[120:132] = b"".join(number.to_bytes(4, "little") for number in (n_tokens, n_types, whole))
    refuse(written(tmp_path, code, bytes(plan)), bytes(plan))


def test_scores_are_made_of_logits_and_the_best_come_first() -> None:
    logits = np.array([[0.0, 1.0], [800.0, -800.0]], np.float32)
    for activation, wanted in (
        ("identity", logits),
        ("sigmoid", [[0.5, 0.7310586], [1.0, 0.0]]),
        ("softmax", [[0.2689414, 0.7310586], [1.0, 0.0]]),
    ):
        found = Classification(("a", "b"), activation).scores(logits)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert best_first(np.array([1, 3, 3, 2], np.float32), 3) == [(1, 3.0), (2, 3.0), (3, 2.0)]


def test_what_fits_is_the_same_where_it_might_be_cut() -> None:
    """Also without a template, where parts by themselves would be of the first type."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = [encode(tokenizer, ("a a", "b b"), most) for most in (None, 4)]
    assert [(one.ids, one.type_ids) for one in found] == [([1, 1, 2, 2], [0, 0, 1, 1])] * 2
    assert encode(tokenizer, ("a a", "b b"), 3).ids == [1, 1, 2]
    assert len(encode(tokenizer, ("a a", "b b"), 2)) == 3, "a token is left, and there are more than most"


@pytest.mark.parametrize("record", [{}, {"labels": ["a"], "activation": "cube", "n_types": 1, "whole": False}, [1]])
def test_a_manifest_that_does_not_say_how_is_refused(record: object) -> None:
    if not record:
        assert Classification.of(record, "m.so") is None  # type: ignore[arg-type]
        return
    with pytest.raises(LlmcError, match="does not say how texts get labels"):
        Classification.of(record, "m.so")  # type: ignore[arg-type]
