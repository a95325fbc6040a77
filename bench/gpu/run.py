"""On a machine with an NVIDIA GPU: is llmc right, how fast is it, which schedules are best?

    python run.py -o OUT [--resume results.jsonl] [--stages abcdefgh] [--seconds 560]

Needs this folder (bench/gpu/prepare.py makes it), NumPy and the driver; for what is compared, PyTorch and transformers.
Everything that is found is a line of OUT/results.jsonl at once; OUT/summary.md is written after every stage.  A run
that was cut off goes on where it was with --resume.  docs/gpu.md says what the stages are.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (HERE / "kit.json").exists():
    sys.path.insert(0, str(HERE))


def main() -> None:
    from llmc.bench.gpu.journal import Journal
    from llmc.bench.gpu.kit import Kit
    from llmc.bench.gpu.stages import STAGES, chosen, run_stage, work
    from llmc.bench.gpu.summary import write_summary

    options = arguments()
    kit, journal = Kit(options.kit), Journal(options.out / "results.jsonl")
    if options.work:
        sys.exit(work(chosen([options.work])[0], kit, journal, options.deadline))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and not journal.path.exists():
        journal.take_over(options.resume)
    end = time.time() + options.seconds
    command = [sys.executable, __file__, "--kit", str(options.kit), "-o", str(options.out)]
    for stage in chosen(options.stages or [stage.letter for stage in STAGES]):
        left = end - time.time()
        if left > 0:
            print(f"{stage.letter}  {stage.says}", flush=True)
            run_stage(stage, kit, journal, command, min(left, stage.seconds))
            write_summary(kit, journal)
    print((options.out / "summary.md").read_text())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="[default: $OUT]")
    parser.add_argument("--kit", type=Path, default=HERE, help="[default: where this file is]")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results.jsonl of a run that was cut off")
    parser.add_argument("--stages", default="", help="letters [default: all]")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything [default: 560]")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
