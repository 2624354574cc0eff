"""The folder around the tests: a checkout, or where they were copied to without the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
BENCH = ROOT / "bench"
