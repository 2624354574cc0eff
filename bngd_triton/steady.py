"""Recognise a step that differs from the one before in nothing but its gradients' values.

A step's own work is two launches; what takes time on the host is to make sure that all is as it
was. Here that is a handful of passes over the parameters, each a loop in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import reduce
from itertools import chain
from operator import attrgetter, is_, itemgetter, or_
from typing import Any

from torch import Tensor

from .kernels.plan import ALIGNMENT, capturing
from .kernels.prepared import FusedStep, structure
from .members import Member, Pass
from .options import Options
from .state import KEYS

_PARAMS = itemgetter("params")
_OPTIONS = itemgetter(*(field.name for field in fields(Options)))
_GRAD = attrgetter("grad")


class Steady:
    """What the last step worked on; `run` repeats it if that still holds.

    Args:
        optimizer: its groups, its state, and its choice of implementation.
        prepared: the step; all its tensors in place.
        members: what it was last run with.
        options: of each group.
        closing: what was written to the tables with the options.
    """

    def __init__(
        self,
        optimizer: Any,
        prepared: FusedStep,
        members: Sequence[Member],
        options: list[Options],
        closing: Sequence[bool],
    ) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        self.prepared = prepared
        self.fused = optimizer.fused
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        # parameters of each group: one may move to its neighbour and stay where it was in the list
        self.sizes = [len(group["params"]) for group in groups]
        self.values = list(chain.from_iterable(map(_OPTIONS, groups)))
        self.structure = [structure(one) for one in options]
        self.tensor_lr = any(isinstance(one.lr, Tensor) for one in options)
        stepped = {id(member.param) for member in members}
        self.active = [i for i, param in enumerate(params) if id(param) in stepped]
        self.idle = [i for i, p in enumerate(params) if id(p) not in stepped and p.numel()]
        # an alias keeps the memory: while it lives, an equal address is the same parameter
        self.aliases = [member.param.detach() for member in members]
        self.addresses = list(map(Tensor.data_ptr, self.aliases))
        self.entries = list(state.values())
        self.closing = closing
        # state tensors by key, each beside the entry that must still hold it
        self.held = []
        for key in KEYS:
            having = [state[m.param] for m in members if key in state.get(m.param, ())]
            if having:
                get = itemgetter(key)
                self.held.append((get, having, list(map(get, having))))
        # of the gradients of the last step
        self.found: list[int] = []
        # parameters too: `p.data = p.data.T` changes neither the address nor, if square, the shape
        grads = [member.grad for member in members]
        self.same_kind = _kind_check([*grads, *(member.param for member in members)])

    @staticmethod
    def serves(prepared: FusedStep, options: Sequence[Options]) -> bool:
        """Whether a step by kernels alone is of the sort that can be recognised."""
        return prepared.in_place and all(one.nonfinite != "raise" for one in options)

    def run(self, optimizer: Any, this: Pass) -> bool:
        """Step if all is as it was but for options and gradients; else change nothing.

        Args:
            optimizer: the one this was made for.
            this: what is new in this step.

        Returns:
            Whether the step was made.

        Raises:
            ValueError: an option, changed since, is out of bounds.
            TypeError: likewise.
        """
        groups, entries = optimizer.param_groups, list(optimizer.state.values())
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        sizes = list(map(len, map(_PARAMS, groups)))
        if sizes != self.sizes or optimizer.fused is not self.fused:
            return False
        if len(entries) != len(self.entries) or not all(map(is_, entries, self.entries)):
            return False
        # a graph would leave them out of every replay: the full check refuses them by name
        if self.idle and capturing(self.aliases[0].device):
            return False
        if any(params[i].grad is not None for i in self.idle):
            return False
        if len(self.active) != len(params):
            params = [params[i] for i in self.active]
        grads = list(map(_GRAD, params))
        try:
            # None has no address and a sparse gradient none to give
            found = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):
            return False
        as_before = (
            self.same_kind(*grads, *params)
            and list(map(Tensor.data_ptr, params)) == self.addresses
            and all(all(map(is_, map(get, having), held)) for get, having, held in self.held)
            and (found == self.found or not reduce(or_, found) % ALIGNMENT)
        )
        if not as_before or not self._follow(groups, this):
            return False
        self.found = found
        self.prepared.run_at(found, this)
        return True

    def _follow(self, groups: list[dict[str, Any]], this: Pass) -> bool:
        """Bring the option tables up to date; False where the layout of the work would change."""
        values = list(chain.from_iterable(map(_OPTIONS, groups)))
        # the same objects: True equals 1.0, but is refused
        same = len(values) == len(self.values) and all(map(is_, values, self.values))
        if same and not self.tensor_lr and this.closing == self.closing:
            return True
        options = [Options.of(group) for group in groups]
        if [structure(one) for one in options] != self.structure:
            return False
        if any(one.nonfinite == "raise" for one in options):
            return False
        self.prepared.write(options, this.closing)
        self.values = values
        self.closing = this.closing
        self.tensor_lr = any(isinstance(one.lr, Tensor) for one in options)
        return True


def _kind_check(tensors: list[Tensor]) -> Callable[..., bool]:
    """A function that tells whether tensors are of these dtypes, devices, shapes and strides."""
    try:
        # torch.compile's own guard: one call in C, 50 ns a tensor
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        if check(*tensors):
            return check
    except (ImportError, AttributeError, TypeError):
        pass

    def kinds(found: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.dtype, t.device, t.shape, t.stride(), t.layout, t.is_neg()) for t in found]

    expected = kinds(tensors)
    return lambda *found: kinds(found) == expected
