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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .checks import Options, buffers_of, check_float, check_step, check_tensors
from .moments import Fold, blocks, fold_moments, global_moments, moments, slice_dims


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    granularity: str = "tensor",
    normalizer: str = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: str = "skip",
    maximize: bool = False,
) -> Tensor:
    """One step of BNGD, in place; the eager twin of `bngd_triton.kernels.fused_step_`.

    Args:
        params: n dense tensors of float16, bfloat16, float32 or float64, written in place.
        grads: n tensors of the same shapes; read only, of any supported dtype and layout.
        momentum_buffers: n tensors of the same shapes, float32 (float64 for float64 parameters),
            written in place; zeros before the first step. None when `momentum` is 0.
        lr: in units of the parameters; bounds the RMS of a step under ``"zscore"`` without decay.
            A float or a 0-dim tensor.
        momentum: weight of the past in the moving average of ``ghat``, in [0, 1).
        nesterov: look one step of momentum ahead.
        weight_decay: decoupled; each step multiplies the parameters by ``1 - lr * weight_decay``.
        eps: added to the RMS, in the gradient's units. 0 is allowed.
        granularity: ``"tensor"``, one slice per parameter; ``"row"``, one per index of dimension 0
            of a parameter with two or more dimensions; ``"global"``, one for all `params`.
        normalizer: ``"zscore"``, or ``"cdf"``: ``sqrt(3) * (2 * Phi(ghat) - 1)``, bounded.
        centering: share of the mean that is removed, in [0, 1]; 0 is RMS normalisation.
        center_1d: centre tensors with fewer than two dimensions too.
        nonfinite: what an inf or NaN does to its slice: ``"skip"`` leaves parameters and momentum
            as they are, ``"propagate"`` gives NaN, ``"raise"`` raises before anything changes.
        maximize: ascend.

    Returns:
        The number of slices skipped, a 0-dim int64 tensor on the first parameter's device.

    Raises:
        ValueError: an option is out of bounds, or the lists do not belong together.
        TypeError: a tensor is sparse, complex or not of a supported dtype.
        FloatingPointError: a non-finite gradient with ``nonfinite="raise"``.
    """
    options = Options(
        lr, momentum, nesterov, weight_decay, eps, granularity, normalizer, centering, center_1d,
        nonfinite, maximize,
    )  # fmt: skip
    check_tensors(params, grads, momentum_buffers, momentum=momentum)
    check_step(params, grads, options)
    return apply_(params, grads, buffers_of(momentum_buffers, params, options), options)


def apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    options: Options,
) -> Tensor:
    """`step_` on what was checked before, under `torch.no_grad`."""
    skipped = torch.zeros((), dtype=torch.int64, device=params[0].device if params else None)
    counted = False
    for index, fold in enumerate(folds(params, grads, options)):
        if fold is None:
            continue
        param, grad, buffer = params[index], grads[index], momentum_buffers[index]
        for block in blocks(param):
            here = None if buffer is None else buffer[block]
            _update_(param[block], grad[block], here, fold.of_block(block), options)
        if options.nonfinite != "propagate" and not (options.granularity == "global" and counted):
            skipped += (~fold.finite).sum().to(skipped.device)
            counted = True
    return skipped


def _update_(
    param: Tensor, grad: Tensor, buffer: Tensor | None, fold: Fold, options: Options
) -> None:
    """Normalise and move one parameter: the last three lines of the definition."""
    dtype = fold.inverse.dtype
    lr = options.lr
    ghat = normalize(grad, fold, options)
    update = ghat
    moved = None
    if buffer is not None:
        fresh = ghat * (1 - options.momentum)
        moved = buffer.to(dtype) * options.momentum
        moved += fresh
        update = moved * options.momentum + fresh if options.nesterov else moved
    target = param.to(dtype)
    if isinstance(lr, Tensor):
        # rounded to the arithmetic dtype here: two 0-dim tensors would be promoted to the wider
        target = target * (1 - lr.double() * options.weight_decay).to(dtype)
        lr = lr.to(dtype)
    elif options.weight_decay:
        target = target * (1 - lr * options.weight_decay)
    target = target - update * lr
    if options.nonfinite != "propagate":
        param.copy_(_keep(fold.finite, target, param))
        if buffer is not None and moved is not None:
            buffer.copy_(_keep(fold.finite, moved, buffer))
    else:
        param.copy_(target)
        if buffer is not None and moved is not None:
            buffer.copy_(moved)


def _keep(finite: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the slice was finite, `old` elsewhere; without a synchronisation on a GPU."""
    if finite.device.type == "cpu" and bool(finite.all()):
        return new
    return torch.where(finite, new, old.to(new.dtype))


def normalize(grad: Tensor, fold: Fold, options: Options) -> Tensor:
    """``ghat`` of one gradient, in the arithmetic dtype, as a new tensor."""
    ghat = grad.to(fold.inverse.dtype) * fold.up
    ghat *= fold.more
    ghat -= fold.high
    ghat -= fold.low
    ghat *= fold.inverse
    if options.normalizer == "cdf":
        # 2 * Phi(x) - 1 = erf(x / sqrt(2)); slices without spread keep their plain quotient
        bounded = torch.erf(ghat * math.sqrt(0.5)) * math.sqrt(3.0)
        ghat = torch.where(fold.uniform, ghat, bounded)
    return ghat


def folds(
    params: Sequence[Tensor], grads: Sequence[Tensor], options: Options
) -> Iterator[Fold | None]:
    """The `Fold` of each gradient in turn; None for a tensor without entries."""
    shared = global_moments(grads) if options.granularity == "global" else None
    for param, grad in zip(params, grads):
        if grad.numel() == 0:
            yield None
            continue
        found = shared or moments(grad, slice_dims(grad.dim(), options.granularity))
        wide = torch.promote_types(torch.promote_types(param.dtype, grad.dtype), torch.float32)
        centering = options.centering if options.centres(grad.dim()) else 0.0
        yield fold_moments(found, options, centering, wide)


@torch.no_grad()
def normalize_gradient(
    grad: Tensor,
    *,
    eps: float = 1e-8,
    granularity: str = "tensor",
    normalizer: str = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: str = "propagate",
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
        center_1d=center_1d, nonfinite=nonfinite, maximize=maximize,
    )  # fmt: skip
    check_float("grad", grad)
    check_step([grad], [grad], options, names=["grad"])
    out = torch.empty_like(grad)
    (fold,) = folds([grad], [grad], options)
    if fold is not None:
        ghat = normalize(grad, fold, options)
        out.copy_(ghat if nonfinite != "skip" else torch.where(fold.finite, ghat, 0.0))
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
