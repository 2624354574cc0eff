"""Batch-normalised gradient descent for PyTorch, with fused Triton kernels."""

from .optimizer import BNGD
from .reference import article_cdf, normalize_gradient

__version__ = "0.1.0"
__all__ = ["BNGD", "article_cdf", "normalize_gradient"]
