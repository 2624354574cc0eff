"""Compiled kernels, executed, do what the eager reference does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.ptx.cases import CASES, CORE

Execute = Callable[..., list[str]]
FORMS = ("two-launch", "single-launch")


def every() -> list[Any]:
    """Each case in each form and schedule; slow unless it is of the core."""
    made = []
    for name in CASES:
        for form in FORMS:
            for schedule in ("in order", "random", "warps"):
                marks = [] if (name, form, schedule) in CORE else [pytest.mark.slow]
                made.append(
                    pytest.param(
                        name, form, schedule, marks=marks, id=f"{name}, {form}, {schedule}"
                    )
                )
    return made


@pytest.mark.parametrize(("name", "form", "schedule"), every())
def test_a_step_is_the_references(execute: Execute, name: str, form: str, schedule: str) -> None:
    assert execute("step", CASES[name], form, schedule) == []
