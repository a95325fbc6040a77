"""A GGUF file of random weights, written as the format is described: no package is needed, and no quantiser.

Blocks are random bytes between scales that make weights of about 0.02.  Types are those that llama.cpp's quantiser
chooses: what is no matrix, routers and convolutions stay float32, and in q4_0 the logits' matrix is Q6_K, or Q8_0 where
rows are no multiples of 256.  mxfp4 is for experts, all else Q8_0 beside them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llmc.bench.peers.shapes import Dims, Shape

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
F32, BF16 = "f32", "bf16"
TYPES = {F32: 0, "q4_0": 2, "q8_0": 8, "q6_k": 14, BF16: 30, "mxfp4": 39}
"""ggml's numbers of them."""
BLOCKS = {F32: (1, 4), BF16: (1, 2), "q4_0": (32, 18), "q8_0": (32, 34), "q6_k": (256, 210), "mxfp4": (32, 17)}
"""Weights and bytes of a block."""
FILE_TYPES = {BF16: 32, "q4_0": 2, "q8_0": 7, "mxfp4": 38}
PLAIN = ("ffn_gate_inp", "ssm_conv1d", "shortconv.conv", "ssm_d", "ssm_a", "exps.bias", "norm")
"""Tensors that are float32 whatever the others are; ssm_a is no ssm_alpha."""
POOL_BYTES, STEP = 1 << 26, 4099
ALIGNED = 32


def write_gguf(shape: Shape, kind: str, out: Path) -> None:
    """kind: bf16, q8_0, q4_0 or mxfp4."""
    pools: dict[str, Iterator[Bytes]] = {}
    with out.open("wb") as file:
        file.write(header(shape, kind))
        for name, dims in shape.tensors.items():
            type_ = type_of(name, dims, kind, shape)
            size = n_bytes(dims, type_)
            if type_ == F32:
                file.write(plain(name, dims).tobytes())
            else:
                write_blocks(file, pools.setdefault(type_, blocks(type_)), size)
            file.write(bytes(padded(size) - size))


def header(shape: Shape, kind: str) -> bytes:
    """All that stands before the tensors' data."""
    fields = {
        "general.architecture": shape.architecture,
        "general.file_type": FILE_TYPES[kind],
        "tokenizer.ggml.model": "no_vocab",
        **{f"{shape.architecture}.{name}": value for name, value in shape.fields.items()},
    }
    said = b"GGUF" + struct.pack("<IQQ", 3, len(shape.tensors), len(fields))
    said += b"".join(text(name) + value_of(value) for name, value in fields.items())
    at = 0
    for name, dims in shape.tensors.items():
        type_ = type_of(name, dims, kind, shape)
        said += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *reversed(dims), TYPES[type_], at)
        at += padded(n_bytes(dims, type_))
    return said + bytes(padded(len(said)) - len(said))


def write_blocks(file: Any, pool: Iterator[Bytes], size: int) -> None:
    """Pieces of a pool that begins elsewhere each time: equal tensors could be kept once."""
    while size > 0:
        piece = next(pool)[:size]
        file.write(piece.data)
        size -= len(piece)


def blocks(kind: str) -> Iterator[Bytes]:
    """Random blocks without end, some megabytes at a time."""
    random = np.random.default_rng(0)
    each = BLOCKS[kind][1]
    pool = random.integers(0, 256, (POOL_BYTES // each, each), dtype=np.uint8)
    if kind == BF16:
        values = (random.standard_normal(len(pool), dtype=np.float32) * 0.02).view(np.uint32) >> 16
        pool = values.astype(np.uint16).view(np.uint8).reshape(-1, 2)
    elif kind == "mxfp4":
        pool[:, 0] = random.integers(119, 122, len(pool))
    else:  # the largest code stands for 0.06 or so
        most = {"q4_0": 8, "q8_0": 127, "q6_k": 32 * 127}[kind]
        scales = (random.uniform(0.03, 0.06, len(pool)) / most).astype(np.float16).view(np.uint8).reshape(-1, 2)
        pool[:, slice(-2, None) if kind == "q6_k" else slice(2)] = scales
    at = 0
    while True:
        at = (at + STEP) % (len(pool) // 2)
        yield pool[at:].reshape(-1)


def type_of(name: str, dims: Dims, kind: str, shape: Shape) -> str:
    is_plain = any(part in name for part in PLAIN) and ".ssm_alpha." not in name
    if len(dims) == 1 or is_plain:
        return F32
    if kind == "mxfp4":
        return kind if "_exps." in name else "q8_0"
    is_logits = name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shape.tensors)
    if kind == "q4_0" and is_logits:
        return "q6_k" if dims[-1] % 256 == 0 else "q8_0"
    return kind


def plain(name: str, dims: Dims) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 weights: norms' about 1, A below 0, others small."""
    random = np.random.default_rng(len(name)).uniform(size=dims).astype(np.float32)
    if "norm" in name:
        return 0.9 + 0.2 * random
    if name.endswith("ssm_a"):
        return -0.5 - 4 * random
    return 0.1 * random - 0.05


def n_bytes(dims: Dims, kind: str) -> int:
    n, each = BLOCKS[kind]
    if dims[-1] % n:
        raise ValueError(f"rows of {dims[-1]} are no blocks of {n}")
    return int(np.prod(dims)) // n * each


def padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value_of(value: Any) -> bytes:
    """A field's type and value; lists are of int32."""
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", kind, value)
