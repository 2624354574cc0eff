"""The tables that plan and kernels share: what each column is, and how options become a row.

The plan fills them in, the kernels read them, and `bngd_triton.sharding` sends one over processes.
Device code has the same names as constants of the compiler (`device/tables.py`).
"""

from __future__ import annotations

import struct

from ..options import Options, on_a_device
from ..records import MEAN, RECORD, SKIPPED, STD

# spans, int64: what one program of the first launch reads of a slice
SPAN_TENSOR, SPAN_START, SPAN_LENGTH, SPAN_PARTIAL, SPAN_SLICE = range(5)
SPAN_COLUMNS = 5

# chunks, int64: what one program of the second launch updates of a slice
CHUNK_TENSOR, CHUNK_START, CHUNK_LENGTH, CHUNK_SLICE = range(4)
CHUNK_COLUMNS = 4

# tiles, int64: rows of one tensor from `TILE_FIRST_ROW` on, or one row of each of `TILE_ROWS`
# tensors from `TILE_TENSOR` on if they are listed; entries of the longest of these rows; place in
# `SHAPES_OF_TILES`, which says how many rows share a program
TILE_TENSOR, TILE_ROWS, TILE_FIRST_ROW, TILE_LISTED, TILE_LONGEST, TILE_SHAPE = range(6)
TILE_COLUMNS = 6
SHAPES_OF_TILES = (32, 8, 4, 2, 1)
# the first shape whose rows have a warp each: tiles that are not aligned take no other, since their
# accesses are of one element, and a thread would have elements of several rows
UNALIGNED_SHAPE = 2

# tensors of a batch, int64, for tiles: entries of a row, see `coded`, addresses or 0
ROW_LENGTH, ROW_CODED, ROW_RECORD, ROW_WINDOW = range(4)
ROW_COLUMNS = 4

# slices with spans, int64: their first row among the partials, how many, entries, see `coded`,
# addresses or 0
SLICE_FIRST, SLICE_SPANS, SLICE_LENGTH, SLICE_CODED, SLICE_RECORD, SLICE_WINDOW = range(6)
SLICE_COLUMNS = 6

# items of a single launch, int64: what kind of work, then its row of the spans or chunks
SPAN_ITEM, CHUNK_ITEM = range(2)
ITEM_KIND, ITEM_ROW = range(2)
ITEM_COLUMNS = ITEM_ROW + max(SPAN_COLUMNS, CHUNK_COLUMNS)

# statistics, float64: of slices [slices, MOMENTS_COLUMNS]; of spans, the partials, with a row for
# each column instead [MOMENTS_COLUMNS, spans]
MOMENT_N, MOMENT_MEAN, MOMENT_M2, MOMENT_LEAST, MOMENT_GREATEST = range(5)
MOMENTS_COLUMNS = 5

# factors of slices, float32
FACTOR_UP, FACTOR_MORE, FACTOR_HIGH, FACTOR_LOW, FACTOR_INVERSE = range(5)
FACTOR_MODE, FACTOR_BETA, FACTOR_FRESH = range(5, 8)
FACTORS_COLUMNS = 8

# records, float64, see `bngd_triton.records`
RECORD_MEAN, RECORD_STD, RECORD_SKIPPED = MEAN, STD, SKIPPED
RECORD_COLUMNS = len(RECORD)
RECORD_BYTES = 8 * RECORD_COLUMNS

# options of groups, float64; the first four are rounded to float32; `WEIGHT_DECAY` is for rates on
# a device, whose `DECAY` is made there
LR, DECAY, MOMENTUM, FRESH, EPS, CENTERING, SIGN, NESTEROV = range(8)
CDF, PROPAGATE, BUFFERED, CLOSING, WEIGHT_DECAY = range(8, 13)
OPTION_COLUMNS = 16

# rates on a device, int64: the address of a 0-dim tensor or 0, and its dtype's place in
# `rates.RATE_DTYPES`
RATE_ADDRESS, RATE_DTYPE = range(2)
RATE_COLUMNS = 2

# how a parameter keeps what its storage type would lose, see `device/rounding.py`
PLAIN, REMAINDER, MASTER_COPY, STOCHASTIC = range(4)

_FLOAT32 = struct.Struct("4f")


def coded(option: int, centred: bool) -> int:
    """A row of the options, and whether the mean is removed, in one integer."""
    return option * 2 + centred


def encode(options: Options, closing: bool = True) -> list[float]:
    """A row of the options; products and differences are rounded to float32 once, here.

    An `lr` on a device is left to `Rates`, so that its value need not be read.
    """
    lr = 0.0 if on_a_device(options.lr) else float(options.lr)
    exact = (lr, 1 - lr * options.weight_decay, options.momentum, options.fresh)
    row = [0.0] * OPTION_COLUMNS
    row[LR], row[DECAY], row[MOMENTUM], row[FRESH] = _FLOAT32.unpack(_FLOAT32.pack(*exact))
    row[EPS] = options.eps
    row[CENTERING] = options.centering
    row[SIGN] = -1.0 if options.maximize else 1.0
    row[NESTEROV] = options.nesterov
    row[CDF] = options.normalizer == "cdf"
    row[PROPAGATE] = options.nonfinite == "propagate"
    row[BUFFERED] = options.buffered
    row[CLOSING] = closing
    row[WEIGHT_DECAY] = options.weight_decay
    return row
