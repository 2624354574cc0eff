"""Triton kernels of BNGD, installed as ``bngd_triton.kernels``.

Importing this package does not import Triton; launching a kernel does.
"""

# With a checkout's root on sys.path this folder also answers to `kernels`, Hugging Face's package,
# which transformers imports if it finds it: under that name nothing is here, not even an error.
if __name__ != "kernels":
    from .api import SegmentStatistics, fused_normalize_gradient, fused_step_, segment_statistics
    from .devices import Tuning

    __all__ = [
        "SegmentStatistics",
        "Tuning",
        "fused_normalize_gradient",
        "fused_step_",
        "segment_statistics",
    ]
