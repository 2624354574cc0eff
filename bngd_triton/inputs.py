"""Standardise inputs, the article's first step; it is this that cures badly scaled features.

Standardising gradients does not: a feature a thousand times larger than the others keeps its
share of every gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_float
from .eager.factors import factors_from
from .eager.moments import moments
from .eager.update import normalize
from .kernels.standardize import standardize_columns
from .kernels.support import why_not
from .options import Options


def standardize(x: Tensor, dim: int = 0) -> Tensor:
    """Bring `x` to mean 0 and standard deviation 1 along `dim`.

    The standard deviation is the population's. A constant column gives 0; one with an inf or a NaN
    gives NaN. Statistics are float64; on a GPU that Triton serves one pass of a kernel takes them.

    Args:
        x: inputs of a float dtype and any shape with at least one dimension.
        dim: the dimension of the samples.

    Returns:
        A new tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not dense or not of a supported float dtype.
        ValueError: `x` is a scalar, or requires a gradient.
        IndexError: `dim` is out of range.
    """
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("standardize needs a dimension of samples, got a 0-dim tensor")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "standardize is for inputs and gives no gradient, but x requires one; "
            "use BatchStandardize inside a model, or pass x.detach()"
        )
    # an out-of-range dim fails here, in torch's words
    samples = x.detach().movedim(dim, 0)
    if not x.numel():
        return x.clone()
    if x.device.type != "cpu" and why_not(x) is None:
        columns = standardize_columns(samples.reshape(samples.shape[0], -1).contiguous())
        return columns.view(samples.shape).movedim(0, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    options = Options(eps=0.0)
    columns = samples.reshape(samples.shape[0], -1).t()
    factors = factors_from(moments(columns), options, 1.0, wide)
    ghat = torch.where(factors.uniform, 0.0, normalize(columns, factors, options))
    return ghat.t().reshape(samples.shape).to(x.dtype).movedim(0, dim)


class BatchStandardize(nn.BatchNorm1d):
    """`standardize` as a layer: batch statistics in training, running ones in evaluation.

    `torch.nn.BatchNorm1d` without learnt parameters; its `eps` sits under the root.

    Args:
        num_features: columns of the input, [n, num_features] or [n, num_features, length].
        eps: added to the variance, in squared units of the input.
        momentum: weight of the newest batch in the running statistics; None averages all.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps, momentum, affine=False)
