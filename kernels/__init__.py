"""Triton kernels of BNGD, installed as ``bngd_triton.kernels``.

Importing this package does not import Triton; launching a kernel does.
"""

if __name__ == "kernels":  # a checkout's root on sys.path: make way for Hugging Face's `kernels`
    raise ImportError("this folder is bngd_triton.kernels; import it by that name")

from .fused import (
    SegmentStatistics,
    fused_normalize_gradient,
    fused_step_,
    segment_statistics,
)
from .plan import Tuning

__all__ = [
    "SegmentStatistics",
    "Tuning",
    "fused_normalize_gradient",
    "fused_step_",
    "segment_statistics",
]
