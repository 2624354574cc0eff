"""Parameters that checkpoints are saved from and loaded into."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from support import steps

# the second is channels_last
make_params = functools.partial(steps.make_params, shapes=[(4, 3), (3, 2, 2, 5), (5,), ()])


def through_a_file(state_dict: Any) -> Any:
    """As another process would read it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load_params(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, saved):
            param.copy_(value)
