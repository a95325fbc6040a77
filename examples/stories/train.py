"""Train the demonstration model from nothing: stories, tokenizer, weights.

    python examples/stories/train.py --minutes 50

The stories are drawn from the grammar as they are needed, so none is seen twice. A byte-level BPE tokenizer is
trained on the first of them, then a small Llama on packed rows of <s> story </s> <s> story </s> ...; the learning
rate follows the clock (warm-up, then a cosine), so training ends with the time it was given. The model folder and a
checkpoint are written every few minutes; after a stop, the same command goes on from the checkpoint. The training
step is compiled by torch, which needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from evaluate import MODEL, grammar_bound, held_out_sequences, load, perplexity
from grammar import stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]
VOCABULARY = 2048
N_TOKENIZER_STORIES = 20_000
ROW = 512  # tokens
BATCH = 4  # rows
PEAK_RATE = 2e-3
WARM_UP = 0.03  # of the time
SAVE_EVERY_S = 300
SEED = 7


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training stories: any text goes in, the same text comes out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (story.text for story in islice(stories(held_out=False), N_TOKENIZER_STORIES))
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=ROW,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=ROW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # compiled, it is faster here than the fused kernel of the library
    return model


def batches(tokenizer: Any, first_seed: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Endless packed batches (BATCH, ROW) of training stories, each with the seed to go on from after it."""
    tokens: list[int] = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for story in stories(held_out=False, first_seed=first_seed):
        tokens += [bos, *tokenizer.encode(story.text, add_special_tokens=False), eos]
        if len(tokens) >= BATCH * ROW:
            yield torch.tensor(tokens[: BATCH * ROW]).view(BATCH, ROW), story.seed + 1
            del tokens[: BATCH * ROW]


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth.    progress in [0, 1]"""
    if progress < WARM_UP:
        return PEAK_RATE * (progress / WARM_UP + 0.001)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return PEAK_RATE * (0.01 + 0.99 * cosine)


class Training:
    """A model, its optimizer and how far it is: everything a checkpoint holds."""

    def __init__(self, folder: Path, checkpoint: Path, seconds: float) -> None:
        self.folder, self.checkpoint, self.budget_s = folder, checkpoint, seconds
        self.steps, self.seconds, self.next_seed = 0, 0.0, 0
        self.tokenizer = train_tokenizer()
        self.model = new_model(self.tokenizer)
        self.compiled: Any = torch.compile(self.model)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
        if checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds, self.next_seed = state["steps"], state["seconds"], state["next_seed"]
        print(f"going on from step {self.steps} ({self.seconds / 60:.1f} min)", flush=True)

    def step(self, rows: torch.Tensor) -> float:
        """One update on rows (BATCH, ROW); the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(min(self.seconds / self.budget_s, 1.0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.compiled(input_ids=rows, labels=rows, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())

    def run(self) -> None:
        """Train until the time is over, reporting every hundred steps, saving every few minutes."""
        last_save, total = self.seconds, 0.0
        clock = time.monotonic()
        for rows, next_seed in batches(self.tokenizer, self.next_seed):
            total += self.step(rows)
            self.next_seed = next_seed
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if self.steps % 100 == 0:
                rate = self.steps * BATCH * ROW / self.seconds
                minutes = self.seconds / 60
                print(f"step {self.steps}  {minutes:.1f} min  loss {total / 100:.4f}  {rate:.0f} tokens/s", flush=True)
                total = 0.0
            if self.seconds >= self.budget_s:
                break
            if self.seconds - last_save >= SAVE_EVERY_S:
                self.save()
                last_save = self.seconds
        self.save()

    def save(self) -> None:
        """Write the model folder and the checkpoint."""
        save_model(self.folder, self.model, self.tokenizer)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"steps": self.steps, "seconds": self.seconds, "next_seed": self.next_seed}
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, the weights rounded to bfloat16."""
    shipped = LlamaForCausalLM(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("backend", None)  # the class below loads in older releases of transformers too
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_metrics(training: Training, machine: str) -> None:
    """Measure the model as shipped on the held-out stories and write metrics.json beside it."""
    model, tokenizer = load(training.folder)
    score = perplexity(model, held_out_sequences(tokenizer))
    metrics = {
        "perplexity": round(score.perplexity, 4),
        "n_tokens": score.n_tokens,
        "grammar_perplexity": round(grammar_bound(score.n_tokens), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": training.steps,
        "n_training_tokens": training.steps * BATCH * ROW,
        "seconds": round(training.seconds),
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "command": f"python examples/stories/train.py --minutes {training.budget_s / 60:g}",
    }
    (training.folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def main() -> None:
    """Train for the given time, then measure."""
    parser = argparse.ArgumentParser(description="Train the stories model from nothing.")
    parser.add_argument("--minutes", type=float, default=50, help="how long to train")
    parser.add_argument("--out", type=Path, default=MODEL, help="the model folder to write")
    parser.add_argument("--checkpoint", type=Path, default=Path("stories.checkpoint"), help="where to keep the state")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="this machine, in words")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    training = Training(arguments.out, arguments.checkpoint, arguments.minutes * 60)
    training.run()
    arguments.checkpoint.unlink()
    write_metrics(training, arguments.machine)


if __name__ == "__main__":
    main()
