"""Models from the Hugging Face hub: only the files that are needed, and one clear line for each thing that can fail."""

from __future__ import annotations

import re
from pathlib import Path

from llmc.compiler.frontend.adapter import CONFIG, TENSORS
from llmc.compiler.frontend.checkpoint import INDEX, SINGLE
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "modules.json",
    "*_Pooling/config.json",
)
ADAPTER_FILES = (CONFIG, TENSORS)
TIMEOUT_S = 10


def is_hub_id(model: str) -> bool:
    """Whether the text has the form owner/name."""
    return HUB_ID.fullmatch(model) is not None


def fetch(hub_id: str, *, weights: bool) -> Path:
    """The folder of a hub model, downloaded if it is not in the cache: configuration, tokenizer and (maybe) weights.

    Of an adapter it is that of the adapter, with its weights in any case: they are small.
    """
    from huggingface_hub import errors

    try:
        return _download(hub_id, weights)
    except errors.GatedRepoError as error:
        raise LlmcError(
            f"the model {hub_id} is gated",
            hint=f"accept its terms at https://huggingface.co/{hub_id}, then log in with `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LlmcError(
            f"there is no model {hub_id} on the Hugging Face hub, nor a folder of that name",
            hint="check the spelling; for a private model, log in with `hf auth login`",
        ) from error
    except LlmcError:
        raise
    except Exception as error:  # no network, a hub that does not answer, a full disk: a class for each, and they change
        folder = _cached(hub_id)
        if folder is not None:
            return folder
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LlmcError(
            f"cannot fetch {hub_id} from the Hugging Face hub, and it is not in the cache: {lines[0]}",
            hint="connect and try again, give the folder of a model, or use --weights random with a known name",
        ) from error


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    listed = HfApi().model_info(hub_id, timeout=TIMEOUT_S).siblings or []
    files = {entry.rfilename for entry in listed}
    wanted = [name for name in TEXT_FILES if name in files]
    if CONFIG in files and not {INDEX, SINGLE} & files:
        wanted += [name for name in ADAPTER_FILES if name in files]
    elif weights and INDEX in files:
        index = parse_json(Path(hf_hub_download(hub_id, INDEX, etag_timeout=TIMEOUT_S)).read_bytes())
        wanted += [INDEX, *sorted(set(index["weight_map"].values()))]
    elif weights and SINGLE in files:
        wanted.append(SINGLE)
    elif weights:
        raise LlmcError(
            f"the model {hub_id} has no safetensors weights"
            + (", only PyTorch pickles, which can run code when read" if any(map(_is_pickle, files)) else ""),
            hint="look for a converted copy, or convert it with transformers' save_pretrained",
        )
    return Path(snapshot_download(hub_id, allow_patterns=wanted, etag_timeout=TIMEOUT_S))


def _is_pickle(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth"))


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except OSError:  # nothing of it was ever downloaded
        return None
