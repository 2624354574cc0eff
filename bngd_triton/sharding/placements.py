"""Sharded parameters: which part of which slice this rank holds, from a `DTensor`'s placements.

The statistics of a slice are those of the whole tensor, never of the local part. What a mesh
dimension does to a slice decides whether it takes part in `exchange`:

* Shard of a dimension that the slice spans cuts it: its statistics are merged over that dimension;
* ``Shard(0)`` under ``granularity="row"`` deals out whole rows: nothing to merge;
* Replicate repeats it: not merged, so that nothing is counted twice.

Every rank of a mesh must step the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ..tensors import local
from .exchange import Share


@torch.no_grad()
def local_parts(name: str, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a parameter and of its gradient, as plain tensors.

    Args:
        name: what to call the parameter in an error.
        param: a plain tensor or a DTensor; the part shares its memory.
        grad: the same, of the same global shape. A gradient with other placements than its
            parameter is redistributed, a Partial one reduced: collectives of its own.

    Raises:
        TypeError: one is a DTensor and the other is not.
        ValueError: shapes or meshes differ, or this process has no place in the mesh.
        NotImplementedError: placements of `param` that are neither Shard nor Replicate.
    """
    if not isinstance(param, DTensor) and not isinstance(grad, DTensor):
        return param, grad
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor):
        kinds = ["a DTensor" if isinstance(t, DTensor) else "a plain tensor" for t in (param, grad)]
        raise TypeError(
            f"{name} is {kinds[0]}, its gradient {kinds[1]}: "
            "distribute both over one mesh (torch.distributed.tensor.distribute_tensor)"
        )
    _cut_dims(name, param)
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(grad.shape)}, "
            f"the parameter {tuple(param.shape)}"
        )
    if grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"the gradient of {name} is on {grad.device_mesh}, the parameter on "
            f"{param.device_mesh}: bring both to one mesh"
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return param.to_local(), grad.to_local()


@torch.no_grad()
def share_of(name: str, param: Tensor, grad: Tensor, granularity: str) -> Share:
    """What this rank holds of the slices of `param`.

    Args:
        name: what to call the parameter in an error.
        param: a plain tensor or a DTensor.
        grad: its gradient, of which only the dtype matters.
        granularity: ``"tensor"``, ``"row"`` or ``"global"``; under the last each tensor is one
            slice here: who knows the group sets `Share.union`.

    Raises:
        ValueError: this process has no place in the mesh.
        NotImplementedError: placements that are neither Shard nor Replicate.
    """
    by_row = granularity == "row" and param.dim() >= 2
    entries = param.numel() // max(1, param.shape[0]) if by_row else param.numel()
    groups: list[ProcessGroup] = []
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        for mesh_dim, dim in reversed(list(enumerate(_cut_dims(name, param)))):
            if dim is not None and mesh.size(mesh_dim) > 1 and not (by_row and dim == 0):
                groups.append(mesh.get_group(mesh_dim))
    part = local(param)
    return Share(
        slices=part.shape[0] if by_row else 1,
        entries=entries,
        groups=tuple(groups),
        wide=grad.dtype is torch.float64,
        device=part.device,
    )


@torch.no_grad()
def like(param: DTensor, local: Tensor) -> DTensor:
    """`local` as this rank's part of a tensor with the shape and placements of `param`.

    Args:
        param: the parameter whose state this is.
        local: shaped as the local part of `param`; of any dtype. Its memory is shared.

    Raises:
        ValueError: another shape than the local part's.
    """
    want = param.to_local().shape
    if local.shape != want:
        raise ValueError(
            f"this rank's part of the parameter has shape {tuple(want)}, got {tuple(local.shape)}"
        )
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def rows_like(param: DTensor, local: Tensor) -> DTensor:
    """One entry for each local row, as state of the shape [rows]."""
    cuts = zip(param.placements, _cut_dims("param", param))
    placements = [place if dim == 0 else Replicate() for place, dim in cuts]
    return DTensor.from_local(
        local, param.device_mesh, placements, run_check=False, shape=param.shape[:1], stride=(1,)
    )


@torch.no_grad()
def local_value(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a checkpoint's tensor.

    Args:
        value: a DTensor of any placements on the mesh of `like`, or the whole tensor.
        like: the tensor whose place it takes.

    Raises:
        ValueError: another mesh.
    """
    if not isinstance(like, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        value = distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    if value.device_mesh != like.device_mesh:
        raise ValueError(
            f"the checkpoint's tensors are on {value.device_mesh}, the parameters on "
            f"{like.device_mesh}; use torch.distributed.checkpoint, which brings them over"
        )
    return value.redistribute(like.device_mesh, like.placements).to_local()


def ordinal(param: Tensor) -> int:
    """Tells the parts of a parameter apart, but not its replicas; 0 for a plain tensor."""
    number = 0
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        for mesh_dim, dim in enumerate(_cut_dims("param", param)):
            if dim is not None:
                number = number * mesh.size(mesh_dim) + mesh.get_local_rank(mesh_dim)
    return number


@torch.no_grad()
def everywhere(tensors: Sequence[Tensor], flags: Sequence[Tensor]) -> list[bool]:
    """Which flags hold on every rank that has a part of their tensor; waits for the device.

    Args:
        tensors: the same on every rank, in the same order.
        flags: 0-dim bool, one for each tensor: of this rank's part.
    """
    held = [flag.int() for flag in flags]
    cut: dict[str, tuple[ProcessGroup, list[int]]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            for group in _cutting(tensor):
                cut.setdefault(group.group_name, (group, []))[1].append(i)
    for group, rows in cut.values():
        packed = torch.stack([held[i].to(held[rows[0]].device) for i in rows])
        dist.all_reduce(packed, dist.ReduceOp.MIN, group=group)
        for i, flag in zip(rows, packed.unbind()):
            held[i] = flag
    return [bool(flag) for flag in held]


def check_found_inf(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse a GradScaler's verdict that may not be every rank's.

    A GradScaler looks at all gradients of one dtype together, and tells of an overflow the ranks
    over which the first of them is cut (`torch.distributed.tensor`, as of torch 2.13).

    Args:
        named: all of an optimizer's parameters that have a gradient, in its order, each after what
            to call it in an error.

    Raises:
        RuntimeError: a later gradient is cut over other ranks too.
    """
    leaders: dict[tuple[torch.device, torch.dtype], tuple[str, set[str]]] = {}
    for name, param in named:
        grad = param.grad
        if not isinstance(grad, DTensor):
            continue
        cut: set[str] = {group.group_name for group in _cutting(grad)}
        leader, told = leaders.setdefault((grad.device, grad.dtype), (name, cut))
        if not cut <= told:
            raise RuntimeError(
                f"GradScaler tells of an overflow only the ranks over which {leader} is cut, and "
                f"{name}, placed by {grad.placements}, is cut over others: list a parameter first "
                "that is cut over all of them, or train in bfloat16 without a GradScaler"
            )


def _cutting(tensor: DTensor) -> list[ProcessGroup]:
    """The process groups over which ranks hold different parts, or terms, of a tensor."""
    mesh = tensor.device_mesh
    return [
        mesh.get_group(mesh_dim)
        for mesh_dim, placement in enumerate(tensor.placements)
        if mesh.size(mesh_dim) > 1 and not placement.is_replicate()
    ]


def _cut_dims(name: str, param: DTensor) -> list[int | None]:
    """For each mesh dimension the tensor dimension that it cuts, None where it repeats."""
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"this process has no place in the mesh of {name} ({param.device_mesh}): "
            "give the optimizer only parameters of which this process holds a part"
        )
    cuts: list[int | None] = []
    for placement in param.placements:
        # FSDP over tensor parallelism places by _StridedShard, which is no subclass of Shard
        dim = getattr(placement, "dim", None)
        if not placement.is_replicate() and (dim is None or placement.is_partial()):
            raise NotImplementedError(
                f"{name} is placed by {param.placements}; BNGD takes Shard and Replicate "
                "(redistribute the parameter first)"
            )
        cuts.append(None if dim is None else int(dim) % max(1, param.dim()))
    return cuts
