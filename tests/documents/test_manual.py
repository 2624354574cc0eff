"""README and pages that speak of code: tests, public names, options, commands and links."""

import ast
import inspect
import re
from dataclasses import fields
from typing import get_type_hints

import pytest

import bngd_triton
from bngd_triton import BNGD, kernels
from bngd_triton.kernels import fused_step_
from bngd_triton.options import Options, StepOptions
from bngd_triton.reference import step_
from support.checkout import DOCS, ROOT, needs_docs

pytestmark = needs_docs


def test_every_fault_is_shown_by_a_test_that_exists():
    page = (DOCS / "faults.md").read_text()
    rows = re.findall(r"^\| (?!fault|---)(.*) \|$", page, re.M)
    assert len(rows) > 50
    for row in rows:
        (shown,) = re.findall(r"\[`(\w+)`\]\(\.\./(tests/\S+\.py)\)$", row)
        name, file = shown
        tree = ast.parse((ROOT / file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests, row


def test_every_public_name_is_in_the_api():
    named = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M))
    public = {f"bngd_triton.{name}" for name in bngd_triton.__all__}
    public |= {f"bngd_triton.kernels.{name}" for name in kernels.__all__}
    public |= {"bngd_triton.reference.step_", "bngd_triton.integrations.register_timm"}
    # what verify_step returns
    public |= {
        f"bngd_triton.verify.own_model.{name}" for name in ("StepReport", "CheckedParameter")
    }
    assert named == public


def test_the_site_has_every_page():
    site = ROOT / "mkdocs.yml"
    if not site.exists():
        pytest.skip("mkdocs.yml is in the checkout only")
    pages = re.findall(r": ([\w-]+\.md)$", site.read_text(), re.M)
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))


def test_both_commands_stand_on_lines_of_their_own():
    lines = (ROOT / "README.md").read_text().splitlines()
    setup = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e"
    assert f"{setup} '.[demo]' && .venv/bin/bngd demo" in lines[:40]
    assert (
        f"{setup} '.[test]' && .venv/bin/python -m pytest -q -n auto --dist loadfile" in lines[:40]
    )


def anchors(page):
    """Of the headings, as the repository and the manual make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
    return {f"#{text}" for text in plain}


@pytest.mark.skipif(not (ROOT / "bngd_triton").is_dir(), reason="pages link to the whole checkout")
@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\((?!http)([^)#\s]*)(#[^)\s]*)?\)", page.read_text())
    # `compiled[grid](...)` is code
    links = [(link, place) for link, place in links if link != "..."]
    assert [link for link, _ in links if not (page.parent / link).exists()] == []
    places = [(page.parent / link if link else page, place) for link, place in links if place]
    assert [(file, place) for file, place in places if place not in anchors(file)] == []


def test_every_option_is_in_the_table_and_in_the_docstrings():
    names = {field.name for field in fields(Options)}
    readme = (ROOT / "README.md").read_text()
    table = [row.split("|")[1] for row in readme.splitlines() if row.startswith("| `")]
    assert names <= set(re.findall(r"`(\w+)`", " ".join(table)))
    assert names <= set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(BNGD) or "", re.M))
    for function in (step_, fused_step_):
        _, _, listed = (function.__doc__ or "").partition("**step_options: ")
        assert set(get_type_hints(StepOptions)) <= set(re.findall(r"\w+", listed))
