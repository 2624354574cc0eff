"""The ahead-of-time check passes on the kernels and fails on kernels with other hints."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bngd_triton.kernels
from support.checkout import ROOT

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
CHECK = ROOT / "tests" / "aot.py"
KERNELS = Path(bngd_triton.kernels.__file__).parent
OTHER_POLICY = {"evict_first": "evict_last", "evict_last": "evict_first"}


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the check in a process in which Triton compiles, whatever this one does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CHECK), "--quick", *arguments]
    return subprocess.run(command, text=True, capture_output=True, env=environment)


class Unhinted(ast.NodeTransformer):
    """Replaces ``tl.multiple_of(x, ...)`` by ``x``."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if ast.unparse(node.func) != "tl.multiple_of":
            return node
        self.removed += 1
        return node.args[0]


class Swapped(ast.NodeTransformer):
    """Asks the caches to keep what is not read again, and not to keep what is."""

    def __init__(self) -> None:
        self.swapped = 0

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        other = OTHER_POLICY.get(node.value) if isinstance(node.value, str) else None
        self.swapped += other is not None
        return ast.Constant(other) if other else node


class Unguarded(ast.NodeTransformer):
    """Leaves out barriers."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        if ast.unparse(node.value) != "tl.debug_barrier()":
            return node
        self.removed += 1
        return None


def copy_of(source: Path, folder: Path) -> Path:
    """Where a changed file of the kernels goes."""
    place = folder / source.relative_to(KERNELS)
    place.parent.mkdir(exist_ok=True)
    return place


def test_machine_code() -> None:
    done = run_check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout


def test_missing_and_wrong_hints_are_found(tmp_path: Path) -> None:
    """Two mutants in one compilation: neither changes what the other's check reads."""
    unhinted, swapped = Unhinted(), Swapped()
    for source in KERNELS.rglob("*.py"):
        tree = swapped.visit(unhinted.visit(ast.parse(source.read_text())))
        copy_of(source, tmp_path).write_text(ast.unparse(tree))
    assert min(unhinted.removed, swapped.swapped) > 0

    variants = ("update", "lanes", "stream")
    done = run_check("--kernels", str(tmp_path), "--only", *variants)

    assert done.returncode == 1, done.stdout + done.stderr
    for variant in variants:
        line = rf"FAIL {variant} +\S+ +plain +aligned +sm_90 .* loads < "
        assert re.search(line, done.stdout), done.stdout
        for target in ("sm_90", "gfx942"):
            line = rf"FAIL {variant} +\S+ +plain +aligned +{target} +cache hints "
            assert re.search(line, done.stdout), done.stdout


def test_a_window_that_is_written_while_it_is_read_is_found(tmp_path: Path) -> None:
    removed = 0
    for source in KERNELS.rglob("*.py"):
        tree = ast.parse(source.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "admit":
                unguarded = Unguarded()
                unguarded.visit(node)
                removed += unguarded.removed
        copy_of(source, tmp_path).write_text(ast.unparse(tree))
    assert removed == 1

    done = run_check("--kernels", str(tmp_path), "--only", "lanes")

    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 2, done.stdout + done.stderr
    assert all(" windows " in line and "other threads may yet read" in line for line in failed)


@pytest.mark.skipif(VERSION >= (3, 9), reason="this Triton waits")
def test_a_flag_that_is_raised_too_early_is_found(tmp_path: Path) -> None:
    """The kernels as they are, for a Triton from which on the wait is demanded."""
    for source in KERNELS.rglob("*.py"):
        text = source.read_text().replace(
            "RELEASES_WAIT_FROM = (3, 9)", "RELEASES_WAIT_FROM = (0, 0)"
        )
        copy_of(source, tmp_path).write_text(text)

    done = run_check("--kernels", str(tmp_path), "--only", "single lanes")

    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed, done.stdout + done.stderr
    assert all("gfx942" in line and "releases without a wait" in line for line in failed)
