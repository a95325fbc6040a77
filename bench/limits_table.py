"""Records of decode.py as a Markdown table.

python -m bench.limits_table bench/README.md       rewrites the table between its <!-- limits --> marks
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- limits -->\n).*?(<!-- end -->)", re.DOTALL)
RECORDS = Path(__file__).with_name("records")
HEAD = (
    "| | context | batch | tokens/s | share of read bandwidth | step, × batch 1's | prefill: tokens/s, share of peak |",
    "|---|---|---|---|---|---|---|",
)


def table(folder: Path = RECORDS) -> str:
    """A row for every record and batch size, by model, precision and context."""
    records = [json.loads(path.read_text()) for path in folder.glob("*-context-*.json")]
    records.sort(key=lambda r: (r["model"], -bits(r), r["context"]))
    return "\n".join([*HEAD, *(row for record in records for row in rows(record))])


def bits(record: dict[str, Any]) -> int:
    return {"int8": 8, "fp8": 8, "int4": 4}.get(str(record.get("quant")), 16)


def rows(record: dict[str, Any]) -> list[str]:
    name = f"{record['model']} {record.get('quant') or record['dtype']}"
    prompts = [
        f"{p['tokens']}: {p['tokens_per_s']:.1f}, {p['share_of_peak']:.2f} of {p['peak_of']}"
        for p in record.get("prefill", [])
    ]
    lines = []
    if not record["decode"]:
        return [f"| {name} | – | – | – | – | – | {'; '.join(prompts)} |"]
    for step in record["decode"]:
        low, high = step["share_range"]
        cells = [
            name,
            str(record["context"]),
            str(step["batch"]),
            f"{step['tokens_per_s']:.2f}",
            f"{step['share_of_read_bandwidth']:.2f} ({low:.2f}–{high:.2f})",
            f"{step['times_batch_of_first']:.2f}",
            "; ".join(prompts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        prompts = []
    return lines


def with_table(text: str) -> str:
    return MARKED.sub(lambda mark: f"{mark[1]}{table()}\n{mark[2]}", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text()))
