"""`bngd verify`: whether kernels and reference do, on this machine, what the definition says."""

from __future__ import annotations

import math
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from .. import __version__, strict_json
from ..info import collect
from ..kernels.support import interpreting
from .cases import FACTORS, STEPS, Case
from .judge import Result, judge

# failures that are printed; all are in the JSON
_WORST = 5
# cases up to which each has a line of its own
_FEW = 15
_WIDTH = 24


def verify(cases: Sequence[Case], device: torch.device, seed: int, path: Path | None) -> int:
    """Run cases one after the other, and report; after Ctrl-C those that were run.

    Args:
        cases: see `cases.suite`.
        device: where; the kernels must serve it.
        seed: of parameters and gradients.
        path: where to write a JSON of everything.

    Returns:
        The exit code: 0 if everything is as promised, 1 if not, 130 after Ctrl-C.
    """
    results: list[Result] = []
    code = 0
    with _quietly(device):
        try:
            for done, case in enumerate(cases):
                _show_progress(sys.stderr, done, len(cases), case.name)
                results.append(judge(case, device, seed))
        except KeyboardInterrupt:
            code = 130
        finally:
            _show_progress(sys.stderr, len(results), len(cases), "")
    failed = sorted((one for one in results if one.failures), key=lambda one: -one.share)
    if failed:
        code = code or 1
    where = "Triton's interpreter" if interpreting() else _name(device)
    print("\n".join(_table(results)))
    cases_run = f"{len(results)} case{'s' * (len(results) != 1)}"
    print(f"\n{cases_run} of {STEPS} steps in {where}, seed {seed}, {len(failed)} failed")
    for result in failed[:_WORST]:
        print(f"\n{result.case}:")
        print("\n".join(f"  {sentence}" for sentence in result.failures))
        print(f"  again: bngd verify --device {device} --seed {seed} --case {result.case}")
    if len(failed) > _WORST:
        print(f"\nand {len(failed) - _WORST} more" + (f", in {path}" if path else ": see --json"))
    if code == 130:
        print(f"interrupted: {len(cases) - len(results)} cases were not run")
    if path is not None:
        _write(path, results, device, seed, complete=len(results) == len(cases))
    return code


def _table(results: Sequence[Result]) -> list[str]:
    """Largest errors by case, or where these are many, by the values of their factors."""
    rows: list[tuple[str, str, list[Result]]]
    if len(results) <= _FEW:
        rows = [("", result.case, [result]) for result in results]
    else:
        named = [(Case.named(result.case), result) for result in results]
        rows = [
            (factor, value, [result for case, result in named if case[factor] == value])
            for factor, values in FACTORS.items()
            for value in values
        ]
    # labels of cases, and all in narrow terminals, have lines of their own
    own_lines = len(results) <= _FEW or shutil.get_terminal_size().columns < 79
    margin = 2 if own_lines else 24
    lines = [
        f"{'':{margin}} {'cases':>6} {'failed':>6} {'kernels':>8} {'reference':>9} "
        f"{'of bound':>8} {'equal bits':>10}",
        f"{'':{margin}} {'':6} {'':6} {'ulp':>8} {'ulp':>9}",
    ]
    before = ""
    for factor, label, found in rows:
        if not found:
            continue
        shown, before = factor if factor != before else "", factor
        if own_lines:
            lines.append(f"{factor} {label}".strip())
        label = "" if own_lines else f"{shown:12}{label}"
        promised = [one for one in found if one.bits]
        equal = f"{sum(one.bits == 'equal' for one in promised)}/{len(promised)}"
        kernels = max((one.kernels.ulp for one in found if one.kernels), default=math.nan)
        eager = max((one.eager.ulp for one in found if one.eager), default=math.nan)
        lines.append(
            f"{label:{margin}} {len(found):6} {sum(bool(r.failures) for r in found):6} "
            f"{kernels:8.2f} {eager:9.2f} {max(one.share for one in found):8.2f} "
            f"{equal if promised else '':>10}"
        )
    return lines


def _show_progress(stream: TextIO, done: int, total: int, now: str) -> None:
    """One line that is overwritten, and nothing where nobody watches."""
    if not stream.isatty():
        return
    filled = _WIDTH * done // max(total, 1)
    line = f"[{'#' * filled:{_WIDTH}}] {done}/{total} {now}"
    # from the line's start, to its end
    stream.write(f"\r\x1b[K{line[:79]}" if now else "\r\x1b[K")
    stream.flush()


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """On the CPU: on one thread, and without the interpreter's warnings of an inf.

    Tensors are so small that threads wait more than they work.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        # the interpreter is NumPy
        with np.errstate(all="ignore"):
            yield
    finally:
        torch.set_num_threads(before)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.machine()
    return str(torch.get_device_module(device).get_device_name(device))


def _write(
    path: Path, results: Sequence[Result], device: torch.device, seed: int, *, complete: bool
) -> None:
    document = {
        "bngd_triton": __version__,
        "device": str(device),
        "seed": seed,
        "steps": STEPS,
        "complete": complete,
        "passed": complete and not any(one.failures for one in results),
        "cases": [asdict(one) for one in results],
        "info": collect(),
    }
    strict_json.write(path, document)
