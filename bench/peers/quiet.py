"""Whether a measurement had the machine to itself: the processors' time that went to anyone else."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
MOMENT_S = 0.25


class Neighbours:
    """Seconds of processor time that neither idled nor went to one of these processes, since this was made.  Linux."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.began = time.monotonic()
        self.busy, self.own = busy_seconds(), own_seconds(*pids)

    def cores(self) -> float:
        """How many cores others kept busy, on average."""
        others = (busy_seconds() - self.busy) - (own_seconds(*self.pids) - self.own)
        return max(0.0, others / (time.monotonic() - self.began))


def wait_for_quiet(cores: float, patience_s: float) -> None:
    """Until all processes together keep at most so many cores busy for a moment, or patience ends."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(MOMENT_S)
        if busy_seconds() - before <= cores * MOMENT_S:
            return


def busy_seconds() -> float:
    """All processors', since the machine began: user, nice, system, interrupts, and what the hypervisor took."""
    user, nice, system, _idle, _waiting, irq, softirq, stolen = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, stolen))) / TICKS


def own_seconds(*pids: int) -> float:
    """Some processes', all their threads together."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS
