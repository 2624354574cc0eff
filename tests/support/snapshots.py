"""Copies of what a refused call must leave alone."""

import copy
from typing import Any

import torch
from torch import Tensor


def snapshot(optimizer, params):
    """Everything that a refused call must leave alone, as copies that `==` compares.

    Tensors become their bytes, shape, strides and address; parameters in groups become ids.
    """
    found: dict[str, Any] = {"params": [_frozen(param) for param in params]}
    if optimizer is None:
        return found
    found["state"] = {
        id(param): {key: _frozen(value) for key, value in state.items()}
        for param, state in optimizer.state.items()
    }
    found["groups"] = [
        {key: _frozen(value) for key, value in group.items() if key != "params"}
        | {"params": [id(param) for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    return found


def _frozen(value):
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.device.type == "meta":
        return value.shape, value.stride(), value.dtype
    plain = value.detach().cpu().contiguous().flatten()
    content = plain.view(torch.uint8).tolist() if plain.numel() else []
    return content, value.shape, value.stride(), value.dtype, value.data_ptr()
