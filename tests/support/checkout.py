"""The folder around the tests: a checkout, or where they were copied to without the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
BENCH = ROOT / "bench"
needs_docs = pytest.mark.skipif(
    not DOCS.exists(), reason="the tests run without the checkout around them"
)


def blocks(page, language="python"):
    """The code of a page, or of a part of it."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)
