"""Count, print and write: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.counts import kernels, l2, page, whole_steps

RESULT = Path(__file__).resolve().parents[1] / "results" / "counts" / "counts.json"


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    of = row["instructions"]
    by_unit = " ".join(f"{name} {n}" for name, n in of.items() if name != "all")
    text = (
        f"{row['case']:31s} {row['kernel']:10s} {row['registers']:3d} registers"
        f" {row['programs']:2d} programs; PTX {of['all']:6.2f} ({by_unit});"
        f" sectors {row['sector_bytes']} of {row['least_bytes']}, conflicts {row['conflicts']};"
        f" {row['bounds']}"
    )
    return text + (f"; machine code {row['machine_code']}" if "machine_code" in row else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few kernels, nothing written")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    parser.add_argument(
        "--check", action="store_true", help="whether a few kernels still give the result's counts"
    )
    parser.add_argument("--docs", action="store_true", help="make the page of the result, no more")
    options = parser.parse_args()
    if options.docs:
        page.write(json.loads(options.out.read_text()))
        return 0
    on = kernels.machine()
    rows = []
    for case in kernels.QUICK if options.quick or options.check else kernels.ALL:
        for row in kernels.run(on, case):
            rows.append(row)
            print(line(row), flush=True)
    if options.check:
        result = json.loads(options.out.read_text())
        if result["versions"]["triton"] != kernels.versions()["triton"]:
            print("another Triton's counts")
            return 0
        changed = [row for row in rows if row not in result["kernels"]]
        print(f"{len(changed)} of {len(rows)} changed: run python -m bench.counts")
        return bool(changed)
    if options.quick:
        return 0
    result = {
        "versions": kernels.versions(),
        "kernels": rows,
        "steps": [whole_steps.whole_step(on, name) for name in whole_steps.STEPS],
        "l2": [row for name in ("resnet50", "gpt2-124m") for row in l2.rows(name)],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    page.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
