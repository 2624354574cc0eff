"""Cheap proofs that tensors and dicts are as they were: each one or a few calls in C.

Some of the functions of torch used here are its own affair, and may be missing or change; then
slower ones in Python say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .memory import is_sharded


class Same:
    """Tells whether lists hold the very tensors that these do, in their order.

    Lists compare equal without touching their elements where these are the same objects, at 2 ns
    an element against 17 ns for `is`. Elements that are not are asked, and a tensor's answer is a
    tensor: its truth is an error, which is a no, unless it has a single entry.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        # of its own: a list that was changed in place would equal itself
        self.lists = list(map(list, lists))
        # a DTensor's answer may take the other ranks
        self.asked = not any(map(is_sharded, chain.from_iterable(lists)))
        self.single = [
            (i, j)
            for i, tensors in enumerate(lists)
            for j, tensor in enumerate(tensors)
            if tensor.numel() < 2
        ]

    def __call__(self, found: list[list[Tensor]]) -> bool:
        """Whether `found` are the same lists of objects."""
        if not self.asked:
            return list(map(len, found)) == list(map(len, self.lists)) and all(
                map(is_, chain.from_iterable(found), chain.from_iterable(self.lists))
            )
        try:
            equal = found == self.lists
        # whatever a stranger's comparison raises
        except Exception:
            return False
        return equal and all(found[i][j] is self.lists[i][j] for i, j in self.single)


def same_dicts(dicts: Sequence[dict[Any, Any]]) -> Callable[[Sequence[dict[Any, Any]]], bool]:
    """A function that tells whether given dicts are these ones, and nothing was set in them since.

    What their values hold, lists say, may have changed.
    """
    try:
        # a number that no other dict has, nor this one after a change; 80 ns a dict
        from torch._C._dynamo.guards import dict_version

        versions = list(map(dict_version, dicts))
        return lambda found: list(map(dict_version, found)) == versions
    except (ImportError, RuntimeError):
        held = _contents(dicts)

        def same(found: Sequence[dict[Any, Any]]) -> bool:
            now = _contents(found)
            return len(now) == len(held) and all(map(is_, now, held))

        return same


def _contents(dicts: Sequence[dict[Any, Any]]) -> list[Any]:
    return [*dicts, *chain.from_iterable(chain.from_iterable(map(dict.items, dicts)))]


def same_kinds(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether tensors are of these dtypes, devices, shapes and strides."""
    try:
        # torch.compile's own guard: one call in C, 57 ns a tensor
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        if check(*tensors):
            return check
    except (ImportError, AttributeError, TypeError, RuntimeError):
        pass

    def kinds(found: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.dtype, t.device, t.shape, t.stride(), t.layout, t.is_neg()) for t in found]

    expected = kinds(tensors)
    return lambda *found: kinds(found) == expected


class Addresses:
    """Where tensors were.

    Args:
        addresses: of their first elements, in bytes. Others may be set.
    """

    def __init__(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self._indices: list[int] = []

    def of(self, tensors: list[Tensor]) -> list[int]:
        """Where these tensors are: the very list `addresses` if that is where those were.

        Raises:
            TypeError: a tensor is None.
            RuntimeError: likewise, or a tensor has no address.
        """
        if _at is not None and len(tensors) == len(self.addresses):
            if len(self._indices) != len(tensors):
                self._indices = list(range(len(tensors)))
            if _at(tensors, self.addresses, self._indices):
                return self.addresses
        found = list(map(Tensor.data_ptr, tensors))
        # where equal, the same list: it is compared again, at less than half the cost
        return self.addresses if found == self.addresses else found


# what trees of CUDA graphs use, in CUDA builds only: 31 ns a tensor against 65
_at: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
