"""Statistics of sharded tensors against exact arithmetic on the whole tensor, on 2 to 4 ranks."""

import math
from fractions import Fraction

import pytest
import torch

from bngd_triton.sharding.exchange import Exchange, merge
from support.exact_statistics import exact
from support.sharded_cases import CASES, RUNS, SPOILT, WORLDS, whole
from support.sharded_statistics import visited

# float64 sums of a few hundred entries are off by some units of 2**-53, 1e-16
CLOSE = 1e-12
EVERY = [pytest.param(w, c, id=f"{w}: {c.desc}") for w in WORLDS for c in CASES[w] + SPOILT[w]]


def assert_statistics(found, want):
    """One slice's values for each item of `found`."""
    assert len(found.mean) == len(found.std) == len(found.table) == len(want)
    for mean, std, row, values in zip(found.mean, found.std, found.table, want):
        assert found.n == row[0] == values.numel()
        if not values.isfinite().all():
            assert not (math.isfinite(mean) and math.isfinite(std))
            continue
        want_mean, want_std = exact(values)
        bound = CLOSE * (abs(want_mean) + Fraction(want_std))
        assert abs(Fraction(mean) - want_mean) <= bound
        assert abs(std - want_std) <= CLOSE * want_std
        if values.numel():
            assert row[3] == values.double().min()
            assert row[4] == values.double().max()


@pytest.mark.parametrize(("world", "case"), EVERY)
@pytest.mark.parametrize("run", ["tensor", "dealt out", "row", "rows dealt out"])
def test_statistics_are_those_of_the_whole_tensor(world, case, run):
    full = whole(case)
    by_row = "row" in run and full.dim() >= 2
    for result in visited(world):
        slices = list(full[result.rows[case.desc]]) if by_row else [full]
        assert_statistics(result.found[run, case.desc], slices)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", [run for run in RUNS if run.startswith("global")])
def test_global_statistics_span_meshes_and_plain_tensors(world, run):
    takes = RUNS[run][1]
    for result in visited(world):
        values = [whole(case) for case in CASES[world] + SPOILT[world] if takes(case)]
        union = torch.cat([value.double().flatten() for value in values])
        for (other, _), found in result.found.items():
            if other == run:
                assert_statistics(found, [union])


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_has_the_same_bits(world):
    results = visited(world)
    compared = 0
    for run, desc in results[0].found:
        seen = {}
        for result in results:
            table = result.found[run, desc].table.view(torch.int64)
            by_row = RUNS[run][0] == "row" and desc in result.rows
            rows = result.rows[desc].tolist() if by_row else [0]
            for row, bits in zip(rows, table):
                compared += row in seen
                assert torch.equal(bits, seen.setdefault(row, bits)), (run, desc)
    assert compared > 100


@pytest.mark.parametrize("world", WORLDS)
def test_repeats_bit_for_bit_and_reads_nothing_on_the_host(world):
    for result in visited(world):
        assert result.repeated
        assert result.reads == 0


# mesh dimensions over which slices are cut: those of the mesh of four, of the grid, or of both
CUTTING = {2: 1, 3: 1, 4: 3}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", RUNS)
def test_one_collective_per_mesh_dimension(world, run):
    for result in visited(world):
        names = [collective.name for collective in result.collectives[run]]
        if "dealt" in run:
            assert names == ["all-to-all", "all-gather"] * CUTTING[world]
        else:
            assert names == ["all-gather"] * CUTTING[world]
        # two exchanges, and nothing else behind them
        assert result.commands[run] == 2 * len(names)


@pytest.mark.parametrize(
    ("desc", "words"),
    [
        ("plain gradient", "TypeError: w is a DTensor, its gradient a plain tensor: distribute"),
        ("plain parameter", "TypeError: w is a plain tensor, its gradient a DTensor: distribute"),
        ("shape", "ValueError: the gradient of w has shape (4, 3), the parameter (4, 2)"),
        ("mesh", "ValueError: the gradient of w is on DeviceMesh"),
        ("partial parameter", "NotImplementedError: w is placed by (Partial(sum),)"),
        ("state", "ValueError: this rank's part of the parameter has shape"),
        ("outside", "ValueError: this process has no place in the mesh of w"),
    ],
)
def test_refusals_on_a_mesh(desc, words):
    inside, outside = visited(2)
    assert outside.refusals[desc].startswith(words)
    assert inside.refusals.get(desc, "") == (outside.refusals[desc] if desc != "outside" else "")


def test_nothing_to_exchange():
    assert Exchange([]).run([]) == []


def test_rows_without_entries_are_ignored_whatever_they_hold():
    real = torch.tensor([[[2.0, 5.0, 1.0, 4.5, 5.5]]]).double()
    empty = torch.tensor([[[0.0, torch.nan, torch.inf, torch.nan, -7.0]]]).double()
    for wide in (None, torch.tensor([True])):
        for parts in ([empty, real], [real, empty], [empty, empty, real]):
            assert torch.equal(merge(torch.cat(parts), wide), real[0])


@pytest.mark.parametrize("value", [0.1, 0.7])
def test_equal_parts_merge_without_rounding(value):
    # with these counts sum(n * value) / sum(n) is not value
    filled = [[[n, value, 0.0, value, value]] for n in (5.0, 9.0, 19.0)]
    merged = merge(torch.tensor([[[0.0] * 5], *filled], dtype=torch.float64))
    assert merged.tolist() == [[33.0, value, 0.0, value, value]]
