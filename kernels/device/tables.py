"""The names of `kernels/tables.py` as constants of the compiler."""

from typing import Any

import triton.language as tl

from .. import tables


def __getattr__(name: str) -> Any:
    return tl.constexpr(getattr(tables, name))
