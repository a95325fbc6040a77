"""What a model says of itself."""

from __future__ import annotations

from typing import NamedTuple

from llmc.runtime import capi
from llmc.runtime.errors import LlmcError


class Info(NamedTuple):
    """Facts about a model; see llmc_info in include/llmc.h.  Counts are in elements."""

    n_vocab: int
    n_context: int
    n_threads: int
    max_step_tokens: int
    bos_token: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_tokens_free: int
    device: str
    program: int
    page_tokens: int
    sampling_bytes: int

    def check_masks(self, place: str) -> None:
        """Raise LlmcError when the artifact's runtime does not heed which tokens are allowed."""
        allowed = capi.Sampling.allowed
        if self.sampling_bytes < allowed.offset + allowed.size:  # fields may follow it some day
            fact = "the artifact's runtime cannot choose among some tokens only"
            raise LlmcError(fact, place=place, hint="compile the model again with this llmc")

    @classmethod
    def of(cls, raw: capi.Info) -> Info:
        device = (raw.device or b"CPU").decode("utf-8", "replace")
        return cls._make(device if name == "device" else getattr(raw, name) for name in cls._fields)
