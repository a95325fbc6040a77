"""Small models of many families, whole, by the artifact's own runtime: do they say what float32 says on a CPU?

A kit has them with their weights (small_models.py).  Each is given texts whose logits are known: as a prompt, as a
prompt in parts, and token by token in a batch, one of whose sequences is a fork.  Two sequences run ahead of the host,
and must say what they say in steps; one is saved in a file, and what comes out of it must go on with the same bits.  At
last texts are written, with guesses and without, drawn, and with penalties, for which the host chooses.  A model that
reads texts whole is given them alone and together, and writes nothing.  Of one with adapters each text has its own, and
the first of them none.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import SMALL, Kit

STAGE = "families"
N_TEXTS, N_TOKENS = 3, 80
PARTS = (33, 34, 36)
"""Where a prompt is cut."""
ROOM = 2048
FORKED_AT, AHEAD = 41, 4
FEW_STEPS = 2
"""Of a batch, where LLMC_FEW_STEPS asks for them, as under a sanitizer; then one ahead of the host.  So few positions
are no typical ones: their distance is not judged."""
NEW, GUESSES, TIE = 12, 3, 6
"""Tokens of a text; guesses in a step; how far below the best a token may be that was chosen by other kernels than
judge it, in what logits may be off by."""
DRAWN: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_k": 20, "seed": 7},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 7},
)
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""How a kit's own models are unpacked: Python 3.10.12 and 3.11.4 are the first that know of filters."""
SLACK, LEAST = 2.5, 0.004
"""A GPU's distance may be so many times that of bf16 on a CPU, and this in any case."""

Array = np.ndarray[Any, Any]


def text(number: int, n_tokens: int) -> list[int]:
    drawn = np.random.default_rng(number).integers(3, n_tokens, N_TOKENS)
    return [int(token) for token in drawn]


def distance(found: Array, exact: Array) -> float:
    """Typically, at a position: the root of the mean square, in standard deviations of all logits.  Typically, since
    where two experts are equally good a position may take the other one."""
    errors = np.sqrt(np.square(found.astype(np.float64) - exact).mean(-1))
    return float(np.median(errors) / exact.std()) if np.isfinite(errors).all() else float("nan")


def items(kit: Kit) -> Iterator[str]:
    yield from kit.said.get("families", {})


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> distances from float32; raises ValueError: too far."""
    unpacked = tempfile.TemporaryDirectory(prefix="llmc-small-")
    folder = Path(unpacked.name)

    def run(name: str) -> dict[str, Any]:
        if not any(folder.iterdir()):
            with tarfile.open(kit.folder / SMALL) as file:
                file.extractall(unpacked.name, **SAFELY)
        with np.load(folder / f"{name}.npz") as known:
            exact = known["logits"].astype(np.float32)
        allowed = max(SLACK * kit.said["families"][name]["cpu_error"], LEAST)
        found = asked(folder / f"{name}.so", exact, allowed)
        for how, error in found.items():
            if not error <= allowed:  # NaN is no number below the limit
                raise ValueError(f"{how}: {error:.3g} standard deviations from float32 (allowed: {allowed:.3g})")
        return {**found, "allowed": allowed}

    return run


def asked(path: Path, exact: Array, allowed: float) -> dict[str, float]:
    """Distances of an artifact's logits from those that are known, however it is asked.  Raises ValueError: what it
    writes is not what its logits say."""
    from llmc.runtime import load

    few = bool(os.environ.get("LLMC_FEW_STEPS"))
    end = FORKED_AT + FEW_STEPS if few else N_TOKENS
    with load(path, kv_tokens=ROOM) as model:
        known = [text(number, model.info.n_tokens) for number in range(N_TEXTS)]
        if model.is_whole:
            alone = distance(np.array(model.logits(known[0])), exact[0])
            return {"as a text": alone, "in one step": distance(together(model, known), exact[:, -1])}
        rows, number = in_a_batch(model, known, end), int(bool(model.adapters))
        one, adapter = known[number], adapter_of(model, number)
        found = {
            "as a prompt": distance(np.array(model.logits(one, adapter)), exact[number]),
            "in parts": distance(in_parts(model, one, adapter), exact[number]),
        }
        if not few:
            found["in a batch"] = distance(rows, exact[[*range(N_TEXTS), 0], FORKED_AT:end])
            refuse_other_texts(model, one[:FORKED_AT], TIE * allowed, adapter)
        refuse_others_ahead(model, known[:2], 1 if few else AHEAD)
        refuse_another_of_a_file(model, one, adapter)
    return found


def adapter_of(model: Any, number: int) -> str | None:
    """The adapter that a text goes through, if the model has some."""
    names: tuple[str | None, ...] = (None, *model.adapters)
    return names[number % len(names)]


def sequences_of(model: Any, known: list[list[int]]) -> list[Any]:
    return [model.sequence(adapter_of(model, number)) for number in range(len(known))]


def together(model: Any, known: list[list[int]]) -> Array:
    """[texts, columns]: what texts are made into that are read in as few steps as there may be."""
    sequences = [model.sequence() for _ in known]
    try:
        model.step(list(zip(sequences, known, strict=True)))
        return np.array([sequence.logits() for sequence in sequences])
    finally:
        for sequence in sequences:
            sequence.close()


def in_parts(model: Any, ids: list[int], adapter: str | None) -> Array:
    with model.sequence(adapter) as sequence:
        cuts = zip((0, *PARTS), (*PARTS, len(ids)), strict=True)
        return np.concatenate([np.array(sequence.feed_for_logits(ids[start:end])) for start, end in cuts])


def in_a_batch(model: Any, known: list[list[int]], end: int) -> Array:
    """[sequences, tokens from FORKED_AT up to end, words]; the last sequence is a fork of the first."""
    sequences = sequences_of(model, known)
    try:
        model.step([(sequence, ids[:FORKED_AT]) for sequence, ids in zip(sequences, known, strict=True)])
        sequences.append(sequences[0].fork())
        rows = []
        for at in range(FORKED_AT, end):
            texts = zip(sequences, [*known, known[0]], strict=True)
            model.step([(sequence, ids[at : at + 1]) for sequence, ids in texts])
            rows.append([np.array(sequence.logits()) for sequence in sequences])
        return np.array(rows).swapaxes(0, 1)
    finally:
        for sequence in sequences:
            sequence.close()


def refuse_others_ahead(model: Any, known: list[list[int]], n: int) -> None:
    """Raises ValueError: tokens that are chosen while the GPU runs ahead are others than those of single steps."""
    from llmc.runtime.generation import GREEDY

    said = []
    for ahead in (True, False):
        sequences = sequences_of(model, known)
        model.step(list(zip(sequences, known, strict=True)))
        tokens = []
        for _ in range(n):
            if ahead:
                tokens.append(model.advance([(sequence, GREEDY) for sequence in sequences]))
            else:
                tokens.append([sequence.sample() for sequence in sequences])
                model.step([(sequence, [token]) for sequence, token in zip(sequences, tokens[-1], strict=True)])
        for sequence in sequences:
            sequence.close()
        said.append(tokens)
    if said[0] != said[1]:
        raise ValueError(f"ahead of the host it says {said[0]}, in steps {said[1]}")


def refuse_another_of_a_file(model: Any, ids: list[int], adapter: str | None) -> None:
    """Raises ValueError: a sequence that was saved and restored goes on with other logits."""
    with tempfile.TemporaryDirectory(prefix="llmc-saved-") as folder, model.sequence(adapter) as sequence:
        sequence.feed(ids[:FORKED_AT])
        sequence.save(Path(folder, "text.seq"))
        with model.restore(Path(folder, "text.seq")) as back:
            for one in (sequence, back):
                one.feed(ids[FORKED_AT : FORKED_AT + 1])
            if back.logits().tobytes() != sequence.logits().tobytes():
                raise ValueError("a sequence that was saved in a file goes on with other logits")


def refuse_other_texts(model: Any, prompt: list[int], tie: float, adapter: str | None = None) -> None:
    """Raises ValueError: greedy tokens are not the model's best but for ties (in standard deviations of its logits), or
    what is drawn from one seed is not the same twice."""
    for speculate in (0, GUESSES):
        said = model.tokens(prompt, NEW, ignore_eos=True, speculate=speculate, adapter=adapter)
        rows = np.array(model.logits([*prompt, *said], adapter))[len(prompt) - 1 : -1]
        gap = float((rows.max(-1) - rows[np.arange(NEW), said]).max() / rows.std())
        if not gap <= tie:
            raise ValueError(f"with {speculate} guesses a token is {gap:.3g} standard deviations below the best")
    for how in DRAWN:
        once, again = (model.tokens(prompt, NEW, ignore_eos=True, adapter=adapter, **how) for _ in range(2))
        if once != again:
            raise ValueError(f"drawn with {how} it says {once}, then {again}")


def report(journal: Journal) -> Iterator[str]:
    """How far each is from float32, as lines of Markdown."""
    for name, entry in journal.results(STAGE).items():
        errors = ", ".join(f"{how} {error:.2g}" for how, error in entry.items() if how.startswith(("as ", "in ")))
        yield f"- {name}: {errors} standard deviations from float32 (allowed: {entry['allowed']:.2g})"
