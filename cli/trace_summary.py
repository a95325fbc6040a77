"""The sums that a trace of `llmc run --profile` carries, read back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.runtime.read_file import read_file

Said = dict[str, Any]
VERSION = 1


def read_summary(path: str, plans: Collection[str], artifact: str) -> Said:
    """The sums in a trace of one of these plans, given by their hashes.

    Raises LlmcError: no such file, no trace of llmc, or of another artifact.
    """
    hint = f"llmc run {artifact} -p TEXT --profile {path}"
    try:
        said: Any = parse_json(read_file(path))
    except OSError as error:
        raise LlmcError(f"the profile cannot be read: {error.strerror}", place=path, hint=hint) from None
    except ValueError:
        raise LlmcError("the profile is not valid JSON", place=path, hint=hint) from None
    found = said.get("llmc") if isinstance(said, dict) else None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise LlmcError("this is no trace that this llmc wrote", place=path, hint=hint)
    if found.get("plan_sha256") not in plans:
        raise LlmcError(f"the profile is of another artifact than {artifact}", place=path, hint=hint)
    return found
