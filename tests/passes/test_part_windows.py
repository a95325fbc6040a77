"""passes/part_windows.py"""

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler import graph
from llmc.compiler.ops import IN_WINDOWS
from llmc.passes.insert_kv_cache import insert_kv_cache
from llmc.passes.part_windows import part_windows

N, WIDTH = 6, 8
SIZES = {"num_heads": 2, "kv_num_heads": 2, "scale": 0.5, "softcap": 0.0, "window": 0, "layer": 0}


def attending(build: Any, within: str) -> ir.Model:
    """Two layers of a tower, as steps."""
    x = build.input("pixels", N, WIDTH)
    build.input("positions", N, dtype=ir.DataType.INT64)
    for layer in range(2):
        qkv = (build.op("MatMul", x, build.weight(f"{name}.{layer}", WIDTH, WIDTH)) for name in "qkv")
        x = build.op("llmc.BidirectionalAttention", *qkv, **SIZES)
    model: ir.Model = build.model(x)
    insert_kv_cache(model)
    model.metadata_props[IN_WINDOWS] = within
    return model


def test_attention_within_windows_is_told_of_them(build: Any, golden: Any, feeds: Any) -> None:
    model = attending(build, "1")
    given, before = feeds(model), graph.to_text(model)
    wanted = list(graph.evaluate(model, given).values())
    assert part_windows(model) == 1
    after = graph.to_text(model)
    golden(f"{before}\n\n// part_windows\n\n{after}")
    same = {f"window_{name}": given[name] for name in ("positions", "page_table")}
    for a, b in zip(wanted, graph.evaluate(model, given | same).values(), strict=True):
        assert np.array_equal(a, b)
    assert part_windows(model) == 0
    assert graph.to_text(model) == after


def test_without_windows_all_stays(build: Any, refused: Any) -> None:
    refused(attending(build, ""), part_windows)
