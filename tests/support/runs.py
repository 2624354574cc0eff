"""Parameters under an optimizer of one path, and what is compared of them afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bngd_triton import BNGD
from support import steps
from support.exact_runs import state_of
from support.paths import StepPath
from support.snapshots import snapshot


def start(
    path: StepPath,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = steps.SHAPES,
    **options: Any,
) -> tuple[list[Parameter], BNGD]:
    """Parameters of the same values at every call, and their optimizer."""
    params = steps.make_params(path.device, dtype, shapes)
    return params, BNGD(params, **{"fused": path.fused, **options})


def everything(optimizer: BNGD, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parameters and their state."""
    return [tensor.detach().clone() for tensor in (*params, *state_of(optimizer, params))]


@contextlib.contextmanager
def refused(
    error: type[Exception], match: str, optimizer: BNGD | None, params: Sequence[Tensor]
) -> Iterator[None]:
    """What the block does is refused, and changes nothing of the optimizer and `params`."""
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(optimizer, params) == before
