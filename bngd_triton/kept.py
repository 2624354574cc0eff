"""Gradients that stay the tensors they are, as ``zero_grad(set_to_none=False)`` leaves them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.__future__ import get_swap_module_params_on_conversion

# steps through which gradients stay before all are looked at one by one, which takes 5 ms for 300
PATIENCE = 8


class Kept:
    """Recognises parameters and gradients that are the same objects, and of the same kinds.

    torch.compile's guards walk the lists in C, at 130 ns for a parameter with its gradient where
    `.grad` and `TensorGuards` take 185. References to gradients are weak: whoever drops them frees
    them.

    Args:
        lists: the parameters of each group.
        moved: those that a step moves. The others are empty, or have no gradient.
        entries: of the state.

    Raises:
        ImportError: this torch has no such guards, or others.
        AttributeError: likewise.
        TypeError: likewise.
        RuntimeError: likewise.
    """

    def __init__(
        self, lists: list[list[Tensor]], moved: list[Tensor], entries: list[dict[str, Any]]
    ) -> None:
        from torch._C._dynamo.guards import RootGuardManager
        from torch._dynamo.guards import GuardManagerType

        root, plain = RootGuardManager(), GuardManagerType.GUARD_MANAGER
        of_step = set(map(id, moved))
        root.add_length_check_guard(len(lists), [], None)
        for i, params in enumerate(lists):
            of_group = root.list_getitem_manager(i, f"[{i}]", params, plain)
            of_group.add_length_check_guard(len(params), [], None)
            for j, param in enumerate(params):
                name = f"[{i}][{j}]"
                of_param = of_group.list_getitem_manager(j, name, param, plain)
                of_param.add_id_match_guard(id(param), [], None)
                grad = param.grad
                if grad is not None and id(param) in of_step:
                    of_grad = of_param.grad_manager(f"{name}.grad", grad, plain)
                    of_grad.add_id_match_guard(id(grad), [], None)
                    _match(of_grad, grad)
                    _match(of_param, param)
                elif not param.numel():
                    # it may grow
                    _match(of_param, param)
                else:
                    of_param.grad_manager(f"{name}.grad", None, plain).add_none_match_guard(
                        [], None
                    )
        self._same: Callable[[list[list[Tensor]]], bool] = root.check
        self._grads = [weakref.ref(param.grad) for param in moved]
        of_state = RootGuardManager()
        for i, entry in enumerate(entries):
            of_entry = of_state.list_getitem_manager(i, f"[{i}]", entry, plain)
            of_entry.add_dict_version_guard(entry, [], None)
        self._untouched: Callable[[list[dict[str, Any]]], bool] = of_state.check
        self._entries = entries
        if not self._same(lists) or not self.untouched():
            raise TypeError("a guard refuses what it was made from")

    def grads(self, lists: list[list[Tensor]]) -> list[Tensor] | None:
        """The gradients of `moved`, if all is as it was; else None."""
        if not self._same(lists):
            return None
        # an object that took the place of one long gone has its number, and the reference is dead
        grads: list[Any] = [ref() for ref in self._grads]
        return None if grads[0] is None else grads

    def untouched(self) -> bool:
        """Whether nothing was set in the entries; 17 ns for each."""
        return self._untouched(self._entries)


def _match(guard: Any, tensor: Tensor) -> None:
    """Have a guard compare a tensor's dtype, device, shape and strides."""
    sizes, strides, keys = tensor.size(), tensor.stride(), torch._C._dispatch_keys(tensor)
    guard.add_tensor_match_guard(
        tensor, list(sizes), list(strides), "", [], None, type(tensor), keys
    )


class Witness:
    """Waits until gradients stay, by the first of them, and has all of them looked at then."""

    def __init__(self) -> None:
        self._first: Callable[[], Tensor | None] = lambda: None
        self._stayed = 0
        self._patience = PATIENCE

    def kept(
        self, lists: list[list[Tensor]], moved: list[Tensor], entries: list[dict[str, Any]]
    ) -> Kept | None:
        """What recognises these gradients, once they have stayed for long enough."""
        first = moved[0].grad
        assert first is not None
        # torch cannot swap tensors that have weak references
        if get_swap_module_params_on_conversion():
            return None
        if self._first() is first:
            self._stayed += 1
        else:
            self._first, self._stayed = weakref.ref(first), 0
        if self._stayed < self._patience:
            return None
        # where some stay and others do not, this is for nothing: ever more seldom
        self._stayed, self._patience = 0, 2 * self._patience
        try:
            return Kept(lists, moved, entries)
        except (ImportError, AttributeError, TypeError, RuntimeError):
            return None
