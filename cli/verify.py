"""`llmc verify`: is the file what was written, and does it compute what it computed when it was compiled?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from llmc.cli.output import artifact_argument, compiler_installed, in_bytes, json_option, print_json
from llmc.runtime import ArtifactFile, LlmcError, load
from llmc.runtime.artifact import is_weights
from llmc.runtime.given import Example

if TYPE_CHECKING:
    from llmc.compiler.frontend.embedding import Task
    from llmc.runtime.artifact import HashProgress
    from llmc.runtime.binding import Model

ROUNDING = 1e-6
"""Share of the logits' range by which another machine's math library may differ."""
OTHER_TARGET = 1.5
"""How many times the certified error, or the compiler's bar, another target than the certificate's may be off."""


class Check(NamedTuple):
    """One thing that was verified."""

    name: str
    status: str
    """"passed", "failed" or "skipped"."""
    detail: str


@click.command(short_help="Check an artifact and replay its certificate.")
@artifact_argument
@click.option("--against", metavar="MODEL", help="Compare with the source model again (needs the compiler).")
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]DIR",
    multiple=True,
    help="With --against, an adapter that the model was compiled with, as it was given then. May be repeated.",
)
@json_option
def command(artifact: str, against: str | None, adapters: tuple[str, ...], as_json: bool) -> None:
    """Check an artifact's hashes, then replay the parity certificate that it carries."""
    if adapters and against is None:
        fact, hint = "an adapter is for comparing with the source again", "add --against MODEL"
        raise LlmcError(fact, place=f"--adapter {adapters[0]}", hint=hint)
    checks = []
    for check in verify(artifact, against, adapters):
        checks.append(check)
        if not as_json:
            click.echo(f"{check.status:<8} {check.name}: {check.detail}")
    failed = [check for check in checks if check.status == "failed"]
    if as_json:
        status = "failed" if failed else "passed"
        print_json({"path": artifact, "status": status, "checks": [check._asdict() for check in checks]})
    if failed:
        fact = f"verification failed: {failed[0].name}: {failed[0].detail}"
        raise LlmcError(fact, place=artifact, hint="compile the model again")


def verify(artifact: str, against: str | None, adapters: Sequence[str] = ()) -> Iterator[Check]:
    """The checks, each as soon as it is made.  An artifact that is damaged is not run."""
    with ArtifactFile.open(artifact) as file:
        others = ", ".join(name for name in file.sections if not is_weights(name))
        yield Check("sections", "passed", f"{others} are as written")
        weights = in_bytes(sum(section.n_bytes for name, section in file.sections.items() if is_weights(name)))
        try:
            with hashing_bar() as progress:
                file.check_weights(progress)
        except LlmcError as error:
            yield Check("weights", "failed", error.fact)
            return
        yield Check("weights", "passed", f"{weights} as written")
        manifest = file.manifest()
        targets = file.targets
    if against is not None:
        check_target(artifact, targets)
    yield from replay(artifact, manifest.get("certificate", {}))
    if against is not None:
        yield from compare(artifact, against, manifest, adapters)


def check_target(artifact: str, targets: Sequence[str]) -> None:
    """Raises LlmcError when this machine cannot run the artifact for any of its targets."""
    with compiler_installed():
        from llmc.compiler.target import missing, parse_target

        lacking = [", ".join(missing(parse_target(name))) for name in targets]
    if all(lacking):
        hint = "compare it on a machine that it was compiled for"
        raise LlmcError(f"this machine lacks {'; '.join(dict.fromkeys(lacking))}", place=artifact, hint=hint)


@contextmanager
def hashing_bar() -> Iterator[HashProgress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def replay(artifact: str, certificate: Mapping[str, Any]) -> Iterator[Check]:
    """The checks that repeat what the certificate records: its prompts, with their tokens and logits."""
    if certificate.get("status") != "passed":
        yield Check("certificate", "skipped", certificate.get("reason", "the artifact carries none"))
        return
    with load(artifact) as model:
        own = model.target == certificate.get("target", model.target)
        if "targets" in model.manifest:
            other = "" if own else f", the certificate is {certificate['target']}'s"
            yield Check("target", "passed", f"{model.target}{other}")
        yield from replay_prompts(model, certificate, own=own)
        for adapter, of_adapter in certificate.get("adapters", {}).items():
            yield from replay_prompts(model, of_adapter, own=own, of=f" of adapter {adapter}", adapter=adapter)
        if "images" in certificate:
            yield from replay_images(model, certificate["images"], own=own)


def replay_images(model: Model, certificate: Mapping[str, Any], *, own: bool) -> Iterator[Check]:
    """The checks of the prompts with a picture: the numbers of its rows are what this model now gives them."""
    with Example.of(model.info).seen(model) as rows:
        moved = rows.ids.start - certificate["first_row"]
        prompts = [
            prompt | {"tokens": [token + moved * (token >= certificate["first_row"]) for token in prompt["tokens"]]}
            for prompt in certificate["prompts"]
        ]
        yield from replay_prompts(model, {**certificate, "prompts": prompts}, own=own, of=" with a picture")


def replay_prompts(
    model: Model, certificate: Mapping[str, Any], *, own: bool, of: str = "", adapter: str | None = None
) -> Iterator[Check]:
    """The checks of a certificate's prompts.

    own: whether the certificate was made for the target that runs.  of: what it is of; "": the model alone.
    """
    if not certificate["prompts"]:  # no text has room for the picture
        return
    tolerance = certificate["max_logit_error"] + ROUNDING * certificate["logit_range"]
    if not own:
        tolerance = OTHER_TARGET * max(tolerance, bar_of(certificate))
    for index, prompt in enumerate(certificate["prompts"], 1):
        name = f"prompt {index}{of}"
        if prompt["greedy"]:  # a model for embeddings says nothing
            replayed = replay_greedy(model, name, prompt, adapter) if own else None
            yield replayed or replay_text(model, name, prompt, tolerance, adapter)
        yield replay_logits(model, name, prompt, tolerance, adapter)


def bar_of(certificate: Mapping[str, Any]) -> float:
    """The largest error of logits that the compiler accepts; 0 where the certificate has no such bar."""
    bar = certificate.get("bar", {})
    relative = bar.get("relative_error", 0.0) * certificate["logit_range"]
    times = bar.get("times_reference_error") or bar.get("times_reference_typical_error", 0.0)
    return float(relative or times * certificate.get("reference_error", 0.0))


def replay_text(
    model: Model, name: str, prompt: Mapping[str, Any], tolerance: float, adapter: str | None = None
) -> Check:
    """Check the greedy tokens of another target: each is this target's too, or as likely within the tolerance."""
    wanted, first = prompt["greedy"], len(prompt["tokens"]) - 1
    logits = model.logits(prompt["tokens"] + wanted, adapter)[first : first + len(wanted)]
    best = logits.argmax(-1)
    for index, (row, token, want) in enumerate(zip(logits, best, wanted, strict=True)):
        if not row[token] - row[want] <= 2 * tolerance:
            return Check(name, "failed", f"greedy token {index + 1} is {token}, was {want} when compiled")
    n_same = int((best == wanted).sum())
    return Check(name, "passed", f"{n_same} of {len(wanted)} greedy tokens as when compiled, the others as likely")


def replay_greedy(model: Model, name: str, prompt: Mapping[str, Any], adapter: str | None = None) -> Check:
    """Check the greedy tokens of the same target: they are the same on every machine."""
    wanted = prompt["greedy"]
    tokens = model.tokens(prompt["tokens"], max_tokens=len(wanted), ignore_eos=True, adapter=adapter)
    for index, (token, want) in enumerate(zip(tokens, wanted, strict=False)):
        if token != want:
            return Check(name, "failed", f"greedy token {index + 1} is {token}, was {want} when compiled")
    if len(tokens) != len(wanted):
        return Check(name, "failed", f"{len(tokens)} greedy tokens, were {len(wanted)} when compiled")
    return Check(name, "passed", f"{len(tokens)} greedy tokens as when compiled")


def replay_logits(
    model: Model, name: str, prompt: Mapping[str, Any], tolerance: float, adapter: str | None = None
) -> Check:
    """Check the logits after the prompt: those that are largest in the reference."""
    top = prompt["top_logits"]
    with model.sequence(adapter) as sequence:
        sequence.feed(prompt["tokens"])
        logits = sequence.logits()
    error = max(abs(float(logits[i]) - value) for i, value in zip(top["ids"], top["values"], strict=True))
    close = error <= tolerance  # false for NaN as well
    detail = f"{len(top['ids'])} largest logits of the reference: error {error:.1e}, at most {tolerance:.1e} wanted"
    return Check(name, "passed" if close else "failed", detail)


def compare(artifact: str, source: str, manifest: Mapping[str, Any], adapters: Sequence[str] = ()) -> Iterator[Check]:
    """Repeat the compiler's comparison with the source model; with its adapters, as they were given to the compiler."""
    with compiler_installed():
        from dataclasses import replace
        from pathlib import Path

        from llmc.compiler.certificate.certify import certify_source, judged_as
        from llmc.compiler.frontend import load_source
        from llmc.compiler.quantization.quantize import SCHEMES, Scheme

        model = manifest["model"]
        dtype, has_f16 = model["dtype"], model["dtype"] == "f16"
        task: Task = (
            "embed" if manifest.get("embedding") else "classify" if manifest.get("classification") else "generate"
        )
        how = {"has_f16": has_f16, "images": bool(manifest.get("images"))}
        sizes = {"dtype": dtype, "max_sequence": model["n_context"]}
        loaded = load_source(source, **sizes, adapters=adapters, task=task, **how)
        check_merged(source, model.get("adapters", ()), [adapter.record for adapter in loaded.adapters])
        rounded = manifest.get("quant") or {}
        quant = judged_as(rounded.get("name"), model["dtype"], manifest["kv_cache"]["dtype"])
        try:
            group = rounded["group"] if quant == "int4" else None
            scheme = Scheme.parse(quant, group, rounded["lm_head"]) if quant in SCHEMES else None
            if scheme is not None:
                scheme = replace(scheme, wide=frozenset(rounded.get("in_8_bits", ())))
            certificate = certify_source(Path(artifact), loaded, quant, scheme)
        except LlmcError as error:
            yield Check(f"against {source}", "failed", error.fact)
            return
    found = {f"against {source}": certificate}
    found |= {f"adapter {name} against {source}": own for name, own in certificate.get("adapters", {}).items()}
    for name, own in found.items():
        yield Check(name, "passed", f"logits within {own['relative_error']:.1e} of their range")
    for each in model.get("named_adapters", ()):
        if each["name"] not in certificate.get("adapters", {}):
            hint = f"give --adapter {each['name']}=DIR too"
            yield Check(f"adapter {each['name']} against {source}", "skipped", hint)


def check_merged(source: str, ours: Sequence[Mapping[str, str]], theirs: Sequence[Mapping[str, str]]) -> None:
    """Raise LlmcError where the artifact has other adapters merged into its weights than the model."""
    if [each["sha256"] for each in ours] == [each["sha256"] for each in theirs]:
        return
    has, given = (", ".join(each["name"] for each in listed) or "none" for listed in (ours, theirs))
    hint = "give each as it was given to the compiler: --adapter DIR" if ours else None
    raise LlmcError(f"adapters merged into the artifact: {has}; into the model: {given}", place=source, hint=hint)
