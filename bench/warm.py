"""``python -m bench.warm``: the gate over every arm and tuning, in parallel, before times.

It compiles each kernel into Triton's cache, so that what times them need not, and says which arms
are wrong or cannot run. Exit status 1 where one of BNGD's is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from . import devices
from .report import ROOT

# a process holds half a GB of the GPU for its context, and its arms' kernels are compiled in turn
MOST_WORKERS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Gate all, in as many processes as are useful.

    Returns:
        0; 1 where an arm of BNGD failed or a process ended early.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="comma-separated arms, 'sweep' and dtypes")
    parser.add_argument("--share", help="I/N: be the I-th of N processes")
    args = parser.parse_args(argv)
    if args.share:
        return _share(args)
    command = [sys.executable, "-m", "bench.warm", "--device", args.device, "--only", args.only]
    several = [
        subprocess.Popen([*command, "--share", f"{i}/{args.workers}"], cwd=ROOT)
        for i in range(args.workers)
    ]
    try:
        codes = [process.wait() for process in several]
    finally:
        for process in several:
            process.kill()
    print(f"{args.workers} processes, exit statuses {codes}")
    return int(any(codes))


def _share(args: argparse.Namespace) -> int:
    device = devices.use(args.device)
    from . import gate
    from .arms import ARMS, STORAGES, Arm, UnavailableError, tuned
    from .sweep import QUESTIONS

    words = {word for word in args.only.split(",") if word}
    arms = [arm for name, arm in ARMS.items() if name != "compile"]
    work = [(arm, storage) for storage in STORAGES.values() for arm in arms]
    if not words or "sweep" in words:
        changed: dict[tuple[str, str], tuple[Arm, str]] = {}
        for question in QUESTIONS.values():
            for change in ({}, *question.changes):
                arm = tuned({**question.base, **change})
                changed |= {(arm.name, d): (arm, d) for d in {d for _, d in question.places}}
        work += [(arm, STORAGES[dtype]) for _, (arm, dtype) in sorted(changed.items())]
    names, dtypes = words - set(STORAGES) - {"sweep"}, words & set(STORAGES)
    asked = [
        (arm, storage)
        for arm, storage in work
        if (not names or arm.name in names or (arm.name not in ARMS and "sweep" in words))
        and (not dtypes or storage.label in dtypes)
    ]
    mine, of = map(int, args.share.split("/"))
    code = 0
    for arm, storage in asked[mine::of]:
        verdict = "right"
        try:
            gate.check(arm, storage, device)
        except UnavailableError as error:
            verdict = str(error)
            # rivals may lack a storage; BNGD is to run in all of them, wherever graphs exist
            if arm.rule.startswith("bngd") and not (
                arm.name == "bngd-graph" and device.type == "cpu"
            ):
                code = 1
        # one write, so that processes do not mix their lines
        sys.stdout.write(f"{arm.name} {storage.label}: {verdict}\n")
        sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
