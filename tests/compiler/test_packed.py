"""Checkpoints that were quantised: packed here as the formats are described, and read as the numbers they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmc
from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.packed import packing_of
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.report import notes_of_packing
from llmc.compiler.weights import Coded, Weight
from llmc.runtime.errors import LlmcError

Array = np.ndarray[Any, Any]
Made = tuple[dict[str, torch.Tensor], Array]
N, K, GROUP = 48, 64, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
RANDOM = np.random.default_rng(0)


def in_words(codes: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words of codes of `bits` bits, neighbours along `axis`; order: which neighbour lies lowest, and so on."""
    per_word = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).reshape(codes.shape[0], -1, per_word)
    words = np.zeros(codes.shape[:2], np.uint32)
    for place, neighbour in enumerate(order or range(per_word)):
        words |= codes[..., neighbour] << np.uint32(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def some_scales(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.uniform(0.001, 0.02, shape).astype(np.float32))


def gptq(bits: int = 4, version: int = 1, act_order: bool = False, group: int = GROUP) -> Made:
    groups = K // group
    codes = RANDOM.integers(0, 2**bits, (K, N))
    zeros = RANDOM.integers(0, 2**bits, (groups, N))
    scales = some_scales(groups, N).half()
    of_group = np.arange(K) // group
    if act_order:
        RANDOM.shuffle(of_group)
    ones = in_words(np.full((1, 32 // bits), version == 1), bits, 1)
    made = {
        ".qweight": in_words(codes, bits, 0),
        ".qzeros": in_words(zeros, bits, 1) - ones,
        ".scales": scales,
        ".g_idx": torch.from_numpy(of_group.astype(np.int32)),
    }
    return made, ((codes - zeros[of_group]) * scales.float().numpy()[of_group]).T.astype(np.float32)


def awq(group: int = GROUP) -> Made:
    codes, zeros = RANDOM.integers(0, 16, (K, N)), RANDOM.integers(0, 16, (K // group, N))
    scales = some_scales(K // group, N).half()
    packed = {name: in_words(values, 4, 1, AWQ_ORDER) for name, values in ((".qweight", codes), (".qzeros", zeros))}
    of_group = np.arange(K) // group
    return packed | {".scales": scales}, ((codes - zeros[of_group]) * scales.float().numpy()[of_group]).T


def words(bits: int = 4, group: int = GROUP, zeros: bool = False, act_order: bool = False) -> Made:
    half = 2 ** (bits - 1)
    codes = RANDOM.integers(-half, half, (N, K))
    scales = some_scales(N, K // group).bfloat16()
    offsets = RANDOM.integers(-half, half, (N, K // group)) * zeros
    of_group = np.arange(K) // group
    made = {".weight_packed": in_words(codes + half, bits, 1), ".weight_scale": scales}
    made[".weight_shape"] = torch.tensor([N, K])
    if zeros:
        made[".weight_zero_point"] = in_words(offsets + half, bits, 0)
    if act_order:
        RANDOM.shuffle(of_group)
        made[".weight_g_idx"] = torch.from_numpy(of_group.astype(np.int32))
    return made, ((codes - offsets[:, of_group]) * scales.float().numpy()[:, of_group]).astype(np.float32)


def int8(scales: torch.Tensor) -> Made:
    codes = RANDOM.integers(-128, 128, (N, K)).astype(np.int8)
    wide = scales.float().numpy().reshape(-1, 1)
    return {".weight": torch.from_numpy(codes), ".weight_scale": scales}, codes.astype(np.float32) * wide


def float8(scales: torch.Tensor, name: str = ".weight_scale") -> Made:
    codes = torch.from_numpy(RANDOM.normal(0, 50, (N, K)).astype(np.float32)).to(torch.float8_e4m3fn)
    return {".weight": codes, name: scales}, codes.float().numpy() * scales.float().numpy().reshape(-1, 1)


def nvfp4() -> Made:
    codes = RANDOM.integers(0, 16, (N, K)).astype(np.uint8)
    scales = torch.from_numpy(RANDOM.uniform(1, 448, (N, K // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    made = {".weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4), ".weight_scale": scales}
    made[".weight_global_scale"] = torch.tensor([321.0])
    return made, E2M1[codes] * np.repeat(scales.float().numpy() / np.float32(321), 16, axis=1)


def nf4(nested: bool, size: int = 64) -> Made:
    codes, table = RANDOM.integers(0, 16, N * K).astype(np.uint8), np.sort(RANDOM.uniform(-1, 1, 16)).astype(np.float32)
    blocks = max(N * K // size, 1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [N, K]}
    made = {".weight": torch.from_numpy(codes[::2] << 4 | codes[1::2])[:, None]}
    made[".weight.quant_map"] = torch.from_numpy(table)
    absmax = some_scales(blocks).numpy()
    made[".weight.absmax"] = torch.from_numpy(absmax)
    if nested:
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.25}
        of_bytes, outer = RANDOM.uniform(-1, 1, 256).astype(np.float32), RANDOM.uniform(0, 0.1, 2).astype(np.float32)
        inner = RANDOM.integers(0, 256, blocks).astype(np.uint8)
        absmax = of_bytes[inner] * np.repeat(outer, 32)[:blocks] + np.float32(0.25)
        made |= {".weight.absmax": torch.from_numpy(inner), ".weight.nested_quant_map": torch.from_numpy(of_bytes)}
        made[".weight.nested_absmax"] = torch.from_numpy(outer)
    text = bytearray(json.dumps(state).encode())
    made[".weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(text, dtype=torch.uint8)
    return made, (table[codes].reshape(blocks, -1) * absmax[:, None]).reshape(N, K)


def bnb_int8() -> Made:
    codes, scales = RANDOM.integers(-127, 128, (N, K)).astype(np.int8), some_scales(N)
    made = {".weight": torch.from_numpy(codes), ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return made, codes * (scales.numpy() / np.float32(127))[:, None]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def compressed(format: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


IN_WORDS = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)
IN_BYTES = compressed("int-quantized", {"num_bits": 8, "type": "int"}, num_bits=8, type="int", strategy="channel")
IN_FLOAT8 = compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[], Made]]] = {
    "gptq": (GPTQ, gptq),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, lambda: gptq(8)),
    "gptq of 2 bits, version 2": (GPTQ | {"bits": 2, "checkpoint_format": "gptq_v2"}, lambda: gptq(2, 2)),
    "gptq with a scale a row": (GPTQ | {"group_size": -1}, lambda: gptq(group=K)),
    "gptq in act-order": (GPTQ | {"desc_act": True}, lambda: gptq(act_order=True)),
    "awq": (AWQ, awq),
    "awq in groups beyond a row": (AWQ | {"group_size": 2**60}, lambda: awq(K)),
    "packed": (IN_WORDS, words),
    "packed with zeros": (IN_WORDS, lambda: words(zeros=True)),
    "packed in act-order": (IN_WORDS, lambda: words(act_order=True)),
    "packed, 8 bits a row": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        lambda: words(8, K),
    ),
    "int8": (IN_BYTES, lambda: int8(some_scales(N, 1).bfloat16())),
    "int8 a tensor": (IN_BYTES, lambda: int8(some_scales(1).bfloat16())),
    "float8": (IN_FLOAT8, lambda: float8(some_scales(1))),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, lambda: float8(some_scales(N, 1))),
    "float8 a tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, lambda: float8(some_scales())),
    "nf4": (BNB, lambda: nf4(False)),
    "nf4, quantised twice": (BNB, lambda: nf4(True)),
    "nf4 in blocks beyond the weight": (BNB, lambda: nf4(False, 2**60)),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
}


def save(folder: Path, made: dict[str, torch.Tensor]) -> None:
    tensors = {f"layer{end}": tensor.contiguous() for end, tensor in made.items()}
    save_file({"norm.weight": torch.ones(3), **tensors}, folder / "model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_that_codes_stand_for(name: str, tmp_path: Path) -> None:
    config, make = FORMATS[name]
    made, wanted = make()
    save(tmp_path, made)
    packing = packing_of({"quantization_config": config}, "config.json")
    assert packing is not None
    found = packing.join(open_checkpoint(tmp_path))
    assert sorted(found) == ["layer.weight", "norm.weight"]
    assert found["layer.weight"].dims == (N, K)
    values = found["layer.weight"].read()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, wanted)


CODED = {
    "gptq": Coded(4, GROUP),
    "gptq with zeros": Coded(4, GROUP, zeros=True),
    "gptq with zeros in act-order": Coded(4, 0, zeros=True),
    "gptq of 8 bits": Coded(8, GROUP),
    "gptq with a scale a row": Coded(4, K),
    "awq": Coded(4, GROUP, zeros=True),
    "packed": Coded(4, GROUP),
    "packed with zeros": Coded(4, GROUP, zeros=True),
    "packed in act-order": Coded(4),
    "packed, 8 bits a row": Coded(8, K),
    "int8": Coded(8),
    "fbgemm": None,
    "nf4": None,
}
"""What schemes are told of a weight."""
ZEROS = {
    "gptq with zeros": (GPTQ | {"sym": False}, gptq),
    "gptq with zeros in act-order": (GPTQ | {"sym": False, "desc_act": True}, lambda: gptq(act_order=True)),
}


@pytest.mark.parametrize("name", CODED)
def test_how_values_are_kept_is_told_before_they_are_read(name: str, tmp_path: Path) -> None:
    config, make = {**FORMATS, **ZEROS}[name]
    save(tmp_path, make()[0])
    packing = packing_of({"quantization_config": config}, "config.json")
    assert packing is not None
    assert packing.join(open_checkpoint(tmp_path))["layer.weight"].weight("w").coded == CODED[name]


def test_groups_that_no_column_is_of_are_no_hindrance(tmp_path: Path) -> None:
    made, wanted = gptq(group=2)
    one_more = {name: torch.cat([made[name], made[name][:1]]) for name in (".qzeros", ".scales")}
    save(tmp_path, made | one_more)
    packing = packing_of({"quantization_config": GPTQ}, "config.json")
    assert packing is not None
    np.testing.assert_array_equal(packing.join(open_checkpoint(tmp_path))["layer.weight"].read(), wanted)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "hqq"}, "quantised by hqq, which is not read"),
        ({"quant_method": "\x1b[2J"}, r"quantised by \\x1b\[2J, which is not read"),
        ({"quant_method": ["gptq"]}, "which is not read"),
        (GPTQ | {"bits": 3}, "gptq with bits 3"),
        (GPTQ | {"bits": True}, "gptq with bits True"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        (GPTQ | {"group_size": "many"}, "group_size many"),
        (AWQ | {"version": "gemv"}, "awq with version gemv"),
        (compressed("marlin-24"), "format marlin-24"),
        (compressed("pack-quantized", num_bits=3), "num_bits 3"),
        (compressed("pack-quantized", num_bits=4, strategy="group"), "group_size None"),
        (compressed("dense"), "no config_groups of weights"),
        (IN_WORDS | {"config_groups": []}, "no config_groups"),
        (IN_WORDS | {"config_groups": [1]}, "config_groups"),
        (IN_WORDS | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int3"}, "bnb_4bit_quant_type int3"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(LlmcError, match=said):
        packing_of({"quantization_config": config}, "config.json")


def spoiled(name: str, end: str, tensor: torch.Tensor | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, make = FORMATS[name]
    made, _ = make()
    return config, {each: value for each, value in {**made, end: tensor}.items() if value is not None}


STATE = {"shape": [N, K], "blocksize": 64, "nested_blocksize": 32, "nested_offset": 10**400}
BEYOND = torch.frombuffer(bytearray(json.dumps(STATE).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "end", "tensor", "said"),
    [
        ("gptq", ".scales", None, "lacks the tensor 'layer.scales'"),
        ("gptq", ".qweight", None, "lacks the tensor 'layer.qweight'"),
        ("gptq", ".scales", torch.ones(3, N), "'layer.weight' is no GPTQ of 4 bits"),
        ("gptq", ".scales", torch.ones(2, 0), "'layer.weight' is no GPTQ of 4 bits"),
        ("gptq", ".qweight", torch.ones(K // 8, N), "'layer.weight' is no GPTQ"),
        ("gptq", ".g_idx", torch.zeros(K - 1, dtype=torch.int32), "'layer.weight' is no GPTQ"),
        ("gptq", ".g_idx", torch.full((K,), 2, dtype=torch.int32), "names a group that has no scales"),
        ("awq", ".qzeros", torch.zeros(1, N // 8, dtype=torch.int32), "'layer.weight' is no AWQ"),
        ("awq", ".act.scales", torch.ones(K), "which the model does not know"),
        ("packed", ".weight_scale", torch.ones(N, 3), "is no integers packed in words"),
        ("packed", ".weight_shape", torch.tensor([N, -K]), "is no integers packed in words"),
        ("packed", ".weight_shape", None, "is no integers packed in words"),
        ("packed", ".weight_scale", None, "lacks the tensor 'layer.weight_scale'"),
        ("packed in act-order", ".weight_g_idx", torch.full((K,), 9), "names a group that has no scales"),
        ("int8", ".weight", None, "lacks the tensor 'layer.weight'"),
        ("int8", ".weight_scale", torch.ones(N + 1), "is no codes of 8 bits"),
        ("nvfp4", ".weight_scale", torch.ones(N, K // 16), "is no nvfp4"),
        ("fbgemm", ".weight_scale", torch.ones(2), "is no float8"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "no JSON of bitsandbytes"),
        ("nf4", ".weight.absmax", torch.ones(3), "is no weight in nf4"),
        ("nf4, quantised twice", ".weight.nested_absmax", None, "is no weight in nf4"),
        ("nf4, quantised twice", ".weight.quant_state.bitsandbytes__nf4", BEYOND, "is no weight in nf4"),
        ("bitsandbytes int8", ".weight_format", torch.tensor(1, dtype=torch.uint8), "do not lie by rows"),
        ("bitsandbytes int8", ".SCB", torch.ones(1), "is no int8"),
    ],
)
def test_tensors_that_do_not_go_together_are_named(
    name: str, end: str, tensor: torch.Tensor | None, said: str, tmp_path: Path
) -> None:
    config, made = spoiled(name, end, tensor)
    save(tmp_path, made)
    packing = packing_of({"quantization_config": config}, "config.json")
    assert packing is not None
    with pytest.raises(LlmcError, match=said):
        packing.join(open_checkpoint(tmp_path))["layer.weight"].read()


@pytest.mark.parametrize(
    ("config", "small"),
    [
        (GPTQ, "int4"),
        (GPTQ | {"group_size": 128}, "int4 --quant-group 128"),
        (GPTQ | {"group_size": 128, "sym": False}, "int4 --quant-group 128"),
        (AWQ | {"group_size": 64}, "int4"),
        (GPTQ | {"bits": 8}, "int8"),
        (IN_WORDS, "int4"),
        (compressed("pack-quantized", num_bits=4, strategy="channel"), "int4 --quant-group 128"),
        (compressed("pack-quantized", num_bits=4, strategy="channel", symmetric=False), "int4 --quant-group 128"),
        (IN_BYTES, "int8"),
        (IN_FLOAT8, "fp8"),
    ],
)
def test_what_keeps_a_checkpoint_small_is_told(config: dict[str, Any], small: str) -> None:
    packing = packing_of({"quantization_config": config}, "config.json")
    assert packing is not None
    assert packing.small == small


LINEAR = re.compile(r"(proj|w[123])\.weight$")


def in_gptq(folder: Path, out: Path, *, zeros: bool) -> Path:
    """The model with its linear layers in GPTQ, 4 bits in groups of 32, as older packages wrote it."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not LINEAR.search(name) or tensor.shape[1] % GROUP:
            tensors[name] = tensor.half()
            continue
        groups = tensor.float().numpy().reshape(len(tensor), -1, GROUP)
        ends = groups.min(-1), groups.max(-1)
        scales = ((ends[1] - ends[0]) / 15 if zeros else np.abs(groups).max(-1) / 7.5).astype(np.float16)
        wide = scales.astype(np.float32)
        of_groups = np.clip(np.rint(-ends[0] / wide), 1, 16).astype(int) if zeros else np.full(scales.shape, 8)
        codes = np.clip(np.rint(groups / wide[..., None]) + of_groups[..., None], 0, 15).astype(int)
        codes = codes.reshape(tensor.shape)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.qweight"] = in_words(codes.T, 4, 0)
        tensors[f"{stem}.qzeros"] = in_words(of_groups.T - 1, 4, 1)
        tensors[f"{stem}.scales"] = torch.from_numpy(np.ascontiguousarray(scales.T))
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    (out / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": GROUP, "sym": not zeros}))
    return out


@pytest.mark.parametrize(("zeros", "said"), [(False, "symmetric"), (True, "with zeros")])
def test_a_compiled_model_keeps_the_numbers_of_its_checkpoint(
    zeros: bool, said: str, tiny_model: Any, tmp_path: Path
) -> None:
    folder = in_gptq(tiny_model("llama"), tmp_path / "gptq", zeros=zeros)
    report = llmc.compile(folder, out=tmp_path / "model.so", quant="int4", dtype="f32", batch=(1,), max_sequence=31)
    kept = "int4 keeps the checkpoint's own numbers (GPTQ, 4 bits in groups of 32"
    assert f"{kept}, {said})" in report["notes"]
    assert report["certificate"]["kl_mean"] < 0.002


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (1.0, "int4 keeps the checkpoint's own numbers (GGUF, most in Q4_K), but for 25 %, which are int8"),
        (
            0.5,
            "int4 keeps 50 % of the checkpoint's own numbers (GGUF, most in Q4_K), but for 25 %, which are int8",
        ),
        (0.0, "int4 cannot hold the checkpoint's own numbers (GGUF, most in Q4_K), but for 25 %, which"),
    ],
)
def test_what_becomes_int8_beside_int4_is_said(kept: float, said: str) -> None:
    """Of what the checkpoint keeps as codes: the last one it does not."""
    weights = []
    for rows, bits, scheme in ((48, 4, Scheme(4, 32, zeros=True)), (16, 6, Scheme(8)), (640, 0, Scheme(8))):
        zeros = np.zeros((rows, 32), np.float32)
        weight = Weight("w", zeros.shape, zeros.copy, "f32", Coded(bits, 32) if bits else None)
        weights.append(QuantizedWeight(weight, scheme))
        weights[-1].kept = kept if scheme.bits == 4 else 0.0
    placed = [SimpleNamespace(value=SimpleNamespace(const_value=weight)) for weight in weights]
    source: Any = SimpleNamespace(packing=Packing("GGUF, most in Q4_K", dict, "int4"))
    programs: Any = [SimpleNamespace(weights=placed)]
    (note,) = notes_of_packing(source, programs, Scheme(4, 32))
    assert note.startswith(said)
