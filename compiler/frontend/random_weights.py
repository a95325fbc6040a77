"""Weights drawn from a normal distribution, the same for the same seed, name and shape.

Every row of a tensor is a window into one pool of normal values, at an offset no other row of the tensor has, so that
a 7B model is drawn at the speed of memory.  The values are those of float32 rounded to the dtype asked for.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod

import numpy as np

from llmc.compiler.kernel import numpy_dtype
from llmc.compiler.weights import Array, StoredDType, Weight

POOL_SIZE = 1 << 22
LONGEST_WINDOW = 1 << 16


def random_weight(name: str, dims: tuple[int, ...], dtype: StoredDType, *, std: float, seed: int) -> Weight:
    """A weight of N(0, std²); a vector that scales (a norm's weight) is about one instead of about zero."""
    mean = 1.0 if len(dims) == 1 and name.endswith("weight") else 0.0
    return Weight(name, dims, lambda: _draw(name, dims, dtype, mean, std, seed), dtype)


def _draw(name: str, dims: tuple[int, ...], dtype: StoredDType, mean: float, std: float, seed: int) -> Array:
    digest = hashlib.blake2b(f"{seed} {name} {dims}".encode(), digest_size=16).digest()
    first, stride = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    size = prod(dims)
    window = min(dims[-1], LONGEST_WINDOW) if dims else 1
    values = np.empty(size, numpy_dtype(dtype))
    pool = _pool(dtype, mean, std)
    for row, start in enumerate(range(0, size, window)):
        # The stride is odd and the pool a power of two: rows meet the same offset only after POOL_SIZE of them.
        offset = (first + row * (stride | 1)) % POOL_SIZE
        stop = min(start + window, size)
        values[start:stop] = pool[offset : offset + stop - start]
    return values.reshape(dims)


@lru_cache(maxsize=4)
def _pool(dtype: StoredDType, mean: float, std: float) -> Array:
    generator = np.random.Generator(np.random.SFC64(0))
    normal = generator.standard_normal(POOL_SIZE + LONGEST_WINDOW, dtype=np.float32)
    return (np.float32(mean) + np.float32(std) * normal).astype(numpy_dtype(dtype))
