"""The names of `kernels/tables.py` as constants of the compiler.

Import them by name: Triton's cache knows a kernel by its source and the constants among its
globals, not by a module's attributes, and would go on with the columns of an earlier version.
"""

from typing import Any

import triton.language as tl

from .. import tables


def __getattr__(name: str) -> Any:
    return tl.constexpr(getattr(tables, name))
