"""llama.cpp's architectures: small models of each, written as its converter writes them, are read as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmc.compiler.frontend.gguf.architectures import ARCHITECTURES, MIXTRAL
from llmc.compiler.frontend.gguf.file import GgufFile, open_gguf
from llmc.compiler.frontend.gguf.kind import ALTERNATING, NAMES, ROWS, Architecture
from llmc.compiler.frontend.gguf.model import architecture_of, checkpoint_of, config_of, layer_types
from llmc.runtime.errors import LlmcError
from tests.compiler.test_gguf import F32, Tensors, write

Array = np.ndarray[Any, Any]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
IN_PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FILES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    name: (each, {}) for name, each in ARCHITECTURES.items() if not each.made
}
FILES["mixtral"] = (MIXTRAL, {"num_local_experts": 3, "num_experts_per_tok": 2})
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2moe": {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "qwen3moe": {**EXPERTS, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "olmoe": EXPERTS,
    "gpt-oss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 24, "attn_logit_softcapping": 20.0},
    "gemma3": {"query_pre_attn_scalar": 8, "sliding_window": 24},
    "phi3": {"sliding_window": 24},
    "llama4": {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": None,
    },
    "glm4moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        **IN_PART,
    },
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2, "attention_multiplier": 0.25},
    "exaone4": {"sliding_window": 24},
    "qwen3": {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 1.0}},
    "mistral3": {
        "rope_parameters": {
            **YARN,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.5,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.25,
        }
    },
    "granite": {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "glm4": {"attention_bias": True, **IN_PART},
    "command-r": {"logit_scale": 0.125, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.125, "sliding_window": 24},
    "stablelm": {"use_qkv_bias": True, **IN_PART},
    "nemotron": IN_PART,
}
COUNTED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def tensors_of(name: str, values: Array, known: Architecture, config: Any) -> dict[str, Array]:
    """The file's tensors for one of transformers'."""
    stem, _, end = name.rpartition(".")
    if not stem.startswith("model.layers."):
        own = next(each for each, other in NAMES.items() if other == stem)
        return {f"{own}.{end}": values + known.adds_one * (own == "output_norm" and end == "weight")}
    _, _, number, *inner = name.split(".")
    place = ".".join(inner)
    if known.experts and place.startswith(known.experts[0]):
        return experts_of(f"blk.{number}", place.rpartition(".")[2], values, known.experts[1])
    whole = {"self_attn.sinks": "attn_sinks.weight", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
    if place in whole:
        return {f"blk.{number}.{whole[place]}": values}
    stem = ".".join(inner[:-1])
    own = next(each for each, other in known.layers.items() if other == stem)
    if known.turns_neighbours and own in ("attn_q", "attn_k"):  # halves become neighbours
        heads = config.num_attention_heads if own == "attn_q" else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if own == "ffn_gate_inp_shexp":
        values = values[0]
    return {f"blk.{number}.{own}.{end}": values + known.adds_one * (own.endswith("norm") and end == "weight")}


def experts_of(layer: str, part: str, values: Array, kept: str) -> dict[str, Array]:
    part, _, bias = part.partition("_proj")
    end = "bias" if bias else "weight"
    if kept != ROWS and not bias:
        values = values.swapaxes(1, 2)
    if part == "down":
        return {f"{layer}.ffn_down_exps.{end}": values}
    gates, ups = (values[:, ::2], values[:, 1::2]) if kept == ALTERNATING else np.split(values, 2, axis=1)
    return {f"{layer}.ffn_gate_exps.{end}": gates, f"{layer}.ffn_up_exps.{end}": ups}


def fields_of(architecture: str, known: Architecture, config: Any) -> dict[str, Any]:
    fields = {name: getattr(config, own) for name, own in {**COUNTED, **known.fields}.items() if hasattr(config, own)}
    fields |= {"attention.key_length": SIZES["head_dim"], known.epsilon[0]: float(getattr(config, known.epsilon[1]))}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    fields |= {"rope.freq_base": float(rope["rope_theta"])}
    if known.turns_part:
        fields["rope.dimension_count"] = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] == "yarn":
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        fields |= {f"rope.scaling.yarn_{name}": rope[name] for name in ("beta_fast", "beta_slow")}
    if "mscale" in rope:
        fields["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        fields["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    said = {f"{architecture}.{name}": value for name, value in fields.items() if value is not None}
    return {"general.architecture": architecture, **said}


@pytest.mark.parametrize("kind", FILES)
def test_a_small_model_of_the_architecture_is_read_as_it_was(kind: str, tmp_path: Path) -> None:
    known, more = FILES[kind]
    architecture = "llama" if kind == "mixtral" else kind
    wanted = CONFIG_MAPPING[known.model_type](**SIZES | more | SPECIAL.get(kind, {}))
    torch.manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(wanted)
    tied = "lm_head.weight" if wanted.tie_word_embeddings else ""
    values = {name: torch.randn(t.shape).numpy() for name, t in model.state_dict().items() if name != tied}
    tensors: dict[str, Any] = {}
    for name, array in values.items():
        for own, each in tensors_of(name, array, known, wanted).items():
            tensors[own] = (each.shape, F32, np.ascontiguousarray(each, np.float32).tobytes())
    file = open_gguf(write(tmp_path / "m.gguf", fields_of(architecture, known, wanted), tensors))
    assert architecture_of(file) is known
    fields = config_of(file)
    made = CONFIG_MAPPING[fields["model_type"]](**fields)
    assert fields["architectures"] == [type(model).__name__]
    same = [name for name in fields if hasattr(wanted, name) and not name.endswith(("token_id", "architectures"))]
    assert {name: getattr(made, name) for name in same} == {name: getattr(wanted, name) for name in same}
    found = checkpoint_of(file, fields)
    assert found.keys() == values.keys()
    for name, array in values.items():
        assert found[name].dims == array.shape
        np.testing.assert_allclose(found[name].read(), array, rtol=0, atol=3e-7 * known.adds_one, err_msg=name)


@pytest.mark.parametrize(
    ("name", "dims", "said"),
    [
        ("blk.0.ffn_gate_exps.weight", (3, 4, 32), "has no other of its shape for up"),
        ("blk.0.ffn_gate.weight", (4, 32), "no tensor for the file's 'blk.0.ffn_gate.weight'"),
        (
            "blk.0.ffn_gate_exps.weight+blk.0.ffn_up_exps.weight",
            (384,),
            "ffn_gate_exps.weight' has the shape \\[384\\]",
        ),
    ],
)
def test_experts_that_are_not_whole_are_refused(name: str, dims: tuple[int, ...], said: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["mixtral"](**SIZES | FILES["mixtral"][1])
    fields = fields_of("llama", MIXTRAL, config)
    blocks = {each: (dims, F32, bytes(4 * int(np.prod(dims)))) for each in name.split("+")}
    file = open_gguf(write(tmp_path / "m.gguf", fields, blocks))
    with pytest.raises(LlmcError, match=said):
        checkpoint_of(file, config.to_dict())


def test_a_tensor_of_experts_keeps_a_shape_that_is_none_of_theirs(tmp_path: Path) -> None:
    """The binding of weights says what shape the model's has."""
    blocks: Tensors = {"blk.0.ffn_down_exps.bias": ((96,), F32, bytes(4 * 96))}
    config = CONFIG_MAPPING["gpt_oss"](**SIZES | SPECIAL["gpt-oss"])
    file = open_gguf(write(tmp_path / "m.gguf", fields_of("gpt-oss", FILES["gpt-oss"][0], config), blocks))
    assert [tensor.dims for tensor in checkpoint_of(file, config.to_dict()).values()] == [(96,)]


def test_a_model_of_more_layers_than_any_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"general.architecture": "llama4", "llama4.block_count": 1 << 31}, {})
    with pytest.raises(LlmcError, match="2147483648 layers"):
        config_of(open_gguf(path))


@pytest.mark.parametrize(("kind", "is_read"), [("qwen3moe", True), ("gpt-oss", False)])
def test_gates_and_ups_may_be_one_tensor(kind: str, is_read: bool, tmp_path: Path) -> None:
    known, _ = FILES[kind]
    fields = fields_of(kind, known, CONFIG_MAPPING[known.model_type](**SIZES | SPECIAL[kind]))
    values = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
    tensors: Tensors = {"token_embd.weight": ((40, 32), F32, bytes(4 * 40 * 32))}
    tensors["blk.0.ffn_gate_up_exps.weight"] = (values.shape, F32, values.tobytes())
    file = open_gguf(write(tmp_path / "m.gguf", fields, tensors))
    if not is_read:
        with pytest.raises(LlmcError, match="gates and ups in one, is not read here"):
            checkpoint_of(file, config_of(file))
        return
    found = checkpoint_of(file, config_of(file))["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(found.read(), values)


def test_layers_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    known, _ = FILES["glm4moe"]
    config = CONFIG_MAPPING["glm4_moe"](**SIZES | SPECIAL["glm4moe"])
    fields = {**fields_of("glm4moe", known, config), "glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    names = ("token_embd.weight", "blk.2.nextn.eh_proj.weight", "blk.2.attn_norm.weight")
    tensors: Tensors = {name: ((40, 32), F32, bytes(4 * 40 * 32)) for name in names}
    file = open_gguf(write(tmp_path / "m.gguf", fields, tensors))
    found = config_of(file)
    assert found["num_hidden_layers"] == 2
    assert list(checkpoint_of(file, found)) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [(None, [1, 1, 1, 0, 1, 1]), (3, [1, 1, 0] * 2), ([True, False] * 3, [1, 0] * 3), ([1], None)],
)
def test_which_layers_have_a_window_is_what_the_file_says(pattern: Any, windows: list[int] | None) -> None:
    fields: dict[str, Any] = {"general.architecture": "exaone4", "exaone4.attention.sliding_window": 8}
    fields |= {} if pattern is None else {"exaone4.attention.sliding_window_pattern": pattern}
    file = GgufFile(Path("m.gguf"), fields, {})
    if windows is None:
        with pytest.raises(LlmcError, match="no list of its layers"):
            layer_types(file, 6)
        return
    assert layer_types(file, 6) == ["sliding_attention" if one else "full_attention" for one in windows]


def test_a_model_in_several_files_is_one(tmp_path: Path) -> None:
    def piece(number: int, n: int = 2, total: int = 2, name: str = "") -> Path:
        fields = {"general.architecture": "llama", "split.count": n, "split.tensors.count": total}
        data = np.full(3, number, np.float32).tobytes()
        return write(tmp_path / f"m-{number:05}-of-{n:05}.gguf", fields, {name or f"t{number}": ((3,), F32, data)})

    first, second = piece(1), piece(2)
    file = open_gguf(first)
    assert (file.name, {name: tensor.read()[0] for name, tensor in file.tensors.items()}) == ("m", {"t1": 1, "t2": 2})
    with pytest.raises(LlmcError, match="not its first") as refused:
        open_gguf(second)
    assert refused.value.hint == "give the first, m-00001-of-00002.gguf"
    piece(2, name="t1")
    with pytest.raises(LlmcError, match="a piece of another model"):
        open_gguf(first)
    piece(2, total=3)
    with pytest.raises(LlmcError, match="have not all of its tensors"):
        open_gguf(piece(1, total=3))
    second.unlink()
    with pytest.raises(LlmcError, match="cannot be read: No such file"):
        open_gguf(first)
    with pytest.raises(LlmcError, match="its name does not say which"):
        open_gguf(first.rename(tmp_path / "m.gguf"))
