"""Flat buffers: parameters and momentum as 128-byte-aligned views of a few large allocations.

Every view has a storage of its own that keeps the buffer alive, so that saving, copying or
sharing one tensor never touches its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.utils.dlpack
from torch import Tensor

from .checks import overlaps
from .tensors import dispatches, lasting, on_device

# a GPU's L2 line, and a multiple of what 16-byte accesses need
ALIGNMENT = 128
# a buffer is filled while the parameters it replaces are still alive: this bounds the extra memory
MAX_BYTES = 256 * 2**20


@lasting()
def flatten_(params: Sequence[Tensor]) -> list[Tensor]:
    """Move parameters into flat buffers, in order; their values, shapes and strides stay.

    Args:
        params: parameters of any devices and dtypes.

    Returns:
        Those that stay where they are, for the reason that `why_not_flat` gives.
    """
    left: list[Tensor] = []
    moving: list[Tensor] = []
    for param in params:
        (left if why_not_flat(param) else moving).append(param)
    for i, view in _views(moving, [param.dtype for param in moving]):
        view.copy_(moving[i].data)
        moving[i].data = view
    return left


def why_not_flat(param: Tensor) -> str | None:
    """Why a parameter's storage must be left alone; None if it may move."""
    storage = param.untyped_storage()
    if type(param) not in (torch.Tensor, torch.nn.Parameter):
        return f"it is a {type(param).__name__}"
    if _bytes(param) > MAX_BYTES:
        return f"it is larger than a flat buffer, {MAX_BYTES} bytes"
    if not param.numel():
        return "it has no entries"
    if param.is_inference():
        return "it was made under torch.inference_mode"
    if storage.nbytes() != _bytes(param) or param.storage_offset() or overlaps(param):
        return "it is a part of a larger storage, or overlaps itself"
    if not storage.resizable():
        return "its memory belongs to somebody else (another flat buffer, NumPy, a mapped file)"
    if param.is_shared() and param.device.type == "cpu":
        return "it is in shared memory"
    return _why_shared(param)


def zeros_like(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeros of the shapes and strides of `params`, as views of flat buffers; in order."""
    plain = [i for i, param in enumerate(params) if not dispatches(param)]
    views = _views([params[i] for i in plain], [dtypes[i] for i in plain])
    zeros = {plain[at]: view for at, view in views}
    # what a class does to operations must happen to its state too, or not at all
    return [
        zeros[i] if i in zeros else torch.zeros_like(param, dtype=dtypes[i])
        for i, param in enumerate(params)
    ]


def _views(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Iterator[tuple[int, Tensor]]:
    """Zeroed views of these dtypes, each with its parameter's place.

    A buffer, made when its first view is asked for, serves parameters of one device and dtype that
    are together at most `MAX_BYTES`, or one.
    """
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault((param.device, param.dtype, dtypes[i]), []).append(i)
    for (_, _, dtype), same in kinds.items():
        part: list[int] = []
        size = 0
        for i in same:
            if part and size + _bytes(params[i]) > MAX_BYTES:
                yield from zip(part, _views_of_one([params[j] for j in part], dtype))
                part, size = [], 0
            part.append(i)
            size += _bytes(params[i])
        yield from zip(part, _views_of_one([params[j] for j in part], dtype))


def _views_of_one(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """One zeroed buffer on the parameters' device, and a view of it for each parameter."""
    granule = ALIGNMENT // dtype.itemsize
    starts, end = [], 0
    for param in params:
        starts.append(end)
        end += -(-param.numel() // granule) * granule
    # allocators align to 512 bytes on a GPU, to 64 on the CPU
    flat = torch.zeros(end + granule, dtype=dtype, device=params[0].device)
    flat = flat[-flat.data_ptr() % ALIGNMENT // dtype.itemsize :]
    views = []
    for param, start in zip(params, starts):
        run = flat[start : start + param.numel()]
        # a tensor that comes by DLPack has a storage of its own, which holds on to the buffer
        with on_device(run.device):
            own = torch.utils.dlpack.from_dlpack(run) if param.numel() else torch.empty_like(run)
        # dense strides in the parameter's order, also where the parameter itself has gaps
        strides = torch.empty_like(param, device="meta").stride()
        views.append(own.as_strided(param.shape, strides))
    return views


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _why_shared(param: Tensor) -> str | None:
    """Whether another tensor looks into the storage: it would go on seeing the old values.

    Only torch's own count knows of those that autograd or a process group holds. Without that
    private function nothing is moved.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return "torch does not tell whether other tensors share its storage"
    alone = torch.nn.Parameter(torch.empty(1, dtype=torch.float32, device="cpu"))
    users, least = (count(tensor.untyped_storage()._cdata) for tensor in (param, alone))
    return "other tensors share its storage" if users > least else None
