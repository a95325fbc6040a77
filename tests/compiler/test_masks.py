"""A mask that arrives at attention is worked out, and is what attention was given, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from transformers import PretrainedConfig
from transformers.models.llama import modeling_llama

from llmc.compiler.frontend.export import export_graph
from llmc.compiler.frontend.export.masks import drop_masks, worked_out
from llmc.compiler.graph.causal_mask import LONGEST
from llmc.runtime.errors import LlmcError

CAUSAL, NEAR = "causal = LessOrEqual (columns, rows)", "near = Less (distance, eight)"
CHUNKS = "of_rows = Div (rows, eight) of_columns = Div (columns, eight) same = Equal (of_rows, of_columns)"
TEXT = """<ir_version: 10, opset_import: ["" : 23]>
part (int64[batch, sequence] input_ids, int64[batch, sequence] position_ids, float[batch, 4, sequence, 16] x) => (y)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] last = {1}, int64 four = {4}, int64 eight = {8},
int64 sixteen = {16},
int64 large = {5000}, float hidden = {-1e30}, float nothing = {0}, float[1, 1] weight = {1}>
{
    sizes = Shape <start = 1, end = 2> (position_ids)
    size = Squeeze (sizes)
    indices = Range (zero, size, one)
    rows = Unsqueeze (indices, last)
    columns = Unsqueeze (indices, first)
    distance = Sub (rows, columns)
    prefix = Less (columns, four)
    first16 = Less (columns, sixteen)
    scores = Mul (x, weight)
    LINES
    y = Attention <is_causal = 1> (x, x, x, mask)
}"""


def attention(window: int, *lines: str, is_causal: int = 1) -> ir.Graph:
    """Attention with this window, and a mask of these lines."""
    text = TEXT.replace("LINES", "\n".join(lines)).replace("is_causal = 1", f"is_causal = {is_causal}")
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    graph.initializers["weight"].const_value = None  # a weight, that is: none of the graph's own numbers
    graph.node(-1).metadata_props["llmc.window"] = str(window)
    return graph


@pytest.mark.parametrize(
    ("window", "lines"),
    [
        (0, [CAUSAL, "mask = Identity (causal)"]),
        (0, [CAUSAL, "mask = Where (causal, nothing, hidden)"]),
        (8, [CAUSAL, NEAR, "mask = And (causal, near)"]),
        (-8, [CAUSAL, CHUNKS, "mask = And (causal, same)"]),
    ],
)
def test_a_mask_that_says_nothing_new_goes(window: int, lines: list[str]) -> None:
    graph = attention(window, *lines)
    drop_masks(graph, 96)
    assert [value.name for value in graph.node(-1).inputs if value] == ["x", "x", "x"]


SPREAD = ["apart = Abs (distance)", "near = Less (apart, eight)"]


@pytest.mark.parametrize(
    ("window", "lines"),
    [
        (0, ["mask = Equal (distance, distance)"]),
        (8, [*SPREAD, "mask = Identity (near)"]),
        (8, [*SPREAD, "mask = Where (near, nothing, hidden)"]),
    ],
)
def test_the_mask_of_an_encoder_says_how_far_a_token_sees(window: int, lines: list[str]) -> None:
    graph = attention(0, *lines, is_causal=0)
    drop_masks(graph, 96)
    assert graph.node(-1).metadata_props["llmc.window"] == str(window)
    assert len([value for value in graph.node(-1).inputs if value]) == 3


def test_a_mask_that_is_neither_causal_nor_an_encoders_is_refused() -> None:
    with pytest.raises(LlmcError, match="neither causal nor that of an encoder: for token 1 the key 0 counts"):
        drop_masks(attention(0, CAUSAL, "mask = Identity (causal)", is_causal=0), 96)


def test_a_mask_that_hides_all_keys_is_refused() -> None:
    lines = ["mask = Less (distance, distance)"]
    with pytest.raises(LlmcError, match="for token 0 the key 0 does not count"):
        drop_masks(attention(0, *lines, is_causal=0), 96)


def test_an_encoders_window_that_is_longer_than_is_worked_out_is_refused() -> None:
    lines = ["apart = Abs (distance)", "mask = Less (apart, large)"]
    with pytest.raises(LlmcError, match="has the number 5000 in it, and may be a sliding window") as caught:
        drop_masks(attention(0, *lines, is_causal=0), 1 << 15)
    assert caught.value.hint == "ask for a --max-seq of at most 4608"


def test_of_a_window_that_is_longer_than_is_worked_out_the_beginning_is() -> None:
    graph = attention(5000, CAUSAL, "near = Less (distance, large)", "mask = And (causal, near)")
    mask = graph.node(-1).inputs[3]
    assert mask is not None
    assert worked_out(mask, 1 << 15, "here").shape == (LONGEST, LONGEST)


@pytest.mark.parametrize(
    ("window", "lines", "said"),
    [
        (0, [CAUSAL, NEAR, "mask = And (causal, near)"], "for token 8 the key 0 does not count, and there it does"),
        (8, [CAUSAL, "mask = Identity (causal)"], "than its window of 8: for token 8 the key 0 counts"),
        (-8, [CAUSAL, NEAR, "mask = And (causal, near)"], "than its chunks of 8: for token 8 the key 1 counts"),
        (-8, [CAUSAL, CHUNKS, "m = And (causal, same) mask = And (m, first16)"], "for token 16 the key 16 does not"),
        (0, [CAUSAL, "mask = Or (causal, prefix)"], "for token 0 the key 1 counts, and there it does not"),
        (0, ["mask = Cast <to = 1> (distance)"], "a bias by distance"),
        (0, [CAUSAL, "mask = Where (causal, scores, hidden)"], "depends on the tokens"),
        (0, ["mask = Reshape (causal, eight)", CAUSAL], "ONNX Runtime does not run a part of the graph"),
    ],
)
def test_another_mask_is_refused(window: int, lines: list[str], said: str) -> None:
    with pytest.raises(LlmcError, match=said):
        drop_masks(attention(window, *lines), 96)


def test_a_model_that_lets_tokens_see_ahead_is_refused(
    tiny_config: Callable[[str], PretrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = modeling_llama.create_causal_mask

    def with_prefix(*arguments: Any, **options: Any) -> Any:
        return make(*arguments, **options, or_mask_function=lambda batch, head, row, column: column < 4)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", with_prefix)
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    with pytest.raises(LlmcError, match="mask is another than causal attention: for token 0 the key 1 counts"):
        export_graph(config)
