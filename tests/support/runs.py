"""Parameters under an optimizer of one path, and what is compared of them afterwards."""

import contextlib

import pytest
import torch

from bngd_triton import BNGD
from support import steps
from support.exact_runs import state_of
from support.snapshots import snapshot


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
