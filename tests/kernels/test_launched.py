"""Launches past Triton's dispatch are those that Triton's own dispatch makes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("bench", reason="bench/ is in the checkout only")

from support.checkout import ROOT

CHECK = ROOT / "tests" / "support" / "fake_launches.py"


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_launches_agree_with_tritons(backend: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CHECK), backend]
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches agree" in done.stdout


def test_the_interpreters_kernels_are_launched_as_ever() -> None:
    """No handle is made of what is not compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    import torch

    from bngd_triton.kernels import Tuning
    from bngd_triton.kernels.fused_step import FusedStep
    from bngd_triton.options import Options
    from bngd_triton.records import functional_inputs, functional_tensors

    params, grads, options = [torch.zeros(5000)], [torch.randn(5000)], [Options(momentum=0.0)]
    members = functional_tensors(params, grads, None, None, None, options[0])
    step = FusedStep(members, options, Tuning(block=4096, unroll=1))
    inputs = functional_inputs(params, True, None, None, None)
    step.run(members, options, inputs)
    once = params[0].clone()
    step.run(members, options, inputs)
    torch.testing.assert_close(params[0], 2 * once)
    launches = step._devices[0].plan.launches["two-launch"]
    assert [one._compiled for one in launches] == [None, None]
