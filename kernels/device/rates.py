"""Learning rates that are tensors on the device, from there to the table of options.

A replayed graph thus follows a rate that changes in place, and the host never waits for one.
"""

import triton
import triton.language as tl

from .tables import (  # isort: skip
    DECAY, LR, OPTION_COLUMNS, RATE_ADDRESS, RATE_COLUMNS, RATE_DTYPE, WEIGHT_DECAY,
)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rates_ptr", "options_ptr"])
def _rates_kernel(
    rates_ptr,  # int64 [groups, RATE_COLUMNS]
    options_ptr,  # float64 [groups, OPTION_COLUMNS], written
):
    """One group: its rate, and its decay, rounded to float32 as `tables.encode` does."""
    group = tl.program_id(0).to(tl.int64)
    rate = rates_ptr + group * RATE_COLUMNS
    address = tl.load(rate + RATE_ADDRESS)
    dtype = tl.load(rate + RATE_DTYPE)
    if address != 0:
        # one of the four is loaded, in the order of `rates.RATE_DTYPES`; the others are 0
        single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=dtype == 0, other=0.0)
        double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=dtype == 1, other=0.0)
        half = tl.load(address.to(tl.pointer_type(tl.float16)), mask=dtype == 2, other=0.0)
        brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)), mask=dtype == 3, other=0.0)
        lr = single.to(tl.float64) + double + half.to(tl.float64) + brain.to(tl.float64)
        option = options_ptr + group * OPTION_COLUMNS
        decay = 1.0 - lr * tl.load(option + WEIGHT_DECAY)
        tl.store(option + LR, lr.to(tl.float32).to(tl.float64))
        tl.store(option + DECAY, decay.to(tl.float32).to(tl.float64))
