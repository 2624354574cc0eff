"""How tensors lie in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor; without the second that importing it takes."""
    return hasattr(tensor, "placements")


def dispatches(tensor: Tensor) -> bool:
    """Whether a tensor's class carries out operations itself: its memory, if any, tells nothing.

    Wrapper subclasses and fake tensors do, DTensors too; a `Parameter` class of one's own does not.
    """
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; other tensors as they are.

    Under `torch.no_grad`, or the part is a view that autograd guards.
    """
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


# 8 MB of set, however an allocator wanders
MOST_ADDRESSES = 100_000


class Written:
    """The memory of tensors that a step writes.

    Args:
        tensors: of any devices; those without memory of their own are left out.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        starts: list[int] = []
        ends = [0]
        for start, end in sorted(span for span in map(_span, tensors) if span is not None):
            # overlapping spans are one: `_touched` looks at the last that starts before an end
            if start < ends[-1]:
                ends[-1] = max(ends[-1], end)
                continue
            starts.append(start)
            ends.append(end)
        self._starts, self._ends = np.array(starts, np.uint64), np.array(ends, np.uint64)

        # addresses of runs that lie elsewhere
        self._apart: set[int] = set()

    def hold_any(self, starts: Sequence[int], sizes: Any) -> bool:
        """Whether any of many runs of bytes may lie there; those of an address have one size.

        Allocators give the same addresses again and again: a lookup takes 20 ns.

        Args:
            starts: their first addresses.
            sizes: their bytes: uint64 [runs].
        """
        if self._apart.issuperset(starts):
            return False
        if self._touched(np.array(starts, np.uint64), sizes).any():
            return True
        if len(self._apart) > MOST_ADDRESSES:
            self._apart.clear()
        self._apart.update(starts)
        return False

    def _touched(self, starts: Any, sizes: Any) -> Any:
        before = np.searchsorted(self._starts, starts + sizes)
        return self._ends[before] > starts

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's entries may lie in this memory."""
        span = _span(tensor)
        if span is None:
            return False
        start, end = np.array(span, np.uint64)
        return bool(self._touched(start, end - start))


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """From the first byte that a tensor's entries use to the one after the last."""
    if dispatches(tensor) or not tensor.numel():
        return None
    try:
        start = tensor.data_ptr()
    # it stands for zeros, or wraps another
    except RuntimeError:
        return None
    return (start, start + reach(tensor) * tensor.element_size()) if start else None


def reach(tensor: Tensor) -> int:
    """How many entries of a storage lie from a tensor's first to its last."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))


def apart(grads: Sequence[Tensor], written: Iterable[Tensor | None]) -> list[Tensor]:
    """Gradients as they are before a step writes: copies of those that lie where it writes."""
    memory = Written(tensor for tensor in written if tensor is not None)
    return [grad.clone() if memory.holds(grad) else grad for grad in grads]


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that may be written at any time, though `torch.inference_mode` is on."""
    # leaving it turns autograd on
    with torch.inference_mode(False), torch.no_grad():
        yield


def lasting_when_inferring(method: Callable[P, T]) -> Callable[P, T]:
    """`method`, whose tensors are `lasting` though `torch.inference_mode` is on."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with lasting():
            return method(*args, **kwargs)

    return wrapped


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one run of memory, each in a place of its own."""
    if tensor.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != filled:
            return False
        filled *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are dense and lie in memory in the same order."""
    if a.stride() == b.stride():
        return is_dense(a)
    pairs = zip(a.shape, a.stride(), b.stride())
    return all(size == 1 or s == t for size, s, t in pairs) and is_dense(a)


def walked_in_place(tensor: Tensor, rows: int) -> bool:
    """Whether a tensor is dense and each of its rows one run: else a row-major copy is walked."""
    runs = rows == 1 or tensor.stride(0) * rows == tensor.numel()
    return is_dense(tensor) and runs


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current: Triton launches there and DLPack refuses tensors from elsewhere."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]
