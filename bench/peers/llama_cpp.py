"""llama.cpp through llama-cpp-python's low-level API, built from source for this machine: bf16, q8_0, q4_0.

The GGUF is written in bf16 tensor by tensor, and quantised by llama.cpp's own quantiser (which keeps the output matrix
of q4_0 in Q6_K).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found, unused-ignore]
import llama_cpp as llama  # type: ignore[import-not-found, unused-ignore]
import numpy as np

from llmc.bench.peers.protocol import Loading, Refusal, serve, timed

FILE_TYPES = {"q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0}


class Context:
    """A llama_context for a number of sequences, all of the same length."""

    def __init__(self, model: Any, n_sequences: int, room: int, threads: int) -> None:
        params = llama.llama_context_default_params()
        per_sequence = -(-room // 256) * 256
        params.n_ctx = params.n_batch = per_sequence * n_sequences
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.handle = llama.llama_init_from_model(model, params)
        if not self.handle:
            raise Refusal("llama.cpp made no context")
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.memory = llama.llama_get_memory(self.handle)
        self.length = 0

    def truncate(self, prompts: list[list[int]]) -> None:
        """Keep the tokens of the prompts; where a state does not go back, read them again."""
        length = len(prompts[0])
        if self.length < length or not llama.llama_memory_seq_rm(self.memory, -1, length, -1):
            llama.llama_memory_clear(self.memory, True)
            self.length = 0
            if length:
                self.step(prompts)
        self.length = length

    def step(self, tokens: list[list[int]]) -> list[list[int]]:
        """Append tokens[s] to sequence s; the next token of each."""
        n = sum(map(len, tokens))
        batch = llama.llama_batch_init(n, 0, 1)
        batch.n_tokens, last, row = n, [], 0
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[row], batch.pos[row] = token, self.length + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = offset == len(ids) - 1
                row += 1
            last.append(row - 1)
        failed = llama.llama_decode(self.handle, batch)
        rows = [] if failed else [llama.llama_get_logits_ith(self.handle, i) for i in last]
        chosen = [[int(np.ctypeslib.as_array(row, (self.n_vocab,)).argmax())] for row in rows]
        llama.llama_batch_free(batch)
        if failed:
            raise Refusal(f"llama_decode returned {failed}")
        self.length += len(tokens[0])
        return chosen


class LlamaCpp:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        if config["model_type"] != "llama":
            raise Refusal(f"llama.cpp has no architecture {config['model_type']}")
        if precision == "bf16":
            write_gguf(config, out)
            return
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_TYPES[precision], 2
        plain = out.with_name("llama.cpp-bf16")
        if not plain.exists():
            raise Refusal("prepare llama.cpp:bf16 first: the quantiser reads it")
        if llama.llama_model_quantize(str(plain).encode(), str(out).encode(), ctypes.byref(params)):
            raise Refusal("llama.cpp's quantiser failed")

    def load(self, loading: Loading) -> str:
        llama.llama_backend_init()
        self.loading = loading
        self.model = llama.llama_model_load_from_file(str(loading.path).encode(), llama.llama_model_default_params())
        if not self.model:
            raise Refusal(f"llama.cpp does not read {loading.path}")
        self.contexts: dict[tuple[int, int], Context] = {}
        self.first = Context(self.model, 1, loading.room, loading.threads)
        return f"llama-cpp-python {version('llama-cpp-python')}"

    def prefill(self, prompt: list[int]) -> float:
        self.first.truncate([[]])
        return timed(lambda: self.first.step([prompt]))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        which = len(prompts), len(prompts[0])
        context = self.contexts.get(which)
        if context is None:
            context = Context(self.model, len(prompts), self.loading.room, self.loading.threads)
            self.contexts[which] = context
        context.truncate([prompt[:-1] for prompt in prompts])
        tokens = context.step([prompt[-1:] for prompt in prompts])
        seconds = []
        for _ in range(steps):
            chosen: list[list[list[int]]] = []
            seconds.append(timed(lambda tokens=tokens, chosen=chosen: chosen.append(context.step(tokens))))  # type: ignore[misc]
            tokens = chosen[0]
        return seconds


def write_gguf(config: dict[str, Any], out: Path) -> None:
    """Random bf16 weights in a file of the model's shapes, one tensor in memory at a time."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    dims = list(tensors(config))
    for name, shape in dims:
        kind, width = (gguf.GGMLQuantizationType.F32, 4) if len(shape) == 1 else (gguf.GGMLQuantizationType.BF16, 2)
        n_bytes = width * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pool = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    rounded = (pool.view(np.uint32) >> 16).astype(np.uint16)
    for _, shape in dims:
        size = int(np.prod(shape))
        values = np.ones(shape, np.float32) if len(shape) == 1 else np.resize(rounded, size).view(np.uint8)
        writer.write_tensor_data(values)
    writer.close()


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama in GGUF."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "token_embd.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (vocab, hidden)


if __name__ == "__main__":
    serve(LlamaCpp())
