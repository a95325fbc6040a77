"""Adapters that stay beside the weights: each sequence says what the model with its own adapter says, and nothing of
what others say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import llmc
from llmc.cli.main import main
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.job import Ask, Job, Said
from tests.families import ADAPTER_SCALE, ALL, changed, save_adapter
from tests.runtime.serve.conftest import serving
from tests.test_tiny import TINY  # whose graph and kernels are in the cache then

Logits = npt.NDArray[np.float32]
WANTED = {"sql": (3, ALL), "chat": (9, ("q_proj", "v_proj"))}
"""The adapters: rank, and what each changes."""
TEXT = [(7 * i * i + 3) % TINY.vocab_size for i in range(90)]


class Made:
    """A model's folder, its adapters' folders, and what each makes of its weights, by transformers."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.source = folder / "tiny", AutoModelForCausalLM.from_config(TINY)
        self.source.save_pretrained(self.folder)
        self.adapters = {name: save_adapter(self.source, folder / name, *wanted) for name, wanted in WANTED.items()}

    def logits(self, adapter: str) -> Logits:
        """What transformers says of TEXT, with the adapter's products added to the weights."""
        from safetensors.torch import load_file

        tensors = load_file(self.adapters[adapter] / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        with torch.no_grad():
            for name, _ in changed(self.source, WANTED[adapter][1]):
                a, b = (tensors[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
                model.get_submodule(name).weight += ADAPTER_SCALE * (b @ a)
            return np.asarray(model(torch.tensor([TEXT])).logits[0].numpy())

    @property
    def named(self) -> list[str]:
        return [f"{name}={folder}" for name, folder in self.adapters.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def artifact(made: Made) -> Path:
    path = made.folder.parent / "named.so"
    report = llmc.compile(made.folder, out=path, dtype="f32", batch=(1, 2), adapters=made.named)
    certificates = report["certificate"]["adapters"]
    assert {name: own["status"] for name, own in certificates.items()} == {"sql": "passed", "chat": "passed"}
    return path


@pytest.fixture(scope="module")
def base(made: Made) -> Iterator[Model]:
    path = made.folder.parent / "base.so"
    llmc.compile(made.folder, out=path, dtype="f32", batch=(1, 2), verify=False)
    with llmc.load(path) as model:
        yield model


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[Model]:
    with llmc.load(artifact, kv_tokens=1024) as model:
        yield model


def test_each_adapter_makes_what_it_makes_of_the_weights(made: Made, model: Model) -> None:
    assert model.adapters == ("sql", "chat")
    for name in model.adapters:
        wanted, found = made.logits(name), model.logits(TEXT, name)
        assert np.abs(found - wanted).max() <= 2e-4 * np.ptp(wanted)
        assert np.abs(found - model.logits(TEXT)).max() > 0.05 * np.ptp(wanted)


def test_without_an_adapter_the_bits_are_the_models(base: Model, model: Model) -> None:
    for tokens in (TEXT, TEXT[:1], TEXT[:33]):
        assert np.array_equal(model.logits(tokens), base.logits(tokens))
    assert not base.adapters


def test_bits_do_not_depend_on_company_chunks_and_threads(model: Model, artifact: Path) -> None:
    wanted = {name: model.logits(TEXT, name) for name in (None, "sql", "chat")}
    lengths: dict[str | None, int] = {None: 11, "sql": 7, "chat": 3}
    with llmc.load(artifact, threads=3, kv_tokens=512) as other:
        sequences = {name: other.sequence(name) for name in lengths}
        other.step([(sequences[name], TEXT[:n]) for name, n in lengths.items()])
        for i in range(9):
            other.step([(sequences[name], [TEXT[n + i]]) for name, n in lengths.items()])
        with sequences["sql"].fork() as fork:
            fork.feed(TEXT[16:40])
            assert np.array_equal(fork.logits(), wanted["sql"][39])
        for name, n in lengths.items():
            assert np.array_equal(sequences[name].logits(), wanted[name][n + 8])
            assert sequences[name].cut(0) == 0
            sequences[name].feed(TEXT[:2])
            assert np.array_equal(sequences[name].logits(), wanted[name][1])


def test_quantised_weights_have_adapters_that_are_not(made: Made, tmp_path: Path) -> None:
    settings: Any = {"dtype": "bf16", "quant": "int4", "batch": (1,), "max_sequence": 96}
    report = llmc.compile(made.folder, out=tmp_path / "q.so", adapters=made.named, **settings)
    llmc.compile(made.folder, out=tmp_path / "base.so", verify=False, **settings)
    assert all(own["kl_mean"] < 1e-3 for own in report["certificate"]["adapters"].values())
    with llmc.load(tmp_path / "q.so") as model, llmc.load(tmp_path / "base.so") as base:
        assert np.array_equal(model.logits(TEXT[:40]), base.logits(TEXT[:40]))
        alone = model.logits(TEXT[:40], "sql")
        with model.sequence("sql") as sequence:
            assert np.array_equal(np.concatenate([sequence.feed_for_logits([token]) for token in TEXT[:40]]), alone)


def test_one_adapter_may_be_merged_and_another_stay(made: Made, tmp_path: Path) -> None:
    adapters: list[str | Path] = [made.adapters["chat"], f"sql={made.adapters['sql']}"]
    settings: Any = {"dtype": "f32", "batch": (1, 2), "verify": False}
    llmc.compile(made.folder, out=tmp_path / "both.so", adapters=adapters, **settings)
    with llmc.load(tmp_path / "both.so") as model:
        wanted = made.logits("chat")
        assert np.abs(model.logits(TEXT) - wanted).max() <= 2e-4 * np.ptp(wanted)
        assert model.manifest["model"]["name"] == "tiny+chat"
        assert [each["name"] for each in model.manifest["model"]["named_adapters"]] == ["sql"]


def test_commands_choose_an_adapter_and_show_all(artifact: Path, model: Model) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    for name in (None, "chat"):
        chosen = ["--adapter", name] if name else []
        said = run("run", str(artifact), "--tokens", "5,17,3", "-n", "9", "--json", *chosen)
        assert json.loads(said)["tokens"] == model.tokens([5, 17, 3], 9, adapter=name)
    assert "adapter      sql (sql), rank 3, 14 weights; passed: logits within" in run("inspect", str(artifact))
    assert "passed   prompt 4 of adapter chat: 32 greedy tokens as when compiled" in run("verify", str(artifact))


def test_adapters_are_compared_with_their_source_again(made: Made, artifact: Path) -> None:
    def verify(*adapters: str) -> str:
        asked = [f"--adapter={each}" for each in adapters]
        result = CliRunner().invoke(main, ["verify", str(artifact), "--against", str(made.folder), *asked])
        return result.output

    said = verify(made.named[0])
    assert re.search(r"passed   adapter sql against \S+: logits within \S+ of their range", said)
    assert re.search(r"skipped  adapter chat against \S+: give --adapter chat=DIR too", said)
    wrong = verify(f"sql={made.adapters['chat']}")
    assert re.search(r"failed   against \S+: the compiled model does not match its source", wrong)
    alone = CliRunner().invoke(main, ["verify", str(artifact), "--adapter", made.named[0]])
    assert alone.exit_code == 1
    assert "error: an adapter is for comparing with the source again" in alone.output


def served(model: Model, folder: Path, names: Sequence[str | None]) -> list[int]:
    """How many tokens of a prompt each text, through one of these adapters, has from others before it."""
    news: list[Said] = []
    engine = Engine(model, news.extend, max_batch=4, queue=9, prompt_cache=str(folder))
    jobs = [
        Job(Ask(tuple(TEXT[:80]), 6, ignore_eos=True, adapter=name), engine.room, None, news.append) for name in names
    ]
    for job in jobs:
        engine.submit([job])
    while not all(job.finish for job in jobs):
        assert engine.collect()
        engine.turn()
    assert not [said.error for said in news if said.error]
    engine.close()
    for job in jobs:
        assert job.tokens == model.tokens(TEXT[:80], 6, ignore_eos=True, adapter=job.ask.adapter)
    return [job.n_reused for job in jobs]


def test_a_batch_shares_prompts_within_an_adapter_alone(model: Model, tmp_path: Path) -> None:
    assert served(model, tmp_path, ("sql", None, "sql", None)) == [0, 0, 64, 64]
    assert served(model, tmp_path, ("chat", "sql", None)) == [0, 64, 64]


def test_a_client_asks_for_an_adapter_as_for_a_model(artifact: Path, model: Model) -> None:
    with serving(artifact, "--name", "tiny") as server:
        _, listed = server.ask("GET", "/v1/models")
        assert [(each["id"], each["parent"]) for each in listed["data"]] == [
            ("tiny", None),
            ("sql", "tiny"),
            ("chat", "tiny"),
        ]
        assert server.ask("GET", "/v1/models/sql")[1]["root"] == "sql"
        for name in ("sql", "tiny", "chat"):
            said = server.complete(model=name, prompt=TEXT[:5], max_tokens=8, return_token_ids=True)
            adapter = None if name == "tiny" else name
            assert said["model"] == name
            assert said["choices"][0]["token_ids"] == model.tokens(TEXT[:5], 8, ignore_eos=True, adapter=adapter)
        status, refused = server.ask("POST", "/v1/completions", {"model": "other", "prompt": TEXT[:5]})
        assert (status, refused["error"]["code"]) == (404, "model_not_found")
        assert "'tiny' is, with the adapters sql, chat" in refused["error"]["message"]


def test_a_model_and_its_adapter_need_two_names(artifact: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(artifact), "--name", "sql", "--port", "0"])
    assert result.exit_code == 1
    assert "error: the model and an adapter of it are both named 'sql'" in result.output


def test_a_saved_sequence_keeps_its_adapter(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "sql.seq"
    with model.sequence("sql") as sequence:
        sequence.feed(TEXT[:20])
        sequence.save(path)
    with model.restore(path) as sequence:
        assert sequence.adapter == "sql"
        sequence.feed(TEXT[20:30])
        assert np.array_equal(sequence.logits(), model.logits(TEXT[:30], "sql")[-1])
    wanted = model.tokens(TEXT[:25], 5, adapter="sql")
    assert model.tokens(TEXT[:25], 5, adapter="sql", prompt_cache=path) == wanted
    for other in (None, "chat"):
        with pytest.raises(LlmcError, match="this file keeps what the adapter 'sql' knows of a text"):
            model.tokens(TEXT[:25], 5, adapter=other, prompt_cache=path)
    data = bytearray(path.read_bytes())
    at = fmt.SAVED.size - 16
    for adapter, fact in ((0, "its SHA-256 differs"), (2, "its SHA-256 differs"), (9, "is damaged: its header")):
        data[at : at + 4] = adapter.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(LlmcError, match=fact):
            model.restore(path)
