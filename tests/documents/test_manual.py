"""Pages of the manual that speak of code: the tests that they name, and every public name."""

from __future__ import annotations

import ast
import re

import pytest

import bngd_triton
from bngd_triton import kernels
from support.checkout import DOCS, ROOT

pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="the tests run without the checkout around them"
)


def test_every_fault_is_shown_by_a_test_that_exists() -> None:
    page = (DOCS / "faults.md").read_text()
    rows = re.findall(r"^\| (?!fault|---)(.*) \|$", page, re.M)
    assert len(rows) > 50
    for row in rows:
        (shown,) = re.findall(r"\[`(\w+)`\]\(\.\./(tests/\S+\.py)\)$", row)
        name, file = shown
        tree = ast.parse((ROOT / file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests, row


def test_every_public_name_is_in_the_api() -> None:
    named = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M))
    public = {f"bngd_triton.{name}" for name in bngd_triton.__all__}
    public |= {f"bngd_triton.kernels.{name}" for name in kernels.__all__}
    public |= {"bngd_triton.reference.step_", "bngd_triton.integrations.register_timm"}
    # what verify_step returns
    public |= {
        f"bngd_triton.verify.own_model.{name}" for name in ("StepReport", "CheckedParameter")
    }
    assert named == public


def test_the_site_has_every_page() -> None:
    site = ROOT / "mkdocs.yml"
    if not site.exists():
        pytest.skip("mkdocs.yml is in the checkout only")
    pages = re.findall(r": ([\w-]+\.md)$", site.read_text(), re.M)
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))
