"""Standardise the columns of a row-major matrix: ``(x - mean) / std``, 0 in a constant column.

Float64 Welford down the columns, one column to a lane, whatever the GPU's float64 rate: inputs
are standardised once, not in every step.

Traffic per element, float32: reads x twice, writes it once (12 bytes).
"""

import triton
import triton.language as tl

from .factors import UNIFORM, factors_from
from .moments import merge
from .rounding import store_as
from .update import normalize


@triton.jit(do_not_specialize=["n_rows", "n_columns", "rows_per_split"])
def _column_moments_kernel(
    x_ptr,  # [n_rows, n_columns], row-major
    partials_ptr,  # float64 [3, splits, n_columns]: count, mean, M2
    n_rows,
    n_columns,
    rows_per_split,  # a program's share of the rows
    UNROLL: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1).to(tl.int64)
    i = split * rows_per_split
    last = tl.minimum(i + rows_per_split, n_rows)
    mean = tl.zeros((COLUMNS,), tl.float64)
    m2 = tl.zeros((COLUMNS,), tl.float64)
    k = (i * 0).to(tl.float64)
    while i < last:
        for u in tl.static_range(UNROLL):
            present = i + u < last
            live = (c < n_columns) & (tl.zeros((COLUMNS,), tl.int64) + i + u < last)
            x = tl.load(x_ptr + (i + u) * n_columns + c, mask=live, other=0.0).to(tl.float64)
            k += tl.where(present, 1.0, 0.0)
            away = x - mean
            next_mean = mean + away * (1.0 / k)
            m2 = tl.where(live, m2 + away * (x - next_mean), m2)
            mean = tl.where(live, next_mean, mean)
        i += UNROLL
    row = partials_ptr + split * n_columns + c
    column = tl.num_programs(1).to(tl.int64) * n_columns
    tl.store(row, tl.zeros((COLUMNS,), tl.float64) + k, mask=c < n_columns)
    tl.store(row + column, mean, mask=c < n_columns)
    tl.store(row + 2 * column, m2, mask=c < n_columns)


@triton.jit(do_not_specialize=["splits", "n_rows", "n_columns"])
def _standardize_kernel(
    x_ptr,
    out_ptr,  # of x's shape and dtype
    partials_ptr,
    splits,
    n_rows,
    n_columns,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # rows on the first axis of the grid: the others end at 65 535
    c = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    c_live = c < n_columns
    column = splits.to(tl.int64) * n_columns
    n = tl.zeros((COLUMNS,), tl.float64)
    mean = tl.load(partials_ptr + column + c, mask=c_live, other=0.0)
    m2 = tl.zeros((COLUMNS,), tl.float64)
    i = splits * 0
    while i < splits:
        row = partials_ptr + i.to(tl.int64) * n_columns + c
        n_b = tl.load(row, mask=c_live, other=0.0)
        mean_b = tl.load(row + column, mask=c_live, other=0.0)
        m2_b = tl.load(row + 2 * column, mask=c_live, other=0.0)
        n, mean, m2 = merge(n, mean, m2, n_b, mean_b, m2_b)
        i += 1
    n = tl.maximum(n, 1.0)
    uniform = tl.sqrt(m2 / n) <= tl.abs(mean) * UNIFORM
    up, more, high, low, inverse = factors_from(mean, m2, n, uniform, 1.0, 0.0, 1.0)
    inverse = tl.where(uniform, 0.0, inverse)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (r < n_rows)[:, None] & c_live[None, :]
    at = r[:, None] * n_columns + c[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    factors = (up[None, :], more[None, :], high[None, :], low[None, :], inverse[None, :])
    x = normalize(x, factors)
    tl.store(out_ptr + at, store_as(x, out_ptr.dtype.element_ty, SOFT), mask=live)
