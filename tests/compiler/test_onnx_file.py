"""frontend/onnx_file.py and frontend/onnx_tensors.py: what an .onnx file may be, and what is refused and how.

The decoder here is written by hand: embedding, one attention of two heads, logits, and a position added to each token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from llmc.cli.main import main
from llmc.compiler import graph
from llmc.compiler.certificate.reference_onnx import file_logits
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.onnx_file import open_onnx
from llmc.compiler.rewrite import rewrite
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

VOCABULARY, WIDTH = 23, 16
N_DAMAGES = 150
TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
RANDOM = np.random.default_rng(0)
EMBEDDING = RANDOM.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
OUTPUT = RANDOM.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
RATES = np.array([1 / 3, 1 / 5, 1 / 7, 1 / 9] * 4, np.float32)


def stored(array: np.ndarray[Any, Any], dtype: str, name: str) -> onnx.TensorProto:
    import ml_dtypes

    types = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    return numpy_helper.from_array(array.astype(types[dtype]), name)


def decoder(dtype: str = "f32") -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["tokens"]),
        helper.make_node("Unsqueeze", ["position_ids", "last"], ["at"]),
        helper.make_node("Cast", ["at"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "rates"], ["angles"]),
        helper.make_node("Cos", ["angles"], ["turns"]),
        helper.make_node("Cast", ["turns"], ["places"], to=TYPES[dtype]),
        helper.make_node("Add", ["tokens", "places"], ["x"], name="sum"),
        helper.make_node("Attention", ["x", "x", "x"], ["y"], is_causal=1, q_num_heads=2, kv_num_heads=2),
        helper.make_node("MatMul", ["y", "output"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "S"]) for n in ("input_ids", "position_ids")]
    logits = helper.make_tensor_value_info("logits", TYPES[dtype], ["B", "S", VOCABULARY])
    tensors = [
        stored(EMBEDDING, dtype, "embedding"),
        stored(OUTPUT, dtype, "output"),
        stored(RATES, "f32", "rates"),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def serialised(model: onnx.ModelProto) -> bytes:
    data: bytes = model.SerializeToString()  # type: ignore[no-untyped-call]
    return data


def write(folder: Path, model: onnx.ModelProto, *, apart: bool = False) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=apart, location="weights.bin", size_threshold=100)
    return path


def logits_of(path: Path, dtype: str | None = None) -> np.ndarray[Any, Any]:
    """Of the step graph, for one sequence, in ONNX Runtime."""
    step, _ = rewrite(load_source(str(path), dtype=dtype, max_sequence=32), None, None)
    for weight in step.graph.initializers.values():
        assert weight.const_value is not None
        weight.const_value.numpy()  # tables of positions are worked out when they are read
    shapes = {str(v.name): s for v, s in graph.bind(step, {"M": 6, "R": 6, "P": 1, "n_pages": 1}).items()}
    places = np.arange(6)
    feeds = {"tokens": places + 3, "positions": places, "rows": places, "page_table": np.zeros((6, 1), np.int64)}
    feeds |= {name: np.zeros(shapes[name], np.float32) for name in ("k_cache.0", "v_cache.0")}
    return graph.evaluate(step, feeds)["logits"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_file_means_what_onnx_runtime_says(tmp_path: Path, dtype: str, *, apart: bool) -> None:
    path = write(tmp_path, decoder(dtype), apart=apart)
    file = open_onnx(path)
    assert (file.dtype, file.is_float32, file.n_vocab) == (dtype, dtype == "f32", VOCABULARY)
    wanted = file_logits(file, [[3, 4, 5, 6, 7, 8]])[0]
    np.testing.assert_allclose(logits_of(path, "f32"), wanted, atol=2e-5)
    if dtype == "bf16":
        rounded = file_logits(file, [[3, 4, 5, 6, 7, 8]], dtype)[0]
        assert 1e-4 < np.abs(rounded - wanted).max() / np.ptp(wanted) < 0.05


def test_no_weight_is_read_and_what_makes_up_positions_stays_float32(tmp_path: Path) -> None:
    source = load_source(str(write(tmp_path, decoder("bf16"))), max_sequence=32)
    assert source.dtype == "bf16"
    tensors = {name: value.const_value for name, value in source.graph.graph.initializers.items()}
    assert {name for name, tensor in tensors.items() if isinstance(tensor, Weight)} == {"embedding", "output"}
    rates = tensors["rates"]
    assert rates is not None
    np.testing.assert_array_equal(rates.numpy(), RATES)


OURS = ["output.T", "page_table", "positions", "rows", "k_cache.0", "ints.0", "ints.m1", "axes.m1", "mask.one", "%3"]


def test_names_of_a_file_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Each of these, a number that is added to x, has the name of something that passes make."""
    model = decoder()
    wanted = logits_of(write(tmp_path, model), "f32")
    x = "x"
    for index, name in enumerate(OURS):
        model.graph.initializer.append(stored(np.full(1 + index % 2 * (WIDTH - 1), 0.125), "f32", name))
        added = helper.make_node("Add", [x, name], [f"ours.{index}"])
        model.graph.node.insert(7 + index, added)
        x = f"ours.{index}"
    for index in range(3):
        model.graph.node[7 + len(OURS)].input[index] = x
    given = logits_of(path := write(tmp_path, model), "f32")
    np.testing.assert_allclose(given, file_logits(open_onnx(path), [[3, 4, 5, 6, 7, 8]])[0], atol=2e-5)
    assert np.abs(given - wanted).max() > 0.1


def test_another_byte_in_the_middle_of_a_weight_is_another_file(tmp_path: Path) -> None:
    model = decoder()
    model.graph.initializer.insert(0, stored(np.zeros(1 << 13), "f32", "large"))
    path = write(tmp_path, model, apart=True)
    first, data = open_onnx(path).digest, bytearray((tmp_path / "weights.bin").read_bytes())
    assert open_onnx(path).digest == first
    data[4 << 12] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert open_onnx(path).digest != first


def test_configuration_beside_the_file_is_used(tmp_path: Path) -> None:
    path = write(tmp_path, decoder())
    (tmp_path / "config.json").write_text('{"model_type": "tiny", "max_position_embeddings": 48, "eos_token_id": 7}')
    source = load_source(str(path))
    assert (source.n_context, source.eos, source.name) == (48, (7,), tmp_path.name)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LlmcError, match="longest sequence") as refusal:
        load_source(str(path))
    assert "--max-seq" in str(refusal.value.hint)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a graph")


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [truncated, empty, text, gone])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = write(tmp_path, decoder())
    spoil(path)
    with pytest.raises(LlmcError, match=r"truncated, or is not ONNX|cannot be read") as refusal:
        load_source(str(path))
    assert refusal.value.place == str(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin", ""])
def test_weights_elsewhere_than_in_the_models_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write(folder, decoder(), apart=True)
    model = onnx.load(str(path), load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(serialised(model))
    with pytest.raises(LlmcError, match="is none of the model's folder"):
        load_source(str(path))


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write(folder, decoder(), apart=True)
    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(LlmcError, match="a link to another folder"):
        load_source(str(path))


def test_a_folder_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    path = write(folder, decoder(), apart=True)
    (folder / "weights.bin").rename(elsewhere / "weights.bin")
    (folder / "inside").symlink_to(elsewhere)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "inside/weights.bin"
    path.write_bytes(serialised(model))
    with pytest.raises(LlmcError, match="a link to another folder"):
        load_source(str(path))


def test_a_function_reads_no_file_elsewhere(tmp_path: Path) -> None:
    secret = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value="../secret")
    nodes = [helper.make_node("Constant", [], ["c"], value=secret), helper.make_node("Add", ["a", "c"], ["b"])]
    model = decoder()
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], nodes, model.opset_import))
    (tmp_path / "model.onnx").write_bytes(serialised(model))
    with pytest.raises(LlmcError, match="is none of the model's folder"):
        load_source(str(tmp_path / "model.onnx"), max_sequence=32)


@pytest.mark.parametrize(("first", "said"), [("Identity", "more than 131072 nodes"), ("F2", "calls itself")])
def test_functions_that_grow_without_end_are_refused(tmp_path: Path, first: str, said: str) -> None:
    model = decoder()
    model.opset_import.add(domain="own", version=1)
    for level in range(3):
        called = (first, "own" if first == "F2" else "") if level == 0 else (f"F{level - 1}", "own")
        names = ["a", *(f"t{i}" for i in range(59)), "b"]
        nodes = [helper.make_node(called[0], [x], [y], domain=called[1]) for x, y in pairwise(names)]
        model.functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], nodes, model.opset_import))
    model.graph.node[8].output[0] = "all"
    model.graph.node.append(helper.make_node("F2", ["all"], ["logits"], domain="own"))
    (tmp_path / "model.onnx").write_bytes(serialised(model))
    with pytest.raises(LlmcError, match=said):
        load_source(str(tmp_path / "model.onnx"), max_sequence=32)


def test_weights_that_are_made_of_each_other_again_and_again_take_no_time(tmp_path: Path) -> None:
    model = decoder()
    for i in range(2000):
        made = helper.make_node("Add", [f"w{i}" if i else "output"] * 2, [f"w{i + 1}"])
        model.graph.node.insert(i, made)
    path = write(tmp_path, model)
    assert "output" in open_onnx(path).weights


def test_weights_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, decoder(), apart=True)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:100])
    with pytest.raises(LlmcError, match=r"weights\.bin is truncated: 100 bytes"):
        load_source(str(path))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(LlmcError, match=r"weights\.bin with the weights is missing"):
        load_source(str(path))


def short_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def numbers_of_another_type(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[2]
    tensor.ClearField("raw_data")  # type: ignore[no-untyped-call]
    tensor.double_data.extend(RATES.tolist())


def negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -5


def strange_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[6].domain, model.graph.node[6].op_type = "com.microsoft", "MatMulNBits"


def branch(model: onnx.ModelProto) -> None:
    model.graph.node[6].attribute.append(helper.make_attribute("then_branch", model.graph))


def strange_cast(model: onnx.ModelProto) -> None:
    model.graph.node[5].attribute[0].i = TensorProto.COMPLEX128


def old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9


def unmade(model: onnx.ModelProto) -> None:
    model.graph.node[6].input[0] = "nothing"


def no_tokens(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = model.graph.node[0].input[1] = "pixel_values"


def no_logits(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[8].output[0] = "last_hidden_state"


def fixed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (short_tensor, "4 bytes; its shape"),
        (numbers_of_another_type, "not as many numbers"),
        (negative_size, "negative size"),
        (strange_type, "a type that is not compiled"),
        (foreign_operator, "MatMulNBits is none of standard ONNX"),
        (branch, "Add branches or loops"),
        (strange_cast, "Cast makes numbers of a type that is not compiled"),
        (old, "opset 9; 13 to 25"),
        (unmade, "takes 'nothing', which nothing before it makes"),
        (no_tokens, "no input input_ids"),
        (no_logits, "no result logits"),
        (fixed, "fixed shape"),
    ],
)
def test_a_graph_that_cannot_be_compiled_is_refused(
    tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], said: str
) -> None:
    model = decoder()
    spoil(model)
    (tmp_path / "model.onnx").write_bytes(serialised(model))
    with pytest.raises(LlmcError, match=said) as refusal:
        load_source(str(tmp_path / "model.onnx"), max_sequence=32)
    assert "model.onnx" in str(refusal.value.place)


def test_made_up_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="has its own weights"):
        load_source(str(write(tmp_path, decoder())), weights="random")


def test_damage_to_a_graph_is_noticed_or_means_what_it_says(tmp_path: Path) -> None:
    """One bit of what is no weight: an error of one line; or logits as before, or as ONNX Runtime says they are now."""
    path = write(tmp_path, decoder(), apart=True)
    whole, wanted = path.read_bytes(), logits_of(path, "f32")
    random = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for _ in range(N_DAMAGES):
        data = bytearray(whole)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        began = time.process_time()
        found[outcome(path, wanted)] += 1
        assert time.process_time() - began < 5
    assert found["noticed"] >= 0.75 * N_DAMAGES
    assert found["compiled, and no ONNX"] <= 0.02 * N_DAMAGES
    assert found["compiled to something else"] == found["several lines"] == 0


def outcome(path: Path, wanted: np.ndarray[Any, Any]) -> str:
    try:
        logits = logits_of(path, "f32")
    except LlmcError as error:
        return "noticed" if f"{error.fact}{error.place}".isprintable() else "several lines"
    if logits.shape == wanted.shape and np.allclose(logits, wanted, atol=2e-5):
        return "does no harm"
    try:
        said = file_logits(open_onnx(path), [[3, 4, 5, 6, 7, 8]])[0]
    except Exception:  # a class for each complaint
        return "compiled, and no ONNX"
    same = logits.shape == said.shape and np.allclose(logits, said, atol=2e-5, equal_nan=True)
    return "means what it says" if same else "compiled to something else"


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_file_is_one_clear_line_on_the_command_line(tmp_path: Path, place: float) -> None:
    path = write(tmp_path, decoder(), apart=True)
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data))])
    result = CliRunner().invoke(main, ["compile", str(path), "--max-seq", "32", "-o", str(tmp_path / "x.so")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the file is truncated, or is not ONNX\n")
    assert "Traceback" not in result.stderr
