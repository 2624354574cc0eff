"""The table of sizes: which row a device gets."""

from types import SimpleNamespace

import pytest
import torch

from bngd_triton.kernels import devices
from bngd_triton.kernels.devices import TABLE, releases_wait, row_for, tuning_for
from support.compiled_cases import TARGETS

GPU = torch.device("cuda", 5)
CACHED = (devices.architecture_of, tuning_for, releases_wait)


@pytest.fixture
def pretend(monkeypatch):
    """Makes `GPU` a device of the given kind."""

    def become(capability=(9, 0), gfx=None, wave=32, l2=60 << 20):
        for cached in CACHED:
            cached.cache_clear()
        properties = SimpleNamespace(gcnArchName=gfx, warp_size=wave, L2_cache_size=l2)
        monkeypatch.setattr(torch.version, "hip", "7.0" if gfx else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield become
    for cached in CACHED:
        cached.cache_clear()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_compiled_ahead_of_time_has_a_row_of_its_own(name):
    # a program has as many threads whatever the lanes of a wave
    assert TABLE[name].tuning.warps * (64 if name.startswith("gfx") else 32) == 128
    assert TABLE[name].reason


@pytest.mark.parametrize(
    ("kind", "wave", "wide"),
    [
        *(
            ({"capability": divmod(version, 10)}, 32, version in (80, 90, 100))
            for version in (80, 86, 87, 89, 90, 100, 103, 120)
        ),
        ({"gfx": "gfx90a:sramecc+:xnack-"}, 64, True),
        ({"gfx": "gfx942:sramecc+"}, 64, True),
        ({"gfx": "gfx950"}, 64, True),
        ({"gfx": "gfx908"}, 64, False),
        ({"gfx": "gfx1100"}, 32, False),
    ],
    ids=str,
)
def test_float64_lanes_are_for_those_that_run_them_at_full_rate(kind, wave, wide, pretend):
    pretend(wave=wave, **kind)
    assert tuning_for(GPU).wide is wide
    assert tuning_for(GPU).warps * wave == 128


@pytest.mark.parametrize(
    ("l2_mib", "wave_mib"), [(126, 8), (60, 8), (50, 8), (40, 4), (8, 1), (6, 1), (4, 0.5)]
)
def test_three_waves_fit_the_l2(pretend, l2_mib, wave_mib):
    """Twice, where an L2 in two halves may hold everything twice."""
    pretend(l2=l2_mib << 20)
    assert tuning_for(GPU).wave == wave_mib * 2**20
    assert 6 * tuning_for(GPU).wave <= l2_mib << 20


def test_others_and_the_interpreter():
    assert tuning_for(torch.device("cpu")) is TABLE["interpreter"].tuning
    assert not tuning_for(torch.device("xpu")).wide
    assert row_for("sm_999") is devices.OTHERS[32]


@pytest.mark.parametrize(
    ("gfx", "version", "waits"),
    [
        (None, "3.7.1", True),
        ("gfx942", "3.6.0+rocm7.1", False),
        ("gfx942", "3.7.1", False),
        ("gfx90a", "3.8.0", False),
        ("gfx942", "3.9.0", True),
        ("gfx942", "3.10.0+git1", True),
        ("gfx942", "4.0.0", True),
    ],
)
def test_on_amd_a_release_waits_from_triton_3_9_on(gfx, version, waits, pretend, monkeypatch):
    pytest.importorskip("triton")
    pretend(gfx=gfx)
    monkeypatch.setattr("triton.__version__", version)
    assert releases_wait(GPU) is waits
    assert releases_wait(torch.device("cpu"))
