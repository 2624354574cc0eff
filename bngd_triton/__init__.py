"""Batch-normalised gradient descent for PyTorch, with fused Triton kernels."""

from .inputs import BatchStandardize, standardize
from .masters import fp32_state_dict, load_fp32_state_dict
from .optimizer import BNGD
from .reference import article_cdf, normalize_gradient
from .release import release_gradients
from .state import GradStats

__version__ = "0.1.0"
__all__ = [
    "BNGD",
    "BatchStandardize",
    "GradStats",
    "article_cdf",
    "fp32_state_dict",
    "load_fp32_state_dict",
    "normalize_gradient",
    "release_gradients",
    "standardize",
]
