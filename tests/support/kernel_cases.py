"""Small work items, and tensors, options and guards to try the kernels on."""

import pytest
import torch

from bngd_triton.kernels import Tuning
from bngd_triton.kernels.support import interpreting

# small work items, so that small tensors have several spans, chunks and merges;
# rows of up to 256 entries are tiles, but aligned ones whose length would cut a 16-byte access:
# 32 of 8, 8 of 32, 4 of 64, 2 of 128, or one, of which so many entries are 4 trips
SMALL = {
    "block": 32,
    "unroll": 2,
    "span": 128,
    "merge": 4,
    "update_block": 64,
    "chunk": 256,
    "tile": 256,
    "tile_block": 64,
}
LANES = Tuning(wide=True, **SMALL)
TILES = Tuning(wide=False, **SMALL)

# around the tile's 256, the span, the 16-entry granule; primes; rows of all three kinds
SHAPES = [
    (0,), (1,), (2,), (3,), (15,), (16,), (17,), (31,), (127,), (128,), (129,), (255,), (256,),
    (257,), (271,), (272,), (1009,), (),
    (1, 1), (3, 0), (5, 7), (4, 16), (70, 16), (3, 271), (3, 272), (2, 300), (2, 3, 4, 5),
]  # fmt: skip

# one of each kind, for options that do not change which memory is walked
FEW = [(1,), (17,), (128,), (257,), (1009,), (), (5, 7), (4, 16), (3, 272), (2, 3, 4, 5)]

OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"momentum": 0.0}, id="no momentum"),
    pytest.param({"nesterov": True}, id="nesterov"),
    pytest.param({"weight_decay": 0.1}, id="weight decay"),
    pytest.param({"maximize": True}, id="maximize"),
    pytest.param({"eps": 0.0}, id="eps 0"),
    pytest.param({"eps": 0.1}, id="large eps"),
    pytest.param({"centering": 0.0}, id="RMS normalisation"),
    pytest.param({"centering": 0.3, "center_1d": True}, id="partial centring"),
    pytest.param({"granularity": "row"}, id="rows"),
    pytest.param({"granularity": "row", "center_1d": True, "nesterov": True}, id="rows, centred"),
    pytest.param({"granularity": "global"}, id="global"),
    pytest.param({"normalizer": "cdf"}, id="cdf"),
    pytest.param({"normalizer": "cdf", "granularity": "row", "weight_decay": 0.1}, id="cdf, rows"),
]
LR = 1e-2

# of kernels that a test defines. To compile a block of 2**19 entries takes minutes; the interpreter
# takes 0.1 ms for a block, whatever its size
HOW = {"SOFT": interpreting(), "BLOCK": 2**16 if interpreting() else 2**10}


def blocks(x):
    """The grid of such a kernel."""
    assert x.numel() % HOW["BLOCK"] == 0
    return (x.numel() // HOW["BLOCK"],)


def make(dtype, grad_dtype, device, shapes):
    """Parameters, gradients and momentum inside larger buffers whose rest must not matter.

    A read outside a gradient gives NaN; a write outside a parameter changes a guard.
    """
    guarded = []

    def inside(values, guard):
        whole = torch.full((values.numel() + 64,), guard, dtype=values.dtype, device=device)
        whole[32 : 32 + values.numel()] = values.flatten().to(device)
        guarded.append((whole, values.numel()))
        return whole[32 : 32 + values.numel()].view(values.shape)

    params = [inside(torch.randn(shape).to(dtype), 77.0) for shape in shapes]
    grads = [
        inside((torch.randn(shape) * 1e-3 + 5e-4).to(grad_dtype), torch.nan) for shape in shapes
    ]
    buffers = [inside(torch.randn(shape), 77.0) for shape in shapes]
    return params, grads, buffers, guarded


def assert_guards(guarded):
    for whole, n in guarded:
        outside = torch.cat([whole[:32], whole[32 + n :]])
        assert ((outside == 77) | outside.isnan()).all()
