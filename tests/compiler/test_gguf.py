"""GGUF files, written here as the format is described: the model that they hold, and what is said of other files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmc.compiler.frontend import load_source, source
from llmc.compiler.frontend.config import read_config
from llmc.compiler.frontend.gguf import file as gguf_file
from llmc.compiler.frontend.gguf.file import open_gguf
from llmc.compiler.frontend.gguf.kind import LAYER_NAMES
from llmc.compiler.frontend.gguf.kind import NAMES as GGUF_NAMES
from llmc.compiler.frontend.gguf.model import config_of
from llmc.compiler.frontend.graph_cache import exported_graph
from llmc.compiler.frontend.packed.ggml import KINDS, LEVELS, iq4_nl, iq4_xs, numbers, q4_k, q6_k
from llmc.compiler.frontend.packed.mxfp4 import E2M1
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.compiler.weights import Coded
from llmc.runtime.errors import LlmcError
from llmc.runtime.text import load_tokenizer

Array = np.ndarray[Any, Any]
TinyModel = Callable[[str], Path]
Tensors = dict[str, tuple[tuple[int, ...], int, bytes]]
F32, F16, Q4_0, Q4_1, Q8_0, MXFP4 = 0, 1, 2, 3, 8, 39
TOKENS = "tokenizer.ggml.tokens"


@pytest.fixture
def same_graph(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the small Llama for whatever is its like: it is in the cache already."""
    fields = read_config(tiny_model("llama"))
    monkeypatch.setattr(source, "exported_graph", lambda _, place, **how: exported_graph(fields, place, **how))


def field(name: str, value: Any) -> bytes:
    """A field of the header; lists are of texts or of int32."""
    if isinstance(value, list):
        items = b"".join(text(each) if isinstance(each, str) else struct.pack("<i", each) for each in value)
        kind = 8 if value and isinstance(value[0], str) else 5
        return text(name) + struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    kind, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return text(name) + struct.pack("<I", kind) + struct.pack(f"<{form}", value)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def write(path: Path, fields: dict[str, Any], tensors: Tensors) -> Path:
    """tensors: dims as numpy has them, ggml's type, data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(field(name, value) for name, value in fields.items())
    data = b""
    for name, (dims, kind, blocks) in tensors.items():
        header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *reversed(dims), kind, len(data))
        data += blocks + bytes(-len(blocks) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def blocks_of(values: Array, kind: int) -> tuple[bytes, Array]:
    """The blocks of a tensor, and the numbers that they stand for."""
    if kind in (F32, F16):
        kept = values.astype(np.float16 if kind == F16 else np.float32)
        return kept.tobytes(), kept.astype(np.float32)
    groups = values.reshape(-1, 32)
    if kind == Q4_1:
        return with_minima(groups, values.shape)
    middle, top = (8, 15) if kind == Q4_0 else (0, 127)
    scales = (np.abs(groups).max(1, keepdims=True) / (7.5 if kind == Q4_0 else 127)).astype(np.float16)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)) + middle, -127 if kind == Q8_0 else 0, top)
    numbers = scales.astype(np.float32) * (codes - middle).astype(np.float32)
    packed = codes.astype(np.int8).view(np.uint8)
    if kind == Q4_0:
        packed = packed[:, :16] | packed[:, 16:] << 4
    return np.concatenate([scales.view(np.uint8), packed], axis=1).tobytes(), numbers.reshape(values.shape)


def with_minima(groups: Array, shape: tuple[int, ...]) -> tuple[bytes, Array]:
    """The same in Q4_1."""
    minima = groups.min(1, keepdims=True).astype(np.float16)
    scales = (np.ptp(groups, axis=1, keepdims=True) / 15).astype(np.float16)
    d, m = scales.astype(np.float32), minima.astype(np.float32)
    codes = np.clip(np.rint((groups - m) / d), 0, 15).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    blocks = np.concatenate([scales.view(np.uint8), minima.view(np.uint8), packed], axis=1)
    return blocks.tobytes(), (d * codes + m).reshape(shape)


def in_gguf(folder: Path, path: Path, kind: int, **changed: Any) -> tuple[Path, dict[str, Array]]:
    """The small Llama as a file, its matrices in blocks; and its numbers by the names of the folder's tensors."""
    config = json.loads((folder / "config.json").read_text())
    own_names = {own: name for name, own in {**GGUF_NAMES, **LAYER_NAMES}.items()}
    tensors, numbers = {}, {}
    for name, values in load_file(folder / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers") else None
        own = own_names[stem.removeprefix(f"model.layers.{layer}.")]
        own = f"blk.{layer}.{own}.{end}" if layer else f"{own}.{end}"
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(stem.rpartition(".")[2])
        blocks, numbers[name] = blocks_of(values, kind if values.ndim == 2 else F32)
        if heads:  # halves become neighbours
            pairs = values.reshape(config[heads], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            blocks, _ = blocks_of(pairs, kind)
        tensors[own] = (values.shape, kind if values.ndim == 2 else F32, blocks)
    fields = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    said = {name: value for name, value in {**fields, **changed}.items() if value is not None}
    return write(path, said, tensors), numbers


@pytest.mark.parametrize("kind", [F16, Q4_0, Q4_1, Q8_0], ids=["F16", "Q4_0", "Q4_1", "Q8_0"])
def test_a_file_is_the_model_of_its_folder(kind: int, tiny_model: TinyModel, tmp_path: Path, same_graph: None) -> None:
    folder = tiny_model("llama")
    path, numbers = in_gguf(folder, tmp_path / "m.gguf", kind, **{"split.count": 0})  # as merged files have it
    found, wanted = load_source(str(path)), load_source(str(folder))
    same = ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    assert {name: found.config[name] for name in same} == {name: wanted.config[name] for name in same}
    assert (found.name, found.eos, found.bos, found.n_context) == ("m", (2,), 1, wanted.n_context)
    assert found.dtype == "bf16"
    for name, values in numbers.items():
        np.testing.assert_array_equal(found.weights[name].unrounded().astype(np.float32), values, err_msg=name)
    scheme = Scheme(4, 32, zeros=kind == Q4_1)
    weight = found.weights["model.layers.0.self_attn.q_proj.weight"]
    assert quantize(weight.unrounded(), scheme).kept == (kind in (Q4_0, Q4_1))
    assert weight.coded == KINDS[kind].coded


def test_blocks_of_256() -> None:
    """Each of one number repeated, but for codes that say where they lie."""
    half = np.array([0.5, 0.25], np.float16).view(np.uint8)
    scales = np.array([1, 2, 3, 4, 5, 6, 7, 8, 0x21, 0x43, 0x65, 0x87], np.uint8)
    codes = np.arange(128, dtype=np.uint8)
    found = q4_k(np.concatenate([half, scales, codes])[None]).reshape(4, 2, 32)
    s, m = np.array([1, 2, 3, 4, 1, 3, 5, 7]).reshape(4, 2, 1), np.array([5, 6, 7, 8, 2, 4, 6, 8]).reshape(4, 2, 1)
    packed = codes.reshape(4, 32)
    np.testing.assert_array_equal(found, 0.5 * s * np.stack([packed & 15, packed >> 4], 1) - 0.25 * m)
    codes = np.repeat(np.array([0x72, 0b11100100], np.uint8), (128, 64))
    sixths = q6_k(np.concatenate([codes, np.arange(16, dtype=np.uint8), half[:2]])[None]).reshape(2, 4, 2, 16)
    wanted = np.array([2, 2 + 16, 7 + 32, 7 + 48]).reshape(1, 4, 1, 1) - 32
    assert KINDS[12].coded == Coded(4, 32, zeros=True)
    np.testing.assert_array_equal(sixths, 0.5 * np.arange(16).reshape(2, 4, 2, 1) * wanted * np.ones(16))


def test_codes_that_stand_for_levels() -> None:
    """Codes 0 … 15 in the low halves of bytes, and the other way round in the high ones."""
    half, codes = np.array([0.5], np.float16).view(np.uint8), np.arange(16, dtype=np.uint8)
    packed = codes | codes[::-1] << 4
    both = LEVELS[[*codes, *codes[::-1]]]
    np.testing.assert_array_equal(iq4_nl(np.concatenate([half, packed])[None])[0], 0.5 * both)
    upper, lower = np.array([0b11100100, 0b00011011], np.uint8), np.array([0x10, 0x32, 0x54, 0x76], np.uint8)
    found = iq4_xs(np.concatenate([half, upper, lower, np.tile(packed, 8)])[None])
    scales = np.array([0, 1 + 16, 2 + 32, 3 + 48, 4 + 48, 5 + 32, 6 + 16, 7]) - 32
    np.testing.assert_array_equal(found[0].reshape(8, 32), 0.5 * scales[:, None] * both)


def test_mxfp4_stays_what_it_is(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, 17), dtype=np.uint8)
    blocks[..., 0] = [[120, 121, 122], [127, 128, 126]]
    file = open_gguf(write(tmp_path / "m.gguf", {}, {"e": ((2, 3, 32), MXFP4, blocks.tobytes())}))
    values = numbers(file.tensors["e"])
    sixth = blocks[1, 1, 6]
    np.testing.assert_array_equal(values[1, 1, [5, 21]], [2 * E2M1[sixth & 15], 2 * E2M1[sixth >> 4]])
    scheme = Scheme.parse("mxfp4", None, False)
    assert scheme is not None
    assert quantize(values[0].astype(np.float32), scheme).kept == 1


def test_positions_are_stretched_as_llama_3_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, _ = in_gguf(tiny_model("llama"), tmp_path / "m.gguf", F16, **{"llama.rope.freq_base": 500000.0})
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (8192 / waves - 1) / 3
    divisors = np.where(waves < 2048, 1, np.where(waves > 8192, 32, 1 / ((1 - smooth) / 32 + smooth)))
    file = open_gguf(path)

    def put(values: Array) -> None:
        one: Tensors = {"rope_freqs.weight": ((8,), F32, values.astype(np.float32).tobytes())}
        file.tensors.update(open_gguf(write(tmp_path / "f.gguf", {}, one)).tensors)

    put(divisors)
    rope = config_of(file)["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 500000.0)
    put(divisors[::-1])
    with pytest.raises(LlmcError, match="scales positions otherwise"):
        config_of(file)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"general.architecture": "rwkv7"}, "architecture 'rwkv7' are not read"),
        ({"llama.attention.scale": 0.5}, "says llama.attention.scale, which is not read"),
        ({"llama.attention.causal": False}, "attention is not causal"),
        ({"llama.attention.head_count": 0}, "head_count is no count"),
        ({"llama.attention.head_count": "four"}, "head_count is no count"),
        ({"llama.block_count": None}, "block_count is no count"),
        ({"llama.embedding_length": 2**31, "llama.attention.key_length": 16}, "of a model 2147483648 wide"),
        ({"llama.rope.dimension_count": 8}, "turned in part"),
        ({"llama.rope.scaling.type": "longrope"}, "scaled by 'longrope'"),
        ({"split.count": 3}, "one of 3, and its name does not say which"),
        ({"general.architecture": "a" * 999}, "architecture 'a{60}…' are not read"),
        ({"general.alignment": 0}, "truncated, or is not GGUF"),
        ({TOKENS: ["a"], "tokenizer.ggml.model": "bert"}, "tokenizer of the kind 'bert'"),
        ({TOKENS: [1, 2], "tokenizer.ggml.model": "gpt2"}, "no list of texts"),
        ({TOKENS: ["a"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "splits texts as 'new'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    changed: dict[str, Any], said: str, tiny_model: TinyModel, tmp_path: Path, same_graph: None
) -> None:
    path, _ = in_gguf(tiny_model("llama"), tmp_path / "m.gguf", F16, **changed)
    with pytest.raises(LlmcError, match=said):
        load_source(str(path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blk.0.ssm_a", "no tensor for the file's 'blk.0.ssm_a'"),
        ("blk.0.ffn_up.bias", "no tensor for the file's 'blk.0.ffn_up.bias'"),
        ("blk.0.attn_k.weight", "has shape"),
        ("blk.0.attn_q.weight", "has the shape"),
    ],
)
def test_tensors_that_no_model_has_and_shapes_that_do_not_fit_are_named(
    name: str, said: str, tiny_model: TinyModel, tmp_path: Path, same_graph: None
) -> None:
    path, _ = in_gguf(tiny_model("llama"), tmp_path / "m.gguf", F16)
    file = open_gguf(path)
    kinds = {kind.name: number for number, kind in KINDS.items()}
    tensors = {each: (t.dims, kinds[t.dtype], t.read_bytes().tobytes()) for each, t in file.tensors.items()}
    tensors[name] = ((4, 64), F32, bytes(4 * 64 * 4))
    with pytest.raises(LlmcError, match=said):
        load_source(str(write(tmp_path / "n.gguf", file.fields, tensors)))


def test_the_tokenizer_is_the_files(tiny_model: TinyModel, tmp_path: Path, same_graph: None) -> None:
    letters = [*map(chr, range(33, 127)), "Ġ"]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "Ġab"]
    tokenizer = {
        TOKENS: tokens,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 3)],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    path, _ = in_gguf(tiny_model("llama"), tmp_path / "m.gguf", F16, **tokenizer)
    found = load_source(str(path))
    assert found.tokenizer_json is not None
    built = load_tokenizer(found.tokenizer_json.decode(), "m")
    assert built.get_vocab_size() == len(tokens)
    ids = built.encode("ab ab</s>b").ids
    assert [tokens[token] for token in ids] == ["<s>", "ab", "Ġab", "</s>", "b"]
    assert found.vocabulary is not None
    assert found.vocabulary[len(tokens) - 1] == b" ab"
    assert json.loads(found.chat or b"")["tokens"] == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(("pre", "wanted"), [("gpt-2", ["12", "a"]), ("refact", ["1", "2", "a"])])
def test_digits_are_split_where_the_files_tokenizer_does(
    pre: str, wanted: list[str], tiny_model: TinyModel, tmp_path: Path, same_graph: None
) -> None:
    tokens = [*map(chr, range(33, 127)), "12"]
    tokenizer = {TOKENS: tokens, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    path, _ = in_gguf(tiny_model("llama"), tmp_path / "m.gguf", F16, **tokenizer, **{"tokenizer.ggml.merges": ["1 2"]})
    built = load_tokenizer((load_source(str(path)).tokenizer_json or b"").decode(), "m")
    assert built.encode("12a").tokens == wanted


def test_a_file_that_is_not_there_is_no_folder() -> None:
    with pytest.raises(LlmcError, match="the file cannot be read: No such file") as refused:
        load_source("nowhere.gguf")
    assert refused.value.place == "nowhere.gguf"


def test_a_header_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", {TOKENS: ["a"] * 100}, {"a": ((3,), F32, bytes(12))})
    open_gguf(path)
    monkeypatch.setattr(gguf_file, "LONGEST_HEADER", 500)
    with pytest.raises(LlmcError, match="truncated, or is not GGUF"):
        open_gguf(path)


def test_a_file_that_is_damaged_is_no_gguf(tmp_path: Path) -> None:
    """Cut anywhere, or any byte of its header another: one line, or a file like it."""
    whole = write(
        tmp_path / "m.gguf",
        {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"], "llama.block_count": 1},
        {"a": ((2, 32), Q8_0, bytes(68)), "b": ((3,), F32, bytes(12))},
    ).read_bytes()
    open_gguf(tmp_path / "m.gguf")
    random, bad = np.random.default_rng(0), tmp_path / "bad.gguf"
    n_refused = 0
    for length in range(0, len(whole) - 32, 7):
        bad.write_bytes(whole[:length])
        with pytest.raises(LlmcError, match="truncated"):
            open_gguf(bad)
    for at in random.integers(0, len(whole) - 128, 150):
        bad.write_bytes(whole[:at] + bytes([random.integers(0, 256)]) + whole[at + 1 :])
        try:
            open_gguf(bad)
        except LlmcError:
            n_refused += 1
    assert n_refused > 50


def test_ggml_knows_the_sizes_of_blocks() -> None:
    for kind in KINDS.values():
        if kind.read is not None:
            assert kind.read(np.zeros((3, kind.n_bytes), np.uint8)).shape == (3, kind.n)
