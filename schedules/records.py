"""Tuned records: which parameters were fastest for a call, as measured by `llmc tune` (tuning/tune.py).

A target has one file; a target of GPUs has one for each card.  A file has one record a line, sorted, and then switches
(switches.py).  The files that come with llmc lie in schedules/tuned/, a user's own in $LLMC_TUNED, or else in tuned/ of
llmc's part of the user's configuration.  The user's own are asked first.

A target of GPUs may have several cards (sm_90a: H200, H100), which run the same artifacts at different speeds.  If
several files have a record for a call, the first one counts, in the order of CARDS, with other cards by name behind
them: so the H100's records fill in what the H200's do not know.

A record is for a signature, not for a call: what follows the sum (bias, activation, residual) hardly matters for the
choice.  It is used only if the rule still offers its parameters, so a record of another version can do no harm.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llmc.compiler.kernel import Call
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.schedules.attention_call import LATENT, is_both_ways
from llmc.schedules.cuda.deferred_norm import MOST, prepares, settled
from llmc.schedules.record_fields import of_kind
from llmc.schedules.rule import Rule
from llmc.schedules.switches import PASSES, Switch, switched

Line = TypeVar("Line")
SHIPPED = Path(__file__).resolve().parent / "tuned"
CARDS = {"sm_90a": ("nvidia-h200", "nvidia-h100")}
"""The cards of a level whose records are asked first, in this order."""
_NO_PART_OF_A_CARD = re.compile(r"\d+gb|hbm\w*|sxm\d*")
_OPERATOR = re.compile(r"llmc\.((?:Deferred)?(?:RMSNorm|LayerNorm)?(?:Gated)?Linear)")


class Signature(NamedTuple):
    """What a choice depends on.

    op: "Linear" or "GatedLinear", with the name of a norm in front of it, which may be deferred; "LinearMoments" for a
        product that prepares a deferred norm; in prompts as if no norm were deferred.
    n, k: the weight's shape.  m: rows of x.  weight: its dtype, with its group.  lanes: float32 lanes of a vector.

    On a GPU also attention: n, k: columns of its queries, and of its keys; weight: the cache's dtype."""

    op: str
    n: int
    k: int
    m: int
    weight: str
    lanes: int

    def __str__(self) -> str:
        return f"{self.op} {self.weight} [{self.n}, {self.k}] M={self.m}"


def signature(call: Call, target: Target) -> Signature | None:
    """The call's signature; None for calls that nobody tunes."""
    if target.kind == "cuda" and call.op.endswith("PagedAttention"):
        return None if is_both_ways(call) else _of_attention(call, target)
    call = settled(call, target)
    operator = _OPERATOR.match(call.op)
    x = call.inputs[0] if call.inputs else None
    weight = next((kind for kind in call.inputs if kind and kind.constant and len(kind.shape) == 2), None)
    if not (operator and x and weight and len(x.shape) == 2):
        return None
    dtype = f"{weight.dtype}g{weight.group}" if weight.group else str(weight.dtype)
    n, k = weight.shape
    m = x.shape[0]
    op = operator[1] + "Moments" * prepares(call) if m <= MOST else operator[1].removeprefix("Deferred")
    return Signature(op, n, k, m, dtype, target.lanes)


def _of_attention(call: Call, target: Target) -> Signature:
    head_dim = call.attribute("head_dim")
    if call.op == LATENT:
        head_dim = call.attribute("latent_dim") + call.attribute("rotary_dim")
    n, k = (head_dim * call.attribute(heads, 1) for heads in ("num_heads", "kv_num_heads"))
    m = call.outputs[0].shape[0]
    op = call.op.removeprefix("llmc.").removeprefix("RMSNorm")  # a norm of heads changes nothing that is chosen
    return Signature(op, n, k, m, call.attribute("kv_dtype"), target.lanes)


@dataclass(frozen=True)
class Record:
    """One choice, and the measurement behind it.

    rule, params: what to use, the fields of the rule's parameters.  time_us: of one call, the median.
    limit: what bounds the call on this machine: "read bandwidth", "copy bandwidth" (a GPU's), an instruction, or a
    library's matrix product; share: of that, measured in the same run.  rate: the limit itself, in GB/s or GOP/s.
    heuristic_us: with the rule's own choice, in the same run.
    beat: the fastest of the others in words, and how many times longer it takes; "" and 0.0 where there was none.
    tried: how many were measured.  clean: of the samples, the part during which every thread kept its processor; where
    it is low the machine was loaded, and time and share are worth little.
    date, machine, llmc: when, on which CPU with how many threads, and by which version.
    in_place: of a GPU's calls that were measured between those of a model's layer, in which layers; times and share are
    then a layer's.
    """

    signature: Signature
    rule: str
    params: Mapping[str, Any]
    time_us: float
    share: float
    limit: str
    rate: float
    heuristic_us: float
    beat: str
    beat_ratio: float
    tried: int
    clean: float
    date: str
    machine: str
    llmc: str
    in_place: str = ""

    def to_json(self) -> dict[str, Any]:
        said = {name: value for name, value in vars(self).items() if name != "signature"}
        if not self.in_place:
            del said["in_place"]
        return {**self.signature._asdict(), **said, "params": dict(self.params)}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Record:
        """Raises KeyError or TypeError where something is missing or of another kind."""
        key = signature_of(said)
        said = {"in_place": "", **said}
        rest = {f.name: of_kind(said[f.name], f.type) for f in fields(cls) if f.name != "signature"}
        return cls(key, **rest)


def signature_of(said: Mapping[str, Any]) -> Signature:
    """The one whose fields these are, among others.  Raises KeyError or TypeError."""
    return Signature(*(of_kind(said[name], kind) for name, kind in Signature.__annotations__.items()))


@dataclass
class Tuned:
    """The records of one target, by signature, and its switches, by their passes.  notes: what was ignored, and why."""

    records: dict[Signature, Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    switches: dict[str, Switch] = field(default_factory=dict)

    def on(self, target: Target) -> list[Switch]:
        """The switches that turn a pass on for a target.  Only kernels for Hopper have what these passes need."""
        return [each for each in self.switches.values() if each.is_on and target.level == "sm_90a"]

    def switched(self, n_rows: int) -> frozenset[str]:
        """The passes that are on in a plan of so many rows."""
        return switched(self.switches.values(), n_rows)

    def choose(self, rule: Rule, call: Call, target: Target, default: Any) -> tuple[Any, Record | None]:
        """The parameters for a call, and the record they come from; `default` and None without a usable record."""
        key = signature(call, target) if self.records else None
        record = self.records.get(key) if key else None
        if record is None or is_outdated(record, default):
            return default, None
        params = params_of(record, rule, call, target, default)
        if params is None:
            self.note(f"the tuned record for {key} does not fit this version of llmc and is ignored")
            return default, None
        return params, record

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def params_of(record: Record, rule: Rule, call: Call, target: Target, default: Any) -> Any | None:
    """The record's parameters as the rule's own kind, if the rule still offers them for this call."""
    if record.rule != rule.name:
        return None
    return next((p for p in chain([default], rule.space(call, target)) if is_said(p, record.params)), None)


def is_outdated(record: Record, default: Any) -> bool:
    """Whether a record says that nothing was faster than the rule's own choice, but of a version whose own choice was
    another: today's was not measured then.  (Where calls were measured in place, all that a rule offers was.)"""
    was_own = record.time_us == record.heuristic_us and not record.in_place
    return was_own and not is_said(default, record.params)


def is_said(params: Any, said: Mapping[str, Any]) -> bool:
    """Whether a record has these parameters.  A field that it lacks has come later, and counts as its default."""
    defaults = {f.name: f.default for f in fields(params) if f.default is not MISSING}
    return asdict(params) == {**defaults, **said}


# -- files ------------------------------------------------------------------------


def folder() -> Path:
    """Where a user's own records lie."""
    if chosen := os.environ.get("LLMC_TUNED"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "llmc", "tuned")


def file_name(target: Target, card: str = "") -> str:
    """card: of a GPU's records, the card's name as its driver gives it; by default the first of the level's."""
    if target.kind == "cpu":
        return f"cpu-{target.level}.json"
    usual = CARDS.get(target.level, (f"cuda-{target.level}",))[0]
    return f"{card_of(card) or usual}.json"


def card_of(name: str) -> str:
    """A card's name in the words that tell it from others: nvidia-h100 for "NVIDIA H100 80GB HBM3"."""
    words = re.findall("[a-z0-9]+", name.lower())
    return "-".join(word for word in words if not _NO_PART_OF_A_CARD.fullmatch(word))


def files(place: Path, target: Target) -> list[Path]:
    """A folder's files of a target, the one to be asked first at the front."""
    if target.kind == "cpu":
        return [place / file_name(target)]
    usual = [place / f"{card}.json" for card in CARDS.get(target.level, ())]
    others = [path for path in sorted(place.glob("*.json")) if path not in usual and is_of(path, target)]
    return usual + others


def is_of(path: Path, target: Target) -> bool:
    """Whether a file says that it is a target's."""
    try:
        with path.open("rb") as file:
            return file.read(256).startswith(f'{{"target": "{target}",'.encode())
    except OSError:
        return False


def installed(target: Target) -> Tuned:
    """The records that compiling for a target uses: the user's own before llmc's.  A damaged file is noted, no more."""
    tuned = Tuned()
    for path in [path for place in (SHIPPED, folder()) for path in reversed(files(place, target))]:
        try:
            tuned.records.update(load(path, target, tuned))
            tuned.switches.update(load_switches(path, target, tuned))
        except LlmcError as error:
            tuned.note(f"tuned records are ignored: {error.fact} ({path})")
    return tuned


def load(path: Path, target: Target, tuned: Tuned | None = None) -> dict[Signature, Record]:
    """The records in a file, none if there is no file.  Single records that this version cannot read are noted in
    `tuned`.  Raises LlmcError: damaged, or of another target."""
    lines, _ = _lines(path, target)
    return {record.signature: record for record in _readable(lines, Record.from_json, path, tuned or Tuned())}


def load_switches(path: Path, target: Target, tuned: Tuned | None = None) -> dict[str, Switch]:
    """The switches in a file, as `load` reads its records; those of passes that this version has not are left out."""
    _, lines = _lines(path, target)
    found = _readable(lines, Switch.from_json, path, tuned or Tuned())
    return {switch.name: switch for switch in found if switch.name in PASSES}


def _lines(path: Path, target: Target) -> tuple[list[Any], list[Any]]:
    """Records and switches as a file says them."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [], []
    except (OSError, UnicodeDecodeError) as error:
        raise LlmcError(f"the tuned records cannot be read: {error}", place=str(path)) from None
    try:
        said = parse_json(text)
        of, lines, switches = said["target"], list(said["records"]), list(said.get("switches", ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        hint = "remove it, or run llmc tune with another -o"
        raise LlmcError("the file of tuned records is damaged", place=str(path), hint=hint) from None
    if of != str(target):
        raise LlmcError(f"the tuned records are for {of}, not {target}", place=str(path))
    return lines, switches


def _readable(lines: Iterable[Any], read: Callable[[Any], Line], path: Path, tuned: Tuned) -> Iterator[Line]:
    for line in lines:
        try:
            yield read(line)
        except (KeyError, TypeError):
            tuned.note(f"records of another version of llmc are ignored ({path})")


def save(path: Path, target: Target, records: Iterable[Record], switches: Iterable[Switch] | None = None) -> None:
    """Writes a file of records, whole or not at all; switches: None are those that it has.  Raises LlmcError when it
    cannot be written."""
    if switches is None:
        switches = ()
        with suppress(LlmcError):  # who writes has read it before, or means to replace it
            switches = load_switches(path, target).values()
    lines = [json.dumps(r.to_json(), ensure_ascii=False) for r in sorted(records, key=lambda r: r.signature)]
    others = [json.dumps(s.to_json(), ensure_ascii=False) for s in sorted(switches, key=lambda s: s.name)]
    behind = '], "switches": [\n' + ",\n".join(others) + "\n]}\n" if others else "]}\n"
    text = f'{{"target": {json.dumps(str(target))}, "records": [\n' + ",\n".join(lines) + "\n" + behind
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise LlmcError(f"the tuned records cannot be written: {error.strerror}", place=str(path)) from None
        raise
