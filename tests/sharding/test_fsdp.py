"""Sharded parameters are stepped as whole ones are: FSDP2, tensor parallelism, both, HSDP.

What one process does with whole parameters and the same gradients is the measure.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bngd_triton.verify.tolerances import LRE, ULP
from support.closeness import ulps
from support.sharded_model import NAMES, SHAPES
from support.sharded_steps import (
    APART,
    CUTTING,
    GRANULARITIES,
    LAYOUTS,
    Group,
    Raised,
    Run,
    Scaled,
    raising,
    runs,
    scaled,
)
from support.sharded_visits import alone, visited

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks run kernels interpreted"),
]

WORLDS = sorted(LAYOUTS)
RUNS = [
    pytest.param(w, run, id=f"{w}: {run.layout}{', fused' * run.fused}")
    for w in WORLDS
    for run in runs(w)
]
PLACES = [(w, layout) for w, layouts in LAYOUTS.items() for layout in layouts]


def joined(ranks: Sequence[Group], i: int) -> Tensor:
    """Parameter i, put together again; replicas must agree to the bit."""
    whole = torch.full((SHAPES[i].numel(),), torch.nan)
    for rank in ranks:
        index, value = rank.indices[i].flatten(), rank.values[i].flatten()
        there = ~whole[index].isnan()
        assert torch.equal(whole[index][there], value[there]), "replicas differ"
        whole[index] = value
    assert not whole.isnan().any(), "nobody has some entry"
    return whole


@pytest.mark.parametrize(("world", "run"), RUNS)
def test_weights_are_those_of_one_process(world: int, run: Run) -> None:
    for name in run.groups:
        ranks = [rank.trained[run.layout, run.fused][name] for rank in visited(world)]
        for i, want in enumerate(alone(run)[name].values):
            assert ulps(joined(ranks, i), want.flatten()) <= ULP, (name, NAMES[i])


@pytest.mark.parametrize(("world", "run"), RUNS)
def test_statistics_are_those_of_the_whole_tensor(world: int, run: Run) -> None:
    for name in run.groups:
        want = alone(run)[name]
        for rank in visited(world):
            got = rank.trained[run.layout, run.fused][name]
            for i, (ours, rows) in enumerate(zip(got.statistics, got.rows)):
                theirs = want.statistics[i][rows]
                # kernels finish rows that nobody has another part of as tiles, in float32
                bound = LRE if run.fused else 12.0
                off = (ours - theirs).abs() > 10**-bound * theirs[:, :2].abs().amax(1, keepdim=True)
                assert not off.any(), (name, NAMES[i])
                assert torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours[:, 2], theirs[:, 2])


def test_slices_were_skipped() -> None:
    skipped = [int(one[:, 2].sum()) for one in alone(Run("fsdp", False))["tensor"].statistics]
    assert dict(zip(NAMES, skipped)) == {
        **dict.fromkeys(NAMES, 0), "up.weight": 1, "down.weight": 1, "norm.bias": 1
    }  # fmt: skip


@pytest.mark.parametrize(("world", "run"), RUNS)
def test_state_lies_as_its_parameter_does(world: int, run: Run) -> None:
    for rank in visited(world):
        for name in run.groups:
            assert rank.trained[run.layout, run.fused][name].placed, name


@pytest.mark.parametrize("world", WORLDS)
def test_local_statistics_would_be_found_out(world: int) -> None:
    want = alone(APART)
    for name in APART.groups:
        ranks = [rank.apart[name] for rank in visited(world)]
        off = max(ulps(joined(ranks, i), whole.flatten())
                  for i, whole in enumerate(want[name].values))  # fmt: skip
        assert off > 1000 * ULP, name


@pytest.mark.parametrize(("world", "layout"), PLACES)
def test_one_collective_per_cutting_mesh_dimension(world: int, layout: str) -> None:
    for rank in visited(world):
        assert rank.commands[layout] == CUTTING[layout]


@functools.cache
def raising_alone(granularity: str) -> Raised:
    return raising("whole", 1, granularity, False)


@pytest.mark.parametrize(("world", "layout"), PLACES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_raises_on_every_rank_and_changes_nothing(
    world: int, layout: str, granularity: str
) -> None:
    for fused in (False, True):
        if (layout, fused, granularity) not in visited(world)[0].raised:
            continue
        for rank in visited(world):
            raised = rank.raised[layout, fused, granularity]
            assert "has an inf or a NaN, here or on another rank" in raised.message
            assert raised.unchanged
        assert_alike([rank.raised[layout, fused, granularity].values for rank in visited(world)],
                     layout, world, raising_alone(granularity).values)  # fmt: skip


@functools.cache
def scaled_alone() -> Scaled:
    return scaled("whole", 1, False)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(world: int, fused: bool) -> None:
    for rank in visited(world):
        assert rank.scaled[fused].unchanged
        assert rank.scaled[fused].scale == 4.0
    assert_alike([rank.scaled[fused].values for rank in visited(world)],
                 "fsdp", world, scaled_alone().values)  # fmt: skip


def assert_alike(
    ranks: Sequence[list[Tensor]], layout: str, world: int, want: list[Tensor]
) -> None:
    """Float32 parameters of a short run, put together, are those of one process."""
    groups = [rank.trained[layout, False]["tensor"] for rank in visited(world)]
    whole = [group._replace(values=values) for group, values in zip(groups, ranks)]
    for i in range(len(SHAPES)):
        assert ulps(joined(whole, i), want[i].flatten()) <= ULP, NAMES[i]


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_round_alike_and_shards_apart(world: int) -> None:
    for key in visited(world)[0].rounded:
        seen: dict[int, Tensor] = {}
        replicas = 0
        for rank in visited(world):
            ordinal, part = rank.rounded[key]
            assert len(part.unique()) > 1
            replicas += ordinal in seen
            assert torch.equal(part, seen.setdefault(ordinal, part))
        parts = list(seen.values())
        assert replicas == (2 if key[0] == "hsdp" else 0)
        assert len(parts) == world - replicas
        for i, part in enumerate(parts):
            assert not any(torch.equal(part, other) for other in parts[:i])


@pytest.mark.parametrize("world", WORLDS)
def test_refuses_global_micro_batches(world: int) -> None:
    for rank in visited(world):
        assert "granularity='global' with accumulation_steps > 1" in rank.refused


@pytest.mark.parametrize("world", WORLDS)
def test_refuses_an_overflow_of_which_some_ranks_are_not_told(world: int) -> None:
    for rank in visited(world):
        words, unchanged = rank.scaled_refused
        assert "param_groups[0]['params'][0] is cut, and param_groups[0]['params'][7]" in words
        assert unchanged
