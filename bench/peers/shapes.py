"""Models that llama.cpp and llmc read out of one GGUF file: what the file says of each, and its tensors' shapes.

The shapes are the published ones; of mixtures there are only the first layers, or experts, so that two systems fit on a
small machine.  Fields are those of llama.cpp's architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

Dims: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = dict[str, Dims]


class Shape(NamedTuple):
    """architecture, fields: what the file says, fields without the architecture's name before them.  tensors: their
    sizes, rows first."""

    architecture: str
    fields: dict[str, Any]
    tensors: Tensors


def shape(
    architecture: str,
    hidden: int,
    vocab: int,
    layers: Sequence[Tensors],
    *,
    tied: bool = False,
    last_norm: str = "output_norm",
    **fields: Any,
) -> Shape:
    """A model of layers.  fields: names with two underscores where the file's have a dot."""
    tensors: Tensors = {"token_embd.weight": (vocab, hidden), f"{last_norm}.weight": (hidden,)}
    if not tied:
        tensors["output.weight"] = (vocab, hidden)
    for number, layer in enumerate(layers):
        tensors |= {f"blk.{number}.{name}": dims for name, dims in layer.items()}
    said = {"block_count": len(layers), "embedding_length": hidden, "context_length": 32768, "vocab_size": vocab}
    said |= {name.replace("__", "."): value for name, value in fields.items()}
    return Shape(architecture, {"attention.layer_norm_rms_epsilon": 1e-6, **said}, tensors)


def norms(hidden: int, *names: str) -> Tensors:
    return {f"{name}.weight": (hidden,) for name in names}


def attention(hidden: int, n_heads: int, n_kv_heads: int, head: int) -> Tensors:
    rows = {"attn_q": n_heads * head, "attn_k": n_kv_heads * head, "attn_v": n_kv_heads * head}
    found: Tensors = {f"{name}.weight": (n, hidden) for name, n in rows.items()}
    return {**found, "attn_output.weight": (hidden, n_heads * head)}


def mlp(hidden: int, inner: int, end: str = "") -> Tensors:
    return {
        f"ffn_gate{end}.weight": (inner, hidden),
        f"ffn_up{end}.weight": (inner, hidden),
        f"ffn_down{end}.weight": (hidden, inner),
    }


def experts(hidden: int, inner: int, n: int) -> Tensors:
    return {
        "ffn_gate_inp.weight": (n, hidden),
        "ffn_gate_exps.weight": (n, inner, hidden),
        "ffn_up_exps.weight": (n, inner, hidden),
        "ffn_down_exps.weight": (n, hidden, inner),
    }


def heads(n: int, n_kv: int | list[int], size: int, **more: Any) -> dict[str, Any]:
    """The fields of attention."""
    sizes = {"attention__key_length": size, "attention__value_length": size, "rope__dimension_count": size}
    return {"attention__head_count": n, "attention__head_count_kv": n_kv, **sizes, **more}


def tinyllama() -> Shape:
    layer = norms(2048, "attn_norm", "ffn_norm") | attention(2048, 32, 4, 64) | mlp(2048, 5632)
    return shape("llama", 2048, 32000, [layer] * 22, feed_forward_length=5632, **heads(32, 4, 64))


def qwen3_06b() -> Shape:
    layer = norms(1024, "attn_norm", "ffn_norm") | norms(128, "attn_q_norm", "attn_k_norm")
    layer |= attention(1024, 16, 8, 128) | mlp(1024, 3072)
    return shape(
        "qwen3",
        1024,
        151936,
        [layer] * 28,
        tied=True,
        feed_forward_length=3072,
        **heads(16, 8, 128, rope__freq_base=1e6),
    )


def gemma3_1b() -> Shape:
    layer = norms(1152, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    layer |= norms(256, "attn_q_norm", "attn_k_norm") | attention(1152, 4, 1, 256) | mlp(1152, 6912)
    more: dict[str, Any] = {"rope__freq_base": 1e6, "attention__sliding_window": 512, "feed_forward_length": 6912}
    return shape("gemma3", 1152, 262144, [layer] * 26, tied=True, **heads(4, 1, 256), **more)


def mixture(
    name: str, n_layers: int, hidden: int, vocab: int, inner: int, n: int, used: int, of: dict[str, Any], norm: Dims
) -> Shape:
    """Attention and experts in every layer.  norm: sizes of queries' and keys' norms."""
    layer = norms(hidden, "attn_norm", "ffn_norm") | experts(hidden, inner, n)
    layer |= {"attn_q_norm.weight": norm[:1], "attn_k_norm.weight": norm[1:]}
    layer |= attention(hidden, of["attention__head_count"], of["attention__head_count_kv"], of["attention__key_length"])
    more: dict[str, Any] = {"expert_count": n, "expert_used_count": used, "feed_forward_length": inner}
    more["expert_feed_forward_length"] = inner
    return shape(name, hidden, vocab, [layer] * n_layers, **of, **more)


def qwen3_30b(n_layers: int) -> Shape:
    of = heads(32, 4, 128, rope__freq_base=1e6)
    return mixture("qwen3moe", n_layers, 2048, 151936, 768, 128, 8, of, (128, 128))


def olmoe(n_layers: int) -> Shape:
    return mixture("olmoe", n_layers, 2048, 50304, 1024, 64, 8, heads(16, 16, 128), (2048, 2048))


def gpt_oss(n_layers: int) -> Shape:
    layer = norms(2880, "attn_norm", "post_attention_norm") | experts(2880, 2880, 32) | attention(2880, 64, 8, 64)
    biases = {"attn_q": 4096, "attn_k": 512, "attn_v": 512, "attn_output": 2880, "ffn_gate_inp": 32}
    layer |= {f"{name}.bias": (n,) for name, n in biases.items()} | {"attn_sinks.weight": (64,)}
    layer |= {f"ffn_{name}_exps.bias": (32, 2880) for name in ("gate", "up", "down")}
    more: dict[str, Any] = {"expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 2880}
    more |= {"feed_forward_length": 2880, "attention__sliding_window": 128, "rope__freq_base": 150000.0}
    more |= {"rope__scaling__type": "yarn", "rope__scaling__factor": 32.0}
    more["rope__scaling__original_context_length"] = 4096
    return shape("gpt-oss", 2880, 201088, [layer] * n_layers, **heads(64, 8, 64), **more)


def qwen35_08b() -> Shape:
    """Three layers of the gated delta rule, with 16 heads of 128, then one of attention whose queries have gates."""
    of_all = norms(1024, "attn_norm", "post_attention_norm") | mlp(1024, 3584)
    attending: Tensors = {**attention(1024, 8, 2, 256), "attn_q.weight": (2 * 8 * 256, 1024)}
    attending |= of_all | norms(256, "attn_q_norm", "attn_k_norm")
    small: Tensors = {
        "ssm_alpha.weight": (16, 1024),
        "ssm_beta.weight": (16, 1024),
        "ssm_a": (16,),
        "ssm_dt.bias": (16,),
    }
    state: Tensors = {"attn_qkv.weight": (6144, 1024), "attn_gate.weight": (2048, 1024), "ssm_out.weight": (1024, 2048)}
    state |= {"ssm_conv1d.weight": (6144, 4), "ssm_norm.weight": (128,)} | small | of_all
    layers = [attending if layer % 4 == 3 else state for layer in range(24)]
    more: dict[str, Any] = {"ssm__conv_kernel": 4, "ssm__state_size": 128, "ssm__group_count": 16}
    more |= {"ssm__time_step_rank": 16, "ssm__inner_size": 2048, "full_attention_interval": 4}
    more |= {"feed_forward_length": 3584, "rope__dimension_sections": [11, 11, 10, 0], "rope__freq_base": 1e7}
    of = heads(8, 2, 256) | {"rope__dimension_count": 64}
    return shape("qwen35", 1024, 248320, layers, tied=True, **of, **more)


def granite4_tiny(n_layers: int) -> Shape:
    """Mamba 2 with 48 heads of 64 and a state of 128, attention in every tenth layer, experts in all."""
    of_all = norms(1536, "attn_norm", "ffn_norm") | experts(1536, 512, 64) | mlp(1536, 1024, "_shexp")
    inner, channels = 3072, 3072 + 2 * 128
    scan: Tensors = {"ssm_in.weight": (inner + channels + 48, 1536), "ssm_conv1d.weight": (channels, 4)}
    scan |= {"ssm_conv1d.bias": (channels,), "ssm_dt.bias": (48,), "ssm_a": (48, 1), "ssm_d": (48, 1)}
    scan |= {"ssm_norm.weight": (1, inner), "ssm_out.weight": (1536, inner)}
    attends = [layer % 10 == 5 for layer in range(n_layers)]
    layers = [of_all | (attention(1536, 12, 4, 128) if one else scan) for one in attends]
    more: dict[str, Any] = {"ssm__conv_kernel": 4, "ssm__state_size": 128, "ssm__group_count": 1}
    more |= {"ssm__time_step_rank": 48, "ssm__inner_size": inner, "rope__scaling__finetuned": False}
    more |= {"expert_count": 64, "expert_used_count": 6, "expert_feed_forward_length": 512}
    more |= {"expert_shared_feed_forward_length": 1024, "feed_forward_length": 512}
    more |= {"attention__scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0}
    of = heads(12, [4 * one for one in attends], 128)
    return shape("granitehybrid", 1536, 100352, layers, tied=True, **of, **more)


def mamba_370m() -> Shape:
    """Mamba 1 alone: 2048 channels with 16 states each."""
    hidden, inner, rank, size = 1024, 2048, 64, 16
    layer: Tensors = norms(hidden, "attn_norm") | {"ssm_in.weight": (2 * inner, hidden), "ssm_a": (inner, size)}
    layer |= {"ssm_conv1d.weight": (inner, 4), "ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * size, inner)}
    layer |= {"ssm_dt.weight": (inner, rank), "ssm_dt.bias": (inner,), "ssm_d": (inner,)}
    layer |= {"ssm_out.weight": (hidden, inner)}
    more: dict[str, Any] = {"ssm__conv_kernel": 4, "ssm__inner_size": inner, "ssm__state_size": size}
    more |= {"ssm__time_step_rank": rank, "attention__head_count": 0, "feed_forward_length": 0}
    return shape("mamba", hidden, 50280, [layer] * 48, tied=True, **more)


def lfm2_12b() -> Shape:
    of_all = norms(2048, "attn_norm", "ffn_norm") | mlp(2048, 8192)
    attending: Tensors = of_all | attention(2048, 32, 8, 64) | norms(64, "attn_q_norm", "attn_k_norm")
    conv: Tensors = {"shortconv.conv.weight": (2048, 3), "shortconv.in_proj.weight": (6144, 2048)}
    conv |= {"shortconv.out_proj.weight": (2048, 2048)} | of_all
    attends = [layer in (2, 5, 8, 10, 12, 14) for layer in range(16)]
    of = heads(32, [8 * one for one in attends], 64, rope__freq_base=1e6)
    more: dict[str, Any] = {"feed_forward_length": 8192, "shortconv__l_cache": 3, "last_norm": "token_embd_norm"}
    return shape("lfm2", 2048, 65536, [attending if one else conv for one in attends], tied=True, **of, **more)


def deepseek_v2_lite(n_experts: int) -> Shape:
    """Latents of 512 and turned keys of 64 for 16 heads; all layers but the first have experts, 64 in the model.  It is
    by its 27 layers that llama.cpp tells it from DeepSeek V2, so there are all."""
    of_all = norms(2048, "attn_norm", "ffn_norm") | norms(512, "attn_kv_a_norm")
    of_all |= {"attn_q.weight": (16 * 192, 2048), "attn_kv_a_mqa.weight": (576, 2048)}
    of_all |= {"attn_k_b.weight": (16, 512, 128), "attn_v_b.weight": (16, 128, 512)}
    of_all |= {"attn_output.weight": (2048, 16 * 128)}
    mixed = of_all | experts(2048, 1408, n_experts) | mlp(2048, 2 * 1408, "_shexp")
    more: dict[str, Any] = {"attention__head_count": 16, "attention__head_count_kv": 1}
    more |= {"attention__key_length": 576, "attention__value_length": 512, "rope__dimension_count": 64}
    more |= {"attention__key_length_mla": 192, "attention__value_length_mla": 128, "attention__kv_lora_rank": 512}
    more |= {"expert_count": n_experts, "expert_used_count": 6, "expert_feed_forward_length": 1408}
    more |= {"expert_shared_count": 2, "expert_weights_scale": 1.0, "leading_dense_block_count": 1}
    more |= {"expert_gating_func": 1, "feed_forward_length": 10944}
    return shape("deepseek2", 2048, 102400, [of_all | mlp(2048, 10944), *[mixed] * 26], **more)


SHAPES: dict[str, Callable[[], Shape]] = {
    "tinyllama-1.1b.gguf": tinyllama,
    "qwen3-0.6b.gguf": qwen3_06b,
    "gemma3-1b.gguf": gemma3_1b,
    "lfm2-1.2b.gguf": lfm2_12b,
    "qwen3.5-0.8b.gguf": qwen35_08b,
    "olmoe-1b-7b.gguf": lambda: olmoe(8),
    "qwen3-30b-a3b.gguf": lambda: qwen3_30b(6),
    "gpt-oss-20b.gguf": lambda: gpt_oss(3),
    "mamba-370m.gguf": mamba_370m,
    "granite-4-h-tiny.gguf": lambda: granite4_tiny(10),
    "deepseek-v2-lite.gguf": lambda: deepseek_v2_lite(16),
}
