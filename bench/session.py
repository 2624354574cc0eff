"""``python -m bench.session --part NAME --out DIR``: one call on a rented GPU, nothing lost.

Each step's output goes to a file of its own under DIR as it comes; a step that fails or outlasts
its limit does not keep the others from running; a table is printed last. The parts are those of
`bench.parts`; each ends within nine minutes.

On a machine without a network, carry what it lacks as a folder of wheels (torch-optimi and
flashoptim need nothing but torch and Triton) and run ``pip install --no-index --no-deps
FOLDER/*.whl``; the package itself is found without installing by ``ln -sfn ../kernels
bngd_triton/kernels`` with the checkout's root on PYTHONPATH. Compiled kernels may be carried too:
Triton finds them by TRITON_CACHE_DIR if its version, Python's and this code are the same to the
letter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parts import Step, parts

ROOT = Path(__file__).resolve().parent.parent
# a benchmark that is interrupted writes what it has before it ends
GRACE_S = 8.0
# of a log: a runaway step must not make it too large to be fetched
MOST_BYTES = 8 << 20
# of a log that is shown with the table
SHOWN_LINES = 40
SHOWN_BYTES = 3000


def run_step(step: Step, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a step; its output goes to ``DIR/NAME.log``.

    Returns:
        `step`, `outcome` ("done", "failed", "out of time" or "skipped"), `status`, `seconds`,
        `why`.
    """
    found: dict[str, Any] = {"step": step.name, "status": None, "seconds": 0.0, "why": ""}
    if step.tool and shutil.which(step.tool) is None:
        return {**found, "outcome": "skipped", "why": f"{step.tool} not found"}
    if limit_s < 1:
        return {**found, "outcome": "skipped", "why": "the time of this call was spent"}
    path = out / f"{step.name}.log"
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(step.environment or {})}
    with path.open("wb") as log:
        try:
            # a group of its own, so that a tool's children end with it
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                # a shell's background jobs ignore interrupts, and so would all that they start
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        except OSError as error:
            return {**found, "outcome": "failed", "why": str(error)}
        late = not _ends(process, limit_s)
        if late:
            _stop(process)
    _shorten(path)
    found |= {"status": process.returncode, "seconds": time.monotonic() - begin}
    if late:
        return {**found, "outcome": "out of time", "why": f"stopped after {limit_s:.0f} s"}
    return {**found, "outcome": "failed" if process.returncode else "done"}


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a step, then end whatever is left of its group."""
    process.send_signal(signal.SIGINT)
    _ends(process, GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shorten(path: Path) -> None:
    """Keep the beginning and the end of a log that is too long."""
    size = path.stat().st_size
    if size <= MOST_BYTES:
        return
    with path.open("r+b") as log:
        head = log.read(MOST_BYTES // 2)
        log.seek(size - MOST_BYTES // 4)
        tail = log.read()
        log.seek(0)
        log.write(head + f"\n... {size} bytes in all ...\n".encode() + tail)
        log.truncate()


def run_part(steps: Sequence[Step], out: Path, limit_s: float) -> list[dict[str, Any]]:
    """Run the steps in turn, each for at most its limit and what is left of the call's.

    One that is needed and not done is the last.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit_s
    outcomes = []
    for step in steps:
        # what a step takes to stop is the call's time too
        limit = min(step.limit_s, end - time.monotonic() - GRACE_S)
        outcomes.append(run_step(step, out, limit))
        text = json.dumps(outcomes, indent=1)
        (out / "summary.json").write_text(text + "\n", encoding="utf-8")
        print(_line(outcomes[-1]), flush=True)
        if step.needed and outcomes[-1]["outcome"] != "done":
            break
    return outcomes


def _line(outcome: dict[str, Any]) -> str:
    status = "" if outcome["status"] is None else f"status {outcome['status']}"
    return (
        f"{outcome['step']:28}{outcome['outcome']:13}{outcome['seconds']:7.1f} s  "
        f"{status:12}{outcome['why']}".rstrip()
    )


def _end_of(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_bytes()[-SHOWN_BYTES:].decode(errors="replace")
    return "\n".join(text.splitlines()[-SHOWN_LINES:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part; 0 where every step was done, 1 where one was not, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.session", description=__doc__)
    parser.add_argument("--part", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for the whole call")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    known = parts(out)
    if args.part not in known:
        print(
            f"bench.session: error: --part must be one of {', '.join(known)}, got {args.part!r}",
            file=sys.stderr,
        )
        return 2
    outcomes = run_part(known[args.part], out, args.limit)
    for outcome in outcomes:
        print(f"\n--- end of {outcome['step']}.log\n{_end_of(out / (outcome['step'] + '.log'))}")
    print(f"\n--- {args.part}")
    for outcome in outcomes:
        print(_line(outcome))
    return int(any(outcome["outcome"] != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
