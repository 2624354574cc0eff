"""What a step is laid out from, and what it reuses for as long as its tensors stay in place.

Words: a *slice* has its own statistics: a tensor, a row, or all tensors of a global group together;
a *span* is the part of a slice that one program of the first launch reads; a *chunk* is the part
that one program of the second launch updates; a *tile* is a set of rows or of small tensors that
one program finishes, in a launch of their own. Only slices that no tile finishes are in the table
of slices.

Tensors that share storage dtypes and alignment form a *batch*: three launches serve it, whatever
the number of tensors, groups and options. Statistics of all batches come before all updates, so
that a global group may span batches. A single launch can serve the slices with spans of a batch
(`work.py`), unless such a group spans batches. `build_plan.py` lays all this out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from struct import pack
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import Tuning
from .launcher import Launch
from .tables import MASTER_COPY, PLAIN, REMAINDER, STOCHASTIC, coded
from .work import Work, lay_out

# bytes of the widest access
ALIGNMENT = 16
# for the lowest byte of an address, whether 16 does not divide it
_UNALIGNED = bytes(byte % ALIGNMENT != 0 for byte in range(256))


class Kind(NamedTuple):
    """What tensors must share to share launches."""

    param: torch.dtype
    grad: torch.dtype
    momentum: torch.dtype
    # see `tables.PLAIN` and what follows
    master: int
    aligned: bool


class Entry(NamedTuple):
    """One tensor of a step, as the plan needs it.

    All three tensors have the same dense memory order, in which a row is one contiguous run.

    Attributes:
        param: written in place.
        grad: read only.
        momentum: written in place; None without momentum.
        record: float64 [rows, RECORD_COLUMNS], written.
        option: the tensor's row of the option table.
        rows: slices along dimension 0; 1 when the tensor is one slice.
        centred: whether the mean is removed.
        shared: tensors with the same number here form one slice; None for a slice of its own.
        master: int16 or float32, written in place; None without a master.
        window: uint8 [rows], written; None without accumulation.
        key: seeds stochastic rounding; None where the parameter is rounded to nearest.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor | None
    record: Tensor
    option: int
    rows: int
    centred: bool
    shared: int | None
    master: Tensor | None = None
    window: Tensor | None = None
    key: int | None = None

    @property
    def length(self) -> int:
        """Elements of a row."""
        return self.param.numel() // self.rows

    @property
    def coded(self) -> int:
        """See `tables.coded`."""
        return coded(self.option, self.centred)

    @property
    def buffer(self) -> Tensor:
        """The momentum; without one its address is never used, but it must be one."""
        return self.param if self.momentum is None else self.momentum

    @property
    def granule(self) -> int:
        """Elements in the widest access to the narrowest of the three tensors; 4 or 8."""
        tensors = (self.param, self.grad, self.buffer)
        return ALIGNMENT // min(tensor.element_size() for tensor in tensors)

    @property
    def aligned(self) -> bool:
        """Whether every row of all tensors starts at a multiple of 16 bytes."""
        if self.rows > 1 and self.length % self.granule:
            return False
        tensors = [self.param, self.grad, self.buffer]
        if self.master is not None:
            tensors.append(self.master)
        return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)

    @property
    def kind(self) -> Kind:
        """What it must share with others to share launches with them."""
        master = PLAIN if self.key is None else STOCHASTIC
        if self.master is not None:
            master = REMAINDER if self.master.dtype is torch.int16 else MASTER_COPY
        buffer = torch.float32 if self.momentum is None else self.momentum.dtype
        return Kind(self.param.dtype, self.grad.dtype, buffer, master, self.aligned)


@dataclass
class Batch:
    """The tables of one class of tensors; int64 on the device."""

    order: list[int]
    kind: Kind
    spans: Tensor
    tiles: Tensor
    chunks: Tensor
    rows: Tensor
    param_ptrs: Tensor
    momentum_ptrs: Tensor
    master_ptrs: Tensor
    grad_ptrs: Tensor
    _work: Work | None = field(default=None, init=False)

    def work(self, tuning: Tuning) -> Work:
        """The work list of a single launch, laid out when first asked for."""
        if self._work is None:
            wave = max(1, tuning.wave // self.kind.grad.itemsize)
            self._work = lay_out(self.spans, self.chunks, wave)
        return self._work


@dataclass
class Plan:
    """Everything a step reuses as long as its tensors stay where they are."""

    device: torch.device
    tuning: Tuning
    batches: list[Batch]
    slices: Tensor
    partials: Tensor
    arrived: Tensor
    factors: Tensor
    # written through addresses in the tables: they must live as long
    records: list[Tensor]
    windows: list[Tensor]
    # whether a slice has spans in several batches
    across_batches: bool
    # the batches' gradient addresses, one table, and what was uploaded to it last
    grad_ptrs: Tensor
    in_batch_order: Callable[[list[int]], tuple[int, ...]]
    # bytes of all gradients
    grad_bytes: int
    addresses: list[int] = field(default_factory=list)
    # a CUDA graph reads the tables: they must stay as they are
    fixed: bool = False
    # what each form launches, made when it is first asked for
    launches: dict[str, list[Launch]] = field(default_factory=dict)
    # of each address, in batch order, whether 16 does not divide it
    _unaligned: bytes | None = None

    def point_at(self, addresses: list[int]) -> bool:
        """Upload the gradients' addresses where one changed.

        Args:
            addresses: in entry order.

        Returns:
            False where they were refused, and those before them are still in use: the tables are
            `fixed`, or 16 does not divide the addresses that it divided; other kernels serve
            unaligned gradients, and sum in another order.

        Raises:
            RuntimeError: one moved while a CUDA graph is being captured.
        """
        if addresses != self.addresses:
            if capturing(self.device):
                raise RuntimeError(
                    "a gradient moved while a CUDA graph is being captured; run one whole "
                    "iteration with zero_grad(set_to_none=False) before the capture, on the same "
                    "stream"
                )
            if self.fixed:
                return False
            # 3 us for 300, where `array` takes 8
            packed = pack(f"<{len(addresses)}Q", *self.in_batch_order(addresses))
            unaligned = packed[::8].translate(_UNALIGNED)
            if self._unaligned not in (None, unaligned):
                return False
            upload(self.grad_ptrs, torch.frombuffer(bytearray(packed), dtype=torch.int64))
            self.addresses, self._unaligned = addresses, unaligned
        return True


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be uploaded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(table: Tensor, values: Tensor) -> None:
    """Copy CPU values to a device table, in stream order and without waiting for the device."""
    if table.device.type == "cpu":
        table.copy_(values)
    else:
        # torch's pinned allocator gives the memory out again only after the copy
        table.copy_(values.pin_memory(), non_blocking=True)
