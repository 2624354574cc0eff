"""The tables of a step: every entry once, and at the addresses that wide accesses need."""

import itertools

import pytest
import torch

from bngd_triton import reference
from bngd_triton.kernels import Tuning, launch
from bngd_triton.kernels.build_plan import build
from bngd_triton.kernels.tables import SHAPES_OF_TILES
from bngd_triton.options import Options
from support.handmade_plans import entry, inputs
from support.kernel_cases import LANES, SHAPES, SMALL


def test_past_two_to_the_31(device):
    """The last items of a tensor of 2**31 + 100 entries; memory is committed only where touched."""
    n = 2**31 + 100
    grad = torch.empty(n, dtype=torch.float16, device=device)
    param = torch.empty(n, dtype=torch.float16, device=device)
    tuning = Tuning(wide=True, span=65536, chunk=65536, update_block=4096, block=4096, unroll=1)
    whole = build([entry(param, grad)], tuning)
    (batch,) = whole.batches
    for table in (batch.spans, batch.chunks):
        assert int(table[0, 1]) == 0
        assert torch.equal(table[1:, 1], table[:-1, 1] + table[:-1, 2])
        assert int(table[-1, 1] + table[-1, 2]) == n
        assert int(table[:, 2].max()) < 2**31
    assert whole.partials.shape[1] <= tuning.max_spans

    tail = 100 + 5000
    grad[-tail:] = torch.randn(tail, device=device)
    param[-tail:] = 0
    batch.spans = torch.tensor([[0, n - tail, tail, 0, 0]], device=device)
    batch.chunks = torch.tensor([[0, n - tail, tail, 0]], device=device)
    whole.slices[0, :4] = torch.tensor([0, 1, tail, 1], device=device)
    whole.point_at([grad.data_ptr()])
    options = Options(lr=1.0, momentum=0.0, maximize=True)
    launch.update(whole, inputs(device, options))
    want = reference.normalize_gradient(grad[-tail:], center_1d=True)
    assert torch.equal(param[-tail:], want)


def test_shape_of_a_plan(device):
    """Every entry is in exactly one span or tile, and in exactly one chunk or tile."""
    shapes = [shape for shape in SHAPES if 0 not in shape]
    for granularity in ("tensor", "row"):
        entries = []
        for shape in shapes:
            tensor = torch.randn(shape, device=device)
            rows = shape[0] if granularity == "row" and len(shape) > 1 else 1
            entries.append(entry(tensor, tensor, None, rows, centred=False))
        found = build(entries, LANES)
        for batch in found.batches:
            sizes = {at: entries[i].param.numel() for at, i in enumerate(batch.order)}
            covered = {"spans": {}, "chunks": {}}
            for name, table in (("spans", batch.spans), ("chunks", batch.chunks)):
                for tensor, _, length, *_ in table.tolist():
                    covered[name][tensor] = covered[name].get(tensor, 0) + length
            for first, count, start, listed, longest, shape in batch.tiles.tolist():
                assert count <= SHAPES_OF_TILES[shape]
                for row in range(count):
                    at = first + row * listed
                    length = int(batch.rows[at, 0])
                    assert length <= longest <= LANES.tile // SHAPES_OF_TILES[shape]
                    assert start + row < entries[batch.order[at]].rows or listed
                    for part in covered.values():
                        part[at] = part.get(at, 0) + length
            assert covered == {"spans": sizes, "chunks": sizes}


# as many rows as make 8192 entries, 32, 8, 4, 2 or one: first tensor, rows, first row, whether each
# row is a tensor, the longest row, the shape
TILES = {
    "300 tensors of 16": (
        [(16,)] * 300,
        [[first, 32, 0, 1, 16, 0] for first in range(0, 288, 32)] + [[288, 12, 0, 1, 16, 0]],
    ),
    "9 tensors of 260": ([(260,)] * 9, [[0, 8, 0, 1, 260, 1], [8, 1, 0, 1, 260, 1]]),
    "tensors of three lengths": (
        [(256,), (64,), (4096,), (8,)],
        [[0, 3, 0, 1, 256, 0], [3, 1, 0, 1, 4096, 3]],
    ),
    "3 rows of 1100": ([(3, 1100)], [[0, 3, 0, 0, 1100, 2]]),
    "70 rows of 16": (
        [(70, 16)],
        [[0, n, first, 0, 16, 0] for n, first in ((32, 0), (32, 32), (6, 64))],
    ),
    "3 rows of 4100": ([(3, 4100)], [[0, 1, row, 0, 4100, 4] for row in range(3)]),
}


@pytest.mark.parametrize(("shapes", "expected"), TILES.values(), ids=TILES)
def test_rows_share_tiles(shapes, expected, device):
    tensors = [torch.zeros(shape, device=device) for shape in shapes]
    entries = [entry(t, t, None, len(t) if t.dim() > 1 else 1) for t in tensors]
    (batch,) = build(entries, Tuning(tile=8192)).batches
    assert batch.tiles.tolist() == expected
    assert len(batch.spans) == len(batch.chunks) == 0


def test_aligned_batches_are_aligned(device):
    """What the hints for 16-byte accesses promise: only a GPU acts on them, or faults."""

    def tensor(shape, dtype, offset):
        n = torch.Size(shape).numel()
        return torch.zeros(n + 8, dtype=dtype, device=device)[offset : offset + n].view(shape)

    narrow, wide = torch.bfloat16, torch.float32
    offsets = ((0, 0, 0), (1, 0, 0), (0, 4, 0), (0, 0, 2))
    shapes = [((6,), 1), ((8,), 1), ((20,), 1), ((1000,), 1), ((1001,), 1)]
    shapes += [((3, n), 3) for n in (4, 7, 8, 300, 304)]
    entries = [
        entry(*map(tensor, [shape] * 3, dtypes, offset), rows, centred=False)
        for dtypes in itertools.product((narrow, wide), repeat=3)
        for offset in offsets
        for shape, rows in shapes
    ]
    # neither the span nor a third of 1 000 is a multiple of an access
    tuning = Tuning(**SMALL | {"span": 100, "chunk": 104, "max_spans": 3})
    for batch in build(entries, tuning).batches:
        mine = [entries[i] for i in batch.order]
        for at, one in enumerate(mine):
            length = one.param.numel() // one.rows
            starts = [row * length for row in range(one.rows)]
            assert batch.kind.aligned == all(starts_access(one, start) for start in starts)
            if batch.kind.aligned:
                for table in (batch.spans, batch.chunks):
                    assert all(starts_access(one, k) for i, k, *_ in table.tolist() if i == at)
        if batch.kind.aligned:
            # the kernel's GRANULE: a row's end cuts no access either
            granule = 4 if set(batch.kind[:3]) == {wide} else 8
            for first, count, _, listed, *_ in batch.tiles.tolist():
                assert not (batch.rows[first : first + (count if listed else 1), 0] % granule).any()


def starts_access(entry, element):
    """Whether an element is at a multiple of 16 bytes in all three tensors."""
    tensors = (entry.param, entry.grad, entry.momentum)
    return not any((t.data_ptr() + element * t.element_size()) % 16 for t in tensors)
