"""On a machine with an NVIDIA GPU: is llmc right, how fast is it, which schedules are best?

    python run.py -o OUT [--visit 1|2] [--resume results.jsonl] [--stages abcdefghijkl] [--seconds 330]

Needs this folder (bench/gpu/prepare.py makes it), NumPy and the driver; for what is compared, PyTorch and transformers.
Everything that is found is a line of OUT/results.jsonl at once; OUT/summary.md is written after every part.  A run that
was cut off goes on where it was with --resume.  plan.py says what is done first; docs/gpu.md shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.bench.gpu.journal import Journal
    from llmc.bench.gpu.kit import Kit
    from llmc.bench.gpu.plan import Part

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijkl"
"""Letters of the stages (stages.py)."""
KIT = "kit"
"""The stage of the line that says which kit's results these are."""
LATEST_S = 10
"""So long after its deadline a working process ends, even if it hangs, and even if nobody watches it."""
if (HERE / "kit.json").exists():
    sys.path.insert(0, str(HERE))


def main() -> None:
    from llmc.bench.gpu import facts, plan
    from llmc.bench.gpu.journal import Journal
    from llmc.bench.gpu.kit import Kit
    from llmc.bench.gpu.summary import write_summary

    options = arguments()
    kit, journal = Kit(options.kit, options.share), Journal(options.out / "results.jsonl")
    if options.fill:
        from llmc.bench.gpu.filled import fill

        fill(kit, options.fill.split("+"))
        return
    if options.work:
        from llmc.bench.gpu.work import work

        signal.alarm(max(1, int(options.deadline - time.time()) + LATEST_S))
        sys.exit(work(plan.named(options.work), kit, journal, options.deadline, options.since))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and not journal.path.exists():
        for other in options.resume:
            journal.take_over(other)
    if other := set(journal.latest(KIT)) - {kit.digest}:
        sys.exit(f"error: {journal.path} has what another kit found ({other.pop()}): name another folder with -o")
    journal.append(KIT, kit.digest, "done")
    parts = plan.parts_of(options.visit, options.stages)
    if journal.latest(facts.STAGE) and plan.FACTS in parts:
        journal.ask_again(facts.STAGE, facts.items(kit))
    seconds = options.seconds or plan.SECONDS[options.visit]
    print(f"{seconds:.0f} seconds; findings: {journal.path}, in words: {options.out / 'summary.md'}", flush=True)
    write_summary(kit, journal)
    visit(kit, journal, parts, options, time.time() + seconds)
    print((options.out / "summary.md").read_text())


def visit(kit: Kit, journal: Journal, parts: list[Part], options: argparse.Namespace, end_at: float) -> None:
    """The parts one after the other; meanwhile the models that are measured first are filled with weights."""
    from llmc.bench.gpu import plan, whole
    from llmc.bench.gpu.summary import write_summary
    from llmc.bench.gpu.watch import end, missing_device, run_parts

    share = "/".join(map(str, options.share))
    own = [sys.executable, __file__, "--kit", str(options.kit), "-o", str(options.out), "--share", share]
    filling = None
    if (models := "+".join(whole.filled_early(kit))) and any(part.stage.name == whole.STAGE for part in parts):
        with (options.out / "fill.txt").open("a") as log:
            filling = subprocess.Popen([*own, "--fill", models], stdout=log, stderr=log, start_new_session=True)
    try:
        for group in plan.processes(parts):
            if (left := end_at - time.time()) > 0:
                print(f"{left:.0f} s left: {', '.join(part.name for part in group)}", flush=True)
                if filling and group[0].stage.name == whole.STAGE:
                    with contextlib.suppress(subprocess.TimeoutExpired):  # what is timed has the machine to itself
                        filling.wait(max(1.0, end_at - time.time()))
                run_parts(group, kit, journal, own, end_at)
                write_summary(kit, journal)
                if said := missing_device(journal):
                    sys.exit(f"error: the GPU cannot be used: {said}\n  hint: run this where nvidia-smi lists one")
    finally:
        if filling and filling.poll() is None:
            end(filling)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="[default: $OUT]")
    parser.add_argument("--kit", type=Path, default=HERE, help="[default: where this file is]")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="results.jsonl of a run that was cut off; of several, each",
    )
    parser.add_argument(
        "--share",
        type=share,
        metavar="K/N",
        default=(1, 1),
        help="the K-th of N runs at once, each with its part of the items: where nothing is timed",
    )
    parser.add_argument("--visit", type=int, choices=(1, 2), default=1, help="what comes first [default: 1]")
    parser.add_argument("--stages", default="", help="letters [default: all]")
    parser.add_argument("--seconds", type=float, default=0.0, help="for everything [default: the visit's]")
    parser.add_argument("--fill", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := [path for path in options.resume if not path.is_file()]:
        parser.error(f"--resume: there is no file {missing[0]}")
    if unknown := set(options.stages) - set(LETTERS):
        parser.error(f"--stages: there is no stage {sorted(unknown)[0]}, but {', '.join(LETTERS)}")
    return options


def share(text: str) -> tuple[int, int]:
    """K/N.  Raises ValueError: it is none."""
    k, n = map(int, text.split("/"))
    if not 1 <= k <= n:
        raise ValueError(text)
    return k, n


if __name__ == "__main__":
    main()
