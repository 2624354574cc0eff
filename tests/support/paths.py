"""The two implementations of a step, as tests name them."""

from typing import NamedTuple

import torch


class StepPath(NamedTuple):
    """One of the two implementations of a step: ``BNGD(..., fused=path.fused)``."""

    fused: bool
    device: torch.device
