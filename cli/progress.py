"""The stages of a compile on standard error: bars on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType

import click

from llmc.cli.output import in_seconds


class StageLines:
    """One line for each stage that is done."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._start = 0.0
        self._complete = False

    def __enter__(self) -> StageLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._start = stage, perf_counter()
        self._complete = 0 < total <= done

    def _finish(self) -> None:
        if self._stage is not None and self._complete:
            click.echo(f"{self._stage:<10} {in_seconds(perf_counter() - self._start)}", err=True)
        self._stage = None


class StageBars:
    """A bar for each stage, moving while its end is not known."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=40), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageBars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None)
        if total > 0:
            self._progress.update(self._tasks[stage], completed=done, total=total)


def stage_progress() -> StageBars | StageLines:
    """Bars on a terminal, else lines.  Called with (stage, done, total); total is 0 when it is not known."""
    return StageBars() if sys.stderr.isatty() else StageLines()
