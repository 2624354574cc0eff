"""Train what the results lack, or write the tables: python -m bench.tasks [--report]."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from bench.tasks.contestants import CONTESTANTS
from bench.tasks.problems import TASKS, Task, transformer
from bench.tasks.report import report
from bench.tasks.sweep import TEST, sweep

# of the transformer, to see how the best rate moves; 100 steps of four sequences each
WIDTHS = {
    f"width-{width}": Task(
        f"width {width}, nats", 100, False, partial(transformer, width=width, batch=4)
    )
    for width in (64, 128, 256, 512)
}
AT_WIDTHS = ("sgd", "adamw", "muon", "bngd-tensor", "bngd-row")


def main() -> None:
    """Train what the results lack."""
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/tasks"))
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, by commas")
    parser.add_argument("--optimizers", default=",".join(CONTESTANTS), help="names, by commas")
    parser.add_argument("--widths", action="store_true", help="the transformer at four widths")
    parser.add_argument("--report", action="store_true", help="write README's and docs' tables")
    args = parser.parse_args()
    if args.report:
        report(args.out, Path.cwd(), WIDTHS)
        return
    torch.set_num_threads(1)
    if args.widths:
        sweep(WIDTHS, AT_WIDTHS, args.out / "widths.json", TEST[:1])
        return
    tasks = {name: TASKS[name] for name in args.tasks.split(",")}
    sweep(tasks, args.optimizers.split(","), args.out / "tasks.json", TEST)


if __name__ == "__main__":
    main()
