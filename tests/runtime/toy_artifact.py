"""A toy model as a real artifact: C kernels, the project's runtime, and an oracle in Python.

Its logits are whole numbers that depend on every token so far, in order, so a wrong page, position, row or chunk
shows.  The least body has two rows, so a single token is padded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmc.compiler.link import kernel_table, runtime_sources
from llmc.runtime import format as fmt
from llmc.schedules import cache

HERE = Path(__file__).parent
RUNTIME = Path(fmt.__file__).parent
SIZES = {name: int(value) for name, value in re.findall(r"TOY_(\w+) = (\d+)", (HERE / "toy_model.h").read_text())}
VOCAB, CHANNELS, LAYERS, PRIME = (SIZES[name] for name in ("VOCAB", "CHANNELS", "LAYERS", "PRIME"))
CONTEXT, PAGE_TOKENS, PAGES, PAGE_BYTES = (SIZES[name] for name in ("CONTEXT", "PAGE_TOKENS", "PAGES", "PAGE_BYTES"))
POISON, EOS = SIZES["POISON"], SIZES["EOS"]

BODIES, HEADS = (2, 4, 16), (1, 4)
FLAGS = ("-std=c11", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread")
INCLUDED = (RUNTIME / "include", RUNTIME / "src", HERE)
INCLUDES = tuple(f"-I{folder}" for folder in INCLUDED)
LIBRARIES = ("-lm", "-ldl")

TABLE = [[(7 * v + 3 * c * c + v * c) % PRIME for c in range(CHANNELS)] for v in range(VOCAB)]
"""Embeddings [VOCAB, CHANNELS]."""
OUTPUT = [[(v * (c + 2) + c) % 8 for c in range(CHANNELS)] for v in range(VOCAB)]
"""The head's weights [VOCAB, CHANNELS]."""


def oracle(tokens: Sequence[int]) -> list[list[int]]:
    """Logits [len(tokens), VOCAB] after each token."""
    return oracle_of([TABLE[token] for token in tokens])


def oracle_of(x: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same for their embeddings [CHANNELS]."""
    for _ in range(LAYERS):
        past, turned = [0] * CHANNELS, []
        for row in x:
            past = [(31 * p + value) % PRIME for p, value in zip(past, row, strict=True)]
            y = [(value + p) % PRIME for value, p in zip(row, past, strict=True)]
            turned.append([(y[(c + 1) % CHANNELS] + 1) % PRIME for c in range(CHANNELS)])
        x = turned
    return [[sum(h * w for h, w in zip(row, weights, strict=True)) % PRIME for weights in OUTPUT] for row in x]


def weights_section() -> bytes:
    """TABLE, then OUTPUT, as float32."""
    return b"".join(struct.pack(f"<{CHANNELS}f", *row) for row in TABLE + OUTPUT)


def vocabulary_section() -> bytes:
    """Token v reads "<v>"; the last one has no text."""
    texts = [f"<{v}>".encode() for v in range(VOCAB - 1)]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
    return struct.pack(f"<{len(offsets) + 1}I", len(texts), *offsets) + b"".join(texts)


# -- the plan section: lists of records, so that tests may spoil any of them ------------------------------------------


class ToyPlan:
    """The tables of the toy's plan section; `pack` gives the bytes.  The arena has two halves, of 64 rows at least."""

    def __init__(self, bodies: Sequence[int] = BODIES, heads: Sequence[int] = HEADS) -> None:
        self.read_bytes, self.half = (4 * CHANNELS * max(n, *bodies) for n in (0, 64))
        self.header = fmt.PlanHeader(
            cpu_features=0,
            n_vocab=VOCAB,
            n_context=CONTEXT,
            page_tokens=PAGE_TOKENS,
            pages_per_sequence=PAGES,
            n_kernels=0,
            n_plans=0,
            n_calls=0,
            n_arguments=0,
            eos=(EOS,),
            bos=1,
            default_kv_tokens=4 * CONTEXT,
            kv_page_bytes=PAGE_BYTES,
            arena_bytes=2 * self.half,
            scratch_bytes=4 * CHANNELS,
        )
        self.kernels: list[tuple[str, int]] = []
        self.plans: list[tuple[int, int, int, int]] = []
        self.calls: list[tuple[int, int, int, int]] = []
        self.arguments: list[tuple[str, int, int]] = []
        for m in bodies:
            self.add_plan(0, m, self.body_calls(m))
        for r in heads:
            self.add_plan(1, r, self.head_calls(r))

    def body_calls(self, m: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        """(kernel, grid, arguments) in order; hidden states end at the start of the arena."""
        row = 4 * CHANNELS
        x, y = ("arena", 0, m * row), ("arena", self.half, m * row)
        positions, pages = ("positions", 0, 4 * m), ("page_table", 0, 4 * m * PAGES)
        calls = [("embed", m, [("tokens", 0, 4 * m), ("weights", 0, VOCAB * row), x])]
        for layer in range(LAYERS):
            kv = ("kv", layer * PAGE_BYTES // LAYERS, PAGE_BYTES // LAYERS)
            calls.append(("store", m, [x, positions, pages, kv]))
            calls.append(("attend", m, [x, positions, pages, kv, ("scratch", 0, row), y]))
            calls.append(("turn", 1, [y, x]))
        return [(f"{name}_{m}", grid, arguments) for name, grid, arguments in calls]

    def head_calls(self, r: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        row = 4 * CHANNELS
        picked = ("arena", self.half, r * row)
        return [
            (f"pick_{r}", r, [("arena", 0, self.read_bytes), ("rows", 0, 4 * r), picked]),
            (f"project_{r}", VOCAB, [picked, ("weights", VOCAB * row, VOCAB * row), ("logits", 0, 4 * r * VOCAB)]),
        ]

    def add_plan(self, kind: int, n_rows: int, calls: list[tuple[str, int, list[tuple[str, int, int]]]]) -> None:
        self.plans.append((kind, n_rows, len(self.calls), len(calls)))
        for name, grid, arguments in calls:
            if (name, len(arguments)) not in self.kernels:
                self.kernels.append((name, len(arguments)))
            kernel = self.kernels.index((name, len(arguments)))
            self.calls.append((kernel, grid, len(self.arguments), len(arguments)))
            self.arguments += arguments

    def move_weights(self, table: int, output: int) -> ToyPlan:
        """Read the embeddings and the head's weights at these offsets."""
        places = {0: table, VOCAB * 4 * CHANNELS: output}
        for index, (space, offset, n_bytes) in enumerate(self.arguments):
            if space == "weights":
                self.arguments[index] = (space, places[offset], n_bytes)
        return self

    def read_weights(self, n_bytes: int) -> ToyPlan:
        """Have heads name so many bytes of weights, not just those that they use."""
        first = VOCAB * 4 * CHANNELS
        for index, (space, offset, _) in enumerate(self.arguments):
            if (space, offset) == ("weights", first):
                self.arguments[index] = (space, offset, n_bytes - first)
        return self

    def kernel_record(self, name: str, n_pointers: int) -> fmt.KernelRecord:
        return fmt.KernelRecord(name, n_pointers)

    def pack(self, **changes: Any) -> bytes:
        """The section; `changes` replace fields of the header."""
        counts = {
            "n_kernels": len(self.kernels),
            "n_plans": len(self.plans),
            "n_calls": len(self.calls),
            "n_arguments": len(self.arguments),
        }
        return b"".join(
            [
                fmt.pack_plan_header(self.header._replace(**{**counts, **changes})),
                *(fmt.pack_kernel(self.kernel_record(name, n)) for name, n in self.kernels),
                *(fmt.PLAN_RECORD.pack(*plan) for plan in self.plans),
                *(fmt.CALL_RECORD.pack(*call) for call in self.calls),
                *(fmt.ARGUMENT.pack(fmt.SPACES.index(s), 0, offset, n) for s, offset, n in self.arguments),
            ]
        )


class FullPlan(ToyPlan):
    """The toy's plan, of the format that says most: states, an adapter, rows that stand for tokens, and a tower.  Its
    kernels are the toy's, which know nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        tower = ("turn_2", 1, [("pixels", 0, 128), ("made", 0, 128)])
        self.add_plan(fmt.PLAN_KINDS.index("tower"), 2, [tower])
        header = self.header._replace(slot_bytes=64, default_slots=3, adapters=("sql",))
        self.header = header._replace(n_row=CHANNELS, tile=(2, 4, 4))


# -- files ------------------------------------------------------------------------------------------------------------


def pack_sections(sections: Mapping[str, bytes]) -> bytes:
    """Sections in order, the directory and the trailer, as src/format.h says."""
    data, directory = bytearray(), b""
    for name, content in sections.items():
        alignment = fmt.WEIGHTS_ALIGNMENT if name.startswith("weights") else fmt.SECTION_ALIGNMENT
        data += bytes(-len(data) % alignment)
        directory += fmt.SECTION.pack(name.encode(), len(data), len(content), hashlib.sha256(content).digest())
        data += content
    data += bytes(-len(data) % fmt.SECTION_ALIGNMENT)
    return bytes(data) + pack_end(directory, len(data))


def pack_end(directory: bytes, at: int, **changes: Any) -> bytes:
    """The directory, which lies at `at`, and the trailer; `changes` replace the trailer's fields."""
    values = {
        "magic": fmt.TRAILER_MAGIC,
        "version": fmt.FORMAT_VERSION,
        "n_sections": len(directory) // fmt.SECTION.size,
        "offset": at,
        "file_bytes": at + len(directory) + fmt.TRAILER.size,
        "sha256": hashlib.sha256(directory).digest(),
    }
    return directory + fmt.TRAILER.pack(*{**values, **changes}.values())


def toy_sections(code: bytes = b"no code: the host has it", **changes: bytes) -> dict[str, bytes]:
    """The sections of a toy artifact; `changes` replace some."""
    sections = {
        "code": code,
        "weights": weights_section(),
        "plan": ToyPlan().pack(),
        "vocabulary": vocabulary_section(),
        "manifest": b"{}",
    }
    return {**sections, **changes}


def compile_c(out: Path, sources: Sequence[Path], *flags: str, compiler: Sequence[str] = ("cc",)) -> Path:
    """Compile and link C files with the runtime's headers, anew."""
    return run_compiler([*compiler, *FLAGS, *flags, *INCLUDES, *map(str, sources), "-o", str(out), *LIBRARIES], out)


def link_c(out: Path, sources: Sequence[Path], *flags: str) -> Path:
    """The same, from objects that are kept: nearly all of these programs hold the whole runtime."""
    command = ["cc", *FLAGS, *(flag for flag in flags if flag != "-shared" and not flag.startswith("-Wl,"))]
    kept = {source: kept_object(source, command) for source in sources}
    missing = [source for source, path in kept.items() if not path.exists()]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        if missing:
            run_compiler([*command, *INCLUDES, "-c", *map(str, missing)], Path(folder))
        for source in missing:
            kept[source].parent.mkdir(parents=True, exist_ok=True)
            fresh = kept[source].with_suffix(f".{os.getpid()}")
            shutil.copyfile(Path(folder, f"{source.stem}.o"), fresh)
            fresh.replace(kept[source])
    return run_compiler(["cc", *flags, "-pthread", *map(str, kept.values()), "-o", str(out), *LIBRARIES], out)


def kept_object(source: Path, command: Sequence[str]) -> Path:
    """Where the object file of a source lies, by what it is made from."""
    text = "\0".join([*command, str(source) if "-g" in command else "", source.read_text(), headers()])
    return cache.folder() / "toys" / f"{hashlib.sha256(text.encode()).hexdigest()}.o"


@functools.cache
def headers() -> str:
    """All that sources here may include; toys include each other's."""
    return "\0".join(
        path.read_text() for folder in (*INCLUDED, HERE / "fake_cuda") for path in sorted(folder.glob("*.[ch]"))
    )


def run_compiler(command: Sequence[str], place: Path) -> Path:
    """Run it in the place's folder."""
    folder = place if place.is_dir() else place.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return place


def toy_sources(folder: Path, n_programs: int = 1, plan: ToyPlan | None = None) -> list[Path]:
    """The runtime, the toy's kernels and their table, for so many programs that have the same kernels."""
    table = folder / "table.c"
    table.write_text(kernel_table((plan or ToyPlan()).kernels * n_programs))
    return [*runtime_sources(), HERE / "toy_kernels.c", HERE / "toy_state_kernels.c", table]


def build_code(folder: Path, *flags: str, n_programs: int = 1) -> bytes:
    """The ELF image of a toy artifact."""
    return link_c(folder / "code.so", toy_sources(folder, n_programs), "-O2", "-shared", *flags).read_bytes()


def build_artifact(folder: Path, *flags: str, **sections: bytes) -> Path:
    """A whole artifact, which can be loaded."""
    path = folder / "toy.so"
    path.write_bytes(pack_sections(toy_sections(build_code(folder, *flags), **sections)))
    return path


WRAPPED = (
    *("calloc", "aligned_alloc", "mmap", "pthread_create", "fopen", "sched_getaffinity"),
    *("mkostemp", "pwrite", "fsync", "rename", "read"),
)
"""Functions of libc that tests in C stand in for."""

Host = Callable[..., str]
"""host(name, *arguments) runs a test in C and gives what it prints; an AssertionError when the program fails."""


def build_host(folder: Path, *flags: str) -> Host:
    """The tests in C (host_*.c) as one program."""
    wrapped = [f"-Wl,--wrap={name}" for name in WRAPPED]
    sources = [*toy_sources(folder), *sorted(HERE.glob("host*.c"))]
    program = link_c(folder / "host", sources, "-O1", "-g", *flags, *wrapped)

    def run(*arguments: str | Path) -> str:
        environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
        command = [str(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, f"{' '.join(command)[:500]}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        return done.stdout

    return run
