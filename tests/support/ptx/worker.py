"""A process in which Triton compiles, whatever the one of the tests does: `start`, then `call`."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def start(cache: str) -> ProcessPoolExecutor:
    """One process, with a cache of what it compiles."""
    return ProcessPoolExecutor(
        1,
        # a fork would share the interpreter's kernels
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(cache,),
    )


def _begin(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    import torch

    torch.set_num_threads(1)
    global machine
    machine = importlib.import_module("support.ptx.driver").Machine()
    machine.install()


machine: Any = None


def call(name: str, *arguments: Any, **named: Any) -> Any:
    """A function of `steps`, or of another module of this package, by ``module:name``.

    It gets the machine first.
    """
    module, _, function = name.rpartition(":")
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"support.ptx.{module or 'steps'}"), function
    )
    return found(machine, *arguments, **named)
