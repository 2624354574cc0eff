"""Compiled kernels, executed: whatever else than one step of one list of tensors is launched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Execute = Callable[..., list[str]]
slow = pytest.mark.slow


@pytest.mark.parametrize("schedule", ["in order", "random", pytest.param("warps", marks=slow)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_statistics_of_several_ranks(execute: Execute, granularity: str, schedule: str) -> None:
    assert execute("other_launches:sharded", granularity, schedule) == []


@pytest.mark.parametrize("schedule", ["random", pytest.param("warps", marks=slow)])
@pytest.mark.parametrize("form", ["two-launch", "single-launch"])
def test_an_optimizer_of_three_granularities(execute: Execute, form: str, schedule: str) -> None:
    assert execute("other_launches:optimizer", form, schedule) == []


def test_learning_rates_on_a_device(execute: Execute) -> None:
    assert execute("other_launches:rates") == []


@slow
@pytest.mark.parametrize("normalizer", ["zscore", "cdf"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_a_normalised_gradient(execute: Execute, normalizer: str, granularity: str) -> None:
    assert execute("other_launches:normalized", normalizer, granularity) == []


@slow
@pytest.mark.parametrize("schedule", ["in order", "random", "warps"])
def test_standardised_columns(execute: Execute, schedule: str) -> None:
    assert execute("other_launches:standardized", schedule) == []
