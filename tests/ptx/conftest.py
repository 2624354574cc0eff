"""A process that executes compiled kernels, and one cache of what it compiles."""

from __future__ import annotations

import importlib
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
    # or skips
    importlib.import_module("support.bench_folder")
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("compiled") if cache else tmp_path_factory.mktemp("compiled")
    with worker.start(str(folder)) as pool:
        yield lambda *arguments, **named: pool.submit(worker.call, *arguments, **named).result()
