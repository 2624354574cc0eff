"""A CUDA graph's capture, as the host sees it, where there is no GPU."""

from __future__ import annotations

import pytest

from bngd_triton import gathering, release, replay, stepper
from bngd_triton.kernels import plan, prepared


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, act as if a CUDA graph were being captured."""
    for module in (plan, prepared, replay, release, stepper, gathering):
        monkeypatch.setattr(module, "capturing", lambda device: True)
