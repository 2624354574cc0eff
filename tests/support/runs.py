"""Parameters under an optimizer of one path, and what is compared of them afterwards."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

from bngd_triton import BNGD
from support import steps
from support.exact_runs import state_of


def start(path, dtype=torch.float32, shapes=steps.SHAPES, **options):
    """Parameters of the same values at every call, and their optimizer."""
    params = steps.make_params(path.device, dtype, shapes)
    return params, BNGD(params, **{"fused": path.fused, **options})


def everything(optimizer, params):
    """Copies of the parameters and their state."""
    return [tensor.detach().clone() for tensor in (*params, *state_of(optimizer, params))]


@contextlib.contextmanager
def refused(error, match, optimizer, params):
    """What the block does is refused, and changes nothing of the optimizer and `params`."""
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(optimizer, params) == before


def snapshot(optimizer, params):
    """Everything that a refused call must leave alone, as copies that `==` compares.

    Tensors become their bytes, shape, strides and address; parameters in groups become ids.
    """
    found = {"params": [_frozen(param) for param in params]}
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
