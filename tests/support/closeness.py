"""The comparison of tensors with bounds of their own for each entry."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(what: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Entry by entry ``|got - want| <= bound``; a NaN in `want` asks for one in `got`."""
    got, want, bound = got.detach().cpu().double(), want.double(), bound.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    error = (got - want).abs()
    bad = error > bound
    if bad.any():
        i = int((error - bound).nan_to_num(-1.0).argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} entries off; entry {i} is "
            f"{got.flatten()[i]:.9g}, not {want.flatten()[i]:.9g}: error {error.flatten()[i]:.3g} "
            f"> {bound.flatten()[i]:.3g}; RMS error {error.square().mean().sqrt():.3g}"
        )
