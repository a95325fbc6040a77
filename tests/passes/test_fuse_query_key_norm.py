"""passes/fuse_query_key_norm.py"""

from functools import partial
from typing import Any

import pytest

from llmc.passes.fuse_query_key_norm import fuse_query_key_norm
from tests.passes.test_fuse_head_norm import REFUSED, D, head_norm, layer, no_norm, whole_norm


@pytest.mark.parametrize("rotary_dim", [0, D])
def test_queries_and_keys_are_normalised_where_they_lie(build: Any, check: Any, rotary_dim: int) -> None:
    check(layer(build, whole_norm, whole_norm, rotary_dim=rotary_dim), fuse_query_key_norm, 1)


KINDS: dict[str, Any] = {
    "norms of heads": (head_norm, head_norm),
    "no norm of keys": (whole_norm, no_norm),
    "no norm of queries": (no_norm, whole_norm),
    "another norm": REFUSED["another norm"],
    "two epsilons": (whole_norm, partial(whole_norm, epsilon=1e-6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_norms_are_refused(build: Any, refused: Any, kind: str) -> None:
    refused(layer(build, *KINDS[kind]), fuse_query_key_norm)


def test_a_norm_with_another_user_is_refused(build: Any, refused: Any) -> None:
    model = layer(build, whole_norm, whole_norm)
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    norm.outputs[0].name = "seen"
    model.graph.outputs.append(norm.outputs[0])
    refused(model, fuse_query_key_norm)
