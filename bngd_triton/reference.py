"""Batch-normalised gradient descent in plain PyTorch: the definition the kernels are held to.

One step, for each slice ``g`` of each gradient (the slice is set by `granularity`)::

    g     <- -g if maximize
    v     <- g - centering * mean(g)
    ghat  <- v / (rms(v) + eps)                    # (g - mean) / (std + eps) when centering = 1
    m     <- momentum * m + (1 - momentum) * ghat  # no buffer when momentum = 0
    u     <- momentum * m + (1 - momentum) * ghat if nesterov else m
    theta <- (1 - lr * weight_decay) * theta - lr * u

``std`` is the population standard deviation. Statistics are computed in float64; everything else
in float32 (float64 for float64 parameters), whatever the storage type, with one rounding at the
store. `step_` is also the CPU path of the optimizer.

Sources: ZNorm (arXiv 2408.01215) for the z-score of a gradient, Gradient Centralization
(2004.01461) for the centring of rows, Block-Normalized Gradient (1707.04822) for normalise, then
momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_float, check_masters, check_step, check_tensors
from .eager.eager_step import apply_
from .eager.factors import factors_from
from .eager.moments import moments
from .eager.update import normalize
from .options import (
    Granularity,
    Nonfinite,
    Normalizer,
    Options,
    StepOptions,
    functional_options,
)  # fmt: skip
from .records import (
    functional_inputs,
    functional_tensors,
    skipped_slices,
    slices_of,
)
from .tensors import apart

if TYPE_CHECKING:
    # typing has it from Python 3.11 on
    from typing_extensions import Unpack


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    masters: Sequence[Tensor | None] | None = None,
    rounding_key: int | None = None,
    windows: Sequence[Tensor] | None = None,
    closing: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **step_options: Unpack[StepOptions],
) -> Tensor:
    """One step of BNGD, in place; the eager twin of `bngd_triton.kernels.fused_step_`.

    Args:
        params: n dense tensors of float16, bfloat16, float32 or float64, written in place.
        grads: n tensors of the same shapes; read only, of any supported dtype and layout.
        momentum_buffers: n float tensors of the same shapes, written in place; zeros before the
            first step. None when `momentum` is 0 and `accumulation_steps` is 1.
        lr: in units of the parameters; bounds the RMS of a step under ``"zscore"`` without decay.
            A float or a 0-dim tensor.
        masters: what each parameter lacks of its float32 master, written in place: int16 of the
            same shape (bfloat16 parameters; zeros at first), float32 of the same shape (float16 or
            bfloat16; the parameter's values at first), or None for rounding to nearest.
        rounding_key: rounds float16 and bfloat16 parameters stochastically, by a hash of this key,
            the tensor's place in the list and the element. Give another one in every step.
        windows: n uint8 tensors, one entry per slice, zeros before the first call; written. Needed
            when `accumulation_steps` is above 1.
        closing: whether this call is the last of its window; the others move no parameter.
        grad_scale: a float32 tensor of one element; the gradients are this many times too large.
        found_inf: a float32 tensor of one element; anything but 0 makes the gradients invalid.
        **step_options: the options of `bngd_triton.BNGD` by their names, with its defaults:
            momentum, nesterov, weight_decay, eps, granularity, normalizer, centering, center_1d,
            nonfinite, maximize and accumulation_steps, of which a call is one micro-batch.

    Returns:
        The number of slices skipped, a 0-dim int64 tensor on the first parameter's device.

    Raises:
        ValueError: an option is out of bounds, or the lists do not belong together.
        TypeError: a tensor is sparse, complex or not of a supported dtype.
        FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
    """
    options = functional_options(lr, rounding_key, step_options)
    check_tensors(params, grads, momentum_buffers, buffered=options.buffered)
    check_masters(params, masters, windows, options)
    check_step(params, grads, options)
    grads = apart(grads, [*params, *(momentum_buffers or ()), *(masters or ())])
    members = functional_tensors(params, grads, momentum_buffers, masters, windows, options)
    apply_(
        members, options, functional_inputs(params, closing, rounding_key, grad_scale, found_inf)
    )
    return skipped_slices(members)


@torch.no_grad()
def normalize_gradient(
    grad: Tensor,
    *,
    eps: float = 1e-8,
    granularity: Granularity = "tensor",
    normalizer: Normalizer = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: Nonfinite = "propagate",
    maximize: bool = False,
) -> Tensor:
    """The normalised gradient ``ghat`` of one tensor; the options are those of `step_`.

    Args:
        grad: a dense tensor of any supported dtype and layout; not written.
        eps: added to the RMS, in the gradient's units.
        granularity: ``"tensor"``, ``"row"``, or ``"global"`` (this tensor, centred whatever its
            dimensions).
        normalizer: ``"zscore"`` or ``"cdf"``.
        centering: share of the mean that is removed, in [0, 1].
        center_1d: centre tensors with fewer than two dimensions too.
        nonfinite: ``"propagate"`` turns a slice with an inf or NaN into NaN, ``"skip"`` into 0,
            ``"raise"`` raises.
        maximize: negate.

    Returns:
        A tensor of the shape, dtype and dense strides of `grad`; dimensionless. Under ``"zscore"``
        the RMS of a slice is at most 1, under ``"cdf"`` its entries are at most sqrt(3).

    Raises:
        ValueError: an option is out of bounds.
        TypeError: `grad` is sparse, complex or not of a supported dtype.
        FloatingPointError: a non-finite entry with ``nonfinite="raise"``.
    """
    options = Options(
        eps=eps, granularity=granularity, normalizer=normalizer, centering=centering,
        center_1d=center_1d, nonfinite=nonfinite, maximize=maximize, momentum=0.0,
    )  # fmt: skip
    check_float("grad", grad)
    check_step([grad], [grad], options, names=["grad"])
    out = torch.empty_like(grad)
    if grad.numel():
        values = grad.reshape(slices_of(grad.shape, granularity), -1)
        share = centering if options.centres(grad.dim()) else 0.0
        wide = torch.promote_types(grad.dtype, torch.float32)
        factors = factors_from(moments(values), options, share, wide)
        ghat = normalize(values, factors, options)
        if nonfinite == "skip" and factors.valid is not None:
            ghat = torch.where(factors.valid, ghat, 0.0)
        out.copy_(ghat.view(grad.shape))
    return out


def article_cdf(grad: Tensor) -> Tensor:
    """The article's formula, ``cdf(g) / (std * sqrt(2 * pi)) * (1 / std)``: do not train with it.

    Kept to show why not: every entry is positive, whatever the gradient's sign (the cosine with the
    all-ones vector is near 1), and it grows as ``1 / std**2``: a vanishing gradient explodes.
    ``normalizer="cdf"`` is the idea centred and without those factors.

    Args:
        grad: a real tensor with two or more entries.

    Returns:
        A tensor of the shape and dtype of `grad`.
    """
    std = grad.std(correction=0)
    density: Tensor = torch.special.ndtr(grad) / (std * math.sqrt(2 * math.pi)) * (1 / std)
    return density
