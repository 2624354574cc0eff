"""Recognise a step that differs from the one before in nothing but its gradients' values.

A step's own work is two launches; what takes time on the host is to make sure that all is as it
was. Here that is a handful of passes over the parameters, each a loop in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import kept
from .kernels.plan import capturing
from .kernels.prepared import FusedStep, gradient_of
from .members import Member, Pass
from .memory import Written, is_sharded, local
from .options import Options, OptionsReader
from .state import KEYS
from .unchanged import Addresses, Same, same_dicts, same_kinds

if TYPE_CHECKING:
    # torch may be built without torch.distributed
    from .spread import Spread

_PARAMS = itemgetter("params")
_GRAD = attrgetter("grad")


def _where(tensor: Tensor) -> Callable[[], int]:
    """Asks a tensor for its address; of a DTensor, that of its part."""
    return (lambda: local(tensor).data_ptr()) if is_sharded(tensor) else tensor.data_ptr


class Lot(NamedTuple):
    """What one prepared step serves.

    Attributes:
        prepared: the step; None for parameters of which this process holds nothing.
        pairs: each parameter, and what of it the step was last run with, in the step's order.
        spread: keeps the statistics of slices of which other processes hold parts.
    """

    prepared: FusedStep | None
    pairs: Sequence[tuple[Tensor, Member]]
    spread: Spread | None = None


class Steady:
    """What the last step worked on; `run` repeats it if that still holds.

    Args:
        optimizer: its groups, its state, and its choice of implementation.
        lots: all that was stepped, `serves`.
        reader: has read the options of each group.
        this: the step.
    """

    def __init__(
        self, optimizer: Any, lots: Sequence[Lot], reader: OptionsReader, this: Pass
    ) -> None:
        groups = optimizer.param_groups
        # users may keep things of their own there
        entries = self.entries = [
            entry for entry in optimizer.state.values() if isinstance(entry, dict)
        ]
        self.prepared = [lot.prepared for lot in lots if lot.prepared is not None]
        self.fused = optimizer.fused
        self.lists = list(map(_PARAMS, groups))
        # by group: a parameter may move to the neighbour and stay where it was among all
        self.params = Same(self.lists)
        params = list(chain.from_iterable(self.lists))
        pairs = [pair for lot in lots for pair in lot.pairs]
        members = [member for _, member in pairs]
        self.moved = [param for param, _ in pairs]
        stepped = set(map(id, self.moved))
        self.idle = [p for p in params if id(p) not in stepped and p.numel()]
        self.empty = [param for param in params if not param.numel()]
        self.device = members[0].param.device
        self.same_groups = same_dicts(groups)
        self.reader = reader
        self.layouts = [one.layout for one in reader.options]
        self.closing = this.closing
        self.same_state = same_dicts([optimizer.state])
        # state tensors by key, each beside the entries that must still hold them
        self.held: list[tuple[itemgetter[str], list[Any], Same]] = []
        for key in KEYS:
            get, having = itemgetter(key), [entry for entry in entries if key in entry]
            if having:
                self.held.append((get, having, Same([list(map(get, having))])))
        # `buffer.data = ...` leaves the object as it is: the first, and one more in every step, are
        # looked at (all would take a sixth of a step). The memory that the kernels write is held
        state = [one for _, _, same in self.held for one in same.lists[0]]
        self.memory = [local(one).detach() for one in state]
        self.state_at = [(_where(one), local(one).data_ptr()) for one in state]
        self.turn = 0
        self.written = Written([*(member.param for member in members), *self.memory])
        self.params_at = Addresses([member.param.data_ptr() for member in members])
        # of the last step's gradients
        self.grads_at = Addresses([])
        self.kept: kept.Kept | None = None
        self.witness: kept.Witness | None = kept.Witness()
        self.untouched: kept.Untouched | None = None
        self.repeats = 0
        # parameters too: `p.data = p.data.T` changes neither the address nor, if square, the shape
        grads = [gradient_of(member) for member in members]
        self.same_kinds = same_kinds([*grads, *(member.param for member in members)])

    @staticmethod
    def serves(lots: Sequence[Lot], options: Sequence[Options]) -> bool:
        """Whether a step by kernels alone is of the sort that can be recognised."""
        in_place = all(lot.prepared is None or lot.prepared.in_place for lot in lots)
        return in_place and all(one.nonfinite != "raise" for one in options)

    def run(self, optimizer: Any, this: Pass) -> bool:
        """Step if all is as it was but for options and gradients; else move nothing.

        Args:
            optimizer: the one this was made for.
            this: what is new in this step.

        Returns:
            Whether the step was made.

        Raises:
            ValueError: an option, changed since, is out of bounds.
            TypeError: likewise.
        """
        groups, state, untouched = optimizer.param_groups, optimizer.state, self.untouched
        same_groups = (untouched is not None and untouched.same_groups(groups)) or self.same_groups(
            groups
        )
        if not same_groups:
            self.lists = list(map(_PARAMS, groups))
        if optimizer.fused is not self.fused:
            return False
        # a graph would leave them out of every replay: the full check refuses them by name
        if self.idle and capturing(self.device):
            return False
        grads = None if self.kept is None else self.kept.grads(self.lists)
        recognised = grads is not None
        if grads is None:
            grads = self._grads()
        if grads is None:
            return False
        try:
            # None has no address and a sparse gradient none to give
            found = self.grads_at.of(grads)
        except (TypeError, RuntimeError):
            return False
        stayed = found is self.grads_at.addresses
        params = self._params()
        as_before = (
            (recognised or self.same_kinds(*grads, *params))
            and self.params_at.of(params) is self.params_at.addresses
            and ((untouched is not None and untouched.same_state(state)) or self._holds(state))
            and self._in_place()
        )
        if not as_before or not self._follow(groups, this, same_groups):
            return False
        if not stayed:
            # by the full check, which copies them
            if self.written.hold_any(grads, found):
                return False
            # the kernels were laid out for addresses that 16 divides
            if not self._point_at(found):
                return False
            self.grads_at.addresses = found
        self.repeats += 1
        if self.repeats == kept.PATIENCE:
            self.untouched = kept.Untouched.of(groups, state, self.entries)
        if not recognised and self.witness is not None:
            self.kept = self.witness.kept(self.lists, self.moved)
        self._launch(this)
        return True

    def _grads(self) -> list[Any] | None:
        """The gradients, if parameters are as they were and still have one, or none."""
        if not self.params(self.lists):
            return None
        if any(param.grad is not None for param in self.idle):
            return None
        if any(param.numel() for param in self.empty):
            return None
        return list(map(_GRAD, self.moved))

    def _params(self) -> list[Tensor]:
        """What of `moved` this process holds."""
        return self.moved

    def _point_at(self, found: list[int]) -> bool:
        """Have the kernels read gradients at these addresses; False where they cannot."""
        return all(prepared.point_at(found) for prepared in self.prepared)

    def _launch(self, this: Pass) -> None:
        """Run the step."""
        for prepared in self.prepared:
            prepared.run_again(this)

    def _holds(self, state: dict[Any, Any]) -> bool:
        """Whether the state holds the tensors that it held."""
        if not self.same_state([state]):
            return False
        try:
            return all(same([list(map(get, entries))]) for get, entries, same in self.held)
        except KeyError:
            return False

    def _in_place(self) -> bool:
        """Whether the state's tensors are where they were, as far as two of them tell."""
        if not self.state_at:
            return True
        self.turn = (self.turn + 1) % len(self.state_at)
        looked_at = self.state_at[0], self.state_at[self.turn]
        return all(where() == address for where, address in looked_at)

    def _follow(self, groups: list[dict[str, Any]], this: Pass, same_groups: bool) -> bool:
        """Bring the option tables up to date; False where the layout of the work would change."""
        # whose windows close stands in the groups too
        if same_groups and not self.reader.by_value:
            return True
        options = self.reader.read(groups)
        if [one.layout for one in options] != self.layouts:
            return False
        if any(one.nonfinite == "raise" for one in options):
            return False
        for prepared in self.prepared:
            prepared.write(options, this.closing)
        self.same_groups = same_dicts(groups)
        self.closing = this.closing
        return True
