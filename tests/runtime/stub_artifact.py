"""Artifacts around the stub model: real files, whose code is arithmetic.  `pack` takes any sections."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmc.runtime import format as fmt

HERE = Path(__file__).parent
INCLUDE = Path(fmt.__file__).parent / "include"
N_VOCAB, N_CONTEXT, MAX_STEP, EOS = 64, 48, 8, 2
WEIGHTS = bytes(range(256)) * 16
KERNELS = ("embed", "linear_64x64")
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in "é→".encode()), "▁Once", "▁upon", "▁a", "▁time", "."]


@cache
def stub_code(n_vocab: int = N_VOCAB, step_ms: int = 0, n_context: int = N_CONTEXT) -> bytes:
    """The stub model as a shared object.  step_ms: what a step takes at least."""
    flags = [
        f"-DN_VOCAB={n_vocab}",
        f"-DN_CONTEXT={n_context}",
        f"-DSTEP_MS={step_ms}",
        '-DSTUB_PLACE="at: the stub"',
        f"-I{INCLUDE}",
        "-std=c11",
        "-Wall",
        "-Werror",
    ]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "code.so"
        subprocess.run(["cc", "-shared", "-fPIC", *flags, "-o", out, HERE / "stub_model.c"], check=True)
        return out.read_bytes()


def pack(path: Path, sections: Mapping[str, bytes]) -> Path:
    """Write sections, the directory and the trailer as src/format.h says."""
    data, entries = bytearray(), b""
    for name, content in sections.items():
        data += bytes(-len(data) % (fmt.WEIGHTS_ALIGNMENT if name == "weights" else fmt.SECTION_ALIGNMENT))
        entries += fmt.SECTION.pack(name.encode(), len(data), len(content), hashlib.sha256(content).digest())
        data += content
    data += bytes(-len(data) % fmt.SECTION_ALIGNMENT)
    end = len(data)
    data += entries
    sha256 = hashlib.sha256(entries).digest()
    data += fmt.TRAILER.pack(
        fmt.TRAILER_MAGIC, fmt.FORMAT_VERSION, len(sections), end, end + len(entries) + fmt.TRAILER.size, sha256
    )
    path.write_bytes(data)
    return path


def plan_section(**changes: Any) -> bytes:
    """Two bodies and a head over two kernels; `changes` replace fields of the header."""
    arena, weights, tokens, logits = (fmt.SPACES.index(name) for name in ("arena", "weights", "tokens", "logits"))
    arguments = b""
    for n_rows in (1, 8):
        arguments += fmt.ARGUMENT.pack(tokens, 0, 0, 4 * n_rows)
        arguments += fmt.ARGUMENT.pack(weights, 0, 0, 1024)
        arguments += fmt.ARGUMENT.pack(arena, 0, 0, 64 * n_rows)
    for space, n_bytes in ((arena, 64), (weights, 1024), (logits, 4 * N_VOCAB)):
        arguments += fmt.ARGUMENT.pack(space, 0, 0, n_bytes)
    kernels = b"".join(fmt.pack_kernel(fmt.KernelRecord(name, 3)) for name in KERNELS)
    plans = b"".join(fmt.PLAN_RECORD.pack(*record) for record in ((0, 1, 0, 1), (0, 8, 1, 1), (1, 1, 2, 1)))
    calls = b"".join(fmt.CALL_RECORD.pack(*record) for record in ((0, 1, 0, 3), (0, 8, 3, 3), (1, 4, 6, 3)))
    header = fmt.PlanHeader(
        cpu_features=fmt.CPU_FEATURES["avx2"] | fmt.CPU_FEATURES["fma"],
        n_vocab=N_VOCAB,
        n_context=N_CONTEXT,
        page_tokens=64,
        pages_per_sequence=1,
        n_kernels=len(KERNELS),
        n_plans=3,
        n_calls=3,
        n_arguments=len(arguments) // fmt.ARGUMENT.size,
        eos=(EOS,),
        bos=1,
        default_kv_tokens=N_CONTEXT,
        kv_page_bytes=16384,
        arena_bytes=4096,
        scratch_bytes=0,
    )
    return fmt.pack_plan_header(header._replace(**changes)) + kernels + plans + calls + arguments


def tokenizer_json() -> str:
    """A tokenizer of words with a byte fallback, in the manner of Llama's: prompts begin with <s>."""
    special = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, word in enumerate(WORDS[:3])
    ]  # fmt: skip
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"▁w{i}" for i in range(len(WORDS), N_VOCAB))])}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": special,
            "normalizer": {"type": "Prepend", "prepend": "▁"},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": [],
                "unk_token": "<unk>",
                "byte_fallback": True,
                "ignore_merges": True,
            },
        }
    )


def characters_json() -> str:
    """A tokenizer of single characters, which can say JSON without blanks; ids 0 to 2 are special, as above."""
    characters = '{}[]",:.-+0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO'
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    said = json.loads(tokenizer_json())
    vocabulary = {word: i for i, word in enumerate([*WORDS[:3], *characters])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    said |= {"normalizer": None, "pre_tokenizer": level, "decoder": level, "post_processor": None, "model": model}
    return json.dumps(said)


def manifest() -> dict[str, Any]:
    """What the compiler would say of the stub."""
    return {
        "format_version": fmt.FORMAT_VERSION,
        "llmc": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "model": {
            "name": "stub",
            "type": "llama",
            "weights": "random",
            "dtype": "f32",
            "n_layers": 2,
            "n_context": N_CONTEXT,
            "n_vocab": N_VOCAB,
            "bos": 1,
            "eos": [EOS],
            "config": {},
        },
        "target": {"name": "cpu:x86-64-v3", "cpu_features": ["avx2", "fma"]},
        "batch": [1],
        "kv_cache": {"dtype": "f32", "page_tokens": 64, "bytes_per_token": 256},
        "plans": [{"kind": "body", "rows": 1, "calls": 1}],
        "memory": {"weight_bytes": len(WEIGHTS), "arena_bytes": 4096, "scratch_bytes_per_thread": 0},
        "schedules": [
            {
                "plan": "body",
                "m": 1,
                "op": "llmc.Linear",
                "call": "llmc.Linear(f32[1,64], f32[64,64]!) -> f32[1,64]",
                "nodes": 2,
                "node": "layer.0.q",
                "rule": "gemv",
                "params": "blocks=4",
                "layout": "[N/16][K][16]",
                "kernels": ["linear_64x64"],
                "bytes": 16896,
                "operations": 8192,
            }
        ],
        "certificate": {"status": "skipped", "reason": "random weights"},
    }


def write_stub(path: Path, **changes: Any) -> Path:
    """A stub artifact at `path`; see stub_sections for the changes."""
    return pack(path, stub_sections(**changes))


def stub_sections(**changes: Any) -> dict[str, bytes]:
    """The sections of a stub artifact; None leaves one out, a dict is written as JSON."""
    sections: dict[str, Any] = {
        "code": stub_code(),
        "weights": WEIGHTS,
        "plan": plan_section(),
        "vocabulary": struct.pack("<2I", 0, 0),
        "tokenizer": tokenizer_json(),
        "graph": {
            "passes": [
                {"name": "export", "rewrites": 0, "nodes": 9},
                {"name": "fuse_norm", "rewrites": 2, "nodes": 5},
            ],
            "final": "graph { Gather, llmc.Linear }",
        },
        "manifest": manifest(),
    }
    sections.update(changes)
    texts = {name: json.dumps(data) if isinstance(data, dict) else data for name, data in sections.items()}
    return {n: data.encode() if isinstance(data, str) else data for n, data in texts.items() if data is not None}
