"""``python -m bench.readme``: README's GPU figures, written from committed result files alone.

    python -m bench.readme [--check]

The newest run under ``bench/results/`` (all files of its GPU, commit and suite) becomes a table and
a figure in README.md, and every row, target and prediction in docs/performance.md. Without a result
there is no such block and no such page. ``--check`` writes nothing and fails where a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report, targets
from .predictions import predict

Document = dict[str, Any]

START, END = "<!-- from bench/results, by bench.readme -->", "<!-- end of bench.readme -->"
# README's block goes before it
BEFORE = "## What it is not"
FIGURE, PAGE = "docs/bench.png", "docs/performance.md"
SUITES = ("quick", "full", "compiled")
# README shows these beside BNGD
SHOWN = ("bngd", "bngd-row", "torch-sgd-fused", "torch-adamw-fused")
# docs/performance.md's; times in microseconds
COLUMNS = (
    "workload", "dtype", "arm", "us", "predicted", "replay", "warm", "host", "launches", "copy %",
)  # fmt: skip


def load(folder: Path) -> list[tuple[str, Document]]:
    """Name and content of every result file of a GPU in a folder, the newest first."""
    found = []
    for path in folder.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("environment", {}).get("gpu", "cpu") != "cpu":
            found.append((path.name, document))
    return sorted(found, key=lambda one: (one[1]["started"], one[0]), reverse=True)


def newest(
    files: Sequence[tuple[str, Document]], suites: Sequence[str]
) -> list[tuple[str, Document]]:
    """The files of the newest run among some suites: one GPU, commit and suite with all its parts.

    What `torch.compile` needs is measured apart and joins the run of its GPU and commit.
    """
    of = [one for one in files if one[1]["suite"].partition("-")[0] in suites and one[1]["rows"]]
    main = [one for one in of if one[1]["suite"] != "compiled"] or of
    if not main:
        return []
    first = main[0][1]
    here = first["environment"]["gpu"], first["commit"]
    family = {first["suite"].partition("-")[0], "compiled"}
    return [
        one
        for one in of
        if (one[1]["environment"]["gpu"], one[1]["commit"]) == here
        and one[1]["suite"].partition("-")[0] in family
    ]


def block(files: Sequence[tuple[str, Document]]) -> str:
    """README's part: a figure and a table; empty without files."""
    if not files:
        return ""
    about = files[-1][1]["environment"]
    lines = [
        "## Time on a GPU", "",
        f"One step on an {about['gpu']}, median device time in microseconds, L2 cold; in brackets "
        "the share of the copy bandwidth, each tensor counted once. "
        f"torch {about['torch']}, Triton {about['triton']}; raw results: {_links(files, '')}; "
        f"all arms and targets: [{PAGE}]({PAGE}).", "",
        f"![Percent of the copy bandwidth by workload and optimizer]({FIGURE})", "",
        "| parameters of | dtype | " + " | ".join(SHOWN) + " |",
        "| --- | --- |" + " --- |" * len(SHOWN),
    ]  # fmt: skip
    places: dict[tuple[str, str], dict[str, str]] = {}
    # a file's copy bandwidth is that of its own run
    for _, document in reversed(files):
        for row in document["rows"]:
            cells = places.setdefault((row["workload"], row["dtype"]), {})
            text = f"{_us(row['median_us'])} ({100 * row['copy_fraction']:.0f} %)"
            cells.setdefault(row["arm"], text)
    for (workload, dtype), cells in places.items():
        shown = " | ".join(cells.get(arm, "-") for arm in SHOWN)
        lines.append(f"| {workload} | {dtype} | {shown} |")
    return "\n".join([START, *lines, "", END]) + "\n"


def page(files: Sequence[tuple[str, Document]], counters: Sequence[tuple[str, Document]]) -> str:
    """docs/performance.md's generated part: targets, then every row with its prediction."""
    if not files:
        return ""
    documents = [document for _, document in files]
    about = documents[0]["environment"]
    lines = [
        f"Measured on {about['gpu']}, driver {about['driver']}, torch {about['torch']}, Triton "
        f"{about['triton']}, commit {documents[0]['commit']}. Files: "
        f"{_links([*files, *counters], '../')}.", "",
        *targets.table(targets.evaluate(documents, [d for _, d in counters])), "",
    ]  # fmt: skip
    for name, document in files:
        lines += [
            f"{name}: copies run at {document['copy_gbps']:.0f} GB/s.", "",
            f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|",
            *(_row(row, document["copy_gbps"]) for row in document["rows"]), "",
        ]  # fmt: skip
        missing = [
            f"- {m['workload']} {m['dtype']}, {m['arm']}: {m['reason']}"
            for m in document["unavailable"]
        ]
        missing += [f"- not run: {what}" for what in document["not_run"]]
        if missing:
            lines += ["Without a time:", "", *missing, ""]
    return "\n".join([START, *lines, END]) + "\n"


def _row(row: dict[str, Any], copy_gbps: float) -> str:
    told = predict(row["workload"], row["dtype"], row["arm"], copy_gbps)
    times = [row["median_us"], told, row.get("replay_us"), row.get("warm_us"), row["host_us"]]
    cells = [
        row["workload"],
        row["dtype"],
        row["arm"],
        *("-" if t is None else _us(t) for t in times),
    ]
    cells += ["-" if row["launches"] is None else str(row["launches"])]
    return "| " + " | ".join([*cells, f"{100 * row['copy_fraction']:.1f}"]) + " |"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _links(files: Sequence[tuple[str, Document]], up: str) -> str:
    return ", ".join(f"[{name}]({up}bench/results/{name})" for name, _ in files)


def with_block(text: str, new: str, before: str = "") -> str:
    """A page with its generated part replaced, removed, or put before a line or at the end."""
    start, end = text.find(START), text.find(END)
    if start >= 0 and end > start:
        rest = text[end + len(END) :].removeprefix("\n")
        # the empty line that followed the part goes with it
        return text[:start] + (new + rest if new else rest.removeprefix("\n"))
    if not new:
        return text
    if not before:
        return text.rstrip("\n") + "\n\n" + new
    if before not in text:
        raise ValueError(f"no line {before!r} to put the results before")
    return text.replace(before, f"{new}\n{before}", 1)


def pages(root: Path) -> dict[Path, str]:
    """What README.md and docs/performance.md have to be; the latter only where it is, or is due."""
    files = load(root / "bench" / "results")
    run = newest(files, SUITES)
    for _, document in run:
        report.check(document)
    here = {(d["environment"]["gpu"], d["commit"]) for _, d in run}
    counters = [
        one
        for one in files
        if one[1]["suite"] == "counters"
        and (one[1]["environment"]["gpu"], one[1]["commit"]) in here
    ]
    readme, performance = root / "README.md", root / PAGE
    found = {readme: with_block(readme.read_text(encoding="utf-8"), block(run), BEFORE)}
    if run or performance.exists():
        text = (
            performance.read_text(encoding="utf-8") if performance.exists() else "# Performance\n"
        )
        found[performance] = with_block(text, page(run, counters))
    return found


def main(argv: Sequence[str] | None = None, root: Path = report.ROOT) -> int:
    """Write or check; 1 where --check finds a difference, 2 for a file that is no result."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        wanted = pages(root)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"bench.readme: error: not a result file: {error!r}", file=sys.stderr)
        return 2
    changed = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if args.check:
        for path in changed:
            print(f"{path.name} differs from the results: python -m bench.readme", file=sys.stderr)
        return int(bool(changed))
    for path in changed:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"Wrote {path}")
    run = newest(load(root / "bench" / "results"), SUITES)
    if run:
        # matplotlib is in the extra `demo`
        from . import plot

        merged = {**run[-1][1], "rows": [row for _, d in reversed(run) for row in d["rows"]]}
        plot.draw(merged, root / FIGURE)
        print(f"Wrote {root / FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
