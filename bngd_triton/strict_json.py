"""What JSON can hold of figures."""

from __future__ import annotations

import math
from typing import Any


def nulls(value: Any) -> Any:
    """`value` with None for every float that JSON cannot hold, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
