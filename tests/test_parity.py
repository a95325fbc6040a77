"""What an artifact promises, against Hugging Face: the same tokens and logits, however they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError

N_GREEDY = 64
STORIES = Path(__file__).parent.parent / "examples/stories/model"


def llama(**changes: Any) -> LlamaConfig:
    fields = {
        "hidden_size": 128,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 250,
        "max_position_embeddings": 160,
    }
    return LlamaConfig(**(fields | changes))


def opt(**changes: Any) -> OPTConfig:
    fields = {
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 250,
        "max_position_embeddings": 160,
    }
    return OPTConfig(**(fields | changes))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama multi-head": llama(),
    "llama grouped-query": llama(num_key_value_heads=2),
    "llama tied embeddings": llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama head size 64": llama(head_dim=64),
    "llama head size 80": llama(head_dim=80, num_attention_heads=2, num_key_value_heads=1),
    "llama head size 128, biases": llama(
        head_dim=128, num_attention_heads=2, num_key_value_heads=2, attention_bias=True, mlp_bias=True
    ),
    "llama rope scaling": llama(rope_parameters=LLAMA3_ROPE),
    "opt": opt(),
    "opt 350m style": opt(word_embed_proj_dim=64, do_layer_norm_before=False),
}


@dataclass(frozen=True)
class Compiled:
    """An artifact, opened, and the folder it was compiled from."""

    folder: Path
    model: Model
    report: dict[str, Any]


def save(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random weights, large enough that its logits differ."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    folder = save(CONFIGS[request.param], tmp_path_factory.mktemp("model"))
    out = folder.parent / "model.so"
    report = llmc.compile(folder, out=out, dtype="f32", batch=(1, 3))
    with llmc.load(out, kv_tokens=1024) as model:
        yield Compiled(folder, model, report)


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 250, n)]


def test_greedy_tokens_and_logits_are_those_of_hugging_face(compiled: Compiled) -> None:
    reference = AutoModelForCausalLM.from_pretrained(compiled.folder, dtype=torch.float32)
    prompt = tokens(9)
    wanted = reference.generate(
        torch.tensor([prompt]), max_new_tokens=N_GREEDY, min_new_tokens=N_GREEDY, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        exact = reference(wanted).logits[0].numpy()
    made = compiled.model.tokens(prompt, max_tokens=N_GREEDY, ignore_eos=True)
    assert made == wanted[0, len(prompt) :].tolist()
    assert np.abs(compiled.model.logits(prompt + made) - exact).max() <= 2e-4 * np.ptp(exact)


def test_certificate_passed(compiled: Compiled) -> None:
    assert compiled.report["certificate"]["status"] == "passed"
    assert compiled.report["certificate"]["top1_agreement"] > 0.99


def test_chunked_prefill_and_decode_give_the_logits_of_one_prefill(compiled: Compiled) -> None:
    ids = tokens(150, seed=1)
    whole = compiled.model.logits(ids)
    for split in (1, 31, 64, 65, 100, 149):
        with compiled.model.sequence() as sequence:
            parts = [sequence.feed_for_logits(ids[:split])]
            parts += [sequence.feed_for_logits([token]) for token in ids[split : split + 5]]
            parts.append(sequence.feed_for_logits(ids[split + 5 :]))
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_interleaved_sequences_get_what_they_get_alone(compiled: Compiled) -> None:
    prompts = [tokens(n, seed=n) for n in (3, 40, 70, 1)]
    alone = [compiled.model.logits(prompt)[-1] for prompt in prompts]
    sequences = [compiled.model.sequence() for _ in prompts]
    compiled.model.step(list(zip(sequences, [prompt[:-1] or prompt for prompt in prompts], strict=True)))
    compiled.model.step([(s, p[-1:]) for s, p in zip(sequences, prompts, strict=True) if len(p) > 1])
    for sequence, wanted in zip(sequences, alone, strict=True):
        np.testing.assert_array_equal(sequence.logits(), wanted)
        sequence.close()


def test_a_prompt_may_fill_the_context_but_not_pass_it(compiled: Compiled) -> None:
    limit = compiled.model.info.n_context
    assert compiled.model.logits(tokens(limit)).shape == (limit, 250)
    with pytest.raises(LlmcError, match=str(limit)):
        compiled.model.logits(tokens(limit + 1))


@pytest.mark.parametrize("family", ["llama grouped-query", "opt"])
def test_bf16_errs_no_more_than_hugging_face_in_bf16(family: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[family], tmp_path / "model", torch.bfloat16)
    report = llmc.compile(folder, out=tmp_path / "model.so", dtype="bf16", batch=(1, 3), verify=False)
    ids = tokens(100, seed=5)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            logits[dtype] = model(torch.tensor([ids])).logits[0].float().numpy()
    exact = logits[torch.float32]
    with llmc.load(tmp_path / "model.so") as model:
        ours = np.abs(model.logits(ids) - exact).max()
    assert ours <= 1.5 * np.abs(logits[torch.bfloat16] - exact).max()
    assert report["certificate"] == {"status": "skipped", "reason": "--verify off"}


def test_demonstration_model_tells_the_story_hugging_face_tells(tmp_path: Path) -> None:
    llmc.compile(STORIES, out=tmp_path / "stories.so", dtype="f32", batch=(1,))
    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    with llmc.load(tmp_path / "stories.so") as model:
        prompt = model.encode("Once upon a time")
        made = model.tokens(prompt, max_tokens=N_GREEDY, ignore_eos=True)
        story = "".join(model.generate("Once upon a time", max_tokens=N_GREEDY))
    wanted = reference.generate(
        torch.tensor([prompt]), max_new_tokens=N_GREEDY, min_new_tokens=N_GREEDY, do_sample=False, eos_token_id=None
    )
    assert made == wanted[0, len(prompt) :].tolist()
    assert len(story.split()) > 30
