"""Tiles of a step: whole rows, or whole small tensors, from one gradient read to the stores.

Statistics, parameters and momentum of a tile stay in registers, so the second launch need not
touch it.

Traffic per element, float32 with momentum: reads g, theta, m; writes theta, m (20 bytes).
"""

import triton
import triton.language as tl

from .factors import CLOSE_ONLY, LEAVE, THROUGH_CDF, factors_of
from .moments import centred_moments
from .rounding import hash_positions, rounding_seeds

from .tables import (  # isort: skip
    BUFFERED, CLOSING, FRESH, MASTER_COPY, OPTION_COLUMNS, RECORD_COLUMNS,
    REMAINDER, ROW_CODED, ROW_COLUMNS, ROW_LENGTH, ROW_RECORD, ROW_WINDOW, STOCHASTIC,
    TILE_FIRST_ROW, TILE_LISTED, TILE_ROWS, TILE_TENSOR, TILE_WIDTH,
)  # fmt: skip
from .update import bounded, normalize, update_, update_options


@triton.jit
def _tile(
    row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs, param_ptrs,
    momentum_ptrs, master_ptrs, GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Slices of at most COLUMNS entries each, from one gradient read to the stores."""
    # one row to a thread: eight rows of float64 statistics took 255 registers and spilled
    ROWS: tl.constexpr = BLOCK // COLUMNS if BLOCK > COLUMNS else 1
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    present = r < tl.load(row + TILE_ROWS).to(tl.int32)
    # listed: one row per tensor of the table; else consecutive rows of one tensor
    listed = tl.load(row + TILE_LISTED)
    tensor = tl.load(row + TILE_TENSOR) + r * listed
    rows = rows_ptr + tensor * ROW_COLUMNS
    length = tl.load(rows + ROW_LENGTH, mask=present, other=0).to(tl.int32)
    coded = tl.load(rows + ROW_CODED, mask=present, other=0)
    index = (tl.load(row + TILE_FIRST_ROW) + r) * (1 - listed)
    start = index * length
    if ALIGNED:
        # `Entry.granule`: a bound of so many elements does not cut a 16-byte access
        GRANULE: tl.constexpr = (
            4 if tl.float32 == GRAD and tl.float32 == PARAM and tl.float32 == BUFFER else 8
        )
        x_live = c < tl.multiple_of(length, (GRANULE, GRANULE))
    else:
        x_live = c < length

    base = tl.load(grad_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(GRAD))
    grad = base + start + c
    if ALIGNED:
        grad = tl.multiple_of(grad, (16, 16))
    x = tl.load(grad, mask=x_live, other=0.0, eviction_policy="evict_first").to(tl.float32)
    n = tl.maximum(length, 1).to(tl.float64)
    mean, m2, least, greatest = centred_moments(x, x_live, length.to(tl.float32), 1)
    uniform = least == greatest
    mean = tl.where(uniform, least.to(tl.float64), mean)
    m2 = tl.where(uniform, 0.0, m2)

    option = options_ptr + (coded >> 1) * OPTION_COLUMNS
    address = tl.load(rows + ROW_RECORD, mask=present, other=0)
    record = address.to(tl.pointer_type(tl.float64)) + index * RECORD_COLUMNS
    address = tl.load(rows + ROW_WINDOW, mask=present, other=0)
    window = address.to(tl.pointer_type(tl.uint8)) + index
    factors, mode, beta = factors_of(
        n, mean, m2, uniform, option, (coded & 1) != 0, scale_ptr, found_ptr, record, present,
        window, present & (address != 0), WINDOWS,
    )  # fmt: skip
    options = update_options(option)
    fresh = tl.load(option + FRESH).to(tl.float32)

    # normalise
    ghat = normalize(x, factors)
    # CLOSE_ONLY, of another row, is greater
    if tl.max(mode) >= THROUGH_CDF:
        ghat = tl.where(mode == THROUGH_CDF, bounded(ghat), ghat)
    live = x_live & (mode != LEAVE)
    m_momentum = live & (tl.load(option + BUFFERED) != 0)
    m_param = live
    if WINDOWS:
        ghat = tl.where(mode == CLOSE_ONLY, 0.0, ghat)
        m_param = live & (tl.load(option + CLOSING) != 0)
    # load, all but the gradient
    base = tl.load(param_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(PARAM))
    param = base + start + c
    base = tl.load(momentum_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(BUFFER))
    momentum = base + start + c
    if ALIGNED:
        param = tl.multiple_of(param, (16, 16))
        momentum = tl.multiple_of(momentum, (16, 16))
    p = tl.load(param, mask=m_param, other=0.0, eviction_policy="evict_first")
    m = tl.load(momentum, mask=m_momentum, other=0.0, eviction_policy="evict_first").to(tl.float32)
    rest = p
    hashed = c
    master = param
    if KIND == STOCHASTIC:
        key = tl.load(master_ptrs + tensor, mask=present, other=0)
        tensor_seed, step_seed = rounding_seeds(tl.load(clocks_ptr + (coded >> 1)), key)
        hashed = hash_positions(start + c, tensor_seed, step_seed)
    if KIND == REMAINDER or KIND == MASTER_COPY:  # noqa: SIM109
        STORAGE: tl.constexpr = tl.int16 if KIND == REMAINDER else tl.float32
        base = tl.load(master_ptrs + tensor, mask=present, other=0).to(tl.pointer_type(STORAGE))
        master = base + start + c
        if ALIGNED:
            master = tl.multiple_of(master, (16, 16))
        rest = tl.load(master, mask=m_param, other=0, eviction_policy="evict_first")
    update_(
        param, momentum, master, p, m, rest, ghat, hashed, m_param, m_momentum, options, beta,
        fresh, KIND, SOFT,
    )  # fmt: skip


@triton.jit
def tile_of_any_shape(
    row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs, param_ptrs,
    momentum_ptrs, master_ptrs, GRAD: tl.constexpr, PARAM: tl.constexpr, BUFFER: tl.constexpr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, WINDOWS: tl.constexpr, SOFT: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile by the code for its number of columns: `Tuning.tile_columns`."""
    columns = tl.load(row + TILE_WIDTH)
    for shrink in tl.static_range(4):
        if columns == TILE >> (2 * shrink):
            _tile(
                row, rows_ptr, options_ptr, clocks_ptr, scale_ptr, found_ptr, grad_ptrs,
                param_ptrs, momentum_ptrs, master_ptrs, GRAD, PARAM, BUFFER, KIND, ALIGNED,
                WINDOWS, SOFT, BLOCK, TILE >> (2 * shrink),
            )  # fmt: skip
