"""The tables of docs/performance.md, made of a result."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """By the names in the page's markers."""
    counted, bound = [], []
    # statistics do not depend on how parameters are stored
    rows = {
        (r["kernel"], str(r["instructions"]), r["once_bytes"]): r for r in result["kernels"][::-1]
    }
    for row in list(rows.values())[::-1]:
        of, code = row["instructions"], row.get("machine_code", {})
        name = f"{row['case']}: {row['kernel']}"
        float64 = of.get("float64", 0) + of.get("divide", 0)
        counted.append(
            [
                name, row["registers"], row["programs"], f"{of['all']:.1f}",
                f"{code['loop']:.1f}" if code else "-", f"{float64:.1f}",
                f"{row['sector_bytes']:.1f} ({row['least_bytes']:.1f}, {row['once_bytes']:.1f})",
                row["conflicts"],
            ]
        )  # fmt: skip
        units = [f"{row['bounds'][u]:.2f}" for u in ("issue", "float64", "conversions", "memory")]
        ends = row["bounds"]["latency"]
        latency = " to ".join(f"{end:.2f}" for end in ends) if ends else "-"
        bound.append([name, *units, latency, row["bounds"]["binds"]])
    steps = [
        [row["workload"], f"{row['entries'] / 1e6:.1f}", row["memory_us"], row["modelled_us"]]
        for row in result["steps"]
    ]
    of_l2: dict[tuple[str, str, str], list[str]] = {}
    for row in result["l2"]:
        key = row["workload"], row["storage"], row["form"]
        of_l2.setdefault(key, []).append(f"{row['bytes']:.1f} ({row['hits']:.2f})")
    version = result["versions"]
    return {
        "versions": f"Triton {version['triton']}, {version['target']}.",
        "counts": table(
            ["", "registers", "programs to an SM", "instructions (PTX)", "loop (machine code)",
             "float64", "bytes in sectors (least, once)", "bank conflicts"], counted,
        ),
        "bounds": table(
            ["ps an entry", "issue", "float64", "conversions", "memory", "latency", "binds"], bound
        ),
        "steps": table(["by row, float32", "million entries", "memory, us", "model, us"], steps),
        "l2": table(
            ["", "storage", "form", "50 MB, hints", "50 MB, none", "30 MB, hints", "30 MB, none"],
            [[*key, *cells] for key, cells in of_l2.items()],
        ),
    }  # fmt: skip


def filled(text: str, result: dict[str, Any]) -> str:
    """The page with its tables."""
    for name, made in tables(result).items():
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, times = re.subn(block, lambda m, t=made: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        assert times == 1, f"{times} places for {name}"
    return text


def write(result: dict[str, Any]) -> None:
    PAGE.write_text(filled(PAGE.read_text(), result))
