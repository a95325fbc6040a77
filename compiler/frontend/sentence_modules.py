"""What sentence-transformers' files say of a model: how embeddings are pooled, and what is done with them then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

Pooling = Literal["last", "mean", "cls"]
MODULES = "modules.json"
LIMITS = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
"""Files that say the most tokens of a text."""
POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
OLD_NAMES = {
    "lasttoken": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
}
KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
"""The modules that are understood, in the order in which they come."""
ACTIVATIONS = {"Identity": "", "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid"}
"""The activations of a Dense module, and the operators that compute them."""
TO_TEXT = "--task generate compiles it as a model that writes texts"


@dataclass(frozen=True)
class Dense:
    """A product behind the pooling.  path: of its folder, within the model's.  activation: an ONNX operator, or ""."""

    path: str
    n_inputs: int
    n_outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class Modules:
    """normalized: whether embeddings are brought to length 1.  max_tokens: of a text, 0 where nobody says."""

    pooling: Pooling
    normalized: bool
    dense: tuple[Dense, ...] = ()
    max_tokens: int = 0


def modules_of(folder: Path | None, hint: str | None = TO_TEXT, *, with_dense: bool = False) -> Modules | None:
    """What a folder's files say; None where there are none, or nothing of pooling.  Raises LlmcError for what is not
    known.  hint: what else can be done.  with_dense: whether Dense modules may follow."""
    file = folder / MODULES if folder else None
    if folder is None or file is None or not file.is_file():
        return None
    listed = [(str(one.get("type")).rpartition(".")[2], str(one.get("path"))) for one in read_list(file)]
    names = [name for name, _ in listed]
    if "Pooling" not in names:
        return None
    known = [name for name in KNOWN if with_dense or name != "Dense"]
    if strange := next((name for name in names if name not in known), None):
        fact = f"embeddings that go through a module {strange!r} are not compiled"
        raise LlmcError(fact, place=str(file), hint=hint)
    if names != sorted(names, key=KNOWN.index) or any(names.count(name) > 1 for name in set(names) - {"Dense"}):
        fact = f"its modules come in another order than is compiled: {', '.join(names)}"
        raise LlmcError(fact, place=str(file), hint=hint)
    pooling = read_pooling(folder, dict(listed)["Pooling"], file, hint)
    dense = tuple(read_dense(folder, path, hint) for name, path in listed if name == "Dense")
    return Modules(pooling, "Normalize" in names, dense, read_limit(folder))


def read_pooling(folder: Path, path: str, place: Path, hint: str | None) -> Pooling:
    settings = read_object(folder / path / "config.json")
    asked = settings.get("pooling_mode")
    named = [name for name, old in OLD_NAMES.items() if settings.get(old) is True]
    others = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    mode = asked if isinstance(asked, str) else named[0] if len(named) == len(others) == 1 else ""
    if mode not in POOLINGS:
        fact = "embeddings are compiled of a text's first token, its last, or as the mean; this model's are others"
        raise LlmcError(fact, place=str(place), hint=hint)
    if settings.get("include_prompt") is False and mode != "lasttoken":
        fact = "its pooling leaves out a prompt's tokens, and what is a prompt is not told apart here"
        raise LlmcError(fact, place=str(place), hint=hint)
    return POOLINGS[mode]


def read_dense(folder: Path, path: str, hint: str | None) -> Dense:
    file = folder / path / "config.json"
    settings = read_object(file)
    sizes = [settings.get(name) for name in ("in_features", "out_features")]
    activation = str(settings.get("activation_function")).rpartition(".")[2]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or activation not in ACTIVATIONS:
        fact = (
            f"a Dense module of {sizes[0]} inputs, {sizes[1]} outputs and the activation {activation} is not compiled"
        )
        raise LlmcError(fact, place=str(file), hint=hint)
    return Dense(
        path, int(str(sizes[0])), int(str(sizes[1])), settings.get("bias") is not False, ACTIVATIONS[activation]
    )


def read_limit(folder: Path) -> int:
    """The most tokens of a text, 0 where nobody says."""
    for name in LIMITS:
        if (folder / name).is_file():
            found = read_object(folder / name).get("max_seq_length")
            return found if isinstance(found, int) and found > 0 else 0
    return 0


def read_list(file: Path) -> list[dict[str, Any]]:
    found = read(file)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise LlmcError("it is no list of modules", place=str(file))
    return found


def read_object(file: Path) -> dict[str, Any]:
    found = read(file)
    if not isinstance(found, dict):
        raise LlmcError("it is no object", place=str(file))
    return found


def read(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LlmcError(f"it cannot be read: {error}", place=str(file)) from None
