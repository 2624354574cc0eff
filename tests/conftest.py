"""Kernels run on the GPU where there is one, in Triton's interpreter elsewhere."""

import os

import pytest
import torch

from support import time_limits
from support.paths import StepPath

INTERPRETED = not torch.cuda.is_available()
# Triton reads it when kernels are defined, so it is set before any test imports them
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
# the tests' tolerances are those of float32 products
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    torch.manual_seed(0)
    # `bngd verify --device cpu` sets it: put back after the test
    name = "TRITON_INTERPRET"
    if name in os.environ:
        monkeypatch.setenv(name, os.environ[name])
    else:
        monkeypatch.delenv(name, raising=False)


def pytest_configure():
    # nothing is captured yet
    time_limits.stderr = os.dup(2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # a start of three ranks and what they do takes both cores for 5 to 15 s
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("world", 2) > 2:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def device():
    """Where both paths run; on a GPU for a limited time."""
    if INTERPRETED:
        yield torch.device("cpu")
        return
    with time_limits.limited(time_limits.LIMIT_S):
        yield torch.device("cuda")


@pytest.fixture(params=["eager", "fused"])
def path(request, device):
    """Runs a test once with the eager reference and once with the kernels."""
    return StepPath(request.param == "fused", device)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    from bngd_triton.kernels.launcher import Launch

    names = []
    launch = Launch.__call__

    def noting(self, *args, **more):
        names.append(self._kernel.fn.__name__)
        launch(self, *args, **more)

    monkeypatch.setattr(Launch, "__call__", noting)
    return names


@pytest.fixture
def layouts(monkeypatch):
    """Counts how often a step was laid out or checked in full since the last call."""
    from bngd_triton.engine.step import Stepper

    laid_out = []
    full = Stepper.lay_out_and_step

    def counting(self, *args):
        laid_out.append(self)
        full(self, *args)

    monkeypatch.setattr(Stepper, "lay_out_and_step", counting)

    def since():
        count = len(laid_out)
        laid_out.clear()
        return count

    return since
