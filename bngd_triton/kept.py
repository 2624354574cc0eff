"""What is slower to make and sooner to ask than `unchanged.py`: for steps that repeat for long."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.__future__ import get_swap_module_params_on_conversion

# steps through which gradients stay before all are looked at one by one, which takes 5 ms for 300;
# and steps that repeat one another before guards are made over the state, which takes 2 ms
PATIENCE = 8


class Kept:
    """Recognises parameters and gradients that are the same objects, and of the same kinds.

    Gradients stay so under ``zero_grad(set_to_none=False)``. torch.compile's guards walk the lists
    in C, at 130 ns for a parameter with its gradient where `.grad` and `TensorGuards` take 185.
    References to gradients are weak: whoever drops them frees them.

    Args:
        lists: the parameters of each group.
        moved: those that a step moves. The others are empty, or have no gradient.

    Raises:
        ImportError: this torch has no such guards, or others.
        AttributeError: likewise.
        TypeError: likewise.
        RuntimeError: likewise.
    """

    def __init__(self, lists: list[list[Tensor]], moved: list[Tensor]) -> None:
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
        if not self._same(lists):
            raise TypeError("a guard refuses what it was made from")

    def grads(self, lists: list[list[Tensor]]) -> list[Tensor] | None:
        """The gradients of `moved`, if all is as it was; else None."""
        if not self._same(lists):
            return None
        # an object that took the place of one long gone has its number, and the reference is dead
        grads: list[Any] = list(map(_dereferenced, self._grads))
        return None if grads[0] is None else grads


# Python 3.11's, in half the time of the method
_dereferenced: Callable[[Any], Any] = getattr(operator, "call", weakref.ref.__call__)


class Untouched:
    """Recognises groups and state as the dicts that they were, in which nothing was set since.

    Args:
        groups: the optimizer's.
        state: likewise.
        entries: of the state.

    Raises:
        ImportError: as for `Kept`, like what follows.
        AttributeError: see there.
        TypeError: see there.
        RuntimeError: see there.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        entries: list[dict[str, Any]],
    ) -> None:
        self._state = state
        self._owned: list[dict[Any, Any]] = [state, *entries]
        self._same = _versions(self._owned)
        self.same_groups = _versions(groups)
        if not (self.same_state(state) and self.same_groups(groups)):
            raise TypeError("a guard refuses what it was made from")

    def same_state(self, state: dict[Tensor, Any]) -> bool:
        """Whether this is the state, as it was."""
        return state is self._state and self._same(self._owned)

    @classmethod
    def of(cls, *dicts: Any) -> Untouched | None:
        """One, or None where torch lacks what it needs."""
        try:
            return cls(*dicts)
        except (ImportError, AttributeError, TypeError, RuntimeError):
            return None


def _versions(dicts: Sequence[dict[Any, Any]]) -> Callable[[Sequence[dict[Any, Any]]], bool]:
    """`unchanged.same_dicts` at 17 ns a dict, where making it takes 6 us for each."""
    from torch._C._dynamo.guards import RootGuardManager
    from torch._dynamo.guards import GuardManagerType

    root = RootGuardManager()
    root.add_length_check_guard(len(dicts), [], None)
    for i, one in enumerate(dicts):
        of_one = root.list_getitem_manager(i, f"[{i}]", one, GuardManagerType.GUARD_MANAGER)
        of_one.add_dict_version_guard(one, [], None)
    check: Callable[[Sequence[dict[Any, Any]]], bool] = root.check
    return check


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

    def kept(self, lists: list[list[Tensor]], moved: list[Tensor]) -> Kept | None:
        """What recognises these gradients, once they have stayed for long enough.

        Args:
            lists: as for `Kept`.
            moved: likewise.
        """
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
            return Kept(lists, moved)
        except (ImportError, AttributeError, TypeError, RuntimeError):
            return None
