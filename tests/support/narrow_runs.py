"""Optimizers of bfloat16 and float16 parameters, and the values that tests of them take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from bngd_triton import BNGD
from support.exact_runs import make_params

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
narrow = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
MODES = ["split", "stochastic", None]
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def run(
    mode: str | None, dtype: torch.dtype, fused: bool, device: torch.device, **options: Any
) -> tuple[list[Parameter], BNGD]:
    params = make_params(device, dtype)
    optimizer = BNGD(
        params, lr=0.01, weight_decay=0.1, master_weights=mode, seed=11, fused=fused, **options
    )
    return params, optimizer
