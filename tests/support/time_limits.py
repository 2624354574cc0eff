"""How long a test may take on a GPU, which an endless kernel would hold for good, and elsewhere."""

import contextlib
import faulthandler
import os

# a kernel takes 6 to 10 s to compile, four times that where every core compiles, and a test may
# need a dozen; the longest wait of any test is far below
LIMIT_S = 240.0
# where a traceback can be read; pytest captures descriptor 2 while tests run
stderr = 2


@contextlib.contextmanager
def limited(seconds):
    """End the whole process, with a traceback of every thread, if the block outlasts `seconds`.

    No exception can be raised instead: a thread that waits for a device runs no Python. What the
    process had launched ends with it. Under pytest-xdist the other tests go on in a new worker.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def patience(seconds):
    """How long to wait for what takes less than `seconds` on a quiet machine of two cores.

    Longer where more waits for each core. The environment variable BNGD_TEST_TIMEOUT decides alone.
    """
    told = os.environ.get("BNGD_TEST_TIMEOUT")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return float(told) if told else seconds * max(1.0, load / (os.cpu_count() or 1))
