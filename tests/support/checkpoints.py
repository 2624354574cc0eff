"""How tests save and load a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# the second is channels_last
SHAPES: list[tuple[int, ...]] = [(4, 3), (3, 2, 2, 5), (5,), ()]


def through_a_file(state_dict: Any) -> Any:
    """As another process would read it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def load_params(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for param, value in zip(params, saved):
        param.copy_(value)
