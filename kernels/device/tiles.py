"""Tiles of a step: whole rows, or whole small tensors, that one program finishes.

It reads their gradients twice, once for their statistics and once to normalise and update, and
what lies between is short enough to stay in a cache: no other launch touches a tile.

Traffic per element, float32 with momentum: reads g, theta, m; writes theta, m (20 bytes). The
second read of g (4 bytes) is meant to hit L1.
"""

import triton
import triton.language as tl

from .factors import CLOSE_ONLY, LEAVE, THROUGH_CDF, UNIFORM, factors_of
from .moments import row_moments
from .rounding import hash_positions, rounding_seeds

from .tables import (  # isort: skip
    BUFFERED, CLOSING, FRESH, MASTER_COPY, OPTION_COLUMNS, RECORD_COLUMNS,
    REMAINDER, ROW_CODED, ROW_COLUMNS, ROW_LENGTH, ROW_RECORD, ROW_WINDOW, STOCHASTIC,
    TILE_COLUMNS, TILE_FIRST_ROW, TILE_LISTED, TILE_LONGEST, TILE_ROWS, TILE_SHAPE, SHAPES_OF_TILES,
    TILE_TENSOR, UNALIGNED_SHAPE,
)  # fmt: skip
from .update import bounded, normalize, update_, update_options


@triton.jit
def _columns(values):
    """What is of a row, for blocks of rows."""
    columns = ()
    for k in tl.static_range(len(values)):
        columns = columns + (values[k][:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def _tile(
    row, rows_ptr, options_ptr, clocks_ptr, scaler, tensors, GRAD: tl.constexpr,
    PARAM: tl.constexpr, BUFFER: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    HINTS: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Slices from one gradient read to the stores, COLUMNS entries of each at a time."""
    grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs = tensors
    # `Entry.granule`: a bound of so many elements does not cut a 16-byte access
    GRANULE: tl.constexpr = (
        4 if tl.float32 == GRAD and tl.float32 == PARAM and tl.float32 == BUFFER else 8
    )
    ONCE: tl.constexpr = "evict_first" if HINTS else ""
    # what is of a row has one dimension: of two, a thread would hold it once for each column
    r = tl.arange(0, ROWS)
    present = r < tl.load(row + TILE_ROWS).to(tl.int32)
    longest = tl.load(row + TILE_LONGEST).to(tl.int32)
    # listed: one row per tensor of the table; else consecutive rows of one tensor
    listed = tl.load(row + TILE_LISTED)
    tensor = tl.load(row + TILE_TENSOR) + r * listed
    rows = rows_ptr + tensor * ROW_COLUMNS
    length = tl.load(rows + ROW_LENGTH, mask=present, other=0).to(tl.int32)
    coded = tl.load(rows + ROW_CODED, mask=present, other=0)
    index = (tl.load(row + TILE_FIRST_ROW) + r) * (1 - listed)
    start = index * length
    grad = tl.load(grad_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(GRAD)) + start

    n, mean, m2 = row_moments(grad, length, longest, ALIGNED, HINTS, GRANULE, COLUMNS, 2)
    uniform = tl.sqrt(m2 / n) <= tl.abs(mean) * UNIFORM
    option = options_ptr + (coded >> 1) * OPTION_COLUMNS
    address = tl.load(rows + ROW_RECORD, mask=present, other=0)
    record = address.to(tl.pointer_type(tl.float64)) + index * RECORD_COLUMNS
    address = tl.load(rows + ROW_WINDOW, mask=present, other=0)
    window = address.to(tl.pointer_type(tl.uint8)) + index
    factors, mode, beta = factors_of(
        n, mean, m2, uniform, option, (coded & 1) != 0, scaler, record, present, window,
        present & (address != 0), WINDOWS,
    )  # fmt: skip
    factors = _columns(factors)
    options = _columns(update_options(option))
    fresh = tl.load(option + FRESH).to(tl.float32)
    # CLOSE_ONLY, of another row, is greater
    some_bounded = tl.max(mode) >= THROUGH_CDF

    param = tl.load(param_ptrs + tensor, mask=present, other=0)
    param = param.to(tl.pointer_type(PARAM)) + start
    momentum = tl.load(momentum_ptrs + tensor, mask=present, other=0)
    momentum = momentum.to(tl.pointer_type(BUFFER)) + start
    master = param
    tensor_seed = tensor
    step_seed = tensor
    if KIND == STOCHASTIC:
        # in the place of a master's address: the tensor's key
        key = tl.load(master_ptrs + tensor, mask=present, other=0)
        tensor_seed, step_seed = rounding_seeds(tl.load(clocks_ptr + (coded >> 1)), key)
        tensor_seed = tensor_seed[:, None]
        step_seed = step_seed[:, None]
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        STORAGE: tl.constexpr = tl.int16 if KIND == REMAINDER else tl.float32
        master = tl.load(master_ptrs + tensor, mask=present, other=0)
        master = master.to(tl.pointer_type(STORAGE)) + start
    # how far each tensor is touched
    grad_end = tl.where(mode != LEAVE, length, 0)
    param_end = grad_end
    momentum_end = tl.where(tl.load(option + BUFFERED) != 0, grad_end, 0)
    if WINDOWS:
        param_end = tl.where(tl.load(option + CLOSING) != 0, grad_end, 0)
        grad_end = tl.where(mode != CLOSE_ONLY, grad_end, 0)
    c = tl.arange(0, COLUMNS)[None, :]
    i = longest * 0
    while i < longest:
        g = (grad + i)[:, None] + c
        p = (param + i)[:, None] + c
        m = (momentum + i)[:, None] + c
        a = (master + i)[:, None] + c
        grad_left = (grad_end - i)[:, None]
        param_left = (param_end - i)[:, None]
        momentum_left = (momentum_end - i)[:, None]
        if ALIGNED:
            # divisibility does not survive the cast from a table's integer
            g = tl.multiple_of(g, (16, 16))
            p = tl.multiple_of(p, (16, 16))
            m = tl.multiple_of(m, (16, 16))
            a = tl.multiple_of(a, (16, 16))
            grad_left = tl.multiple_of(grad_left, (GRANULE, GRANULE))
            param_left = tl.multiple_of(param_left, (GRANULE, GRANULE))
            momentum_left = tl.multiple_of(momentum_left, (GRANULE, GRANULE))
        m_grad = c < grad_left
        m_momentum = c < momentum_left
        m_param = c < param_left
        # load
        b_grad = tl.load(g, mask=m_grad, other=0.0, eviction_policy=ONCE)
        b_param = tl.load(p, mask=m_param, other=0.0, eviction_policy=ONCE)
        b_momentum = tl.load(m, mask=m_momentum, other=0.0, eviction_policy=ONCE)
        rest = b_param
        if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
            rest = tl.load(a, mask=m_param, other=0, eviction_policy=ONCE)
        # normalise
        ghat = normalize(b_grad.to(tl.float32), factors)
        if some_bounded:
            ghat = tl.where((mode == THROUGH_CDF)[:, None], bounded(ghat), ghat)
        if WINDOWS:
            ghat = tl.where((mode == CLOSE_ONLY)[:, None], 0.0, ghat)
        hashed = c
        if KIND == STOCHASTIC:
            hashed = hash_positions((start + i)[:, None] + c, tensor_seed, step_seed)
        update_(
            p, m, a, b_param, b_momentum.to(tl.float32), rest, ghat, hashed, m_param, m_momentum,
            options, beta[:, None], fresh[:, None], KIND, HINTS, SOFT,
        )  # fmt: skip
        i += COLUMNS


@triton.jit(
    do_not_specialize_on_alignment=[
        "tiles_ptr", "rows_ptr", "options_ptr", "clocks_ptr", "scale_ptr", "found_ptr",
        "grad_ptrs", "param_ptrs", "momentum_ptrs", "master_ptrs",
    ]
)  # fmt: skip
def _tiles_kernel(
    tiles_ptr,  # int64 [programs, TILE_COLUMNS]
    rows_ptr,  # int64 [tensors, ROW_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS]
    clocks_ptr,  # int64 [groups]
    scale_ptr,  # float32 [1], what gradients were multiplied by
    found_ptr,  # float32 [1], anything but 0 makes gradients invalid
    grad_ptrs,  # int64 [tensors], likewise the next three
    param_ptrs,
    momentum_ptrs,
    master_ptrs,  # of the master, or the tensor's key for stochastic rounding
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BUFFER: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    HINTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_COLUMNS
    shape = tl.load(row + TILE_SHAPE)
    for i in tl.static_range(0 if ALIGNED else UNALIGNED_SHAPE, 5):
        if shape == i:
            _tile(
                row, rows_ptr, options_ptr, clocks_ptr, (scale_ptr, found_ptr),
                (grad_ptrs, param_ptrs, momentum_ptrs, master_ptrs), GRAD, PARAM, BUFFER, KIND,
                ALIGNED, HINTS, WINDOWS, SOFT, SHAPES_OF_TILES[i], BLOCK // SHAPES_OF_TILES[i],
            )  # fmt: skip
