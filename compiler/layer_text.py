"""One layer out of a graph's text (graph/text.py): layers repeat, so one shows them all.

Text alone, so that an artifact can be shown where the compiler is not installed.
"""

from __future__ import annotations

import re

LAYER_OF_WEIGHT = re.compile(r"[\w.]*?\.(\d+)\.[\w.{},]*\[")
"""model.layers.12.mlp.down_proj.weight[4096,11008]: 12."""


def one_layer(text: str) -> list[str]:
    """The lines of a layer in the middle, from where its weights are first used to where the next one's are.

    Empty when no weight is a layer's.
    """
    nodes = [line for line in text.splitlines() if line.startswith("%")]
    first: dict[int, int] = {}
    last = 0
    for index, line in enumerate(nodes):
        for layer in map(int, LAYER_OF_WEIGHT.findall(line)):
            first.setdefault(layer, index)
            last = max(last, index)
    if not first:
        return []
    order = sorted(first, key=first.__getitem__)
    middle = order[len(order) // 2 if len(order) > 2 else 0]
    following = [index for index in first.values() if index > first[middle]]
    return nodes[first[middle] : min(following, default=last + 1)]
