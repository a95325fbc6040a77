"""What calibration is worth: the demonstration model's distributions, and single layers of random weights.

    python bench/calibration.py stories [--work DIR]      divergence from bf16, perplexity; on three kinds of tokens
    python bench/calibration.py layers                    error of each layer's output on tokens not seen before

The demonstration model is nearly certain of most tokens of a story, so that it is also asked about texts that it made
at a temperature of 2, and about random tokens, which no calibration text resembles.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc import passes
from llmc.compiler.certificate import certify
from llmc.compiler.frontend import load_source
from llmc.compiler.graph.stream import Stream
from llmc.compiler.quantization import calibrate, quantize
from llmc.compiler.quantization.calibrate import Calibration, Fitting
from llmc.compiler.quantization.quantize import Scheme
from llmc.passes.quantize_weights import quantize_weights
from llmc.runtime.binding import Model

STORIES = Path(__file__).parents[1] / "examples" / "stories"
SCHEMES = (Scheme(8), Scheme(8, number="fp"), Scheme(4, 32), Scheme(4, 128))
N_TOKENS = 256
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
"""The widths of TinyLlama 1.1B."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["stories", "layers"])
    parser.add_argument("--work", type=Path, help="keep texts and artifacts here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.work or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for line in stories(folder) if options.what == "stories" else layers(folder):
            print(line, flush=True)


# -- the demonstration model ---------------------------------------------------------------------------------------


def stories(folder: Path) -> Iterator[str]:
    """A table: how far each quantised artifact's distributions are from bf16's, in nats, and its perplexity."""
    sys.path.insert(0, str(STORIES))
    from evaluate import held_out_sequences
    from grammar import stories as told
    from transformers import AutoTokenizer

    text = folder / "calibration.txt"
    text.write_text("\n".join(story.text for story in islice(told(held_out=False), 200)), encoding="utf-8")
    with compiled(folder / "bf16.so") as exact:
        held_out = held_out_sequences(AutoTokenizer.from_pretrained(STORIES / "model"), 120)
        begin = exact.info.bos_token
        made = [
            [begin, *exact.tokens([begin], max_tokens=N_TOKENS, temperature=2.0, seed=seed, ignore_eos=True)]
            for seed in range(1, 97)
        ]
        random = np.random.default_rng(0).integers(0, exact.info.n_vocab, (48, N_TOKENS)).tolist()
        texts = {"stories": held_out, "temperature 2": made, "random": random}
        wanted = {kind: [exact.logits(tokens[:N_TOKENS]) for tokens in tokens_of] for kind, tokens_of in texts.items()}
    yield f"| | {' | '.join(texts)} | perplexity | certificate |"
    yield "|---|---|---|---|---|---|"
    before = perplexity(wanted["stories"], held_out)
    for scheme in SCHEMES:
        for calibration in (None, text):
            path = folder / f"{scheme.name}-{scheme.group}{'-calibrated' * bool(calibration)}.so"
            with compiled(path, quant=scheme.name, quant_group=scheme.group or None, calibrate=calibration) as model:
                found = {kind: [model.logits(t[:N_TOKENS]) for t in tokens_of] for kind, tokens_of in texts.items()}
                certificate = model.manifest["certificate"]
            cells = [f"{divergence(wanted[kind], found[kind]):.5f}" for kind in texts]
            cells.append(f"{perplexity(found['stories'], held_out) / before - 1:+.3%}")
            cells.append(f"{certificate['kl_mean']:.4f}")
            yield f"| `{scheme}`{', calibrated' * bool(calibration)} | {' | '.join(cells)} |"


def compiled(path: Path, **options: Any) -> Model:
    llmc.compile(STORIES / "model", out=path, batch=(1,), **options)
    return llmc.load(path)


def divergence(wanted: list[Any], found: list[Any]) -> float:
    """The mean over all positions of KL(wanted || found), in nats."""
    return float(np.concatenate([certify.kl(a, b) for a, b in zip(wanted, found, strict=True)]).mean())


def perplexity(logits: list[Any], sequences: list[list[int]]) -> float:
    losses = []
    for found, tokens in zip(logits, sequences, strict=True):
        likely = certify.log_softmax(found[: len(tokens) - 1])
        losses.append(-likely[np.arange(len(likely)), tokens[1 : len(likely) + 1]])
    return math.exp(np.concatenate(losses).mean())


# -- single layers -------------------------------------------------------------------------------------------------


def layers(folder: Path) -> Iterator[str]:
    """A table: the share of each linear layer's output that is lost, |x (w - q)|² / |x w|², and what calibration leaves
    of it."""
    (folder / "config.json").write_text(json.dumps(LLAMA))
    source = load_source(str(folder), weights="random")
    plain = passes.run(source.graph, n_context=source.n_context)
    seen, unseen = (common_tokens(n, seed) for n, seed in ((calibrate.MOST_TOKENS, 0), (2048, 1)))
    calibration = Calibration("", "", tuple(calibrate.cut([seen], [], calibrate.SEQUENCE_TOKENS)))
    yield "| | layer | K | rounded | calibrated | ratio |"
    yield "|---|---|---|---|---|---|"
    for scheme in SCHEMES:
        model = plain.clone()
        quantize_weights(model, scheme)
        fitted = Fitting(model.clone().graph, calibration).run()
        stream = Stream(model.graph, calibrate.cut([unseen], [], calibrate.SEQUENCE_TOKENS))
        for node in model.graph:
            x, value = (*node.inputs, None)[:2]
            if x is None or value is None or not isinstance(value.const_value, quantize.QuantizedWeight):
                if node.outputs[0] is not model.graph.outputs[0]:
                    stream.run(node)
                continue
            exact, inputs = value.const_value.source.numpy(), np.concatenate(stream.values[x])
            whole = np.square(inputs @ exact.T).sum(dtype=np.float64)
            candidates = quantize.quantize(exact, scheme), next(fitted)[1]
            lost = [np.square(inputs @ (exact - q.values()).T).sum(dtype=np.float64) / whole for q in candidates]
            cells = f"{lost[0]:.2e} | {lost[1]:.2e} | {lost[1] / lost[0]:.2f}"
            yield f"| `{scheme}` | {value.const_value.source.name} | {exact.shape[1]} | {cells} |"
            stream.run(node, {value: exact})


def common_tokens(n: int, seed: int) -> list[int]:
    """Tokens as texts have them: the i-th most common in proportion to 1 / i (Zipf)."""
    shares = 1 / np.arange(1, LLAMA["vocab_size"] + 1)  # type: ignore[operator]
    found: list[int] = np.random.default_rng(seed).choice(len(shares), n, p=shares / shares.sum()).tolist()
    return found


if __name__ == "__main__":
    main()
