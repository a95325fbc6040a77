"""A folder in Hugging Face's layout with random bf16 weights: what the converters of other systems read.

    python -m bench.peers.source_model CONFIG.json DIR

Runs in the environment of `hf`.  Weights are written one tensor at a time; the tokenizer is a list of made-up words,
for converters that insist on one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    config, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(config["vocab_size"], folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.get("tie_word_embeddings", True) else set()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    write_safetensors(shapes, folder / "model.safetensors")


def write_safetensors(shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Eight bytes of length, a header in JSON, the tensors; vectors called weight are ones, as norms have them."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = (torch.randn(1 << 22) * 0.02).to(torch.bfloat16)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            pool = pool.roll(4099)  # converters keep equal tensors once, and a step would read less than the model
            size = torch.Size(shape).numel()
            ones = len(shape) == 1 and name.endswith("weight")
            values = torch.ones(size, dtype=torch.bfloat16) if ones else pool.repeat(size // len(pool) + 1)[:size]
            out.write(values.view(torch.uint8).numpy().data)


def write_tokenizer(n_vocab: int, folder: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, n_vocab)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
