"""Figures as JSON that every reader takes: it has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def nulls(value: Any) -> Any:
    """`value` with None for every float that JSON cannot hold, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a file of JSON, with the `nulls` of `document`."""
    text = json.dumps(nulls(document), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
