"""Repeated steps of sharded parameters: recognised, never by mistake, and alike on every rank."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from support import processes, sharded_repeats
from support.sharded_repeats import CHANGED, CHANGES, STEPS, WORLD, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks run kernels interpreted"),
]


@functools.cache
def visited() -> list[tuple[list[tuple[Run, Run]], list[bool], Run]]:
    return processes.run(WORLD, sharded_repeats.on_every_rank)


@pytest.mark.parametrize("index", range(len(CHANGES)), ids=[c.name for c in CHANGES])
def test_a_step_is_laid_out_again_where_it_must_be(index: int) -> None:
    for rank, (runs, _, _) in enumerate(visited()):
        recognised, _ = runs[index]
        noticed = rank in CHANGES[index].ranks
        assert recognised.layouts[: CHANGED + 1] == [1, *[0] * (CHANGED - 1), int(noticed)]
        assert len(recognised.layouts) == STEPS


@pytest.mark.parametrize("index", range(len(CHANGES)), ids=[c.name for c in CHANGES])
def test_the_bits_are_those_of_steps_laid_out_anew(index: int) -> None:
    for runs, _, _ in visited():
        recognised, anew = runs[index]
        assert anew.layouts == [1] * STEPS
        for found, want in zip(recognised.tensors, anew.tensors):
            torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_not_held() -> None:
    for _, gone, _ in visited():
        assert gone
        assert all(gone)


def test_gradients_that_stay() -> None:
    for _, _, run in visited():
        assert run.layouts == [1, *[0] * (STEPS - 1)]
