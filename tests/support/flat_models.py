"""Models in flat buffers, and where their parameters lie."""

import itertools

import torch

from bngd_triton import BNGD

# a line of a GPU's L2 cache: what the kernels' wide accesses and neighbours are laid out for
ALIGNMENT = 128


def make_model(device):
    """Odd sizes, so that views need padding; the same values at every call."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)
    ).to(device)


def train(model, optimizer, seeds=(0,)):
    device = next(model.parameters()).device
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def spans(tensors):
    """First byte and end of each tensor."""
    return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]


def assert_in_one_buffer(tensors):
    """In order, aligned, each starting at the first aligned byte after the one before it."""
    found = spans(tensors)
    assert all(start % ALIGNMENT == 0 for start, _ in found)
    for (_, end), (start, _) in itertools.pairwise(found):
        assert start == -(-end // ALIGNMENT) * ALIGNMENT


def assert_own_storages(tensors):
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()


def flat_model(device):
    model = make_model(device)
    optimizer = BNGD(model.parameters(), lr=0.1, fused=True)
    assert_in_one_buffer(list(model.parameters()))
    return model, optimizer
