"""The command `bngd`: its arguments, checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__, strict_json

_DEMO_PACKAGES = ("sklearn", "matplotlib", "rich")
_INTERRUPTED = 130
# 128 + SIGPIPE, as shells have it: 0 and 1 would be verdicts
_UNREAD = 141
# where bench/ is when the package runs from a checkout
_ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 1 where something is missing; 2 for bad arguments; 130 after Ctrl-C, 141
        where the reader of a pipe went away.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if args.command == "bench":
            return _bench(args)
        if args.command in ("info", "verify"):
            code = _info(args) if args.command == "info" else _verify(args)
            print(end="", flush=True)
            return code
        _check(args)
    except ValueError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    try:
        return _demo(args)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bngd", description="Batch-normalised gradient descent for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"bngd-triton {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _add_demo(commands, device)
    _add_bench(commands)
    info = commands.add_parser(
        "info",
        help="versions, devices and who serves them; for a bug report",
        description="Print versions, devices and which path a step takes on each; for a bug "
        "report. What is broken is shown as its error.",
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    _add_verify(commands, device)
    return parser


def _add_demo(commands: Any, device: str) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits beside SGD and AdamW",
        description="Train on scikit-learn's digits beside SGD and AdamW: an exploding network, "
        "and a loss scaled over 27 decades. About a minute on two CPU cores, --quick under 20 "
        "seconds on one. Ctrl-C keeps what is done so far; --resume goes on from there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--device", default=device, help="where to train")
    demo.add_argument("--seed", type=int, default=0, help="of the split, weights and batches")
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=15, help="of the exploding network")
    length.add_argument(
        "--quick", action="store_true", help="fewer epochs of both, and fewer factors of the loss"
    )
    demo.add_argument(
        "--target-loss",
        type=float,
        help="stop a run after the first epoch whose mean training loss is below this",
    )
    demo.add_argument("--out", type=Path, default=Path("bngd-demo"), help="folder for PNG and JSON")
    demo.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs that an interrupted demo of the same arguments finished in --out",
    )


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time BNGD beside other optimizers on a GPU; needs a checkout",
        description="Time BNGD beside other optimizers on a GPU, correctness first: raw results as "
        "JSON, a table and a chart at the end. Runs `python -m bench.run` of the checkout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "--suite",
        choices=("quick", "full"),
        default="quick",
        help="quick: cases until 7 minutes are over; full: every workload in every storage",
    )
    bench.add_argument(
        "--only", default="", help="comma-separated workloads, dtypes and arms to keep"
    )
    bench.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for JSON")
    bench.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.json",
        help="measure nothing: draw a result file as percent of copy bandwidth, a PNG beside it",
    )


def _add_verify(commands: Any, device: str) -> None:
    verify = commands.add_parser(
        "verify",
        help="check the kernels and the eager reference against float64 on this machine",
        description="Step many small cases with the kernels and with the eager reference, and "
        "compare both with the definition in float64. Without a GPU the kernels run in Triton's "
        "interpreter: under two minutes on two CPU cores. Ends with 1 where something is not as "
        "promised, and names the case.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verify.add_argument("--device", default=device, help="where to step; --model decides itself")
    verify.add_argument(
        "--seed", type=int, default=0, help="of parameters and gradients, or of what FACTORY draws"
    )
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a dozen cases, under half a minute")
    which.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help="only this case, such as bf16,row,decay; may be repeated",
    )
    which.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="one step of your own model instead: FACTORY() returns model, optimizer and a "
        "function that takes the model and returns its loss",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file")


def _info(args: argparse.Namespace) -> int:
    from .info import collect, lines

    found = collect()
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    _check_seed(args.seed)
    _check_device(args.device)
    if args.json is not None:
        _check_folder(args.json.absolute().parent, "--json")
        if args.json.is_dir():
            raise ValueError(f"--json must be a file, got the folder {args.json}")
    if args.model:
        return _verify_model(args)
    device = torch.empty(1, dtype=torch.float32, device=args.device).device
    if device.type == "cpu":
        # read when kernels are defined, which comes later
        os.environ["TRITON_INTERPRET"] = "1"
    from .kernels.support import why_not
    from .verify.cases import Case, suite
    from .verify.run import verify

    reason = why_not(torch.empty(1, dtype=torch.float32, device=device))
    if reason is not None:
        return _fail(f"the kernels cannot run on {device}: {reason}", 1)
    try:
        import triton.language  # noqa: F401
    # whatever a broken installation raises
    except Exception as error:
        return _fail(f"Triton cannot be imported: {type(error).__name__}: {error}", 1)
    if args.case:
        cases = [Case.named(name) for name in args.case]
    else:
        # all pairs of values in the interpreter, all triples on a GPU
        cases = suite(0 if args.quick else 2 if device.type == "cpu" else 3)
    return verify(cases, device, args.seed, args.json)


def _verify_model(args: argparse.Namespace) -> int:
    """One step of a user's model; what its code raises is shown as it is."""
    from .verify.own_model import verify_step

    module, _, name = args.model.partition(":")
    if not (module and name):
        raise ValueError(f"--model must be MODULE:FACTORY, got {args.model!r}")
    # as `python -m` does
    sys.path.insert(0, os.getcwd())
    torch.manual_seed(args.seed)
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--model {args.model}: {error}") from error
    try:
        report = verify_step(*factory())
    # whatever the user's code raises
    except Exception:
        traceback.print_exc()
        return _fail(f"--model {args.model}: no step could be made, see above", 2)
    if args.json is not None:
        strict_json.write(args.json, report.as_dict())
    print(report)
    return 0 if report.ok else 1


def _bench(args: argparse.Namespace) -> int:
    if not (_ROOT / "bench" / "run.py").is_file():
        way_out = "clone the repository and run `pip install -e .` there"
        return _fail(f"bench/ does not ship in the wheel: {way_out}", 1)
    # a process of its own: `bench` and Triton's settings stay out of this one
    command = [sys.executable, "-m"]
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            return _fail("matplotlib is not installed: pip install matplotlib", 1)
        command += ["bench.report", str(args.plot.resolve())]
    else:
        command += ["bench.run", "--suite", args.suite, "--only", args.only, "--chart"]
        command += ["--out", str(args.out.resolve()), "--device", args.device]
    return subprocess.run(command, cwd=_ROOT, check=False).returncode


def _demo(args: argparse.Namespace) -> int:
    try:
        from .demo.results import QUICK, Settings
        from .demo.resume import NAME, finished_runs
        from .demo.run import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_PACKAGES:
            raise
        packages = "scikit-learn matplotlib rich"
        return _fail(f"{package} is not installed: pip install {packages}", 1)
    length = QUICK if args.quick else Settings(epochs=args.epochs)
    settings = replace(length, device=args.device, seed=args.seed, target_loss=args.target_loss)
    try:
        results = finished_runs(settings, args.out / NAME) if args.resume else None
    except ValueError as error:
        return _fail(str(error), 2)
    return demo(settings, args.out, results=results)


def _check(args: argparse.Namespace) -> None:
    """Refuse bad values by name, before any training."""
    if args.epochs < 1:
        raise ValueError(f"--epochs must be >= 1, got {args.epochs}")
    _check_seed(args.seed)
    target = args.target_loss
    if target is not None and not (math.isfinite(target) and target > 0):
        raise ValueError(f"--target-loss must be finite and > 0, got {target}")
    _check_device(args.device)
    _check_folder(args.out, "--out")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {seed}")


def _check_device(name: str) -> None:
    try:
        # BNGD's statistics are in float64, which some devices lack; "meta" has no values to read
        torch.ones(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error


def _check_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from error


def _fail(message: str, code: int) -> int:
    print(f"bngd: error: {message}", file=sys.stderr)
    return code
