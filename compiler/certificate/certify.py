"""The parity certificate: the artifact against the model it was made from.

A few prompts are continued greedily by the artifact. The reference, Hugging Face transformers in float32 or, of an
.onnx file, ONNX Runtime (reference_onnx.py), then reads each whole text once: its logits at every position judge the
artifact's, and its most likely token at each position, where it equals the artifact's choice, is what the reference
itself would have generated (by induction, one pass stands for the whole greedy run).

The bar. float32: the largest logit error is at most 2e-4 of the logits' range. bf16: at most 1.5 times the error that
the reference makes in bf16. Both: a token may differ from the reference's only where the reference's own two best
logits lie closer together than twice the largest error.

A mixture of experts in bf16 now and then chooses an expert that is as good as another one to within rounding, and so
does the reference, elsewhere; there the error is no rounding, and the largest says little. So of a mixture it is the
geometric mean over positions that is at most 1.5 times the reference's, and its distributions may diverge by 0.01 nats
more than the reference's own.

Quantised weights and a KV cache narrower than the weights are meant to differ, so that such an artifact is judged by
its distributions alone: the mean over positions of their Kullback-Leibler divergence from the reference's, with the
weights as they were, in nats; beyond what is usual, beside what rounding costs the reference itself (bars.py).

Each adapter that an artifact holds by name has a certificate of its own in it, by the same bar: of sequences that
choose it, against the model with that adapter merged into its weights. So have pictures, where it takes them
(images.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.certificate import bars
from llmc.compiler.frontend.named_adapters import with_adapter
from llmc.compiler.graph import is_experts
from llmc.runtime import load
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel
    from llmc.compiler.quantization.quantize import Scheme

F32_BAR = 2e-4
LOW_PRECISION_BAR = 1.5
MIXTURE_BAR = 0.01
"""Nats beyond the reference's own in the same dtype."""
N_GREEDY = 32
TOP = 16
TEXTS = ("Once upon a time, there was a", 'The old man looked at the sea and said, "', "In the morning,")
Logits = NDArray[np.float32]
ReferenceLogits = Callable[[list[list[int]], str], list[Logits]]
"""(token sequences, dtype) -> logits [n_tokens, n_vocab] of each."""
Rounded = Callable[[list[list[int]], str], list[Logits]]
"""(token sequences, target) -> the reference's logits where its products are rounded as that target's are."""


@dataclass(frozen=True)
class Text:
    """A prompt, what the artifact made of it, and the artifact's logits at every position, [n_tokens, n_vocab]."""

    prompt: list[int]
    greedy: list[int]
    logits: Logits

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.greedy


def certify(
    artifact: Path,
    reference: ReferenceLogits,
    dtype: str,
    describe: dict[str, Any],
    quant: str | None = None,
    is_mixture: bool = False,
    adapter: str | None = None,
    rounded: Rounded | None = None,
) -> dict[str, Any]:
    """Compare an artifact with its reference.  -> the certificate; raises LlmcError below the bar.

    Of several programs it is the first that this machine can run; the certificate says which target's.

    quant: "int8", "int4", "fp8" or "mxfp4" for an artifact with such weights; "int8 KV cache" and the like for one
    that differs in its cache alone.  is_mixture: whether tokens choose experts.  adapter: what all sequences choose.
    rounded: who says what rounding costs the model, if anybody.
    """
    with load(artifact) as model:
        target = model.target
        texts = [continue_greedily(model, prompt, describe["model"], adapter) for prompt in prompts(model)]
    here = None if rounded is None else lambda tokens: rounded(tokens, target)
    certificate = judged(texts, reference, dtype, describe["model"], quant, is_mixture, here)
    return certificate | {"target": target, "reference": describe}


def judged(
    texts: Sequence[Text],
    reference: ReferenceLogits,
    dtype: str,
    model: str,
    quant: str | None,
    is_mixture: bool,
    rounded: Callable[[list[list[int]]], list[Logits]] | None = None,
) -> dict[str, Any]:
    """What the reference says of texts, in numbers; raises LlmcError below the bar.  The rest as `certify` has it."""
    tokens = [text.tokens for text in texts]
    exact = reference(tokens, "f32")
    own = None if dtype == "f32" or quant else reference(tokens, dtype)
    certificate = compare(texts, exact, own, dtype, is_mixture)
    if quant is not None:
        cost = None if rounded is None else lambda: float(divergence(exact, rounded(tokens)).mean())
        certificate |= bars.quantised(bars.LOGITS, certificate["kl_mean"], quant, cost)
    judge(certificate, model)
    return certificate


def judged_as(quant: str | None, dtype: str, kv_dtype: str) -> str | None:
    """The bar of an artifact with such weights and such a cache: a key of Bars.usual, or None: that of its dtype."""
    return quant or (None if kv_dtype in ("f32", dtype) else f"{kv_dtype} KV cache")


def reference_of(source: SourceModel) -> tuple[ReferenceLogits, dict[str, str]]:
    """Who judges, and the versions of what it is made of: ONNX Runtime for an .onnx file, else transformers."""
    if source.file is not None:
        import onnxruntime

        from llmc.compiler.certificate.reference_onnx import file_logits

        file = source.file
        return lambda tokens, dtype: file_logits(file, tokens, dtype), {"onnxruntime": onnxruntime.__version__}
    import torch
    import transformers

    from llmc.compiler.certificate.reference import reference_logits

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return lambda tokens, dtype: reference_logits(source, tokens, dtype), versions


def rounded_reference(source: SourceModel, scheme: Scheme | None) -> Rounded | None:
    """Who says what rounding by the scheme costs: transformers, with its products rounded."""
    if source.file is not None or scheme is None:
        return None
    from llmc.compiler.certificate.reference import reference_logits

    def rounded(tokens: list[list[int]], target: str) -> list[Logits]:
        return reference_logits(source, tokens, rounding=scheme, inputs=target.startswith("cpu"))

    return rounded


def certify_source(
    artifact: Path, source: SourceModel, quant: str | None = None, scheme: Scheme | None = None
) -> dict[str, Any]:
    """Compare an artifact with the model it was compiled from; see `certify`.  scheme: how its weights are rounded."""
    reference, versions = reference_of(source)
    describe = {"model": source.name, "dtype": "f32", "source_sha256": source.digest, "versions": versions}
    if source.embedding is not None:
        from llmc.compiler.certificate.embedding import certify_embedding

        rounded = rounded_reference(source, scheme)
        return certify_embedding(artifact, reference, source.embedding.size, source.dtype, describe, quant, rounded)
    if source.classification is not None:
        from llmc.compiler.certificate.labels import certify_labels

        return certify_labels(artifact, reference, source.dtype, describe, quant)
    is_mixture = any(map(is_experts, source.graph.graph))
    rounded = rounded_reference(source, scheme)
    certificate = certify(artifact, reference, source.dtype, describe, quant, is_mixture, rounded=rounded)
    if source.named:
        certificate["adapters"] = {}
    for named in source.named:  # each against the model that it makes, merged into the weights in float32
        merged = with_adapter(source, named)
        of_adapter, _ = reference_of(merged)
        said = describe | {"model": f"{source.name}, adapter {named.name}"}
        rounded = rounded_reference(merged, scheme)
        own = certify(artifact, of_adapter, source.dtype, said, quant, is_mixture, named.name, rounded)
        certificate["adapters"][named.name] = own
    if source.images is not None:
        from llmc.compiler.certificate.images import certify_images

        certificate["images"] = certify_images(artifact, source, describe, quant, is_mixture, scheme)
    return certificate


def prompts(model: Model) -> list[list[int]]:
    """Texts where there is a tokenizer, and token sequences drawn from a fixed seed, short and longer than a page."""
    info = model.info
    made = [model.encode(text) for text in TEXTS] if model.has_tokenizer else []
    rng = np.random.default_rng(2026)
    lengths = [n for n in (1, 7, 67, 150) if n == 1 or n + N_GREEDY <= info.n_context]
    made += [rng.integers(0, info.n_ids, n).tolist() for n in lengths]
    return [prompt for prompt in made if len(prompt) <= info.n_context]


def continue_greedily(model: Model, prompt: list[int], place: str, adapter: str | None = None) -> Text:
    """`place`: what to blame when there is nothing to choose from."""
    refuse_others_than_finite([model.logits(prompt, adapter)], "logits", place)
    most = min(N_GREEDY, model.info.n_context - len(prompt))
    greedy = model.tokens(prompt, max_tokens=most, ignore_eos=True, adapter=adapter)
    return Text(prompt, greedy, model.logits(prompt + greedy, adapter))


def refuse_others_than_finite(found: Iterable[Logits], what: str, place: str) -> None:
    """Raise LlmcError where what an artifact makes is NaN or infinite."""
    if not all(np.isfinite(rows).all() for rows in found):
        hint = "its weights hold NaN or infinity, or values that are too large; --verify off compiles them as they are"
        raise LlmcError(f"the model's {what} are not finite numbers", place=place, hint=hint)


def largest_of(dtype: str, largest: float, extent: float) -> dict[str, Any]:
    """What every certificate begins with.  largest: of the errors; extent: of the numbers that they are of.  Raises
    LlmcError where these are all the same, as those of weights that are zeros."""
    if extent == 0:
        fact = "the model gives the same number for everything, and there is nothing to compare"
        raise LlmcError(fact, hint="look for weights that are zeros; --verify off compiles them as they are")
    return {
        "status": "passed",
        "dtype": dtype,
        "max_logit_error": largest,
        "logit_range": extent,
        "relative_error": largest / extent,
    }


def compare(
    texts: Sequence[Text],
    exact: Sequence[Logits],
    own: Sequence[Logits] | None,
    dtype: str,
    is_mixture: bool = False,
) -> dict[str, Any]:
    """The numbers of the certificate.  exact: the float32 reference; own: the reference in the artifact's dtype."""
    errors = [float(np.abs(text.logits - e).max()) for text, e in zip(texts, exact, strict=True)]
    extent = max(float(np.ptp(e)) if e.shape[-1] > 1 else 0.0 for e in exact)
    divergences = divergence(exact, [text.logits for text in texts])
    agree = np.concatenate([text.logits.argmax(-1) == e.argmax(-1) for text, e in zip(texts, exact, strict=True)])
    largest = max(errors)
    certificate: dict[str, Any] = {
        **largest_of(dtype, largest, extent),
        "kl_mean": float(divergences.mean()),
        "kl_max": float(divergences.max()),
        "top1_agreement": float(agree.mean()),
        "n_positions": int(agree.size),
        "prompts": [record(text, e, largest) for text, e in zip(texts, exact, strict=True)],
    }
    if own is None:
        certificate["bar"] = {"relative_error": F32_BAR}
    else:
        reference_error = max(float(np.abs(o - e).max()) for o, e in zip(own, exact, strict=True))
        certificate |= {"reference_error": reference_error, "bar": {"times_reference_error": LOW_PRECISION_BAR}}
        if is_mixture:
            certificate |= compare_mixture([text.logits for text in texts], exact, own)
    return certificate


def compare_mixture(logits: Sequence[Logits], exact: Sequence[Logits], own: Sequence[Logits]) -> dict[str, Any]:
    """What a mixture is judged by besides: typical errors of a position, and the reference's own divergence."""
    own_divergence = float(divergence(exact, own).mean())
    return {
        "typical_error": typical_error(logits, exact),
        "reference_typical_error": typical_error(own, exact),
        "reference_kl_mean": own_divergence,
        "bar": {"times_reference_typical_error": LOW_PRECISION_BAR, "kl_mean": own_divergence + MIXTURE_BAR},
    }


def typical_error(logits: Sequence[Logits], exact: Sequence[Logits]) -> float:
    """The geometric mean over positions of a position's largest logit error."""
    errors = np.concatenate([np.abs(found - e).max(-1) for found, e in zip(logits, exact, strict=True)])
    return float(np.exp(np.log(np.maximum(errors, 1e-30)).mean()))


def record(text: Text, exact: Logits, largest_error: float) -> dict[str, Any]:
    """One prompt's part: what `llmc verify` replays without the reference."""
    first = len(text.prompt) - 1
    judged = exact[first : first + len(text.greedy)]
    wanted = judged.argmax(-1)
    best = np.sort(judged, -1)[:, -2:]
    differs = wanted != np.array(text.greedy)
    ties = differs & (best[:, 1] - best[:, 0] < 2 * largest_error)
    top = np.argsort(-exact[first])[:TOP]
    return {
        "tokens": text.prompt,
        "greedy": text.greedy,
        "reference_greedy": wanted.tolist(),
        "n_ties": int(ties.sum()),
        "n_wrong": int((differs & ~ties).sum()),
        "top_logits": {"ids": top.tolist(), "values": [float(v) for v in exact[first][top]]},
    }


def divergence(exact: Sequence[Logits], found: Sequence[Logits]) -> NDArray[np.float64]:
    """KL(exact || found) at each position of all texts, one behind the other."""
    return np.concatenate([kl(e, f) for e, f in zip(exact, found, strict=True)])


def kl(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """KL(reference || other) of the softmax distributions at each position, in nats."""
    p, q = log_softmax(reference), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def judge(certificate: dict[str, Any], model: str) -> None:
    """Refuse an artifact of `model` below the bar."""
    wrong = sum(prompt["n_wrong"] for prompt in certificate["prompts"])
    if certificate.get("quant"):
        wrong, said = 0, bars.beyond(bars.LOGITS, certificate, model) or ""
        failed = bool(said)
    elif certificate["dtype"] == "f32":
        failed = not certificate["relative_error"] <= F32_BAR
        said = f"logit error is {certificate['relative_error']:.1e} of the range, the bar is {F32_BAR:.0e}"
    elif "typical_error" in certificate:
        ratio = certificate["typical_error"] / max(certificate["reference_typical_error"], 1e-30)
        failed = not (ratio <= LOW_PRECISION_BAR and certificate["kl_mean"] <= certificate["bar"]["kl_mean"])
        said = f"a typical logit error is {ratio:.2f} times the reference's own in {certificate['dtype']}, the bar is "
        said += f"{LOW_PRECISION_BAR}; distributions diverge by {certificate['kl_mean']:.1e} nats, the bar is "
        said += f"{certificate['bar']['kl_mean']:.1e}"
    else:
        ratio = certificate["max_logit_error"] / max(certificate["reference_error"], 1e-30)
        failed = not ratio <= LOW_PRECISION_BAR
        own = f"the reference's own in {certificate['dtype']}"
        said = f"logit error is {ratio:.2f} times {own}, the bar is {LOW_PRECISION_BAR}"
    if not failed and not wrong:
        return
    fact = said if failed else f"{wrong} greedy tokens differ from the reference where it is in no doubt"
    raise mismatch(fact, model)


def mismatch(fact: str, model: str) -> LlmcError:
    """The error of an artifact of `model` below a bar."""
    hint = "this is a bug in llmc: please report the model; --verify off compiles without the check"
    return LlmcError(f"the compiled model does not match its source: {fact}", place=model, hint=hint)
