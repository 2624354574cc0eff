"""When updates may start before the statistics have ended, and what the launches then ask for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bngd_triton.kernels import devices, launch
from bngd_triton.kernels.device import measure, update
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.options import Options
from bngd_triton.records import functional_members, functional_pass

SEGMENT, TILE = 5000, 16


class Recorder:
    """Stands in for a kernel: notes its launches."""

    def __init__(self, name: str, launches: list[tuple[str, Any, Any]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> None:
            early = arguments["PDL"], arguments.get("launch_pdl", False)
            self.launches.append((self.name, *early))

        return run


def launches_of(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch, *, pdl: bool, can: bool
) -> list[tuple[str, Any, Any]]:
    device = torch.device("cpu")
    tuning = dataclasses.replace(devices.tuning_for(device), pdl=pdl)
    # two dtypes are two batches
    dtypes = torch.float32, torch.bfloat16
    params, grads = ([torch.zeros(n, dtype=k) for n, k in zip(sizes, dtypes)] for _ in range(2))
    options = [Options()]
    momenta = [torch.zeros(size) for size in sizes]
    members = functional_members(params, grads, momenta, None, None, options[0])
    step = FusedStep(members, options, tuning)
    launches: list[tuple[str, Any, Any]] = []
    monkeypatch.setattr(launch, "dependent_launches", lambda device: can)
    for module, name in ((measure, "_statistics_kernel"), (update, "_update_kernel")):
        monkeypatch.setattr(module, name, Recorder(name, launches))
    step.run(members, options, functional_pass(params, True, None, None, None))
    return launches


@pytest.mark.parametrize(("pdl", "can"), [(False, True), (True, False)])
def test_off_unless_asked_for_and_possible(
    pdl: bool, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launches_of([SEGMENT, SEGMENT], monkeypatch, pdl=pdl, can=can)
    assert (
        found == [("_statistics_kernel", False, False)] * 2 + [("_update_kernel", False, False)] * 2
    )


def test_updates_start_early_and_statistics_never_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches_of([SEGMENT, TILE], monkeypatch, pdl=True, can=True)
    assert found == [("_statistics_kernel", True, False)] * 2 + [("_update_kernel", True, True)]


def test_tiles_alone_let_nothing_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows them is another's launch, which may read what they still write."""
    found = launches_of([TILE, TILE], monkeypatch, pdl=True, can=True)
    assert found == [("_statistics_kernel", False, False)] * 2
