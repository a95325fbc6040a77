"""Models from the hub: only what is needed is fetched, and every way to fail is one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from llmc.compiler.frontend import hub, load_source
from llmc.runtime.errors import LlmcError

TEXT = ["config.json", "tokenizer.json"]
SHARDS = ["model-1.safetensors", "model-2.safetensors"]
INDEX = "model.safetensors.index.json"


class FakeHub:
    """A hub with one model: what was asked of it, and where it 'downloaded' to."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self.failure: Exception | None = None
        self.in_cache = False
        self.wanted: list[str] = []

    def model_info(self, hub_id: str, timeout: float) -> Any:
        assert timeout <= 10
        if self.failure:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def hf_hub_download(self, hub_id: str, name: str, **_: Any) -> str:
        return str(self.folder / name)

    def snapshot_download(
        self, hub_id: str, allow_patterns: list[str] | None = None, local_files_only: bool = False, **_: Any
    ) -> str:
        if local_files_only and not self.in_cache:
            raise errors.LocalEntryNotFoundError("not in the cache")
        self.wanted = list(allow_patterns or ())
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(files: list[str], folder: Path = tmp_path) -> FakeHub:
        fake = FakeHub(folder, files)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return install


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("the server said no", response=Mock(headers={}))


def test_only_the_files_that_are_needed_are_fetched(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub([*TEXT, "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "README.md"])
    assert hub.fetch("owner/name", weights=True) == fake.folder
    assert fake.wanted == [*TEXT, "model.safetensors"]


def test_shards_are_those_that_the_index_names(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub([*TEXT, INDEX, *SHARDS, "consolidated.safetensors"])
    (fake.folder / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}))
    hub.fetch("owner/name", weights=True)
    assert fake.wanted == [*TEXT, INDEX, *SHARDS]


def test_random_weights_fetch_none(fake_hub: Callable[..., FakeHub]) -> None:
    fake = fake_hub([*TEXT, "model.safetensors"])
    hub.fetch("owner/name", weights=False)
    assert fake.wanted == TEXT


def test_of_an_adapter_its_own_files_are_fetched(fake_hub: Callable[..., FakeHub]) -> None:
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    fake = fake_hub([*TEXT, *adapter, "training_args.bin"])
    hub.fetch("owner/name", weights=False)
    assert fake.wanted == [*TEXT, *adapter]


def test_pickled_weights_are_refused(fake_hub: Callable[..., FakeHub]) -> None:
    fake_hub([*TEXT, "pytorch_model.bin"])
    with pytest.raises(LlmcError, match="only PyTorch pickles") as caught:
        hub.fetch("owner/name", weights=True)
    assert "convert" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("failure", "fact", "hint"),
    [
        (http_error(errors.GatedRepoError), "owner/name is gated", "accept its terms"),
        (http_error(errors.RepositoryNotFoundError), "no model owner/name on the Hugging Face hub", "spelling"),
        (http_error(errors.HfHubHTTPError), "cannot fetch owner/name", "connect and try again"),
        (errors.OfflineModeIsEnabled("offline mode is enabled"), "cannot fetch owner/name", "--weights random"),
        (ConnectionError("no route to host"), "no route to host", "connect and try again"),
        (OSError(28, "No space left on device"), "No space left on device", "folder"),
    ],
)
def test_failures_say_what_to_do(fake_hub: Callable[..., FakeHub], failure: Exception, fact: str, hint: str) -> None:
    fake_hub(TEXT).failure = failure
    with pytest.raises(LlmcError) as caught:
        load_source("owner/name")
    assert fact in caught.value.fact
    assert "\n" not in caught.value.fact
    assert hint in str(caught.value.hint)


def test_a_model_in_the_cache_needs_no_network(
    fake_hub: Callable[..., FakeHub], tiny_model: Callable[[str], Path]
) -> None:
    fake = fake_hub(TEXT, tiny_model("llama"))
    fake.failure, fake.in_cache = ConnectionError("no network"), True
    source = load_source("owner/name")
    assert (source.name, source.folder) == ("name", tiny_model("llama"))


def test_known_names_are_fetched_under_their_hub_id(fake_hub: Callable[..., FakeHub]) -> None:
    fake_hub(TEXT).failure = http_error(errors.GatedRepoError)
    with pytest.raises(LlmcError, match="meta-llama/Llama-2-7b-hf is gated"):
        load_source("llama2-7b")
