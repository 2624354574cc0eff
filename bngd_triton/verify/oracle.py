"""The definition in float64, which the tests and `bngd verify` compare with.

`oracle_step` is written from the definition alone and shares no code with the package. It is slow
and literal: one slice at a time, sums without rounding error (`math.fsum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def oracle_step(  # noqa: D417
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None],
    *,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    granularity: str = "row",
    normalizer: str = "zscore",
    centering: float = 1.0,
    center_1d: bool = False,
    nonfinite: str = "skip",
    maximize: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One step of one parameter group, out of place.

    Args:
        params: tensors of any float dtype, device and layout.
        grads: of the same shapes; None where a parameter has none.
        buffers: momentum of the same shapes, None where there is none yet; without effect when
            `momentum` is 0.
        lr: as in `reference.step_`, like all that follow.

    Returns:
        New parameters and buffers: contiguous float64 tensors on the CPU. A buffer that this step
        does not touch is returned as it was (None included).
    """
    rate = float(lr)
    new_params = [_plain(param) for param in params]
    new_buffers = [None if buffer is None else _plain(buffer) for buffer in buffers]
    plain_grads = [None if grad is None else _plain(grad) for grad in grads]
    stepped = [i for i, grad in enumerate(grads) if grad is not None]
    if momentum:
        for i in stepped:
            if new_buffers[i] is None:
                new_buffers[i] = torch.zeros_like(new_params[i])

    for members in _slices(params, stepped, granularity):
        values = [_part(plain_grads[i], row) for i, row in members]
        g = torch.cat([value.reshape(-1) for value in values])
        if not g.numel():
            continue
        finite = bool(g.isfinite().all())
        if not finite and nonfinite == "raise":
            raise FloatingPointError("a gradient has an inf or a NaN")
        if not finite and nonfinite == "skip":
            continue
        whole = params[members[0][0]].dim() >= 2 or center_1d or granularity == "global"
        g = -g if maximize else g
        ghat = torch.full_like(g, math.nan)
        if finite:
            ghat = normalized(g, eps, normalizer, centering if whole else 0.0)
        for (i, row), flat in zip(members, ghat.split([value.numel() for value in values])):
            theta = _part(new_params[i], row)
            fresh = flat.view(theta.shape)
            update = fresh
            if momentum:
                m = _part(new_buffers[i], row)
                m.copy_(momentum * m + (1 - momentum) * fresh)
                update = momentum * m + (1 - momentum) * fresh if nesterov else m
            theta.copy_((1 - rate * weight_decay) * theta - rate * update)
    return new_params, new_buffers


def _slices(
    params: Sequence[Tensor], stepped: Sequence[int], granularity: str
) -> Iterator[list[tuple[int, int | None]]]:
    """Each slice: the parameters it spans, and its row in them; None for all of one."""
    if granularity == "global":
        if stepped:
            yield [(i, None) for i in stepped]
        return
    for i in stepped:
        by_row = granularity == "row" and params[i].dim() >= 2
        for row in range(params[i].shape[0]) if by_row else [None]:
            yield [(i, row)]


def normalized(g: Tensor, eps: float, normalizer: str, centering: float) -> Tensor:
    """``ghat`` of one finite slice, a float64 vector."""
    n = g.numel()
    if not g.any():
        return torch.zeros_like(g)
    # by a power of two, so that float64 holds sum and squares of any entries
    up = 2.0 ** -max(-1000, int(torch.frexp(g.abs().max()).exponent))
    g, eps = g * up, eps * up
    if (g == g[0]).all():
        return g / (_rms(g) + eps)
    mu = math.fsum(g.tolist()) / n
    v = g - centering * mu
    ghat = v / (_rms(v) + eps)
    if normalizer == "cdf":
        ghat = math.sqrt(3) * (2 * torch.special.ndtr(ghat) - 1)
    return ghat


def _rms(v: Tensor) -> float:
    return math.sqrt(math.fsum((v * v).tolist()) / v.numel())


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous float64 copy on the CPU, by index and not by memory."""
    out = torch.empty(tensor.shape, dtype=torch.float64, device="cpu")
    return out.copy_(tensor.detach().cpu())


def _part(tensor: Tensor | None, row: int | None) -> Tensor:
    assert tensor is not None
    return tensor if row is None else tensor[row]
