"""Held-out perplexity of any model folder on the stories kept from training.

    python examples/stories/evaluate.py [MODEL_FOLDER]

Definition, fixed: the first 256 held-out stories, each read alone as <s> story </s>; perplexity = exp(mean negative
log-likelihood) over every token after <s>, </s> included, each token weighted alike. The weights are taken as stored
(bfloat16) and the arithmetic is float32. `held_out_sequences` gives the very same tokens to other checks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from grammar import stories

MODEL = Path(__file__).parent / "model"
N_STORIES = 256


class Score(NamedTuple):
    """The perplexity of a model and the number of tokens it was asked to predict."""

    perplexity: float
    n_tokens: int


def held_out_sequences(tokenizer: Any, n_stories: int = N_STORIES) -> list[list[int]]:
    """The first held-out stories as token ids, each <s> story </s>."""
    texts = [story.text for story in islice(stories(held_out=True), n_stories)]
    return [
        [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        for text in texts
    ]


@torch.no_grad()
def perplexity(model: Any, sequences: Sequence[Sequence[int]]) -> Score:
    """exp of the mean negative log-likelihood of every token but the first of each sequence."""
    nats, n_tokens = 0.0, 0
    for sequence in sequences:
        tokens = torch.tensor([list(sequence)])  # (1, length)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()  # (length - 1, vocabulary)
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        n_tokens += len(sequence) - 1
    return Score(math.exp(nats / n_tokens), n_tokens)


def grammar_bound(n_tokens: int, n_stories: int = N_STORIES) -> float:
    """The perplexity of one who knows the grammar: the surprise of its draws spread over the held-out tokens.

    A model that has learned the grammar comes close to it. An upper bound of the best, for two derivations
    may print the same text.
    """
    nats = sum(story.nats for story in islice(stories(held_out=True), n_stories))
    return math.exp(nats / n_tokens)


def load(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, its stored weights widened to float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Print the held-out perplexity of a model folder."""
    parser = argparse.ArgumentParser(description="Held-out perplexity of a model folder on the stories.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL, help="a Hugging Face model folder")
    parser.add_argument("--stories", type=int, default=N_STORIES, help="how many held-out stories to read")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.folder)
    score = perplexity(model, held_out_sequences(tokenizer, arguments.stories))
    bound = grammar_bound(score.n_tokens, arguments.stories)
    print(f"perplexity {score.perplexity:.4f} over {score.n_tokens} tokens (the grammar itself: {bound:.4f})")


if __name__ == "__main__":
    main()
