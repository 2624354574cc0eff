"""Repeated steps of sharded parameters: recognised, never by mistake, and alike on every rank."""

import functools

import pytest
import torch

from support import processes, sharded_repeats
from support.exact_runs import assert_bits
from support.processes import needs_gloo
from support.sharded_repeats import CHANGED, CHANGES, STEPS, WORLD

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks run kernels interpreted"),
]


@functools.cache
def visited():
    return processes.run(WORLD, sharded_repeats.on_every_rank)


@pytest.mark.parametrize("index", range(len(CHANGES)), ids=[c.name for c in CHANGES])
def test_a_step_is_laid_out_again_where_it_must_be_and_ends_in_the_same_bits(index):
    for rank, (runs, _) in enumerate(visited()):
        (layouts, found), (anew, want) = runs[index]
        noticed = rank in CHANGES[index].ranks
        assert layouts[: CHANGED + 1] == [1, *[0] * (CHANGED - 1), int(noticed)]
        assert anew == [1] * STEPS
        assert_bits(found, want)


def test_gradients_are_not_held():
    for _, gone in visited():
        assert gone
        assert all(gone)
