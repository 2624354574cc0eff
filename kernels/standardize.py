"""The launcher of `columns.py`: inputs with columns of mean 0 and standard deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import on_device
from .support import interpreting


def standardize_columns(x: Tensor) -> Tensor:
    """``(x - mean) / std`` of every column of a row-major matrix; 0 in a constant column.

    Args:
        x: [n, c], contiguous, of a dtype and device that `why_not` serves; n and c at least 1.

    Returns:
        A tensor like `x`.
    """
    from .device.columns import _column_moments_kernel, _standardize_kernel

    n_rows, n_columns = x.shape
    # 32 columns are one 128-byte line of float32; 256 rows to a split keep the merge short
    columns, rows = 32, 64
    splits = min(64, -(-n_rows // 256))
    partials = torch.empty(3, splits, n_columns, dtype=torch.float64, device=x.device)
    out = torch.empty_like(x)
    across = -(-n_columns // columns)
    with on_device(x.device):
        _column_moments_kernel[(across, splits)](
            x_ptr=x,
            partials_ptr=partials,
            n_rows=n_rows,
            n_columns=n_columns,
            rows_per_split=-(-n_rows // splits),
            UNROLL=8,
            COLUMNS=columns,
            num_warps=1,
            enable_fp_fusion=False,
        )
        _standardize_kernel[(-(-n_rows // rows), across)](
            x_ptr=x,
            out_ptr=out,
            partials_ptr=partials,
            splits=splits,
            n_rows=n_rows,
            n_columns=n_columns,
            SOFT=interpreting(),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
