"""The comparison of tensors with bounds of their own for each entry."""

import torch


def assert_within(what, got, want, bound):
    """Entry by entry ``|got - want| <= bound``; a NaN in `want` asks for one in `got`."""
    got, want, bound = got.detach().cpu().double(), want.double(), bound.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    error = (got - want).abs()
    if (error > bound).any():
        i = int((error - bound).nan_to_num(-1.0).argmax())
        got, want, far, most = (one.flatten()[i] for one in (got, want, error, bound))
        raise AssertionError(
            f"{what}: {int((error > bound).sum())} of {error.numel()} entries off; entry {i} is "
            f"{got:.9g}, not {want:.9g}: error {far:.3g} > {most:.3g}"
        )


def ulps(ours, theirs):
    """The largest distance of two tensors' entries, in float32 numbers."""
    ordered = []
    for values in (ours, theirs):
        bits = values.float().contiguous().view(torch.int32).long()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return int((ordered[0] - ordered[1]).abs().max()) if ours.numel() else 0
