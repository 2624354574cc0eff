"""The device that is measured: chosen before anything imports Triton, which looks then."""

from __future__ import annotations

import os

import torch


class NoGPUError(RuntimeError):
    """A GPU was asked for, and there is none."""


def use(kind: str | None = None) -> torch.device:
    """Make ready a device.

    Args:
        kind: ``"cuda"``, or ``"cpu"`` for Triton's interpreter; None for a GPU where there is one.

    Raises:
        NoGPUError: for ``"cuda"`` without one.
    """
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise NoGPUError("no GPU found; --device cpu tries the code")
        return torch.device("cuda", torch.cuda.current_device())
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # at these sizes threads only wait for each other
    torch.set_num_threads(1)
    return torch.device("cpu")
