"""The parity certificate: how far the artifact is from the model it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmc.cli.html.artifact_facts import Facts
from llmc.cli.html.markup import Child, Markup, element, paragraph, section


def show(facts: Facts) -> Child:
    certificate = facts.manifest.get("certificate", {"status": "missing"})
    status = str(certificate.get("status", "missing"))
    if status != "passed":
        reason = certificate.get("reason", "the artifact carries none")
        return section("certificate", "Parity certificate", paragraph(badge(status), " ", str(reason)))
    several = len(facts.file.targets) > 1 and "target" in certificate
    where = f" On {certificate['target']}:" if several else ""
    of_file = "onnxruntime" in certificate.get("reference", {}).get("versions", {})
    judge = "its .onnx file in ONNX Runtime" if of_file else "Hugging Face's implementation"
    return section(
        "certificate",
        "Parity certificate",
        paragraph(
            badge(status),
            f"{where} Compared with {judge} in {certificate.get('dtype', '?')} at "
            f"{certificate.get('n_positions', '?')} positions when it was compiled; ",
            element("code", "llmc verify"),
            " replays it.",
        ),
        numbers(certificate),
        [prompt(facts, number, each) for number, each in enumerate(certificate.get("prompts", ()), 1)],
    )


def badge(status: str) -> Markup:
    return element("span", status, class_=f"badge {'good' if status.endswith('passed') else 'other'}")


def numbers(certificate: Mapping[str, Any]) -> Markup:
    """The measures that the certificate has."""
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        "relative_error": ("largest error of a logit", lambda v: f"{100 * v:.3g} % of their range"),
        "max_logit_error": ("… in logits", lambda v: f"{v:.3g}"),
        "top1_agreement": ("same most likely token", lambda v: f"{100 * v:.1f} %"),
        "kl_mean": ("KL divergence, mean", lambda v: f"{v:.2g} nats"),
        "kl_max": ("KL divergence, largest", lambda v: f"{v:.2g} nats"),
    }
    tiles = [
        element("div", element("dt", title), element("dd", write(certificate[name])))
        for name, (title, write) in known.items()
        if name in certificate
    ]
    return element("dl", tiles, class_="tiles")


def prompt(facts: Facts, number: int, said: Mapping[str, Any]) -> Markup:
    """A prompt, what the artifact answered, and whether the reference said the same, token by token."""
    ours, theirs = list(said.get("greedy", ())), list(said.get("reference_greedy", ()))
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    ties = f", {said['n_ties']} ties" if said.get("n_ties") else ""
    tokens = [token(facts, t, theirs[i] if i < len(theirs) else None) for i, t in enumerate(ours)]
    return element(
        "figure",
        element("blockquote", element("span", words(facts, said.get("tokens", ())), class_="quiet"), *tokens),
        element("figcaption", f"Prompt {number}: {same} of {len(ours)} greedy tokens as the reference says{ties}."),
        class_="prompt",
    )


def token(facts: Facts, ours: int, theirs: int | None) -> Markup:
    agrees = theirs is None or ours == theirs
    title = f"token {ours}" + ("" if agrees else f"; the reference: {theirs} {words(facts, [theirs or 0])!r}")
    return element("span", words(facts, [ours]), class_="token" if agrees else "token differs", title=title)


def words(facts: Facts, tokens: Sequence[int]) -> str:
    """The text of tokens, by the artifact's own vocabulary; ids where it has none."""
    known = facts.vocabulary
    if not known:
        return " ".join(map(str, tokens)) + " "
    return b"".join(known[t] for t in tokens if 0 <= t < len(known)).decode("utf-8", "replace")
