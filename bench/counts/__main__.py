"""Count, print and write: see the package."""

from __future__ import annotations

import argparse
import sys

from bench.counts import kernels


def line(row: dict[str, object]) -> str:
    """A row as text."""
    of = dict(row["instructions"])  # type: ignore[call-overload]
    code = row.get("machine_code") or {}
    by_unit = " ".join(f"{name} {n}" for name, n in of.items() if name != "all")
    return (
        f"{row['case']:32s} {row['kernel']:10s} {row['registers']:3d} registers"
        f" {row['programs']:2d} programs; PTX {of['all']:6.2f} ({by_unit});"
        f" sectors {row['sector_bytes']} of {row['least_bytes']}, conflicts {row['conflicts']}"
        + (f"; machine code {code}" if code else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three cases, nothing written")
    options = parser.parse_args()
    on = kernels.machine()
    for case in kernels.QUICK if options.quick else kernels.ALL:
        for row in kernels.run(on, case):
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
