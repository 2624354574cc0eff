"""A block of parameters as one rank holds it, and whole gradients for it.

Which entries of a tensor a rank holds is read off: before a model is sharded, its weights are
their own indices.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bngd_triton.tensors import local


class Block(nn.Module):
    """Uneven on 2, 3 and 4 ranks; vectors and a matrix shorter than a world."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 3)
        self.norm = nn.LayerNorm(3)
        self.lone = nn.Parameter(torch.empty(1, 5))


SHAPES = [param.shape for param in Block().parameters()]
NAMES = [name for name, _ in Block().named_parameters()]


class Parts(NamedTuple):
    """Parameters as a rank holds them, and the flat indices of the entries that it has."""

    params: list[Tensor]
    indices: list[Tensor]

    def place(self, wholes):
        with torch.no_grad():
            for param, index, whole in zip(self.params, self.indices, wholes):
                local(param).copy_(whole.flatten()[index])

    def give(self, gradients):
        for param, index, whole in zip(self.params, self.indices, gradients):
            param.grad = None
            if whole is not None:
                param.grad = like(param, whole.to(param.dtype).flatten()[index])


def like(param, part):
    if not isinstance(param, DTensor):
        return part
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False,
        shape=param.shape, stride=param.stride(),
    )  # fmt: skip


def shard(block, layout, world):
    """Cut a block's parameters as a layout says; "whole" leaves them."""
    if layout == "fsdp":
        fully_shard(block, mesh=mesh_of((world,)))
    elif layout == "tp":
        tensor_parallel(block, mesh_of((world,)))
    elif layout == "mixed":
        # besides sharded ones, a group has replicated and plain parameters
        fully_shard(block.up, mesh=mesh_of((world,)))
        distribute_module(block.down, mesh_of((world,)))
    elif layout == "hsdp":
        fully_shard(block, mesh=mesh_of((2, world // 2)))
    elif layout == "fsdp over tp":
        mesh = mesh_of((2, world // 2))
        tensor_parallel(block, mesh["tp"])
        fully_shard(block, mesh=mesh["dp"])


def tensor_parallel(block, mesh):
    parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@functools.cache
def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])


@torch.no_grad()
def indices(cut):
    """The flat indices of the entries that a rank holds of a block that is cut like this."""
    numbered = Block()
    for param in numbered.parameters():
        param.copy_(torch.arange(param.numel()).view(param.shape))
    cut(numbered)
    return [local(param).long() for param in numbered.parameters()]


def parts(layout, world, dtype):
    """A block's parameters, all 1."""
    block = Block().to(dtype)
    shard(block, layout, world)
    held = indices(lambda numbered: shard(numbered, layout, world))
    made = Parts(list(block.parameters()), held)
    made.place([torch.ones(shape) for shape in SHAPES])
    return made


def initial():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step):
    """Whole gradients: means drift, so that parts have means of their own; some are not usable."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for shape in SHAPES:
        drift = torch.linspace(-1, 1, shape.numel()).view(shape)
        found.append(torch.randn(shape, generator=generator) + drift)
    if step == 5:
        found[NAMES.index("up.weight")][-1, -1] = torch.nan
    if step == 11:
        found[NAMES.index("down.weight")][0, 0] = torch.inf
        found[NAMES.index("norm.bias")][-1] = -torch.inf
    if step == 7:
        found[NAMES.index("down.bias")] = None
    return found
