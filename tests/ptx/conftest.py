"""A process that executes compiled kernels, and one cache of what it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.ptx import worker


@pytest.fixture(scope="session")
def execute(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """`worker.call` in that process."""
    pytest.importorskip("triton")
    pytest.importorskip("bench", reason="bench/ is in the checkout only")
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("compiled") if cache else tmp_path_factory.mktemp("compiled")
    with worker.start(str(folder)) as pool:
        yield lambda *arguments, **named: pool.submit(worker.call, *arguments, **named).result()
