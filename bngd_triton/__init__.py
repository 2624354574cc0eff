"""Batch-normalised gradient descent for PyTorch, with fused Triton kernels."""

from .inputs import BatchStandardize, standardize
from .masters import fp32_state_dict, load_fp32_state_dict
from .optimizer import BNGD
from .reference import article_cdf, normalize_gradient
from .release import release_gradients
from .saving import load_checkpoint, save_checkpoint
from .state import GradStats
from .telemetry import GradStatsLog, GradStatsLogger
from .telemetry_plot import plot_grad_stats

__version__ = "0.1.0"
__all__ = [
    "BNGD",
    "BatchStandardize",
    "GradStats",
    "GradStatsLog",
    "GradStatsLogger",
    "article_cdf",
    "fp32_state_dict",
    "load_checkpoint",
    "load_fp32_state_dict",
    "normalize_gradient",
    "plot_grad_stats",
    "release_gradients",
    "save_checkpoint",
    "standardize",
]
