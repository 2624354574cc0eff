"""Batch-normalised gradient descent for PyTorch, with fused Triton kernels."""

from typing import TYPE_CHECKING, Any

from .checkpoint_files import load_checkpoint, save_checkpoint
from .fp32_weights import fp32_state_dict, load_fp32_state_dict
from .gradient_release import release_gradients
from .inputs import BatchStandardize, standardize
from .optimizer import BNGD
from .reference import article_cdf, normalize_gradient
from .state import GradStats
from .telemetry.log import GradStatsLog, GradStatsLogger
from .telemetry.plot import plot_grad_stats

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
    "verify_step",
]

if TYPE_CHECKING:
    from .verify.own_model import verify_step


def __getattr__(name: str) -> Any:
    """What no training needs is imported when it is asked for."""
    if name == "verify_step":
        from .verify.own_model import verify_step

        return verify_step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
