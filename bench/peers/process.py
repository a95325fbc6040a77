"""A peer in a process of its own, asked one thing at a time."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST_ANSWER_S = 900.0
LONGEST_END_S = 5.0


class PeerError(Exception):
    """A peer refused, failed, died or did not answer in time; the text is the reason, one line."""


class PeerProcess:
    """Speaks bench/peers/protocol.py.  A context manager; what the process says besides goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, folder: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            try:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
                )
            except OSError as error:
                raise PeerError(f"cannot start {command[0]}: {error.strerror}") from error
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, do: str, *, timeout_s: float = LONGEST_ANSWER_S, **request: Any) -> dict[str, Any]:
        """One request, one answer.  Raises PeerError; the process is ended unless the answer was a refusal."""
        try:
            assert self.process.stdin
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise PeerError(f"no answer to {do} in {timeout_s:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            self._let_it_end()
            self.close()
            raise PeerError(f"died at {do}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{do}: {answer['error']}")
        return dict(answer)

    def close(self) -> None:
        """End the process; closing twice is fine."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream and not stream.closed:
                with suppress(OSError):  # of a request that was never read
                    stream.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        assert self.process.stdout
        with suppress(ValueError):  # closed while waiting
            for line in self.process.stdout:
                self._answers.put(line)
        self._answers.put("")

    def _let_it_end(self) -> None:
        """A process that has closed its output may still be saying why."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LONGEST_END_S)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = f"exit status {self.process.returncode}"
        return f"{lines[-1]} ({said})" if lines else said
