"""bench/ for the tests of it; a file that imports this is skipped where there is no bench/."""

import os
import sys

import pytest
import torch

from support.checkout import BENCH, ROOT

if (BENCH / "run.py").is_file():
    # at the end: the root also holds the folder `kernels`, which is not to be imported by that name
    sys.path.append(str(ROOT))
pytest.importorskip("bench.workloads", reason="bench/ is in the checkout only")

from bench import arms

CPU = torch.device("cpu")
FP32 = arms.STORAGES["fp32"]
# on a GPU the arms are tried by `python -m bench.run` itself
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled where there is a GPU"
)
