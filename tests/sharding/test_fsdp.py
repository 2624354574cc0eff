"""Sharded parameters are stepped as whole ones are: FSDP2, tensor parallelism, both, HSDP.

What one process does with whole parameters and the same gradients is the measure.
"""

import functools

import pytest
import torch

from bngd_triton.verify.tolerances import LRE, ULP
from support import sharded_steps
from support.closeness import ulps
from support.processes import needs_gloo
from support.sharded_model import NAMES, SHAPES
from support.sharded_steps import APART, LAYOUTS, alone, runs, visited

pytestmark = [
    needs_gloo,
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks run kernels interpreted"),
]

WORLDS = sorted(LAYOUTS)
RUNS = [
    pytest.param(w, run, id=f"{w}: {run.layout}{', fused' * run.fused}")
    for w in WORLDS
    for run in runs(w)
]
PLACES = [(w, layout) for w, layouts in LAYOUTS.items() for layout in layouts]


def joined(ranks, i):
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
def test_weights_are_those_of_one_process(world, run):
    for name in run.groups:
        ranks = [rank.trained[run.layout, run.fused][name] for rank in visited(world)]
        for i, want in enumerate(alone(run)[name].values):
            assert ulps(joined(ranks, i), want.flatten()) <= ULP, (name, NAMES[i])


@pytest.mark.parametrize(("world", "run"), RUNS)
def test_statistics_are_those_of_the_whole_tensor_and_state_lies_as_it_does(world, run):
    for name in run.groups:
        want = alone(run)[name]
        for rank in visited(world):
            got = rank.trained[run.layout, run.fused][name]
            assert got.placed, f"state of {name} does not lie as its parameter does"
            for i, (ours, rows) in enumerate(zip(got.statistics, got.rows)):
                theirs = want.statistics[i][rows]
                # kernels finish rows that nobody has another part of as tiles, in float32
                bound = LRE if run.fused else 12.0
                off = (ours - theirs).abs() > 10**-bound * theirs[:, :2].abs().amax(1, keepdim=True)
                assert not off.any(), (name, NAMES[i])
                assert torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours[:, 2], theirs[:, 2])


@pytest.mark.parametrize("world", WORLDS)
def test_local_statistics_would_be_found_out(world):
    want = alone(APART)
    for name in APART.groups:
        ranks = [rank.apart[name] for rank in visited(world)]
        off = [ulps(joined(ranks, i), one.flatten()) for i, one in enumerate(want[name].values)]
        assert max(off) > 1000 * ULP, name


@pytest.mark.parametrize(("world", "layout"), PLACES)
def test_one_collective_per_cutting_mesh_dimension(world, layout):
    for rank in visited(world):
        assert rank.commands[layout] == sharded_steps.CUTTING[layout]


@functools.cache
def raising_alone(granularity):
    return sharded_steps.raising("whole", 1, granularity, False).values


@pytest.mark.parametrize(("world", "layout"), PLACES)
@pytest.mark.parametrize("granularity", sharded_steps.GRANULARITIES)
def test_raises_on_every_rank_and_changes_nothing(world, layout, granularity):
    for fused in (False, True):
        if (layout, fused, granularity) not in visited(world)[0].raised:
            continue
        raised = [rank.raised[layout, fused, granularity] for rank in visited(world)]
        for words, unchanged in (one.tried for one in raised):
            assert "has an inf or a NaN, here or on another rank" in words
            assert unchanged
        assert_alike([one.values for one in raised], layout, world, raising_alone(granularity))


@functools.cache
def scaled_alone():
    return sharded_steps.scaled("whole", 1, False).values


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(world, fused):
    ranks = [rank.scaled[fused] for rank in visited(world)]
    assert [rank.tried for rank in ranks] == [("", True)] * world
    assert_alike([rank.values for rank in ranks], "fsdp", world, scaled_alone())


def assert_alike(ranks, layout, world, want):
    """Float32 parameters of a short run, put together, are those of one process."""
    groups = [rank.trained[layout, False]["tensor"] for rank in visited(world)]
    whole = [group._replace(values=values) for group, values in zip(groups, ranks)]
    for i in range(len(SHAPES)):
        assert ulps(joined(whole, i), want[i].flatten()) <= ULP, NAMES[i]


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_round_alike_and_shards_apart(world):
    for key in visited(world)[0].rounded:
        seen = {}
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
def test_what_one_rank_cannot_do_is_refused_on_all(world):
    """Micro-batches of a global group, and an overflow of which some ranks are not told."""
    for rank in visited(world):
        for tried, message in (
            ("global micro-batches", "granularity='global' with accumulation_steps > 1"),
            ("replicated first", "['params'][0] is cut, and param_groups[0]['params'][7]"),
        ):
            words, unchanged = rank.tried[tried]
            assert message in words
            assert unchanged
        assert rank.tried["cut first"] == ("", False)
