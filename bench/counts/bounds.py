"""From counts to the time of an H200, on paper: what each of its units asks of a launch."""

from __future__ import annotations

from typing import Any

from bench.counts import h200
from bench.counts.latency import clocks

PICO = 1e12
UNITS = ("issue", "float64", "conversions", "memory")
# operations of float64 in the place of a division or a square root
DIVISION = 9


def bounds(row: dict[str, Any], launched: Any, entries: int) -> dict[str, Any]:
    """Picoseconds an entry that each unit asks of a launch; two ends of latency.

    Args:
        row: its counts.
        launched: what ran.
        entries: of the tensors.
    """
    # machine code has divisions taken apart
    by_unit = row.get("machine_code") or {
        unit: row["instructions"].get(unit, 0) + DIVISION * row["instructions"].get("divide", 0)
        for unit in ("all", "float64")
    }
    every_clock = h200.SMS * h200.CLOCK / PICO
    made = {
        "issue": by_unit["all"] / (every_clock * h200.ISSUE),
        "float64": by_unit.get("float64", 0) / (every_clock * h200.FLOAT64),
        "conversions": row["instructions"].get("convert", 0) / (every_clock * h200.CONVERSIONS),
        "memory": row["once_bytes"] / h200.COPY * PICO,
    }
    single = {name: round(value, 3) for name, value in made.items()}
    if row["kernel"] == "single":
        # a program's work is as long as there are tickets
        return {**single, "latency": None, "binds": max(UNITS, key=single.__getitem__)}
    # the first programs may be shorter, the last finishes a slice
    trace = launched.counts.traces[min(1, len(launched.counts.traces) - 1)]
    each = every_clock * row["programs"] * entries / launched.grid[0]
    latency = [round(clocks(launched.program, trace, *ends) / each, 3) for ends in h200.LATENCIES]
    slowest = {**single, "latency": latency[-1]}
    return {**single, "latency": latency, "binds": max(slowest, key=slowest.__getitem__)}


def slowest(row: dict[str, Any]) -> float:
    """Picoseconds an entry at the pessimistic end."""
    bound = row["bounds"]
    return float(max(*(bound["latency"] or [0.0]), *(bound[name] for name in UNITS)))
