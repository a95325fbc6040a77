"""A GGUF file's tensors as transformers has them: rows in its order, gate and up in one, norms without the 1 added."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from llmc.compiler.frontend.checkpoint import DTYPES, StoredTensor
from llmc.compiler.frontend.gguf.kind import ALTERNATING, ROWS
from llmc.compiler.frontend.packed.ggml import BY_NAME, numbers
from llmc.compiler.frontend.packed.tensor import packed_tensor
from llmc.compiler.weights import Array, Coded

GATES, UPS, DOWNS = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
GATES_UPS = "ffn_gate_up_exps"
"""Both in one tensor, gates' rows before ups', as the converter writes them where it is asked to."""


def coded_of(tensor: StoredTensor, other: StoredTensor | None = None) -> Coded | None:
    """How a tensor's values are kept in codes; None: in none, or another way than the other's."""
    return BY_NAME[tensor.dtype].coded if other is None or other.dtype == tensor.dtype else None


def as_it_is(own: str, tensor: StoredTensor) -> StoredTensor:
    """The tensor under the model's name `own`."""
    if tensor.dtype in DTYPES:
        return tensor
    return made(own, tensor, tensor.dims, partial(numbers, tensor), coded_of(tensor))


def made(
    own: str,
    tensor: StoredTensor,
    dims: tuple[int, ...],
    read: Callable[[], Array],
    coded: Coded | None = None,
    other: StoredTensor | None = None,
) -> StoredTensor:
    """What is read of a tensor, or of two, blocks as bfloat16."""
    dtype = DTYPES.get(tensor.dtype, "bf16")
    parts = {"codes": tensor} if other is None else {"codes": tensor, "other": other}
    return packed_tensor(tensor.dtype, own, dims, parts, read, dtype, coded)


def in_halves(own: str, tensor: StoredTensor, n_heads: int) -> StoredTensor:
    """The rows of each head [d] in the order 0, 2, 4, …, 1, 3, 5, …: halves, of rows that lie as pairs."""

    def read() -> Array:
        values = numbers(tensor)
        pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    return made(own, tensor, tensor.dims, read, coded_of(tensor))


def less_one(own: str, tensor: StoredTensor) -> StoredTensor:
    """w of 1 + w, float32."""

    def read() -> Array:
        values: Array = numbers(tensor).astype(np.float32) - np.float32(1)
        return values

    return packed_tensor(tensor.dtype, own, tensor.dims, {"codes": tensor}, read, "f32")


def one_row(own: str, tensor: StoredTensor) -> StoredTensor:
    """A vector as a matrix of one row."""
    return made(own, tensor, (1, *tensor.dims), lambda: numbers(tensor)[None], coded_of(tensor))


def gate_up_of_experts(own: str, gates: StoredTensor, ups: StoredTensor, kept: str) -> StoredTensor:
    """[E, 2N, K] of two tensors [E, N, K], or [E, K, 2N], gates and ups perhaps in turn; likewise biases [E, N]."""
    n_experts, n, *rest = gates.dims
    coded = coded_of(gates, ups)

    def read() -> Array:
        both = [numbers(gates), numbers(ups)]
        if kept == ALTERNATING:
            joined = np.stack(both, axis=2).reshape(n_experts, 2 * n, *rest)
        else:
            joined = np.concatenate(both, axis=1)
        return joined if kept == ROWS else joined.swapaxes(1, -1)

    dims = (n_experts, 2 * n, *rest) if kept == ROWS else (n_experts, *rest, 2 * n)
    return made(own, gates, dims, read, coded, ups)


def down_of_experts(own: str, tensor: StoredTensor, kept: str) -> StoredTensor:
    """[E, K, N] as it lies, or [E, N, K]; a bias [E, K] as it lies."""
    if kept == ROWS or len(tensor.dims) != 3:  # whose shape fits, or is refused where the model's is known
        return as_it_is(own, tensor)
    n_experts, k, n = tensor.dims
    read: Callable[[], Array] = lambda: numbers(tensor).transpose(0, 2, 1)  # noqa: E731
    return made(own, tensor, (n_experts, n, k), read, coded_of(tensor))
