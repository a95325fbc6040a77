"""Tools of /v1/responses that come in groups, as Codex sends them: {"type": "namespace", "name": …, "tools": […]}.

To the model a function of a group is one more, `group.function`; to the client it has its own name, and the group's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def spread(listed: list[Any]) -> Iterator[tuple[str, Any]]:
    """(place, tool), those of groups one by one, with the names that the model knows."""
    for index, tool in enumerate(listed):
        place = f"tools[{index}]"
        if looks_nowhere(tool):
            continue
        if not is_group(tool):
            yield place, tool
            continue
        for number, one in enumerate(tool["tools"]):
            named = isinstance(one, dict) and isinstance(one.get("name"), str)
            yield f"{place}.tools[{number}]", {**one, "name": full_name(tool["name"], one["name"])} if named else one


def is_group(tool: object) -> bool:
    if not isinstance(tool, dict) or tool.get("type") != "namespace":
        return False
    return isinstance(tool.get("name"), str) and isinstance(tool.get("tools"), list)


def looks_nowhere(tool: object) -> bool:
    """Whether it is a search that must not reach the web: Codex offers it to every server."""
    return isinstance(tool, dict) and tool.get("type") == "web_search" and tool.get("external_web_access") is False


def full_name(group: object, name: str) -> str:
    return f"{group}.{name}" if isinstance(group, str) and group else name


def names_of(listed: list[Any]) -> dict[str, Mapping[str, str]]:
    """How calls of functions of groups are named to clients, by the names that the model knows."""
    known: dict[str, Mapping[str, str]] = {}
    for tool in filter(is_group, listed):
        for one in tool["tools"]:
            if isinstance(one, dict) and isinstance(one.get("name"), str):
                known[full_name(tool["name"], one["name"])] = {"name": one["name"], "namespace": tool["name"]}
    return known
