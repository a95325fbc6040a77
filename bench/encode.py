"""Texts a second through an encoder: artifacts, transformers and ONNX Runtime, in turns, in one process.

    python bench/encode.py --shape minilm-l6 [--dtypes f32,bf16,int8] [--tokens 16,128,512] [--batch 1,8] [--most N]
                           [--rounds 9] [--threads 1] [--folder build/encode] [--record bench/records/NAME.json]

The weights are random.  Each round asks everybody twice about each number of texts and tokens, so that its weights and
threads are awake; the second time counts, and a figure is the median over rounds.  With one thread it is the time of
the processor that counts, which others on the machine move less than the clock's.  All texts of a batch are as long as
each other, so that nobody fills anything up.  ONNX Runtime runs what PyTorch's exporter makes of the model, with its
own optimiser's fusions for BERT; its mean over tokens is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, BertConfig, PretrainedConfig, XLMRobertaConfig

import llmc
from llmc.bench.limits import cpu_name

BERT: dict[str, Any] = {"vocab_size": 30522, "max_position_embeddings": 512}
SHAPES: dict[str, PretrainedConfig] = {
    "minilm-l6": BertConfig(
        **BERT, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "bge-base": BertConfig(
        **BERT, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "e5-small": XLMRobertaConfig(
        vocab_size=250037,
        max_position_embeddings=514,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        type_vocab_size=1,
    ),
}
REST_S = 0.05
"""Between two measurements: threads of the one spin for a moment, and would share the CPUs with the other."""
Texts = list[list[int]]
Encoder = Callable[[Texts], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--dtypes", default="f32,bf16,int8", help="of artifacts: f32, bf16, or a --quant over bf16")
    parser.add_argument("--tokens", default="16,128,512")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--most", type=int, default=1 << 20, help="leave out more tokens than so many at once")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/encode"))
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    folder = options.folder / options.shape
    write_model(SHAPES[options.shape], folder)
    artifacts = {dtype: compiled(folder, dtype) for dtype in options.dtypes.split(",")}
    export(folder)
    if options.only_compile:
        return
    sizes = [(int(b), int(n)) for n in options.tokens.split(",") for b in options.batch.split(",")]
    sizes = [(batch, n_tokens) for batch, n_tokens in sizes if batch * n_tokens <= options.most]
    encoders: dict[str, Encoder] = {
        f"llmc {dtype}": artifact(path, options.threads) for dtype, path in artifacts.items()
    }
    encoders |= {
        "transformers f32": of_torch(folder, torch.float32, options.threads),
        "transformers bf16": of_torch(folder, torch.bfloat16, options.threads),
        "onnxruntime f32": of_onnx(folder / "model.onnx", options.threads),
    }
    clock = time.process_time if options.threads == 1 else time.perf_counter
    record = measure(encoders, sizes, options.rounds, clock) | {
        "clock": clock.__name__,
        "shape": options.shape,
        "machine": f"{cpu_name()}, {options.threads} threads",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    print(table(record))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def write_model(config: PretrainedConfig, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)


def compiled(folder: Path, dtype: str) -> Path:
    path = folder / f"{dtype}.so"
    if not path.is_file():
        quant = "none" if dtype in ("f32", "bf16") else dtype
        llmc.compile(folder, out=path, batch=(1, 8), dtype=dtype if quant == "none" else "bf16", quant=quant)
    return path


def artifact(path: Path, threads: int) -> Encoder:
    return llmc.load(path, threads=threads).embed


def of_torch(folder: Path, dtype: torch.dtype, threads: int) -> Encoder:
    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def encode(texts: Texts) -> Any:
        return model(torch.tensor(texts)).last_hidden_state.float().mean(1).numpy()

    return encode


def export(folder: Path) -> None:
    """The model as an ONNX file, with what ONNX Runtime's own tool fuses."""
    path = folder / "model.onnx"
    if path.is_file():
        return
    from onnxruntime.transformers import optimizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, attn_implementation="eager")
    ids = torch.zeros((2, 16), dtype=torch.long)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        model.eval(),
        (),
        str(path),
        kwargs={"input_ids": ids},
        dynamo=True,
        dynamic_shapes={"input_ids": axes},
    )
    config = model.config
    fused = optimizer.optimize_model(
        str(path), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    print("fused by ONNX Runtime's optimiser:", fused.get_fused_operator_statistics())
    fused.save_model_to_file(str(path))


def of_onnx(path: Path, threads: int) -> Encoder:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def encode(texts: Texts) -> Any:
        ids = np.array(texts, np.int64)
        return session.run(None, {name: ids})[0]

    return encode


def measure(
    encoders: dict[str, Encoder], sizes: Sequence[tuple[int, int]], rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Seconds of each, in turns."""
    times: dict[tuple[str, int, int], list[float]] = {}
    for number in range(rounds + 1):
        for batch, n_tokens in sizes:
            texts = [[1 + (7 * i + 11 * t) % 1000 for i in range(n_tokens)] for t in range(batch)]
            for name, encode in encoders.items():
                time.sleep(REST_S)
                encode(texts)
                began = clock()
                encode(texts)
                if number:  # the first brings everything into memory
                    times.setdefault((name, batch, n_tokens), []).append(clock() - began)
    results = [
        {
            "encoder": name,
            "batch": batch,
            "tokens": n_tokens,
            "ms": round(1e3 * statistics.median(found), 3),
            "ms_range": [round(1e3 * bound(found), 3) for bound in (min, max)],
            "tokens_per_s": round(batch * n_tokens / statistics.median(found)),
        }
        for (name, batch, n_tokens), found in times.items()
    ]
    return {"results": results, "rounds": rounds}


def table(record: dict[str, Any]) -> str:
    """Tokens a second, in Markdown."""
    sizes = list(dict.fromkeys((one["batch"], one["tokens"]) for one in record["results"]))
    found = {(one["encoder"], one["batch"], one["tokens"]): one["tokens_per_s"] for one in record["results"]}
    lines = [f"| {record['shape']} | {' | '.join(f'{b} × {n}' for b, n in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(one["encoder"] for one in record["results"]):
        lines.append(f"| {name} | {' | '.join(str(found[name, batch, n]) for batch, n in sizes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
