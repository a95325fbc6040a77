"""The bytes of an artifact, in Python: the same records as src/format.h, which says what they mean."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

FORMAT_VERSION = 3
FORMAT_WITH_STATES = 4
"""The version of an artifact with states: PLAN_STATES stands behind the headers of its plan sections."""
FORMAT_WHOLE = 5
"""The version of one that reads texts whole: PLAN_WHOLE stands there."""
FORMAT_LABELS = 6
"""The version of one that gives texts labels: PLAN_LABELS stands there."""
FORMAT_ADAPTERS = 7
"""The version of one with adapters: PLAN_ADAPTERS and their names stand there."""
FORMAT_GIVEN = 8
"""The version of one whose tokens may be rows of numbers, those of pictures say: PLAN_GIVEN stands there."""
FORMAT_GRIDS = 9
"""The version of one whose rows lie in lines and columns: PLAN_GRIDS stands there."""
FORMAT_VERSIONS = tuple(range(FORMAT_VERSION, FORMAT_GRIDS + 1))
TRAILER_MAGIC = b"LLMCART1"
PLAN_MAGIC = 0x4E4C504C
SECTION_ALIGNMENT = 64
WEIGHTS_ALIGNMENT = 4096
MAX_SECTIONS = 64
MAX_PROGRAMS = 8
MAX_EOS = 8
MAX_POINTERS = 24
MAX_KERNEL_NAME = 103
MAX_ADAPTERS = 1024
MAX_ADAPTER_NAME = 63
MAX_ROW = 1 << 20
MAX_ROWS = 1 << 16
MAX_TILE = 1 << 30
MAX_MERGE = 16
MAX_SIDE = 4096

TRAILER = struct.Struct("<8sIIQQ32s")
SECTION = struct.Struct("<16sQQ32s")
PLAN_HEADER = struct.Struct("<12I8iiIQQQII")
PLAN_STATES = struct.Struct("<QII")
PLAN_WHOLE = struct.Struct("<II")
PLAN_LABELS = struct.Struct("<4I")
PLAN_ADAPTERS = struct.Struct("<QII")
PLAN_GIVEN = struct.Struct("<QII4III")
PLAN_GRIDS = struct.Struct("<QII4III8I")
ADAPTER_RECORD = struct.Struct("<64s")
KERNEL_RECORD = struct.Struct("<104s6I")
PLAN_RECORD = struct.Struct("<4I")
CALL_RECORD = struct.Struct("<4I")
ARGUMENT = struct.Struct("<IIQQ")
IMAGE = struct.Struct("<QQ")
SAVED_MAGIC = b"LLMCSEQ1"
SAVED = struct.Struct("<8sIIQ32s32s32s32s6IQ")
"""The header of a sequence's file; see llmc_saved_header."""

CPU_FEATURES = {
    "avx2": 1 << 0,
    "fma": 1 << 1,
    "f16c": 1 << 2,
    "bmi1": 1 << 3,
    "bmi2": 1 << 4,
    "movbe": 1 << 5,
    "avx512f": 1 << 6,
    "avx512bw": 1 << 7,
    "avx512cd": 1 << 8,
    "avx512dq": 1 << 9,
    "avx512vl": 1 << 10,
    "avx512_bf16": 1 << 11,
    "avx512_vnni": 1 << 12,
    "amx_tile": 1 << 13,
    "amx_bf16": 1 << 14,
    "amx_int8": 1 << 15,
    "asimd": 1 << 16,
    "asimddp": 1 << 17,
    "i8mm": 1 << 18,
}

SPACES = (
    "arena",
    "weights",
    "kv",
    "tokens",
    "positions",
    "page_table",
    "rows",
    "logits",
    "scratch",
    "chosen",
    "draws",
    "next",
    "told",
    "states",
    "slots",
    "adapters",
    "given",
    "is_given",
    "pixels",
    "made",
    "sees",
    "turns",
    "places",
)
PLAN_KINDS = ("body", "head", "sampler", "joined", "tower", "adapted", "joined adapted")
DEVICES = ("cpu", "cuda")
CUDA_EXACT = 1 << 16
"""In cuda_arch: the code runs on that compute capability alone, not on later ones of its generation."""
KERNEL_DEPENDENT = 1 << 0
"""In a GPU kernel's flags: it may start before the one in front of it has ended, and itself waits where it must."""
DRAW_BYTES = 32
"""Bytes of one row of the space "draws"; see llmc_draw_record."""


def version_of(
    slot_bytes: int, is_whole: bool, n_types: int, n_adapters: int = 0, n_row: int = 0, *, has_grids: bool = False
) -> int:
    """The version of the format that an artifact needs.

    slot_bytes: of a sequence's states; 0: it has none.  is_whole: whether it reads texts whole.  n_types: of how many
    types tokens are, where texts are given labels; else 0.  n_adapters: how many a sequence may choose from.
    n_row: numbers of a row that may stand for a token; 0: none may.  has_grids: whether it matters where rows are in
    their picture.
    """
    if n_row:
        return FORMAT_GRIDS if has_grids else FORMAT_GIVEN
    if n_adapters:
        return FORMAT_ADAPTERS
    if n_types:
        return FORMAT_LABELS
    if is_whole:
        return FORMAT_WHOLE
    return FORMAT_WITH_STATES if slot_bytes else FORMAT_VERSION


class Section(NamedTuple):
    """A named range of the file."""

    name: str
    offset: int
    n_bytes: int
    sha256: bytes


class Sized(NamedTuple):
    """What a tower that takes pictures of any size is made for; all 0 where there is none.

    patch: numbers of a patch.  merge: a row is made of merge by merge patches, one behind the other.
    window: rows along a side of a window, within which patches attend each other in some layers; 0: there are none.
    pages: most pages of keys and values.  side: entries along a side of a table of positions that is stretched over a
    picture; 0: there is none.  n_taps: entries of it that a patch takes, 4 (bilinear) or 16 (bicubic).
    taps_aligned: 1 where its corners are the picture's.
    """

    patch: int = 0
    merge: int = 0
    window: int = 0
    pages: int = 0
    side: int = 0
    n_taps: int = 0
    taps_aligned: int = 0

    def place_words(self, n_patches: int, page_tokens: int) -> int:
        """How many numbers of 32 bits the space "places" has for so many patches."""
        attending = (1 + -(-n_patches // page_tokens)) * (2 if self.window else 1)
        return n_patches * (attending + 2 + 2 * self.n_taps)


NOT_SIZED = Sized()


class PlanHeader(NamedTuple):
    """The plan section's header, after its magic and version.

    The fields are those of llmc_plan_header in src/format.h; from slot_bytes on, those of llmc_plan_states,
    llmc_plan_whole, llmc_plan_labels, llmc_plan_adapters, llmc_plan_given and llmc_plan_grids, which follow it where
    the version says so.  n_tokens: 0 where there are as many tokens as n_vocab says.  n_types: 0 where texts are given
    no labels.  adapters: their names.  n_row: 0 where no rows stand for tokens.  tile: zeros where there is no tower.
    picture_rows: of those that see each other; 0 where no row sees what is behind it.  is_turned: whether rows turn
    queries and keys by where they are in their picture.
    """

    cpu_features: int
    n_vocab: int
    n_context: int
    page_tokens: int
    pages_per_sequence: int
    n_kernels: int
    n_plans: int
    n_calls: int
    n_arguments: int
    eos: tuple[int, ...]
    bos: int
    default_kv_tokens: int
    kv_page_bytes: int
    arena_bytes: int
    scratch_bytes: int
    device: int = 0
    cuda_arch: int = 0
    slot_bytes: int = 0
    default_slots: int = 0
    n_tokens: int = 0
    is_whole: bool = False
    n_types: int = 0
    adapters: tuple[str, ...] = ()
    n_row: int = 0
    tile: tuple[int, int, int] = (0, 0, 0)
    picture_rows: int = 0
    is_turned: bool = False
    sized: Sized = NOT_SIZED

    @property
    def version(self) -> int:
        """The lowest version of the format that has all of these fields."""
        has_grids = self.is_turned or self.sized.patch > 0
        of_texts = self.slot_bytes, self.is_whole, self.n_types
        return version_of(*of_texts, len(self.adapters), self.n_row, has_grids=has_grids)


class KernelRecord(NamedTuple):
    """A kernel: its name and how many pointers it takes.

    Only for a GPU's kernels: n_threads of a block, shared_bytes (dynamic), flags (KERNEL_DEPENDENT), and image, the
    index of the one it is in; 0 on CPUs.
    """

    name: str
    n_pointers: int
    n_threads: int = 0
    shared_bytes: int = 0
    flags: int = 0
    image: int = 0


class PlanRecord(NamedTuple):
    kind: int
    n_rows: int
    first_call: int
    n_calls: int


class CallRecord(NamedTuple):
    kernel: int
    grid: int
    first_argument: int
    n_arguments: int


class Argument(NamedTuple):
    space: int
    offset: int
    n_bytes: int


def pack_kernel(record: KernelRecord) -> bytes:
    """The record as bytes.  Raises ValueError for a name that does not fit."""
    name = record.name.encode()
    if len(name) > MAX_KERNEL_NAME:
        raise ValueError(f"the kernel's name is longer than {MAX_KERNEL_NAME} bytes: {record.name}")
    return KERNEL_RECORD.pack(name, *record[1:], 0)


def pack_images(images: Sequence[bytes]) -> bytes:
    """The section "cuda": u32 n, u32 0, (u64 offset, u64 bytes) of each image, then the images, 64-byte aligned."""
    table, data = [], bytearray(8 + IMAGE.size * len(images))
    for image in images:
        data += bytes(-len(data) % SECTION_ALIGNMENT)
        table.append(IMAGE.pack(len(data), len(image)))
        data += image
    data[: 8 + IMAGE.size * len(images)] = struct.pack("<II", len(images), 0) + b"".join(table)
    return bytes(data)


def pack_plan_header(header: PlanHeader) -> bytes:
    """The header as bytes: magic and version first, and last what its version adds."""
    eos = (*header.eos, *([-1] * (MAX_EOS - len(header.eos))))
    packed = PLAN_HEADER.pack(
        PLAN_MAGIC,
        header.version,
        *header[:9],
        len(header.eos),
        *eos,
        *header[10:17],
    )
    names = b"".join(ADAPTER_RECORD.pack(name.encode("ascii")) for name in header.adapters)
    states = header.slot_bytes, header.default_slots
    if header.n_row:
        of_rows = header.n_row, *header.tile, header.picture_rows, 0
        grids = (header.is_turned, *header.sized) if header.version == FORMAT_GRIDS else ()
        record = PLAN_GRIDS if grids else PLAN_GIVEN
        return packed + record.pack(*states, len(header.adapters), *of_rows, *grids) + names
    if header.adapters:
        return packed + PLAN_ADAPTERS.pack(*states, len(header.adapters)) + names
    if header.n_types:
        return packed + PLAN_LABELS.pack(header.n_tokens, header.n_types, header.is_whole, 0)
    if header.is_whole:
        return packed + PLAN_WHOLE.pack(header.n_tokens, 0)
    return packed + (PLAN_STATES.pack(*states, 0) if header.slot_bytes else b"")


def plan_header_bytes(version: int, data: bytes | memoryview) -> int:
    """Bytes in front of the tables of a plan section, the header and what its version adds.  data: the section."""
    more = {FORMAT_WITH_STATES: PLAN_STATES, FORMAT_WHOLE: PLAN_WHOLE, FORMAT_LABELS: PLAN_LABELS}
    more |= {FORMAT_ADAPTERS: PLAN_ADAPTERS, FORMAT_GIVEN: PLAN_GIVEN, FORMAT_GRIDS: PLAN_GRIDS}
    start = PLAN_HEADER.size + (more[version].size if version in more else 0)
    if version in (FORMAT_ADAPTERS, FORMAT_GIVEN, FORMAT_GRIDS) and len(data) >= start:
        start += ADAPTER_RECORD.size * more[version].unpack_from(data, PLAN_HEADER.size)[2]
    return start


def unpack_plan_header(data: bytes | memoryview) -> PlanHeader:
    """The header at the start of a plan section; the caller has checked magic, version and length."""
    values = PLAN_HEADER.unpack_from(data)
    n_eos = min(values[11], MAX_EOS)
    slot_bytes = default_slots = n_tokens = is_whole = n_types = n_adapters = n_row = picture_rows = 0
    tile, is_turned, sized = (0, 0, 0), 0, Sized()
    if values[1] == FORMAT_WITH_STATES:
        slot_bytes, default_slots, _ = PLAN_STATES.unpack_from(data, PLAN_HEADER.size)
    elif values[1] == FORMAT_WHOLE:
        n_tokens, _ = PLAN_WHOLE.unpack_from(data, PLAN_HEADER.size)
        is_whole = 1
    elif values[1] == FORMAT_LABELS:
        n_tokens, n_types, is_whole, _ = PLAN_LABELS.unpack_from(data, PLAN_HEADER.size)
    elif values[1] == FORMAT_ADAPTERS:
        slot_bytes, default_slots, n_adapters = PLAN_ADAPTERS.unpack_from(data, PLAN_HEADER.size)
    elif values[1] in (FORMAT_GIVEN, FORMAT_GRIDS):
        record = PLAN_GIVEN if values[1] == FORMAT_GIVEN else PLAN_GRIDS
        slot_bytes, default_slots, n_adapters, n_row, *sizes = record.unpack_from(data, PLAN_HEADER.size)
        tile, picture_rows = (sizes[0], sizes[1], sizes[2]), sizes[3]
        if record is PLAN_GRIDS:
            is_turned, sized = sizes[5], Sized(*sizes[6:])
    start = plan_header_bytes(values[1], data)
    records = data[start - n_adapters * ADAPTER_RECORD.size : start]
    adapters = tuple(
        name.split(b"\0", 1)[0].decode("ascii", "replace") for (name,) in ADAPTER_RECORD.iter_unpack(records)
    )
    more = slot_bytes, default_slots, n_tokens, is_whole == 1, n_types, adapters, n_row, tile, picture_rows
    grids = is_turned == 1, sized
    return PlanHeader._make((*values[2:11], tuple(values[12 : 12 + n_eos]), *values[20:], *more, *grids))
