"""A time limit for tests on a GPU: a kernel that waits for ever would hold the device for good."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

# compiling a test's kernels takes seconds; the longest wait of any test is far below
LIMIT_S = 90.0
# where a traceback can be read; pytest captures descriptor 2 while tests run
stderr = 2


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End the whole process, with a traceback of every thread, if the block outlasts `seconds`.

    No exception can be raised instead: a thread that waits for a device runs no Python. What the
    process had launched ends with it. Under pytest-xdist the other tests go on in a new worker.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
