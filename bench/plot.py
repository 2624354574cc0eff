"""The roofline chart: percent of the copy bandwidth that each arm reaches, by workload.

``python -m bench.plot RESULTS.json`` writes a PNG beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import report
from .arms import ARMS

# Okabe and Ito's colours, then greys and hatches for what is left
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_HATCHES = ("", "//")


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the PNG: a group of bars for each workload and dtype."""
    rows = document["rows"]
    places = list(dict.fromkeys((row["workload"], row["dtype"]) for row in rows))
    arms = [name for name in ARMS if any(row["arm"] == name for row in rows)]
    found = {(row["workload"], row["dtype"], row["arm"]): row["copy_fraction"] for row in rows}
    figure = Figure(figsize=(max(8.0, 1.9 * len(places)), 6.0), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / max(1, len(arms))
    for at, arm in enumerate(arms):
        shown = [i for i, place in enumerate(places) if (*place, arm) in found]
        axes.bar(
            [i + (at - (len(arms) - 1) / 2) * width for i in shown],
            [100 * found[(*places[i], arm)] for i in shown],
            width,
            label=arm,
            color=_COLORS[at % len(_COLORS)],
            hatch=_HATCHES[at // len(_COLORS) % len(_HATCHES)],
            edgecolor="white",
        )
    axes.axhline(100, color="0.3", linewidth=1)
    axes.set_xticks(range(len(places)), [f"{workload}\n{dtype}" for workload, dtype in places])
    axes.set_ylabel("% of copy bandwidth, each tensor counted once")
    about = document["environment"]
    copy = document["copy_gbps"]
    measured = f", copy {copy:.0f} GB/s" if copy else ""
    axes.set_title(f"{about['gpu']}{measured}, torch {about['torch']}, Triton {about['triton']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if arms:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    """Draw each of the files; 2 for one that is not a result file."""
    for name in argv:
        source = Path(name)
        try:
            document = json.loads(source.read_text(encoding="utf-8"))
            report.check(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"bngd: error: {name} is not a result file: {error}", file=sys.stderr)
            return 2
        target = source.with_suffix(".png")
        draw(document, target)
        print(f"Wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
