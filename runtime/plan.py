"""The plan section, unpacked and checked: which kernels a step calls, on which bytes.

The records are described in src/format.h.  The checks are those that the C runtime makes before it runs a plan.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from llmc.runtime.errors import LlmcError
from llmc.runtime.format import (
    ARGUMENT,
    CALL_RECORD,
    CPU_FEATURES,
    DEVICES,
    DRAW_BYTES,
    FORMAT_ADAPTERS,
    FORMAT_GIVEN,
    FORMAT_GRIDS,
    FORMAT_LABELS,
    FORMAT_VERSIONS,
    FORMAT_WHOLE,
    FORMAT_WITH_STATES,
    KERNEL_RECORD,
    MAX_ADAPTER_NAME,
    MAX_ADAPTERS,
    MAX_EOS,
    MAX_MERGE,
    MAX_POINTERS,
    MAX_ROW,
    MAX_ROWS,
    MAX_SIDE,
    MAX_TILE,
    PLAN_GRIDS,
    PLAN_HEADER,
    PLAN_KINDS,
    PLAN_LABELS,
    PLAN_MAGIC,
    PLAN_RECORD,
    SPACES,
    Argument,
    CallRecord,
    KernelRecord,
    PlanHeader,
    PlanRecord,
    plan_header_bytes,
    unpack_plan_header,
)


class PlanTables(NamedTuple):
    """The tables of a plan section.  Records refer to each other by index, always within range."""

    header: PlanHeader
    kernels: tuple[KernelRecord, ...]
    plans: tuple[PlanRecord, ...]
    calls: tuple[CallRecord, ...]
    arguments: tuple[Argument, ...]

    @property
    def cpu_features(self) -> tuple[str, ...]:
        """Names of the CPU features that the kernels use."""
        return tuple(name for name, bit in CPU_FEATURES.items() if self.header.cpu_features & bit)

    def calls_of(self, plan: PlanRecord) -> tuple[CallRecord, ...]:
        """The calls of one plan, in the order they run."""
        return self.calls[plan.first_call : plan.first_call + plan.n_calls]

    def arguments_of(self, call: CallRecord) -> tuple[Argument, ...]:
        """The arguments of one call, in the order of the kernel's parameters."""
        return self.arguments[call.first_argument : call.first_argument + call.n_arguments]


def unpack_plan(data: bytes, weight_bytes: int, place: str) -> PlanTables:
    """The tables in a plan section; `weight_bytes` bounds the arguments that point into the weights.

    Raises LlmcError naming the record that is wrong, at `place`.
    """
    try:
        tables = _unpack_tables(data)
        _check_plans(tables)
        _check_calls(tables, weight_bytes)
    except ValueError as error:
        fact = f"the plan section is not valid: {error}"
        raise LlmcError(fact, place=place, hint="compile the model again") from None
    return tables


def _unpack_tables(data: bytes) -> PlanTables:
    if len(data) < PLAN_HEADER.size:
        raise ValueError(f"{len(data)} bytes do not hold its header")
    raw = PLAN_HEADER.unpack_from(data)
    if raw[0] != PLAN_MAGIC or raw[1] not in FORMAT_VERSIONS:
        raise ValueError(f"magic {raw[0]:#x} version {raw[1]}")
    start = plan_header_bytes(raw[1], data)
    if len(data) < start:
        raise ValueError(f"{len(data)} bytes do not hold its header")
    if raw[11] > MAX_EOS:
        raise ValueError(f"{raw[11]} end tokens, at most {MAX_EOS}")
    header = unpack_plan_header(data)
    sizes = (
        header.n_kernels * KERNEL_RECORD.size,
        header.n_plans * PLAN_RECORD.size,
        header.n_calls * CALL_RECORD.size,
        header.n_arguments * ARGUMENT.size,
    )
    if start + sum(sizes) != len(data):
        raise ValueError(f"its tables take {start + sum(sizes)} bytes, the section has {len(data)}")
    is_sound = header.slot_bytes > 0 and header.slot_bytes % 64 == 0 and header.default_slots > 0
    if raw[1] == FORMAT_WITH_STATES and not is_sound:
        raise ValueError(f"{header.default_slots} slots of {header.slot_bytes} bytes")
    if raw[1] == FORMAT_WHOLE and not 1 <= header.n_tokens <= 1 << 30:
        raise ValueError(f"texts of {header.n_tokens} tokens that are read whole")
    most = 0 if raw[1] != FORMAT_LABELS or PLAN_LABELS.unpack_from(data, PLAN_HEADER.size)[2] > 1 else 1 << 30
    if raw[1] == FORMAT_LABELS and not 1 <= header.n_tokens * header.n_types <= most:
        raise ValueError(f"labels of texts of {header.n_tokens} tokens, of {header.n_types} types")
    if raw[1] == FORMAT_ADAPTERS:
        _check_adapters(header, least=1)
    if raw[1] in (FORMAT_GIVEN, FORMAT_GRIDS):
        _check_given(header)
    if raw[1] == FORMAT_GRIDS:
        _check_grids(header, PLAN_GRIDS.unpack_from(data, PLAN_HEADER.size)[9])
    tables = _split(memoryview(data)[start:], sizes)
    kernels, plans, calls, arguments = tables
    return PlanTables(
        header,
        tuple(KernelRecord(_text(name), *numbers[:5]) for name, *numbers in _records(KERNEL_RECORD, kernels)),
        tuple(PlanRecord(*record) for record in _records(PLAN_RECORD, plans)),
        tuple(CallRecord(*record) for record in _records(CALL_RECORD, calls)),
        tuple(Argument(space, offset, n_bytes) for space, _, offset, n_bytes in _records(ARGUMENT, arguments)),
    )


def _check_given(header: PlanHeader) -> None:
    _check_adapters(header, least=0)
    is_tile = all(header.tile) or not any(header.tile)
    if not 1 <= header.n_row <= MAX_ROW or not is_tile or prod(header.tile) > MAX_TILE or header.device:
        raise ValueError(f"rows of {header.n_row} numbers, of tiles of {header.tile}")
    if header.picture_rows > MAX_ROWS:
        raise ValueError(f"pictures of {header.picture_rows} rows")


def _check_grids(header: PlanHeader, is_turned: int) -> None:
    sized = header.sized
    if is_turned > 1 or (sized.patch == 0 and (any(sized) or not is_turned)):
        raise ValueError(f"rows that are turned {is_turned}, and patches of {sized.patch} numbers")
    if sized.patch == 0:
        return
    is_table = (1 <= sized.side <= MAX_SIDE and sized.n_taps in (4, 16)) or not any(sized[4:])
    is_sound = sized.patch <= MAX_ROW and 1 <= sized.merge <= MAX_MERGE and 1 <= sized.pages <= MAX_ROWS
    if not is_sound or not is_table or sized.taps_aligned > 1 or sized.window > MAX_SIDE or any(header.tile):
        raise ValueError(f"a tower of pictures of any size: {sized}, of tiles of {header.tile}")


def _check_adapters(header: PlanHeader, least: int) -> None:
    is_sound = not header.slot_bytes or (header.slot_bytes % 64 == 0 and header.default_slots > 0)
    are_named = all(1 <= len(name) <= MAX_ADAPTER_NAME for name in header.adapters)
    if not least <= len(header.adapters) <= MAX_ADAPTERS or not are_named or not is_sound:
        raise ValueError(f"{len(header.adapters)} adapters, states of {header.slot_bytes} bytes")


def _split(data: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    parts = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return parts


def _records(record: struct.Struct, table: memoryview) -> Iterator[tuple[Any, ...]]:
    return record.iter_unpack(table)


def _text(padded: bytes) -> str:
    name = padded.split(b"\0", 1)[0].decode("ascii", "replace")
    if not name.isidentifier():
        raise ValueError(f"kernel name {name!r}")
    return name


def _check_plans(tables: PlanTables) -> None:
    header, previous = tables.header, (-1, 0)
    if header.device >= len(DEVICES) or (DEVICES[header.device] == "cuda") != (header.cuda_arch != 0):
        raise ValueError(f"device {header.device} of architecture {header.cuda_arch}")
    if not 1 <= header.n_vocab <= 1 << 30 or not 1 <= header.n_context <= 1 << 30:
        raise ValueError(f"vocabulary of {header.n_vocab}, context of {header.n_context}")
    room = header.pages_per_sequence * header.page_tokens
    if not header.n_context <= room < header.n_context + header.page_tokens:
        raise ValueError(f"{header.pages_per_sequence} pages of {header.page_tokens} for {header.n_context} tokens")
    for index, plan in enumerate(tables.plans):
        if plan.kind >= len(PLAN_KINDS) or plan.n_rows < 1 or (plan.kind, plan.n_rows) <= previous:
            raise ValueError(f"plan {index} has kind {plan.kind} and {plan.n_rows} rows, out of order")
        if plan.first_call + plan.n_calls > header.n_calls:
            raise ValueError(f"plan {index} has calls beyond the table")
        previous = (plan.kind, plan.n_rows)
    longest = max((plan.n_rows for plan in tables.plans if PLAN_KINDS[plan.kind] == "body"), default=0)
    towers = [plan.n_rows for plan in tables.plans if PLAN_KINDS[plan.kind] == "tower"]
    if header.sized.patch and towers and max(towers) * header.sized.merge**2 > MAX_ROWS:
        raise ValueError(f"pictures of {max(towers)} rows")
    made = {header.picture_rows, *towers}
    if header.picture_rows and (header.picture_rows > longest or len(made) > 1):
        raise ValueError(f"pictures of {header.picture_rows} rows, of {sorted(made)}, in steps of {longest}")
    kinds = {PLAN_KINDS[plan.kind] for plan in tables.plans}
    on_gpu = DEVICES[header.device] != "cpu"
    chooses = on_gpu and not header.is_whole  # what reads texts whole chooses no tokens
    is_adapted = on_gpu and bool(header.adapters)
    has_tower = any(header.tile) or header.sized.patch > 0
    wanted = {"body", "head", *(["sampler"] if chooses else []), *(["tower"] if has_tower else [])}
    wanted |= {"adapted"} if is_adapted else set()
    optional = {"joined", *(["joined adapted"] if is_adapted else [])} if chooses else set()
    if kinds - optional != wanted or (len(towers) > 1 and not header.sized.patch):
        raise ValueError(f"the plans are {', '.join(sorted(kinds)) or 'missing'}")
    if is_adapted:
        _check_adapted(tables)


def _check_adapted(tables: PlanTables) -> None:
    """Where there are adapters, each body and each joined step of a GPU has another one for them."""
    rows = {kind: [plan.n_rows for plan in tables.plans if PLAN_KINDS[plan.kind] == kind] for kind in PLAN_KINDS}
    if rows["adapted"] != rows["body"] or rows["joined adapted"] != rows["joined"]:
        raise ValueError("plans are missing for steps with an adapter")


def _check_calls(tables: PlanTables, weight_bytes: int) -> None:
    """Every call of every plan points inside the memory it names."""
    for kernel in tables.kernels:
        if not 1 <= kernel.n_pointers <= MAX_POINTERS:
            raise ValueError(f"kernel {kernel.name} takes {kernel.n_pointers} pointers")
    rows = {kind: max((p.n_rows for p in tables.plans if PLAN_KINDS[p.kind] == kind), default=0) for kind in PLAN_KINDS}
    for plan in tables.plans:
        room = _room(tables.header, plan, rows, weight_bytes)
        for index, call in enumerate(tables.calls_of(plan), plan.first_call):
            _check_call(tables, call, index, room)


def _check_call(tables: PlanTables, call: CallRecord, index: int, room: tuple[int, ...]) -> None:
    if call.kernel >= len(tables.kernels) or call.grid < 1:
        raise ValueError(f"call {index} names kernel {call.kernel} with grid {call.grid}")
    kernel = tables.kernels[call.kernel]
    if call.n_arguments != kernel.n_pointers or call.first_argument + call.n_arguments > len(tables.arguments):
        raise ValueError(f"call {index} gives {kernel.name} {call.n_arguments} arguments of {kernel.n_pointers}")
    for argument in tables.arguments_of(call):
        if argument.space >= len(SPACES) or argument.offset + argument.n_bytes > room[argument.space]:
            raise ValueError(f"call {index} of {kernel.name} points outside its memory")


def _room(header: PlanHeader, plan: PlanRecord, rows: dict[str, int], weight_bytes: int) -> tuple[int, ...]:
    """Bytes of each space for a plan, in the order of SPACES; rows: of the largest plan of each kind."""
    kind, ids = PLAN_KINDS[plan.kind], 4 * plan.n_rows
    body = ids if kind in ("body", "joined", "adapted", "joined adapted") else 0
    head = ids if kind in ("head", "joined", "joined adapted") else 0
    sampler = ids if kind == "sampler" else 0
    logits = 4 * rows["head"] if sampler else head
    positions = 4 * rows["body"] if kind == "head" and header.is_whole else body
    chosen = (head or sampler) if header.device else 0
    tower, sized = ids if kind == "tower" else 0, header.sized
    n_patches = tower // 4 * sized.merge**2
    pixels = n_patches * sized.patch if sized.patch else prod(header.tile)
    return (
        header.arena_bytes,
        weight_bytes,
        0 if tower else header.kv_page_bytes,
        body,
        positions,
        body * header.pages_per_sequence,
        head,
        logits * header.n_vocab,
        header.scratch_bytes,
        chosen,
        sampler // 4 * DRAW_BYTES,
        chosen,
        chosen,
        0 if tower else header.slot_bytes,
        body if header.slot_bytes else 0,
        body if header.adapters else 0,
        body * header.n_row,
        body if header.n_row else 0,
        4 * pixels if tower else 0,
        tower * header.n_row,
        body if header.picture_rows else 0,
        3 * body if header.is_turned else 0,
        4 * sized.place_words(n_patches, header.page_tokens) if tower and sized.patch else 0,
    )
