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
from .kernels.prepared import FusedStep, gradient_of, structure
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
        groups, entries = optimizer.param_groups, list(optimizer.state.values())
        self.prepared = prepared
        self.fused = optimizer.fused
        params = _parameters(groups)
        self.params = Same(params)
        # parameters of each group: one may move to its neighbour and stay where it was in the list
        self.sizes = [len(group["params"]) for group in groups]
        # all that groups hold is read soonest, but a count of micro-batches is no option
        counting = any(one.accumulation_steps > 1 for one in options)
        self.values_of = _OPTIONS if counting else dict.values
        self.values = list(chain.from_iterable(map(self.values_of, groups)))
        self.structure = [structure(one) for one in options]
        self.tensor_lr = any(isinstance(one.lr, Tensor) for one in options)
        stepped = {id(member.param) for member in members}
        self.active = [i for i, param in enumerate(params) if id(param) in stepped]
        self.idle = [i for i, p in enumerate(params) if id(p) not in stepped and p.numel()]
        self.device = members[0].param.device
        self.addresses = [member.param.data_ptr() for member in members]
        self.owners = Same(list(optimizer.state))
        self.closing = closing
        # state tensors by key, each beside the entries that must still hold them: None is all
        self.held: list[tuple[itemgetter[str], list[Any] | None, Same]] = []
        for key in KEYS:
            get, having = itemgetter(key), [entry for entry in entries if key in entry]
            if having:
                some = having if len(having) < len(entries) else None
                self.held.append((get, some, Same(list(map(get, having)))))
        self.entries = entries if any(some for _, some, _ in self.held) else None
        # `buffer.data = ...` goes unseen, and would free memory that the kernels write
        self.memory = [one.detach() for _, _, same in self.held for one in same.tensors]
        # of the gradients of the last step
        self.found: list[int] = []
        # parameters too: `p.data = p.data.T` changes neither the address nor, if square, the shape
        grads = [gradient_of(member) for member in members]
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
        params = _parameters(groups)
        sizes = list(map(len, map(_PARAMS, groups)))
        if sizes != self.sizes or not self.params(params) or optimizer.fused is not self.fused:
            return False
        if self.entries is not None and not all(map(is_, entries, self.entries)):
            return False
        # a graph would leave them out of every replay: the full check refuses them by name
        if self.idle and capturing(self.device):
            return False
        if self.idle and any(params[i].grad is not None for i in self.idle):
            return False
        if len(self.active) != len(params):
            params = [params[i] for i in self.active]
        grads = list(map(_GRAD, params))
        try:
            # None has no address and a sparse gradient none to give
            found = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):
            return False
        kept = found == self.found
        # where kept, the same list: it is compared once more, at less than half the cost
        found = self.found if kept else found
        as_before = (
            self.same_kind(*grads, *params)
            and list(map(Tensor.data_ptr, params)) == self.addresses
            and self.owners(list(optimizer.state))
            and self._holds(entries)
            and (kept or not reduce(or_, found) % ALIGNMENT)
        )
        if not as_before or not self._follow(groups, this):
            return False
        self.found = found
        self.prepared.run_at(found, this)
        return True

    def _holds(self, entries: list[Any]) -> bool:
        """Whether the state holds the tensors that it held."""
        try:
            return all(same(list(map(get, some or entries))) for get, some, same in self.held)
        except KeyError:
            return False

    def _follow(self, groups: list[dict[str, Any]], this: Pass) -> bool:
        """Bring the option tables up to date; False where the layout of the work would change."""
        values = list(chain.from_iterable(map(self.values_of, groups)))
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


class Same:
    """Tells whether a list holds the very tensors that this one does, in their order.

    Lists compare equal without asking their elements where these are the same objects, at 2 ns an
    element against 17 ns for `is`. Elements that are not are asked, and a tensor's answer is a
    tensor: its truth is an error, which is a no, unless it has a single entry.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.single = [i for i, tensor in enumerate(tensors) if tensor.numel() < 2]

    def __call__(self, found: list[Tensor]) -> bool:
        """Whether `found` is the same list of objects."""
        try:
            equal = found == self.tensors
        # whatever a stranger's comparison raises
        except Exception:
            return False
        return equal and all(found[i] is self.tensors[i] for i in self.single)


def _parameters(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    params: list[Tensor] = []
    for group in groups:
        params += group["params"]
    return params


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
