"""Adapters: small changes of a model's weights that lie in a folder of their own, as PEFT saves them.

`adapter_config.json` says how, `adapter_model.safetensors` holds two thin matrices for each weight that is changed,
A [r, in] and B [out, r], and some weights whole.  What they stand for is in merge_adapter.py; here they are read and
checked.  Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.compiler.frontend.chat import read_object
from llmc.compiler.frontend.checkpoint import INDEX, SINGLE, StoredTensor, read_header
from llmc.compiler.frontend.merge_adapter import Change, LowRank, Whole
from llmc.runtime.errors import LlmcError, shortened

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
"""What PEFT puts between a module and a tensor that it keeps whole."""
NAME_BASE = "name the model: llmc compile MODEL --adapter FOLDER"
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Beginnings of training that leave the model's own weights as they are."""
WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules", "runtime_config"),
    *("megatron_core", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "qalora_group_size",
}
"""Fields that say how it was trained and saved: the tensors say what came of it."""
READ = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("target_modules", "modules_to_save", "init_lora_weights", "ensure_weight_tying"),
}
LARGEST = 1e30
"""The largest alpha: float32 has no larger numbers."""
LONGEST_NAME = 500
"""The longest name of a folder or a hub id."""
MOST_SHORT = 80
"""Characters of a value that is told: a tensor's name as a rule."""
MOST_PATTERN = 200
"""Characters of a pattern."""
MOST_WAYS = 64
"""The most ways in which a pattern may match, repetitions aside."""


@dataclass(frozen=True)
class Adapter:
    """changes: of each weight, one after another, by the name that it has in the model the adapter was trained for.
    sha256: of its tensors' file.  settings: the bytes of its adapter_config.json.
    targets: the modules that it says it changes, where it lists them.  ties: whether tied weights are to stay one."""

    folder: Path
    sha256: str
    settings: bytes
    changes: Mapping[str, tuple[Change, ...]]
    targets: tuple[str, ...]
    ties: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def record(self) -> dict[str, str]:
        """Its line of the manifest."""
        return {"name": self.name, "sha256": self.sha256}

    @property
    def digest(self) -> bytes:
        """A hash of all that its changes depend on."""
        return hashlib.sha256(self.settings + self.sha256.encode()).digest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def base_of(folder: Path) -> str:
    """The model that an adapter was trained for: a folder or a hub id."""
    base = _settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not 0 < len(base) < LONGEST_NAME or not base.isprintable():
        raise LlmcError("the adapter does not say which model it is for", place=str(folder / CONFIG), hint=NAME_BASE)
    return base


def read_adapter(folder: Path) -> Adapter:
    """An adapter of the kind LoRA; reads its settings and its tensors' header.  Refuses what would have another effect
    than the tensors say."""
    settings = _settings(folder)
    place = str(folder / CONFIG)
    _check_settings(settings, place)
    file = folder / TENSORS
    if not file.is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        fact = "the adapter is in PyTorch's pickle format, which can run code when it is read" if pickle else None
        hint = "load it with PEFT and save it again: save_pretrained writes safetensors" if pickle else None
        raise LlmcError(fact or f"the adapter has no {TENSORS}", place=str(folder), hint=hint)
    changes: dict[str, tuple[Change, ...]] = {}
    for name, change in _changes(read_header(file), settings, str(file), place):
        changes[name] = (*changes.get(name, ()), change)
    if not changes:
        raise LlmcError("the adapter's file has no tensors", place=str(file))
    _check_saved(settings, changes, place)
    targets = settings.get("target_modules")
    return Adapter(
        folder=folder,
        sha256=_sha256(file),
        settings=(folder / CONFIG).read_bytes(),
        changes=changes,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        ties=bool(settings.get("ensure_weight_tying")),
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise LlmcError(f"the folder has no {CONFIG}", place=str(folder), hint="an adapter is what PEFT saves")
    return read_object(file)


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    def refuse(what: str) -> LlmcError:
        return LlmcError(f"the adapter cannot be merged: {what}", place=place)

    if settings.get("peft_type") != "LORA":
        raise refuse(f"its kind is {short(settings.get('peft_type'))}, and only LORA is supported")
    if (bias := settings.get("bias", "none")) != "none":
        raise refuse(f"it changes biases too (bias = {short(bias)})")
    initial = settings.get("init_lora_weights", True)
    if not any(initial is known or (isinstance(initial, str) and initial == known) for known in INITIAL):
        raise refuse(f"it is for a base that training changed (init_lora_weights = {short(initial)})")
    unknown = sorted(name for name, value in settings.items() if value and name not in READ | WITHOUT_EFFECT)
    if unknown:
        raise refuse(f"{shortened(unknown[0])} = {short(settings[unknown[0]])} is not supported")
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if not isinstance(settings.get(name) or kind(), kind):
            raise refuse(f"its {name} is {short(settings[name])}")


def _changes(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], file: str, place: str
) -> Iterator[tuple[str, Change]]:
    """A weight's name and its change; first all those that are kept whole."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            fact = f"the adapter's tensor {short(key)} is of no model: its name does not begin with {PREFIX}"
            raise LlmcError(fact, place=file, hint="an adapter is what PEFT saves")
        tensor.stored_dtype  # noqa: B018  refuses what is no plain float
        if match := PART.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif ".lora_" in name:
            raise LlmcError(f"the adapter's tensor {short(key)} is of an unknown kind", place=file)
        else:
            yield WRAPPERS.sub("", name), Whole(tensor)
    for module, found in parts.items():
        yield f"{WRAPPERS.sub('', f'{module}.')}weight", _low_rank(module, found, settings, file, place)


def _low_rank(
    module: str, found: Mapping[str, StoredTensor], settings: Mapping[str, Any], file: str, place: str
) -> LowRank:
    of_embedding, has_magnitude = "lora_embedding_A" in found, bool(settings.get("use_dora"))
    names = ["lora_embedding_A", "lora_embedding_B"] if of_embedding else ["lora_A", "lora_B"]
    names += ["lora_magnitude_vector"] if has_magnitude else []
    if found.keys() != set(names):
        said, wanted = ", ".join(sorted(found)), ", ".join(names)
        raise LlmcError(f"the adapter has {said} for {short(module)}, which takes {wanted}", place=file)
    if of_embedding and has_magnitude:
        fact = f"the adapter cannot be merged: use_dora of an embedding, {short(module)}, is not supported"
        raise LlmcError(fact, place=place)
    a, b, *magnitude = (found[name] for name in names)
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    rank = a.dims[0] if a.dims else 0
    if len(a.dims) != 2 or len(b.dims) != 2 or b.dims[1] != rank or 0 in (*a.dims, *b.dims):
        fact = f"the adapter's matrices for {short(module)} do not fit together: {list(a.dims)} and {list(b.dims)}"
        raise LlmcError(fact, place=file)
    if rank not in ranks:
        said = ", ".join(sorted({short(each) for each in ranks}))
        fact = f"the adapter's matrices for {short(module)} have rank {rank}, its settings say {said}"
        raise LlmcError(fact, place=file)
    if magnitude and math.prod(magnitude[0].dims) != b.dims[0]:
        fact = f"the adapter has {math.prod(magnitude[0].dims)} magnitudes for {b.dims[0]} rows of {short(module)}"
        raise LlmcError(fact, place=file)
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    scale = _alpha(module, settings, place) / divisor
    flips = of_embedding or bool(settings.get("fan_in_fan_out"))
    return LowRank(a, b, scale, magnitude[0] if magnitude else None, of_embedding, flips)


def _alpha(module: str, settings: Mapping[str, Any], place: str) -> float:
    """alpha of a module: that of the first pattern that its name ends in, or else everybody's."""
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if not _is_safe(pattern):
            fact = f"the adapter's alpha_pattern {short(pattern)} is too intricate"
            raise LlmcError(fact, place=place, hint="write out the names that it stands for")
        with suppress(re.error, OverflowError):
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise LlmcError(f"the adapter's lora_alpha is {short(alpha)}, which is no number", place=place)
    return float(alpha)


def _is_safe(pattern: str) -> bool:
    """Whether a regular expression of a stranger is found quickly, or not found quickly: few repetitions, none of a
    group, and few ways through what is optional or an alternative."""
    if len(pattern) > MOST_PATTERN or re.search(r"\)[*+{?]", pattern):
        return False
    n_ways = math.prod(1 + part.count("|") for part in pattern.split(")")) << pattern.count("?")
    return len(re.findall(r"[*+{]", pattern)) <= 2 and n_ways <= MOST_WAYS


def _check_saved(settings: Mapping[str, Any], changes: Mapping[str, tuple[Change, ...]], place: str) -> None:
    """Refuse an adapter that lacks what it says it saved."""
    whole = [name for name, (first, *_) in changes.items() if isinstance(first, Whole)]
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{name}" for name in whole):
            fact = f"the adapter lacks the tensors of {short(module)}, which its modules_to_save names"
            raise LlmcError(fact, place=place)


def short(value: object) -> str:
    """What a stranger's file says, as Python writes it."""
    return shortened(repr(value), MOST_SHORT)
