"""llmc beside other systems on this machine: the same shapes, prompts and threads, taking turns, medians.

    python -m bench.compare --model tinyllama-1.1b --peers llmc:bf16,hf:bf16,llama.cpp:bf16 --setup
    python -m bench.compare --model tinyllama-1.1b --peers llmc:bf16,hf:bf16,llama.cpp:bf16 \\
        --batch 1,4 --context 128 --prefill 128 --steps 8 --record bench/records/NAME.json
    python -m bench.peers.table bench/records/NAME.json

Every peer is a process in an environment of its own, loaded and warmed up once; in each round every task is done by
every peer in turn (A B C, A B C), with a read of memory before each.  When the models together exceed --memory-gib,
each is loaded and warmed up for its turn in every round, and ended after it.  A peer that is missing, fails or dies is
left out with a line that says why, and the rest goes on.

Samples are saved as they are measured: the same command again takes up a record where it ended, and a command with
other peers adds them to it.  With --hold SECONDS the measurement waits for a line on standard input after warming up,
and again whenever so many seconds have passed, so that a shared machine can be made quiet for a while.

A sample during which other processes kept more than --neighbours cores busy is saved and not counted: whoever sleeps at
its barriers loses several times its speed then, and whoever spins does not.  The round is repeated, up to three times;
--patience SECONDS waits for a quiet moment before each sample.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmc.bench.limits import Read, reader
from llmc.bench.peers import environments
from llmc.bench.peers.environments import Entry
from llmc.bench.peers.process import PeerError, PeerProcess
from llmc.bench.peers.quiet import Neighbours, wait_for_quiet
from llmc.bench.peers.record import Record
from llmc.bench.peers.shapes import SHAPES
from llmc.bench.peers.table import table_of
from llmc.compiler.frontend.known import KNOWN_MODELS

READ_BYTES = 1 << 29
TRIES = 3


class Task(NamedTuple):
    """Decode steps of `batch` sequences after `tokens` each, or (batch 0) a prompt of `tokens`."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"decode {self.batch}x{self.tokens}" if self.batch else f"prefill {self.tokens}"

    def run(self, process: PeerProcess, steps: int, salt: int) -> list[float]:
        """Seconds of each step.  salt: makes one prefill's prompt differ from another's, so that none is remembered."""
        if not self.batch:
            answer = process.ask("prefill", prompt=prompt(self.tokens, salt))
        else:
            prompts = [prompt(self.tokens, sequence) for sequence in range(self.batch)]
            answer = process.ask("decode", prompts=prompts, steps=steps)
        return [float(seconds) for seconds in answer["seconds"]]


def prompt(n: int, salt: int) -> list[int]:
    """Token ids that no other salt has in any place; none of them ends a text."""
    return [3 + (7 * i + 131 * salt) % 30011 for i in range(n)]


class Turns:
    """Windows of at most `hold` seconds, each begun by a line on standard input; always open when hold is 0."""

    def __init__(self, hold: float) -> None:
        self.hold, self.ends = hold, 0.0

    def wait(self) -> None:
        if self.hold and time.monotonic() > self.ends:
            print("ready: a line on standard input begins", file=sys.stderr, flush=True)
            sys.stdin.readline()
            self.ends = time.monotonic() + self.hold

    def close(self) -> None:
        """What follows is not timed."""
        if self.hold:
            self.ends = 0.0
            print("done for now", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """What is measured: every entry at every task, so many rounds of so many steps."""

    model: str
    config: dict[str, Any]
    entries: Sequence[Entry]
    tasks: Sequence[Task]
    rounds: int
    steps: int
    threads: int
    memory_bytes: float
    neighbours: float
    patience_s: float

    def start(self, entry: Entry, record: Record) -> PeerProcess:
        """A process, its model loaded, every task done once."""
        path = environments.model_path(self.model, entry)
        if not path.exists():
            raise PeerError(f"no model files at {path}; run with --setup")
        process = environments.start(entry)
        try:
            answer = process.ask(
                "load",
                path=str(path),
                config=self.config,
                precision=entry.precision,
                threads=self.threads,
                room=max(task.tokens for task in self.tasks) + self.steps + 2,
                batches=[task.batch for task in self.tasks if task.batch],
            )
            for task in self.tasks:
                task.run(process, 2, salt=0)
        except PeerError:
            process.close()
            raise
        record.describe(str(entry), answer["version"])
        return process

    def fits(self) -> bool:
        return sum(map(self.size, self.entries)) <= self.memory_bytes

    def size(self, entry: Entry) -> int:
        """Bytes of a model's files; of bf16 or f32 weights where a peer draws them itself."""
        path = environments.model_path(self.model, entry)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files) or n_weights(self.config) * entry.bits // 8


def n_weights(config: dict[str, Any]) -> int:
    """About how many weights a Llama or an OPT has, its embedding counted twice."""
    hidden = config["hidden_size"]
    inner = 3 * config["intermediate_size"] if "intermediate_size" in config else 2 * config["ffn_dim"]
    grouped = config.get("num_key_value_heads", config["num_attention_heads"]) / config["num_attention_heads"]
    layer = hidden * (int(hidden * (2 + 2 * grouped)) + inner)
    return int(2 * config["vocab_size"] * hidden + config["num_hidden_layers"] * layer)


class Contest:
    """Runs a plan: who is still in it, which processes run."""

    def __init__(self, plan: Plan, record: Record, turns: Turns, read: Read) -> None:
        self.plan, self.record, self.turns, self.read = plan, record, turns, read
        self.left = list(plan.entries)
        self.running: dict[Entry, PeerProcess] = {}

    def run(self) -> None:
        """Rounds until the record has as many as asked for of every peer that works."""
        together = self.plan.fits()
        try:
            for at in range(TRIES * self.plan.rounds):
                for group in [list(self.left)] if together else [[entry] for entry in self.left]:
                    self.round(group, at)
                    if not together:
                        self.turns.close()
                        self.end(group)
        finally:
            self.turns.close()
            self.end(list(self.running))

    def round(self, group: Sequence[Entry], at: int) -> None:
        """Every task by every peer of a group in turn, but for what the record has."""
        wanted = [entry for entry in group if any(self.missing(entry, task, at) for task in self.plan.tasks)]
        for entry in wanted:
            if entry not in self.running:
                with self.or_left_out(entry):
                    self.running[entry] = self.plan.start(entry, self.record)
        for task in self.plan.tasks:
            for entry in wanted:
                if entry in self.running and self.missing(entry, task, at):
                    with self.or_left_out(entry):
                        self.sample(entry, task, at)

    def sample(self, entry: Entry, task: Task, at: int) -> None:
        self.turns.wait()
        wait_for_quiet(self.plan.neighbours, self.plan.patience_s)
        gb_per_s = READ_BYTES / self.read(self.plan.threads, READ_BYTES) / 1e9
        process = self.running[entry]
        neighbours = Neighbours(process.process.pid)
        seconds = task.run(process, self.plan.steps, salt=1 + at)
        self.record.add(str(entry), str(task), seconds, gb_per_s, neighbours.cores())

    def missing(self, entry: Entry, task: Task, at: int) -> bool:
        """Whether a sample is wanted in round `at`, of which the first are for the first samples."""
        quiet = self.record.rounds(str(entry), str(task))
        return quiet < self.plan.rounds and self.record.tries(str(entry), str(task)) <= at

    @contextmanager
    def or_left_out(self, entry: Entry) -> Iterator[None]:
        """A peer that fails takes no further part."""
        try:
            yield
        except PeerError as error:
            print(f"{entry} left out: {error}", file=sys.stderr, flush=True)
            self.record.leave_out(str(entry), str(error))
            self.left.remove(entry)
            self.end([entry])

    def end(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry in self.running:
                self.running.pop(entry).close()


def config_of(model: str) -> dict[str, Any]:
    """What peers are told of a model: what its GGUF file says, or the fields of config.json."""
    known = {} if model in SHAPES else KNOWN_MODELS[model].config
    return known | {"known_as": model}


def set_up(plan: Plan) -> None:
    """Environments and model files; what fails is said, and left for the measurement to leave out."""
    for entry in plan.entries:
        try:
            environments.set_up(plan.model, plan.config, entry)
        except PeerError as error:
            print(f"{entry} not set up: {error}", file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    """Those of a list with commas, which may be empty, as they stand: the order in which tasks take their turns."""
    return [int(number) for number in text.split(",") if number]


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, choices=[*KNOWN_MODELS, *SHAPES])
    parser.add_argument("--peers", required=True, help="such as llmc:bf16,hf:bf16,llama.cpp:q8_0")
    parser.add_argument("--batch", default="1", help="decode steps of so many sequences, such as 1,4")
    parser.add_argument("--context", default="128", help="tokens before the first decode step, such as 128,4096")
    parser.add_argument("--prefill", default="", help="prompts of so many tokens, such as 128,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decode steps in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-gib", type=float, default=8.0, help="models loaded at the same time")
    parser.add_argument("--neighbours", type=float, default=0.2, metavar="CORES", help="busy with others; see above")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS", help="wait for a quiet moment before a sample"
    )
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS", help="measure in windows, see above")
    parser.add_argument("--record", type=Path, help="JSON, added to when it exists")
    parser.add_argument("--setup", action="store_true", help="make environments and model files, measure nothing")
    options = parser.parse_args(arguments)
    try:
        entries = [Entry.parse(text) for text in options.peers.split(",")]
        batches, contexts, prompts = map(numbers, (options.batch, options.context, options.prefill))
        tasks = [Task(batch, context) for context in contexts for batch in batches]
        tasks += [Task(0, tokens) for tokens in prompts]
    except ValueError as error:
        parser.error(str(error))
    plan = Plan(
        model=options.model,
        config=config_of(options.model),
        entries=entries,
        tasks=tasks,
        rounds=options.rounds,
        steps=options.steps,
        threads=options.threads,
        memory_bytes=options.memory_gib * 2**30,
        neighbours=options.neighbours,
        patience_s=options.patience,
    )
    return options, plan


def main(arguments: Sequence[str] | None = None) -> None:
    options, plan = parse(arguments)
    if options.setup:
        set_up(plan)
        return
    record = Record.open(options.record, model=plan.model, threads=plan.threads, neighbours=plan.neighbours)
    Contest(plan, record, Turns(options.hold), reader()).run()
    print(table_of(record))


if __name__ == "__main__":
    main()
