"""The ahead-of-time check passes on the kernels and fails on kernels with other hints."""

import ast
import re
from pathlib import Path

import pytest

import bngd_triton.kernels
from support.compiling import python

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
KERNELS = Path(bngd_triton.kernels.__file__).parent
OTHER_POLICY = {"evict_first": "evict_last", "evict_last": "evict_first"}


def run_check(*arguments):
    return python("tests/aot.py", "--quick", *arguments)


def unhinted(node):
    hints = isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.multiple_of"
    return node.args[0] if hints else node


def swapped(node):
    """Asks the caches to keep what is not read again, and not to keep what is."""
    named = isinstance(node, ast.Constant) and isinstance(node.value, str)
    other = OTHER_POLICY.get(node.value) if named else None
    return ast.Constant(other) if other else node


def unguarded(node):
    """Without the barrier between the read of a window and its write."""
    if not (isinstance(node, ast.FunctionDef) and node.name == "admit"):
        return node
    text = ast.unparse(node)
    assert text.count("tl.debug_barrier()") == 1
    return ast.parse(text.replace("tl.debug_barrier()", "pass")).body[0]


def waiting(node):
    """Kernels as they are, for a Triton from which on the wait is demanded."""
    text = ast.unparse(node) if isinstance(node, ast.Assign) else ""
    return ast.parse("RELEASES_WAIT_FROM = (0, 0)").body[0] if "WAIT_FROM =" in text else node


def failures(folder, rules, *only):
    """What the check says of kernels that are changed by some rules."""

    class Changed(ast.NodeTransformer):
        done = dict.fromkeys(rules, 0)

        def visit(self, node):
            node = self.generic_visit(node)
            for rule in rules:
                self.done[rule] += (new := rule(node)) is not node
                node = new
            return node

    for source in KERNELS.rglob("*.py"):
        copy = folder / source.relative_to(KERNELS)
        copy.parent.mkdir(exist_ok=True)
        tree = Changed().visit(ast.parse(source.read_text()))
        copy.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    assert all(Changed.done.values())
    code, printed = run_check("--kernels", str(folder), "--only", *only)
    assert code == 1, printed
    return re.findall("^FAIL.*$", printed, re.M)


def test_machine_code():
    code, printed = run_check()
    assert code == 0, printed
    assert ", 0 failed" in printed


def test_missing_and_wrong_hints_are_found(tmp_path):
    """Two mutants in one compilation: neither changes what the other's check reads."""
    variants = ("update", "lanes", "stream")
    failed = failures(tmp_path, [unhinted, swapped], *variants)
    for variant in variants:
        line = rf"FAIL {variant} +\S+ +plain +aligned +"
        assert any(re.match(f"{line}sm_90 .* loads < ", one) for one in failed), failed
        for target in ("sm_90", "gfx942"):
            assert any(re.match(f"{line}{target} +cache hints ", one) for one in failed), failed


def test_a_window_that_is_written_while_it_is_read_is_found(tmp_path):
    failed = failures(tmp_path, [unguarded], "lanes")
    assert len(failed) == 2
    assert all(" windows " in line and "other threads may yet read" in line for line in failed)


@pytest.mark.skipif(VERSION >= (3, 9), reason="this Triton waits")
def test_a_flag_that_is_raised_too_early_is_found(tmp_path):
    failed = failures(tmp_path, [waiting], "single lanes")
    assert all("gfx942" in line and "releases without a wait" in line for line in failed)
